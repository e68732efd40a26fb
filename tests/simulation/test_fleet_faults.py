"""A fleet of modelled engines to which everything happens that may: no answer is lost, doubled, torn or
waited for in vain.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.simulation.engines import PLACES, VOCABULARY, Faults, Pace, World, problem_of
from tests.tiny import tiny_codec
from verl.rollout.engine import EngineError, ServerSpec
from verl.rollout.group_sampling import sample_group
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Completion, FinishReason, SamplingParams
from verl.utils.virtual_time import run

# VERL_SIMULATOR_SEEDS raises their number, VERL_SIMULATOR_SEED replays one.
SEEDS = max(300, int(os.environ.get("VERL_SIMULATOR_SEEDS", "0")))
CHOSEN = (
    [int(os.environ["VERL_SIMULATOR_SEED"])] if "VERL_SIMULATOR_SEED" in os.environ else list(range(SEEDS))
)
# Far more virtual seconds than any run needs.
LIMIT_S = 20_000.0
CODEC = tiny_codec()


@dataclass
class Run:
    """What a seed makes of a fleet, of what is asked of it, and of what happens meanwhile."""

    seed: int
    most_faults: int
    may_fail: bool = False
    rng: random.Random = field(init=False)
    world: World = field(init=False)
    fleet: InferencePool = field(init=False)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    answered: list[tuple[int, ...]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cancelled: int = 0

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        pace = Pace(
            start_s=rng.choice((1.0, 20.0)),
            step_s=rng.choice((0.005, 0.05)),
            part_tokens=rng.choice((1, 4, 16)),
            load_s=rng.choice((0.05, 2.0)),
            slots=rng.choice((3, 64)),
            end_in=rng.choice((8, 60)),
        )
        names = ("position_seeded", "tells_versions", "ends_apart")
        self.world = World(
            Faults.of(self.seed, most=self.most_faults), pace, **{name: rng.random() < 0.6 for name in names}
        )
        self.fleet = InferencePool(
            self.world.engine,
            CODEC,
            vocabulary=VOCABULARY,
            context=400,
            max_running=rng.choice((2, 8)),
            on_update=rng.choice(("keep", "recompute", "abort")),
            note=self.notes.append,
        )

    async def main(self) -> None:
        """The whole run."""
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.problems.append(f"unhandled: {context}")
        )
        try:
            await self.fleet.open(self.world.specs(self.rng.randint(1, 4)))
        except EngineError:
            assert all("at open" in fault for fault in self.world.faults.happened)
            await self.fleet.close()
            return
        await self.publish(0)
        asked = [asyncio.ensure_future(self.ask(i)) for i in range(25)]
        await asyncio.gather(self.train(), self.disturb(), *asked)
        await self.recover()
        await self.fleet.close()
        assert self.world.num_processes == 0

    async def ask(self, i: int) -> None:
        """One prompt, which may be taken back before it is answered."""
        rng, fleet = random.Random(f"{self.seed} {i}"), self.fleet
        await asyncio.sleep(rng.uniform(0, 20))
        prompt = [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(
            n=rng.randint(1, 4), max_tokens=rng.choice((1, 5, 100)), seed=rng.randrange(2**40)
        )
        oldest = fleet.version
        work = asyncio.ensure_future(sample_group(fleet, prompt, params))
        if rng.random() < 0.2:
            await asyncio.sleep(rng.uniform(0, 5))
            work.cancel()
        try:
            answers = await work
        except asyncio.CancelledError:
            self.cancelled += 1
            return
        except RuntimeError as error:
            self.failed.append(str(error))
            return
        if len(answers) != params.n:
            self.problems.append(f"prompt {i} has {len(answers)} answers of {params.n}")
        for number, answer in enumerate(answers):
            self.look(i, number, answer, prompt, params, oldest)

    def look(
        self, i: int, number: int, answer: Completion, prompt: list[int], params: SamplingParams, oldest: int
    ) -> None:
        """Notes what is wrong with an answer."""
        problem = problem_of(
            answer, prompt, params, number=number, world=self.world, versions=(oldest, self.fleet.version)
        )
        if not problem and self.fleet.on_update == "abort" and len(set(answer.versions or ())) > 1:
            problem = f"versions {answer.versions}, though answers begin anew"
        if problem:
            self.problems.append(f"answer {number} to prompt {i}: {problem}")
        self.answered.append((i, number, *answer.token_ids))

    async def train(self) -> None:
        """New versions, and sometimes sleep before them."""
        for version in range(1, self.rng.randint(2, 6)):
            await asyncio.sleep(self.rng.uniform(0, 8))
            if self.rng.random() < 0.2:
                await self.fleet.sleep()
            await self.publish(version)

    async def disturb(self) -> None:
        """Engines that come and leave, but for the last one."""
        rng, fleet = random.Random(f"{self.seed} disturb"), self.fleet
        for i in range(rng.randint(0, 4)):
            await asyncio.sleep(rng.uniform(0, 10))
            staying = [
                replica.name
                for replica in fleet.replicas
                if replica.state != "gone" and not replica.is_draining
            ]
            if rng.random() < 0.5:
                await fleet.add(ServerSpec(f"added-{i}", "unused", timeout_s=10.0, start_timeout_s=60.0))
            elif len(staying) > 1:
                await fleet.remove(rng.choice(staying))

    async def publish(self, version: int) -> None:
        """A version to all engines."""
        await self.fleet.begin_update(version)
        await asyncio.sleep(self.rng.choice((0.0, 1.0)))
        await self.fleet.sync_weights(self.world.write(version))
        if self.fleet.on_update != "keep" or not any(replica.is_draining for replica in self.fleet.replicas):
            self.world.oldest = version

    async def recover(self) -> None:
        """When nothing is asked any more and no fault happens, all engines come back."""
        fleet = self.fleet
        self.world.faults.left = 0
        while any(replica.state not in ("serving", "gone") for replica in fleet.replicas):
            await asyncio.sleep(10)
        await asyncio.sleep(100)  # what left as it started may take so long to end
        serving = [replica for replica in fleet.replicas if replica.state == "serving"]
        assert [replica.version for replica in serving] == [fleet.version] * len(serving)
        assert fleet.num_running == 0 and fleet.num_free == sum(replica.num_free for replica in serving)
        assert all(replica.num_free for replica in serving) and not fleet._router.has_waiters
        assert self.world.num_processes == len(serving)


def done(seed: int, most_faults: int, *, may_fail: bool = False) -> Run:
    """A run to its end."""
    made = Run(seed, most_faults, may_fail)
    run(made.main(), limit_s=LIMIT_S)
    return made


def wrong_with(made: Run) -> str:
    """What was; nothing: ""."""
    found = [
        *made.problems,
        *made.world.breaches,
        *(note for note in made.notes if "task of the inference pool failed" in note),
    ]
    return "; ".join(found if made.may_fail else [*found, *made.failed])


def all_runs(seeds: Sequence[int], most_faults: int, *, may_fail: bool = False) -> list[Run]:
    """The runs of seeds, none with a problem; a run that would wait forever is ended with an error."""
    runs, wrong = [], {}
    for seed in seeds:
        try:
            made = done(seed, most_faults, may_fail=may_fail)
        except (RuntimeError, AssertionError) as error:
            wrong[seed] = f"{type(error).__name__}: {error}"
            continue
        runs.append(made)
        if problem := wrong_with(made):
            wrong[seed] = (
                f"{problem} ({made.fleet.on_update}, {dict(made.world.faults.happened)}, {made.notes})"
            )
    assert not wrong, "\n".join(
        f"VERL_SIMULATOR_SEED={seed}: {problem}" for seed, problem in list(wrong.items())[:5]
    )
    return runs


def test_whatever_happens_every_answer_is_whole_and_right():
    # Fewer faults than an engine may have without an answer before it is given up.
    runs = all_runs(CHOSEN, most_faults=5)
    if len(CHOSEN) < 300:
        return
    happened, metrics = Counter[str](), Counter[str]()
    for made in runs:
        happened.update(made.world.faults.happened)
        metrics.update(made.fleet.take_metrics())
    # Else the seeds show less than they seem to.
    assert {
        kind for kind in PLACES if not any(fault.startswith(f"{kind} at ") for fault in happened)
    } == set()
    assert {
        place
        for place in {place for places in PLACES.values() for place in places}
        if not any(fault.endswith(f" at {place}") for fault in happened)
    } == set()
    names = (
        "moved_answers",
        "kept_tokens",
        "thrown_tokens",
        "recomputed_tokens",
        "repaired_updates",
        "failures",
    )
    assert [name for name in names if not metrics[f"engines/{name}"]] == []
    assert sum(made.cancelled for made in runs) > 0 and sum(len(made.answered) for made in runs) > 10_000


def test_where_too_much_happens_answers_are_right_or_say_why_there_are_none():
    runs = all_runs(CHOSEN[:50], most_faults=100, may_fail=True)
    for made in runs:
        states = {replica.state for replica in made.fleet.replicas}
        for told in made.failed:
            assert "failed on 9 engines in turn" in told or (
                "no engine serves version" in told and states == {"gone"}
            ), told
    assert len(CHOSEN) < 50 or any(made.failed for made in runs)


def test_a_seed_says_all_that_happens():
    for first, again in zip(*(all_runs(CHOSEN[:10], most_faults=5) for _ in range(2)), strict=True):
        assert first.answered == again.answered and first.notes == again.notes
        assert first.world.faults.happened == again.world.faults.happened


def test_the_checker_sees_what_is_lost_doubled_swapped_or_of_another_version():
    world, prompt, params = (
        World(Faults.none(), Pace(end_in=10**9)),
        [20, 30],
        SamplingParams(max_tokens=6, seed=3),
    )

    async def main() -> Completion:
        fleet = InferencePool(world.engine, CODEC, vocabulary=VOCABULARY, context=400)
        await fleet.open(world.specs(1))
        await fleet.begin_update(4)
        await fleet.sync_weights(world.write(4))
        (answer,) = await sample_group(fleet, prompt, params)
        await fleet.close()
        return answer

    answer = run(main())
    ids, logprobs = list(answer.token_ids), list(answer.logprobs or ())

    def problem(
        order: Sequence[int],
        versions: Sequence[int] = (4,) * 6,
        reason: FinishReason = "length",
        number: int = 0,
    ) -> str:
        changed = Completion(
            [ids[i] for i in order],
            [logprobs[i] for i in order],
            reason,
            versions[0],
            None,
            versions[: len(order)],
        )
        return problem_of(changed, prompt, params, number=number, world=world, versions=(3, 4))

    assert problem(range(6)) == ""
    assert (
        "token 1 is" in problem([0, 2, 3, 4, 5])
        and "token 2 is" in problem([0, 1, 1, 2, 3, 4])
        and "token 3 is" in problem([0, 1, 2, 4, 3, 5])
    )
    assert "no end yet" in problem(range(5)) and "ended by stop" in problem(range(6), reason="stop")
    assert "not what version 3 samples" in problem(range(6), [3] * 6) and "allowed are (3, 4)" in problem(
        range(6), [5] * 6
    )
    assert "versions [4, 3" in problem(range(6), [4, 3, 4, 4, 4, 4]) and "token 0 is" in problem(
        range(6), number=1
    )
