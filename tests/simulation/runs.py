"""Whole runs on virtual time: the pipeline, ledger and fleet that train a model, with modelled engines,
rewards and training.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.simulation.engines import END, VOCABULARY, Faults, Pace, World, problem_of
from tests.tiny import tiny_codec
from verl.agents.group_source import GroupSource
from verl.agents.group_state import saved_groups
from verl.agents.groups import Group
from verl.agents.pipeline import Pipeline, TrainBatch, staleness_metrics
from verl.config.pipeline import PipelineConfig
from verl.data.batch import Batch, Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker, stall_reason
from verl.rollout.engine import EngineError
from verl.rollout.group_sampling import sample_group
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Completion, Prompt, SamplingParams
from verl.utils.virtual_time import run

CODEC = tiny_codec()
# Far more virtual seconds than any run needs.
LIMIT_S = 100_000.0
_BAD_DATA = -1


@dataclass
class Answers:
    """Stands for the sampler of a trainer: prompts are numbers, and a reward is what the answer's tokens
    give.

    Attributes:
        fleet: the engines.
        world: of the engines.
        rng: of what goes wrong with rewards.
        samples: answers of a group.
        max_tokens: of an answer.
        failing: share of the rewards that fail once, that fail always, and that take long.
    """

    fleet: InferencePool
    world: World
    rng: random.Random
    samples: int
    max_tokens: int
    failing: tuple[float, float, float]
    reward_names: str = "modelled rewards"
    bound: Callable[[], tuple[int, int]] = lambda: (0, 0)
    problems: list[str] = field(default_factory=list)

    def params(self, samples: int, *, number: int, attempt: int = 0) -> SamplingParams:
        return SamplingParams(n=samples, max_tokens=self.max_tokens, seed=(attempt << 26) + number)

    def greedy_params(self, params: SamplingParams) -> None:
        return None

    async def sample(self, prompt: Prompt, params: SamplingParams) -> list[Trajectory]:
        fleet, oldest = self.fleet, self.fleet.version
        ids = [10 + prompt.index % 900, 11]
        # A prompt that is longer than the context of the policy is refused by every engine.
        asked = [*ids, *[12] * 400] if prompt.answer == _BAD_DATA else ids
        answers = await sample_group(fleet, asked, params)
        for i, answer in enumerate(answers):
            problem = problem_of(
                answer, ids, params, number=i, world=self.world, versions=(oldest, fleet.version)
            )
            if problem:
                self.problems.append(f"answer {i} to prompt {prompt.index}: {problem}")
        return [self._trajectory(prompt, ids, answer) for answer in answers]

    def _trajectory(self, prompt: Prompt, ids: list[int], answer: Completion) -> Trajectory:
        length = len(answer.token_ids)
        return Trajectory(
            prompt, ids, answer.token_ids, [True] * length, answer.logprobs, list(answer.versions or ()), 0
        )

    async def reward(self, answers: Sequence[Trajectory]) -> None:
        once, always, long = self.failing
        await asyncio.sleep(self.rng.choice((0.0, 0.1)) if self.rng.random() >= long else 30.0)
        for t in answers:
            own = random.Random(f"{t.prompt.index} {t.response_ids[:3]}").random()
            if t.outcome == "ok" and t.reward is None and (own < always or self.rng.random() < once):
                t.outcome, t.detail = self.rng.choice(("reward_error", "reward_timeout")), "modelled"
            elif t.outcome == "ok":
                t.reward = float(t.response_ids[0] % 2)

    def finish(self, answers: Sequence[Trajectory], baseline: Trajectory | None) -> None:
        return

    def has_no_signal(self, answers: Sequence[Trajectory]) -> bool:
        return len({t.reward for t in answers if t.outcome == "ok"}) < 2

    def check_failed(self, answers: Sequence[Trajectory]) -> None:
        return


class ModelledRewards(GroupSource):
    """The real source; rewards take virtual time."""

    async def _reward(self, group: Group) -> None:
        await self._sampler.reward(group.all_trajectories)


@dataclass(frozen=True)
class Case:
    """What a seed makes of a run's settings."""

    config: PipelineConfig
    on_update: str
    num_engines: int
    prompts_per_step: int
    samples: int
    max_tokens: int
    max_running: int
    max_resamples: int
    steps: int
    stops_after: int
    train_s: float
    streamed: bool
    bad_data: float
    failing: tuple[float, float, float]
    wait_s: float
    pace: Pace

    @classmethod
    def of(cls, rng: random.Random) -> Case:
        """Small, and different in everything."""
        batches = rng.choice(("arrival", "arrival", "streamed", "deterministic"))
        config = PipelineConfig(
            max_staleness=rng.choice((0, 1, 1, 2, 4)),
            oversample=rng.choice((0, 0, 1, 2)) if batches != "deterministic" else 0,
            batches=batches,
            survivors={"name": rng.choice(("drop", "refill")), "least": rng.choice((1, 1, 2))},
            retries={"infrastructure": rng.choice((0, 3)), "reward": rng.choice((0, 1))},
            max_failures_in_a_row=rng.choice((8, 16)),
        )
        steps = rng.randint(2, 4)
        return cls(
            config=config,
            on_update=rng.choice(("keep", "recompute", "abort")),
            num_engines=rng.randint(1, 3),
            prompts_per_step=rng.randint(1, 3),
            samples=rng.randint(2, 3),
            max_tokens=rng.choice((1, 12, 40)),
            max_running=rng.choice((2, 8)),
            max_resamples=rng.choice((0, 0, 1, 3)),
            steps=steps,
            stops_after=rng.randint(1, steps) if rng.random() < 0.4 else 0,
            train_s=rng.choice((0.0, 1.0, 10.0)),
            streamed=batches == "streamed",
            bad_data=rng.choice((0.0, 0.0, 0.1, 0.5)),
            failing=(rng.choice((0.0, 0.2)), rng.choice((0.0, 0.1, 0.5)), rng.choice((0.0, 0.1))),
            wait_s=rng.choice((15.0, 600.0)),
            pace=Pace(
                start_s=rng.choice((1.0, 20.0)),
                step_s=rng.choice((0.005, 0.05, 0.5)),
                part_tokens=rng.choice((4, 16)),
                load_s=rng.choice((0.05, 2.0)),
                slots=rng.choice((3, 64)),
                end_in=rng.choice((8, 60)),
            ),
        )


class Run:
    """A seed's run, with one restart from a checkpoint if it has one.

    Attributes:
        problems: what must not be; none, if all is well.
        ended: why the run ended before its last step, as it may; nothing: it did not.
        batches: numbers of the groups of each step.
        fates: of groups, counted.
    """

    def __init__(self, seed: int, *, most_faults: int = 5) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.case = Case.of(self.rng)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.ended = ""
        self.batches: list[list[int]] = []
        self.fates: Counter[str] = Counter()
        self.world = World(
            Faults.of(seed, most=most_faults), self.case.pace, position_seeded=self.rng.random() < 0.7
        )
        self.drawn = 0

    async def main(self) -> None:
        """The run, and the one that goes on from its checkpoint."""
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.problems.append(f"unhandled: {context}")
        )
        state = await self.process(None, 0, self.case.stops_after or self.case.steps)
        if self.case.stops_after and state is not None:
            self.world.oldest = self.case.stops_after
            await self.process(state, self.case.stops_after, self.case.steps)

    async def process(self, state: dict[str, Any] | None, version: int, steps: int) -> dict[str, Any] | None:
        """One process of the run, from a checkpoint if there is one; the next checkpoint."""
        case, loop = self.case, asyncio.get_running_loop()
        fleet = InferencePool(
            self.world.engine,
            CODEC,
            vocabulary=VOCABULARY,
            context=300,
            max_running=case.max_running,
            wait_s=case.wait_s,
            on_update=case.on_update,  # type: ignore[arg-type]
            note=self.notes.append,
        )
        waits, ledger = WaitTracker(clock=loop.time), Ledger()
        answers = Answers(
            fleet, self.world, self.rng, case.samples, case.max_tokens, case.failing, problems=self.problems
        )
        source = ModelledRewards(answers, case.samples, in_turn=False, waits=waits)  # type: ignore[arg-type]
        pipeline = Pipeline(
            self.draw,
            source,
            ledger,
            case.config,
            prompts_per_step=case.prompts_per_step,
            waits=waits,
            max_resamples=case.max_resamples,
        )
        watch = asyncio.ensure_future(self.watch(waits))
        try:
            if state is not None:
                pipeline.load_state(state, version, {i: self.prompt(i) for i in range(self.drawn)})
            await fleet.open(self.world.specs(case.num_engines))
            await self.publish(fleet, version)
            for step in range(version + 1, steps + 1):
                await self.step(pipeline, fleet, step)
            return self.saved(pipeline)
        except (RuntimeError, EngineError) as error:
            self.ended = f"{type(error).__name__}: {error}"
            return None
        finally:
            watch.cancel()
            self.look_at(ledger)
            pipeline.close()
            await fleet.close()

    async def step(self, pipeline: Pipeline, fleet: InferencePool, step: int) -> None:
        """One step of a trainer that takes its time."""
        batch = await (self.streamed(pipeline) if self.case.streamed else pipeline.next_batch())
        self.look(batch, pipeline, step)
        await asyncio.sleep(self.case.train_s)
        await pipeline.drain_in_flight()
        await self.publish(fleet, step)
        if fleet.num_running > (known := self.case.samples * len(pipeline._in_flight)):
            self.problems.append(
                f"{fleet.num_running} answers in engines after step {step}, of groups in work at most {known}"
            )
        pipeline.advance(step)

    async def streamed(self, pipeline: Pipeline) -> TrainBatch:
        """A batch that is learned from as it comes."""
        numbers = []
        async for portion in pipeline.stream_groups():
            numbers += [group.number for group in portion]
            await asyncio.sleep(0.1 * self.case.train_s)
        batch = pipeline.finish_batch()
        if sorted(numbers) != [group.number for group in batch.groups]:
            self.problems.append(
                f"portions of {numbers}, a batch of {[group.number for group in batch.groups]}"
            )
        return batch

    async def publish(self, fleet: InferencePool, version: int) -> None:
        """A version to all engines."""
        await fleet.begin_update(version)
        await asyncio.sleep(self.rng.choice((0.0, 1.0)))
        await fleet.sync_weights(self.world.write(version))
        self.world.oldest = version

    async def watch(self, waits: WaitTracker) -> None:
        """Note stalls, as a run's watchdog: no wait may last longer than engines and rewards can take."""
        while True:
            await asyncio.sleep(50.0)
            if told := stall_reason(waits.snapshot(), 5000.0):
                self.problems.append(told)

    def look(self, batch: TrainBatch, pipeline: Pipeline, step: int) -> None:
        """Notes what is wrong with a batch."""
        case, numbers = self.case, [group.number for group in batch.groups]
        self.batches.append(numbers)
        if len(numbers) != case.prompts_per_step or len(set(numbers)) != len(numbers):
            self.problems.append(f"a batch of {numbers} in step {step}")
        if again := set(numbers) & {number for earlier in self.batches[:-1] for number in earlier}:
            self.problems.append(f"groups {again} a second time in step {step}")
        trajectories = [t for group in batch.groups for t in group.answers]
        ages = [step - 1 - version for t in trajectories for version in t.versions]
        if max(ages, default=0) > case.config.max_staleness or min(ages, default=0) < 0:
            self.problems.append(
                f"tokens {max(ages)} steps old in step {step}, the bound is {case.config.max_staleness}"
            )
        told = staleness_metrics(Batch.from_trajectories(trajectories), pipeline.version)
        if told and not (
            told["staleness/max"] == max(ages) and abs(told["staleness/mean"] - sum(ages) / len(ages)) < 1e-9
        ):
            self.problems.append(f"staleness {told}, counted {max(ages)}")
        for group in batch.groups:
            params = SamplingParams(
                n=case.samples, max_tokens=case.max_tokens, seed=(group.attempt << 26) + group.number
            )
            self.problems += [
                told for i, t in enumerate(group.answers) if (told := self.wrong_with(t, params, i, step))
            ]
            if len(group.answers) != case.samples or {t.prompt.index for t in group.answers} != {
                group.prompt.index
            }:
                self.problems.append(
                    f"group {group.number} has answers to {[t.prompt.index for t in group.answers]}"
                )
            if (
                case.config.batches == "deterministic"
                and len({v for t in group.answers for v in t.versions}) > 1
            ):
                self.problems.append(
                    f"group {group.number} is of several versions, though each was to be of one"
                )

    def wrong_with(self, answer: Trajectory, params: SamplingParams, number: int, step: int) -> str:
        """What is wrong with an answer that is learned from: it must be of the last try of its group."""
        reason = "stop" if answer.response_ids[-1] == END else "length"
        # A checkpoint keeps fp32; the modelled ones have three digits.
        logprobs = [round(value, 3) for value in answer.rollout_logprobs or ()]
        completion = Completion(
            answer.response_ids, logprobs, reason, answer.versions[0], versions=answer.versions
        )
        return problem_of(
            completion, answer.prompt_ids, params, number=number, world=self.world, versions=(0, step)
        )

    def look_at(self, ledger: Ledger) -> None:
        """Notes what is wrong with the ledger at the end of a process."""
        counts = ledger.counts()
        self.fates.update(
            {
                "trained": counts.trained,
                "sent again": counts.again,
                **{f"dropped {reason}": count for reason, count in counts.dropped.items()},
                **{f"failed {failure}": count for failure, count in counts.failed.items()},
                **{f"retried {failure}": count for failure, count in counts.retries.items()},
            }
        )
        if counts.accounted != counts.dispatched:
            self.problems.append(f"the ledger does not add up: {counts}")
        if counts.dispatched != self.drawn:
            self.problems.append(f"{self.drawn} prompts were drawn, the ledger has {counts.dispatched}")
        allowed = {"dead", "too_few", *(("straggler", "surplus") if self.case.config.oversample else ())}
        if unknown := set(counts.dropped) - allowed:
            self.problems.append(f"dropped for {unknown}: {counts.dropped}")

    def saved(self, pipeline: Pipeline) -> dict[str, Any]:
        """A checkpoint, as it comes back from the disk."""
        file = io.BytesIO()
        ledger, groups = pipeline.snapshot()
        torch.save({"ledger": ledger, "groups": saved_groups(groups)}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts; some that no engine can answer."""
        self.drawn += count
        return [self.prompt(i) for i in range(self.drawn - count, self.drawn)]

    def prompt(self, index: int) -> Prompt:
        is_bad = random.Random(f"{self.seed} {index}").random() < self.case.bad_data
        return Prompt("p", answer=_BAD_DATA if is_bad else None, index=index)

    def digest(self) -> str:
        """Of all that happened, to compare two runs of a seed."""
        told = (self.batches, self.ended, self.notes, sorted(self.world.faults.happened.items()), self.drawn)
        return hashlib.sha256(repr(told).encode()).hexdigest()


def done(seed: int, *, most_faults: int = 5) -> Run:
    """A run to its end."""
    made = Run(seed, most_faults=most_faults)
    run(made.main(), limit_s=LIMIT_S)
    return made


def check(made: Run) -> None:
    """Nothing was wrong; a run that ended early says why."""
    told = (made.seed, made.case, dict(made.world.faults.happened), made.notes, made.ended)
    assert made.problems == [], told
    assert made.world.breaches == [], told
    assert not any("task of the inference pool failed" in note for note in made.notes), told
    if made.ended:
        known = (
            "groups failed one after the other",
            "no engine serves",
            "at open",
            "ended while it started",
            "said nothing",
        )
        assert any(cause in made.ended for cause in known), told
    else:
        assert len(made.batches) == made.case.steps, told


def summary(runs: Sequence[Run]) -> str:
    """What the runs went through, for people."""
    faults: Counter[str] = Counter()
    for made in runs:
        faults.update(made.world.faults.happened)
    kinds = Counter(kind.partition(" ")[0] for kind, count in faults.items() for _ in range(count))
    fates = sum((made.fates for made in runs), Counter())
    ended = Counter(made.ended.partition(":")[2].strip()[:40] for made in runs if made.ended)
    happened = f"{sum(faults.values())} faults at {len(faults)} places ({dict(kinds.most_common())})"
    return f"{len(runs)} runs, {happened}; groups: {dict(fates)}; ended early: {dict(ended)}"
