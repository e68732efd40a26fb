"""Runs on virtual time: the real pipeline, ledger and pool, with modelled engines, rewards and training."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.simulation.engines import Pace, World
from tests.simulation.episodes import Checked, ModelledEnvironment, episode_problem
from tests.simulation.faults import Faults
from tests.simulation.modelled_policy import END, VOCABULARY
from tests.tiny import tiny_codec
from verl.agents.group_source import GroupSource
from verl.agents.group_state import saved_groups
from verl.agents.groups import Group
from verl.agents.pipeline import Pipeline, TrainBatch, staleness_metrics
from verl.config.pipeline import PipelineConfig
from verl.data.batch import Batch
from verl.data.trajectory import Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker, stall_reason
from verl.rollout.group_sampling import sample_group
from verl.rollout.inference_server import EngineError
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Completion, Prompt, SamplingParams
from verl.utils.virtual_time import run

CODEC = tiny_codec()
# Far more virtual seconds than any run needs.
LIMIT_S = 100_000.0
_BAD_DATA = -1


@dataclass
class Answers:
    """Sampler and rewards of a modelled trainer: prompts are numbers, rewards depend on the sampled tokens.

    Attributes:
        pool: the engines.
        world: of the engines.
        rng: for failures of rewards.
        samples: answers of a group.
        max_tokens: of an answer.
        failing: probability that a reward fails once, that it always fails, and that it takes long.
    """

    pool: InferencePool
    world: World
    rng: random.Random
    samples: int
    max_tokens: int
    failing: tuple[float, float, float]
    reward_names: str = "modelled rewards"
    has_episodes: bool = False
    bound: Callable[[], tuple[int, int]] = lambda: (0, 0)
    problems: list[str] = field(default_factory=list)
    environment: ModelledEnvironment | None = None

    def params(self, samples: int, *, number: int, attempt: int = 0) -> SamplingParams:
        return SamplingParams(n=samples, max_tokens=self.max_tokens, seed=(attempt << 26) + number)

    def row_params(self, prompt: Prompt, params: SamplingParams, *, trains: bool) -> SamplingParams:
        return params

    def greedy_params(self, params: SamplingParams) -> None:
        return None

    async def sample(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        attempt: int = 0,
        only: Sequence[int] | None = None,
        start_seed: int | None = None,
    ) -> list[Trajectory]:
        if self.environment is not None and prompt.answer != _BAD_DATA:
            self.environment.prompts[prompt.index] = [10 + prompt.index % 900, 11]
            runner = self.environment.runner(Checked(self.pool, self.world, self.problems))
            return await runner.run_group(prompt, params, attempt=attempt, only=only, start_seed=start_seed)
        pool, oldest = self.pool, self.pool.version
        ids = [10 + prompt.index % 900, 11]
        # A prompt that is longer than the context of the policy is refused by every engine.
        asked = [*ids, *[12] * 400] if prompt.answer == _BAD_DATA else ids
        answers = await sample_group(pool, asked, params)
        for i, answer in enumerate(answers):
            own = replace(params, sample_index=i)
            problem = self.world.problem_of(answer, ids, own, versions=(oldest, pool.version))
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
    """The real group source; its rewards take virtual time."""

    async def _reward(self, group: Group) -> None:
        await self._sampler.reward(group.all_trajectories)


@dataclass(frozen=True)
class Case:
    """Settings of a run, drawn from its seed."""

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
    turns: int
    death: float
    pace: Pace

    @classmethod
    def of(cls, rng: random.Random) -> Case:
        """Random small settings."""
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
        of_episodes = random.Random(f"{rng.getstate()[1][0]} episodes")
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
            turns=of_episodes.choice((1, 1, 2, 4)),
            death=of_episodes.choice((0.0, 0.05, 0.3)),
            pace=Pace(
                start_s=rng.choice((1.0, 20.0)),
                step_s=rng.choice((0.005, 0.05, 0.5)),
                chunk_tokens=rng.choice((4, 16)),
                load_s=rng.choice((0.05, 2.0)),
                slots=rng.choice((3, 64)),
                mean_tokens=rng.choice((8, 60)),
            ),
        )


class Run:
    """The run of a seed; some runs restart once from a checkpoint.

    Attributes:
        problems: errors that were found.
        ended: why the run ended before its last step; "": it did not.
        batches: numbers of the groups of each step.
    """

    def __init__(self, seed: int, *, max_faults: int = 5) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.case = Case.of(self.rng)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.ended = ""
        self.batches: list[list[int]] = []
        self.world = World(
            Faults.of(seed, limit=max_faults), self.case.pace, position_seeded=self.rng.random() < 0.7
        )
        self.drawn = 0

    async def main(self) -> None:
        """The run, and its continuation from a checkpoint."""
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.problems.append(f"unhandled: {context}")
        )
        state = await self.process(None, 0, self.case.stops_after or self.case.steps)
        if self.case.stops_after and state is not None:
            self.world.oldest = self.case.stops_after
            await self.process(state, self.case.stops_after, self.case.steps)

    async def process(self, state: dict[str, Any] | None, version: int, steps: int) -> dict[str, Any] | None:
        """One process of the run, from a checkpoint or from the start; returns the next checkpoint."""
        case, loop = self.case, asyncio.get_running_loop()
        pool = InferencePool(
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
            pool, self.world, self.rng, case.samples, case.max_tokens, case.failing, problems=self.problems
        )
        if case.turns > 1:
            answers.environment = ModelledEnvironment(self.rng, case.turns, case.death)
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
            await pool.open(self.world.specs(case.num_engines))
            await self.publish(pool, version)
            for step in range(version + 1, steps + 1):
                await self.step(pipeline, pool, step)
            return self.saved(pipeline)
        except (RuntimeError, EngineError) as error:
            self.ended = f"{type(error).__name__}: {error}"
            return None
        finally:
            watch.cancel()
            self.check_ledger(ledger)
            pipeline.close()
            await pool.close()
            if answers.environment is not None and answers.environment.num_open:
                self.problems.append(f"{answers.environment.num_open} episodes were left open")

    async def step(self, pipeline: Pipeline, pool: InferencePool, step: int) -> None:
        """One training step, which takes virtual time."""
        batch = await (self.streamed(pipeline) if self.case.streamed else pipeline.next_batch())
        self.check_batch(batch, pipeline, step)
        await asyncio.sleep(self.case.train_s)
        await pipeline.drain_in_flight()
        await self.publish(pool, step)
        if pool.num_running > (known := self.case.samples * len(pipeline._in_flight)):
            self.problems.append(
                f"{pool.num_running} answers in engines after step {step}, of groups in work at most {known}"
            )
        pipeline.advance(step)

    async def streamed(self, pipeline: Pipeline) -> TrainBatch:
        """A batch whose groups are trained on as they complete."""
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

    async def publish(self, pool: InferencePool, version: int) -> None:
        """Sync a new version to all engines."""
        await pool.begin_update(version)
        await asyncio.sleep(self.rng.choice((0.0, 1.0)))
        await pool.sync_weights(self.world.write(version))
        self.world.oldest = version

    async def watch(self, waits: WaitTracker) -> None:
        """Note stalls, as a run's watchdog: no wait may last longer than engines and rewards can take."""
        while True:
            await asyncio.sleep(50.0)
            if reason := stall_reason(waits.snapshot(), 5000.0):
                self.problems.append(reason)

    def check_batch(self, batch: TrainBatch, pipeline: Pipeline, step: int) -> None:
        """Note the problems of a batch."""
        case, numbers = self.case, [group.number for group in batch.groups]
        self.batches.append(numbers)
        if len(numbers) != case.prompts_per_step or len(set(numbers)) != len(numbers):
            self.problems.append(f"a batch of {numbers} in step {step}")
        if again := set(numbers) & {number for earlier in self.batches[:-1] for number in earlier}:
            self.problems.append(f"groups {again} a second time in step {step}")
        trajectories = [t for group in batch.groups for t in group.answers]
        sampled = [v for t in trajectories for v, own in zip(t.versions, t.response_mask, strict=True) if own]
        ages = [step - 1 - version for version in sampled]
        if max(ages, default=0) > case.config.max_staleness or min(ages, default=0) < 0:
            self.problems.append(
                f"tokens {max(ages)} steps old in step {step}, the bound is {case.config.max_staleness}"
            )
        metrics = staleness_metrics(Batch.from_trajectories(trajectories), pipeline.version)
        if metrics and not (
            metrics["staleness/max"] == max(ages)
            and abs(metrics["staleness/mean"] - sum(ages) / len(ages)) < 1e-9
        ):
            self.problems.append(f"staleness {metrics}, counted {max(ages)}")
        for group in batch.groups:
            params = SamplingParams(
                n=case.samples, max_tokens=case.max_tokens, seed=(group.attempt << 26) + group.number
            )
            for i, t in enumerate(group.answers):
                if case.turns > 1:
                    problem = episode_problem(t, case.turns) if t.outcome == "ok" else ""
                    self.problems += [problem] if problem else []
                    continue
                problem = self.problem_of(t, replace(params, sample_index=i), step)
                self.problems += [problem] if problem else []
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

    def problem_of(self, answer: Trajectory, params: SamplingParams, step: int) -> str:
        """What is wrong with an answer of a batch, or ""; it must be of the last attempt of its group."""
        reason = "stop" if answer.response_ids[-1] == END else "length"
        # A checkpoint keeps fp32; the modelled logprobs have three digits.
        logprobs = [round(value, 3) for value in answer.rollout_logprobs or ()]
        completion = Completion(
            answer.response_ids, logprobs, reason, answer.versions[0], versions=answer.versions
        )
        return self.world.problem_of(completion, answer.prompt_ids, params, versions=(0, step))

    def check_ledger(self, ledger: Ledger) -> None:
        """Note the problems of the ledger at the end of a process."""
        counts = ledger.counts()
        if counts.accounted != counts.dispatched:
            self.problems.append(f"the ledger does not add up: {counts}")
        if counts.dispatched != self.drawn:
            self.problems.append(f"{self.drawn} prompts were drawn, the ledger has {counts.dispatched}")
        allowed = {"dead", "too_few", *(("straggler", "surplus") if self.case.config.oversample else ())}
        if unknown := set(counts.dropped) - allowed:
            self.problems.append(f"dropped for {unknown}: {counts.dropped}")

    def saved(self, pipeline: Pipeline) -> dict[str, Any]:
        """A checkpoint, written and read again."""
        file = io.BytesIO()
        ledger, groups = pipeline.snapshot()
        torch.save({"ledger": ledger, "groups": saved_groups(groups)}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts; some are too long for every engine."""
        self.drawn += count
        return [self.prompt(i) for i in range(self.drawn - count, self.drawn)]

    def prompt(self, index: int) -> Prompt:
        is_bad = random.Random(f"{self.seed} {index}").random() < self.case.bad_data
        return Prompt("p", answer=_BAD_DATA if is_bad else None, index=index)

    def digest(self) -> str:
        """Hash of all events, to compare two runs of a seed."""
        events = (
            self.batches,
            self.ended,
            self.notes,
            sorted(self.world.faults.happened.items()),
            self.drawn,
        )
        return hashlib.sha256(repr(events).encode()).hexdigest()


def simulate(seed: int, *, max_faults: int = 5) -> Run:
    """Run a seed to its end."""
    made = Run(seed, max_faults=max_faults)
    run(made.main(), limit_s=LIMIT_S)
    return made


def check(made: Run) -> None:
    """Assert that a run had no problems; one that ended early has a known reason."""
    details = (made.seed, made.case, dict(made.world.faults.happened), made.notes, made.ended)
    assert made.problems == [], details
    assert made.world.breaches == [], details
    assert not any("task of the inference pool failed" in note for note in made.notes), details
    if made.ended:
        known = (
            "groups failed one after the other",
            "no engine serves",
            "at open",
            "ended while it started",
            "said nothing",
        )
        assert any(cause in made.ended for cause in known), details
    else:
        assert len(made.batches) == made.case.steps, details
