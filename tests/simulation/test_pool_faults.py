"""A pool of modelled engines with random faults: no answer is lost, doubled, damaged or late forever."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.simulation.engines import Pace, World
from tests.simulation.faults import PLACES, Faults
from tests.simulation.modelled_policy import VOCABULARY
from tests.tiny import tiny_codec
from verl.rollout.group_sampling import sample_group
from verl.rollout.inference_server import EngineError, ServerSpec
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
    """A pool with modelled engines, its requests, weight updates and faults, all drawn from a seed."""

    seed: int
    max_faults: int
    may_fail: bool = False
    rng: random.Random = field(init=False)
    world: World = field(init=False)
    pool: InferencePool = field(init=False)
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
            chunk_tokens=rng.choice((1, 4, 16)),
            load_s=rng.choice((0.05, 2.0)),
            slots=rng.choice((3, 64)),
            mean_tokens=rng.choice((8, 60)),
        )
        names = ("position_seeded", "reports_versions", "sends_end_apart")
        self.world = World(
            Faults.of(self.seed, limit=self.max_faults), pace, **{name: rng.random() < 0.6 for name in names}
        )
        self.pool = InferencePool(
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
            await self.pool.open(self.world.specs(self.rng.randint(1, 4)))
        except EngineError:
            assert all("at open" in fault for fault in self.world.faults.happened)
            await self.pool.close()
            return
        await self.publish(0)
        requests = [asyncio.ensure_future(self.request(i)) for i in range(25)]
        await asyncio.gather(self.train(), self.disturb(), *requests)
        await self.recover()
        await self.pool.close()
        assert self.world.num_processes == 0

    async def request(self, i: int) -> None:
        """Sample answers to one prompt; some requests are cancelled."""
        rng, pool = random.Random(f"{self.seed} {i}"), self.pool
        await asyncio.sleep(rng.uniform(0, 20))
        prompt = [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(
            n=rng.randint(1, 4), max_tokens=rng.choice((1, 5, 100)), seed=rng.randrange(2**40)
        )
        oldest = pool.version
        work = asyncio.ensure_future(sample_group(pool, prompt, params))
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
        for index, answer in enumerate(answers):
            self.check_answer(i, answer, prompt, replace(params, sample_index=index), oldest)

    def check_answer(
        self, i: int, answer: Completion, prompt: list[int], params: SamplingParams, oldest: int
    ) -> None:
        """Note the problem of an answer."""
        problem = self.world.problem_of(answer, prompt, params, versions=(oldest, self.pool.version))
        if not problem and self.pool.on_update == "abort" and len(set(answer.versions or ())) > 1:
            problem = f"versions {answer.versions}, though aborted answers start again"
        if problem:
            self.problems.append(f"answer {params.sample_index} to prompt {i}: {problem}")
        self.answered.append((i, params.sample_index, *answer.token_ids))

    async def train(self) -> None:
        """Sync new versions, some after a sleep."""
        for version in range(1, self.rng.randint(2, 6)):
            await asyncio.sleep(self.rng.uniform(0, 8))
            if self.rng.random() < 0.2:
                await self.pool.sleep()
            await self.publish(version)

    async def disturb(self) -> None:
        """Add and remove engines; the last one stays."""
        rng, pool = random.Random(f"{self.seed} disturb"), self.pool
        for i in range(rng.randint(0, 4)):
            await asyncio.sleep(rng.uniform(0, 10))
            staying = [
                replica.name
                for replica in pool.replicas
                if replica.state != "gone" and not replica.is_draining
            ]
            if rng.random() < 0.5:
                await pool.add(ServerSpec(f"added-{i}", "unused", timeout_s=10.0, start_timeout_s=60.0))
            elif len(staying) > 1:
                await pool.remove(rng.choice(staying))

    async def publish(self, version: int) -> None:
        """Sync a new version to all engines."""
        await self.pool.begin_update(version)
        await asyncio.sleep(self.rng.choice((0.0, 1.0)))
        await self.pool.sync_weights(self.world.write(version))
        if self.pool.on_update != "keep" or not any(replica.is_draining for replica in self.pool.replicas):
            self.world.oldest = version

    async def recover(self) -> None:
        """Assert that all engines serve again when there are no requests and no faults."""
        pool = self.pool
        self.world.faults.left = 0
        while any(replica.state not in ("serving", "gone") for replica in pool.replicas):
            await asyncio.sleep(10)
        await asyncio.sleep(100)  # an engine that was removed while it started may take so long to end
        serving = [replica for replica in pool.replicas if replica.state == "serving"]
        assert [replica.version for replica in serving] == [pool.version] * len(serving)
        assert pool.num_running == 0 and pool.num_free == sum(replica.num_free for replica in serving)
        assert all(replica.num_free for replica in serving) and not pool._router.has_waiters
        assert self.world.num_processes == len(serving)


def simulate(seed: int, max_faults: int, *, may_fail: bool = False) -> Run:
    """Run a seed to its end."""
    made = Run(seed, max_faults, may_fail)
    run(made.main(), limit_s=LIMIT_S)
    return made


def problem_of(made: Run) -> str:
    """What was wrong with a run, or ""."""
    found = [
        *made.problems,
        *made.world.breaches,
        *(note for note in made.notes if "task of the inference pool failed" in note),
    ]
    return "; ".join(found if made.may_fail else [*found, *made.failed])


def all_runs(seeds: Sequence[int], max_faults: int, *, may_fail: bool = False) -> list[Run]:
    """The runs of seeds, none with a problem; a run that would wait forever is ended with an error."""
    runs, wrong = [], {}
    for seed in seeds:
        try:
            made = simulate(seed, max_faults, may_fail=may_fail)
        except (RuntimeError, AssertionError) as error:
            wrong[seed] = f"{type(error).__name__}: {error}"
            continue
        runs.append(made)
        if problem := problem_of(made):
            wrong[seed] = (
                f"{problem} ({made.pool.on_update}, {dict(made.world.faults.happened)}, {made.notes})"
            )
    assert not wrong, "\n".join(
        f"VERL_SIMULATOR_SEED={seed}: {problem}" for seed, problem in list(wrong.items())[:5]
    )
    return runs


def test_whatever_happens_every_answer_is_whole_and_right():
    # Fewer faults than an engine may have without an answer before it is given up.
    runs = all_runs(CHOSEN, max_faults=5)
    if len(CHOSEN) < 300:
        return
    happened, metrics = Counter[str](), Counter[str]()
    for made in runs:
        happened.update(made.world.faults.happened)
        metrics.update(made.pool.take_metrics())
    # Otherwise the seeds test less than they seem to.
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
    runs = all_runs(CHOSEN[:50], max_faults=100, may_fail=True)
    for made in runs:
        states = {replica.state for replica in made.pool.replicas}
        for message in made.failed:
            assert "failed on 9 engines in turn" in message or (
                "no engine serves version" in message and states == {"gone"}
            ), message
    assert len(CHOSEN) < 50 or any(made.failed for made in runs)


def test_a_seed_determines_all_events():
    for first, again in zip(*(all_runs(CHOSEN[:10], max_faults=5) for _ in range(2)), strict=True):
        assert first.answered == again.answered and first.notes == again.notes
        assert first.world.faults.happened == again.world.faults.happened


def test_the_checker_sees_what_is_lost_doubled_swapped_or_of_another_version():
    world, prompt, params = (
        World(Faults.none(), Pace(mean_tokens=10**9)),
        [20, 30],
        SamplingParams(max_tokens=6, seed=3),
    )

    async def main() -> Completion:
        pool = InferencePool(world.engine, CODEC, vocabulary=VOCABULARY, context=400)
        await pool.open(world.specs(1))
        await pool.begin_update(4)
        await pool.sync_weights(world.write(4))
        (answer,) = await sample_group(pool, prompt, params)
        await pool.close()
        return answer

    answer = run(main())
    ids, logprobs = list(answer.token_ids), list(answer.logprobs or ())

    def problem(
        order: Sequence[int],
        versions: Sequence[int] = (4,) * 6,
        reason: FinishReason = "length",
        index: int = 0,
    ) -> str:
        changed = Completion(
            [ids[i] for i in order],
            [logprobs[i] for i in order],
            reason,
            versions[0],
            None,
            versions[: len(order)],
        )
        return world.problem_of(changed, prompt, replace(params, sample_index=index), versions=(3, 4))

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
        range(6), index=1
    )
