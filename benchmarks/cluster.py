"""A modelled cluster on virtual time: the real pipeline, inference pool and ledger over modelled devices."""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelled_engines import TOKEN, VOCABULARY, Lengths, Pace, World
from typing_extensions import override

from verl.agents.group_source import GroupSource
from verl.agents.pipeline import Pipeline, TrainBatch
from verl.config.pipeline import PipelineConfig
from verl.data.trajectory import Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.group_sampling import sample_group
from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.inference_pool import InferencePool, OnUpdate
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.virtual_time import run
from verl.weight_sync.types import TensorInfo, WeightChunk

# Hundreds of thousands of requests are open at once, without garbage: frequent collections would take half of
# the time.
_GC_THRESHOLDS = (200_000, 50, 1000)
# Time after which requests that were ended have left their engines.
_LEAVING_S = 1e-3


class _Answers:
    """Replacement of a trainer's collector: rewards take no time, and every group has a learning signal."""

    reward_names = "modelled rewards"
    has_episodes = False

    def __init__(self, world: World, fleet: InferencePool) -> None:
        self._world, self._fleet = world, fleet
        self._prompt = [TOKEN] * world.lengths.blocks(world.lengths.prompt)
        self._longest = world.lengths.blocks(world.lengths.longest)

    def params(self, samples: int, *, number: int, attempt: int = 0) -> SamplingParams:
        return SamplingParams(n=samples, max_tokens=self._longest, seed=number)

    def row_params(self, prompt: Prompt, params: SamplingParams, *, trains: bool) -> SamplingParams:
        return params

    def greedy_params(self, params: SamplingParams) -> None:
        return None

    async def sample(self, prompt: Prompt, params: SamplingParams, **_: Any) -> list[Trajectory]:
        answers = await sample_group(self._fleet, self._prompt, params)
        ids = self._prompt
        return [
            Trajectory(prompt, ids, a.token_ids, [True] * len(a.token_ids), None, list(a.versions or ()), 0)
            for a in answers
        ]

    def reward(self, answers: Sequence[Trajectory]) -> None:
        return

    def finish(self, answers: Sequence[Trajectory], baseline: Trajectory | None) -> None:
        return

    def has_no_signal(self, answers: Sequence[Trajectory]) -> bool:
        return False

    def check_failed(self, answers: Sequence[Trajectory]) -> None:
        return


class _NoText:
    """Replacement of the tokenizer: only its length ends an answer."""

    stop_ids = ()


class _CountingLedger(Ledger):
    """Ledger that also counts the tokens of groups that were trained on, and those that were thrown away."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    @override
    def train(self, number: int, *, step: int) -> None:
        super().train(number, step=step)
        useful = sum(self._world.tokens(number))
        self._world.totals.trained += useful
        self._world.totals.thrown += self._world.forget(number) - useful

    @override
    def drop(self, number: int, reason: str) -> None:
        super().drop(number, reason)
        # Requests of a group in flight end a moment later, and count their tokens then.
        asyncio.get_running_loop().call_later(_LEAVING_S, self._throw, number)

    def _throw(self, number: int) -> None:
        self._world.totals.thrown += self._world.forget(number)


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run.

    Attributes:
        devices: of the cluster; each has one engine, or its share of training.
        generation: devices with engines; None: all devices generate and train by turns.
        prompts_per_step: groups of a batch.
        samples: answers of a group.
        train_s: time to train on a batch of average answers with all devices.
        write_s: from the end of training until engines can load the weights.
        config: of the pipeline.
        on_update: rule for answers in flight when new weights come.
        steps: of the run.
        warmup: first steps, which do not count.
        pace: of each engine.
        lengths: of answers.
    """

    devices: int
    generation: int | None
    prompts_per_step: int
    samples: int = 16
    train_s: float = 30.0
    write_s: float = 1.0
    config: PipelineConfig = field(default_factory=PipelineConfig)
    on_update: OnUpdate = "keep"
    steps: int = 20
    warmup: int = 5
    pace: Pace = field(default_factory=Pace)
    lengths: Lengths = field(default_factory=Lengths)


@dataclass(frozen=True)
class Figures:
    """Figures of a run after the warm-up.

    Attributes:
        updates_per_h: of the policy.
        tokens_per_s: that were trained on.
        training_busy: share of the time in which training runs.
        slots_busy: share of the slots of all engines that decode or prefill an answer, over the time.
        staleness_mean, staleness_max: of the tokens of batches, in steps.
        answer_tokens: mean tokens of an answer that was trained on.
        thrown: thrown away tokens as a share of the sampled ones.
        reread: prefilled tokens for each sampled token.
        dropped: dropped groups for each group that was trained on.
        step_s: of each step.
    """

    updates_per_h: float
    tokens_per_s: float
    training_busy: float
    slots_busy: float
    staleness_mean: float
    staleness_max: int
    answer_tokens: float
    thrown: float
    reread: float
    dropped: float
    step_s: tuple[float, ...]


class Cluster:
    """Run of a plan.

    Attributes:
        world: of its engines.
        ledger: of its groups.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World(plan.pace, plan.lengths, plan.samples, plan.on_update)
        self.ledger = _CountingLedger(self.world)
        self._num_engines = plan.devices if plan.generation is None else plan.generation
        self._ages: list[Counter[int]] = []
        self._drawn = 0

    def figures(self) -> Figures:
        """Run the plan on virtual time."""
        thresholds = gc.get_threshold()
        gc.set_threshold(*_GC_THRESHOLDS)
        try:
            return run(self._main())
        finally:
            gc.set_threshold(*thresholds)

    async def _main(self) -> Figures:
        plan, loop = self.plan, asyncio.get_running_loop()
        sizes = {
            "vocabulary": VOCABULARY,
            "context": plan.lengths.blocks(plan.lengths.prompt) + plan.lengths.blocks(plan.lengths.longest),
        }
        self.fleet = InferencePool(
            self.world.engine,
            _NoText(),  # type: ignore[arg-type]
            **sizes,
            max_running=plan.pace.slots,
            wait_s=math.inf,
            on_update=plan.on_update,
            note=_refuse,
        )
        waits = WaitTracker(clock=loop.time)
        source = GroupSource(_Answers(self.world, self.fleet), plan.samples, in_turn=False, waits=waits)  # type: ignore[arg-type]
        self.pipeline = Pipeline(
            self.draw, source, self.ledger, plan.config, prompts_per_step=plan.prompts_per_step, waits=waits
        )
        await self.fleet.open([ServerSpec(f"e{i}", "modelled") for i in range(self._num_engines)])
        await self._publish(0)
        start_s, before = await self._snapshot()
        ends_s = []
        for step in range(1, plan.steps + 1):
            await self._step(step)
            ends_s.append(loop.time())
            if step == plan.warmup:
                start_s, before = await self._snapshot()
        figures = self._figures(start_s, before, await self._snapshot(), ends_s)
        self.pipeline.close()
        await self.fleet.close()
        return figures

    async def _step(self, step: int) -> None:
        """Run one step, as a trainer does."""
        if self.plan.config.batches == "streamed":
            batch = await self._learned_on_the_way()
        else:
            batch = await self.pipeline.next_batch()
            if self.plan.generation is None:
                await self.fleet.sleep()
            await self._train([group.number for group in batch.groups])
        versions = Counter(
            version for group in batch.groups for answer in group.answers for version in answer.versions
        )
        self._ages.append(Counter({step - 1 - version: count for version, count in versions.items()}))
        await self.pipeline.drain_in_flight()
        await self._publish(step)
        self.pipeline.advance(step)

    async def _learned_on_the_way(self) -> TrainBatch:
        async for portion in self.pipeline.stream_groups():
            await self._train([group.number for group in portion])
        return self.pipeline.finish_batch()

    async def _train(self, groups: Sequence[int]) -> None:
        """Wait for as long as training on these groups takes."""
        plan, tokens = self.plan, sum(sum(self.world.tokens(number)) for number in groups)
        share = 1.0 if plan.generation is None else 1 - plan.generation / plan.devices
        seconds = (
            plan.train_s * tokens / (plan.prompts_per_step * plan.samples * plan.lengths.average) / share
        )
        self.world.totals.training_s += seconds
        await asyncio.sleep(seconds)

    async def _publish(self, version: int) -> None:
        """Publish a version of the weights, as `ThreadedInferencePool` does."""
        await self._deliver()
        await self.fleet.begin_update(version)
        await asyncio.sleep(self.plan.write_s)
        await self._deliver()
        chunk = WeightChunk((TensorInfo("w", (1,), "float32"),), "shm")
        await self.fleet.sync_weights(
            WeightSnapshot(version, (chunk,), None, f"print-{version}", 4, 0.0, Path("modelled"))
        )

    async def _deliver(self) -> None:
        if self.plan.on_update != "keep":
            await self.world.deliver()

    async def _snapshot(self) -> tuple[float, dict[str, float]]:
        """Present time, and the totals until now."""
        self.world.advance()
        counts = self.ledger.counts()
        groups = {"groups": float(counts.trained), "dropped": float(sum(counts.dropped.values()))}
        return asyncio.get_running_loop().time(), {**vars(self.world.totals), **groups}

    def _figures(
        self,
        start_s: float,
        before: dict[str, float],
        now: tuple[float, dict[str, float]],
        ends_s: Sequence[float],
    ) -> Figures:
        plan, passed_s = self.plan, now[0] - start_s
        done = {name: value - before[name] for name, value in now[1].items()}
        num_steps = plan.steps - plan.warmup
        ages = sum(self._ages[plan.warmup :], Counter())
        return Figures(
            updates_per_h=3600 * num_steps / passed_s,
            tokens_per_s=done["trained"] / passed_s,
            training_busy=done["training_s"] / passed_s,
            slots_busy=done["slot_s"] / (passed_s * self._num_engines * plan.pace.slots),
            staleness_mean=sum(age * count for age, count in ages.items()) / ages.total(),
            staleness_max=max(ages),
            answer_tokens=done["trained"] / (done["groups"] * plan.samples),
            thrown=done["thrown"] / done["decoded"],
            reread=done["prefilled"] / done["decoded"],
            dropped=done["dropped"] / done["groups"],
            step_s=tuple(end - start for start, end in zip([0.0, *ends_s], ends_s, strict=False)),
        )

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts."""
        self._drawn += count
        return [Prompt("p", index=index) for index in range(self._drawn - count, self._drawn)]


def _refuse(note: str) -> None:
    """Stop on any event that the pool reports: nothing goes wrong with modelled engines."""
    raise RuntimeError(f"the modelled cluster went wrong: {note}")
