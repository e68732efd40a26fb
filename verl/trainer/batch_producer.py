"""The pipeline of a trainer: its engines' event loop, or one of its own in turn with training, asked from the
trainer's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from verl.agents.collector import DataCollector, RolloutBatch
from verl.agents.group_source import FromFleet, Group, InTurn, outside_loops
from verl.agents.group_state import saved_groups
from verl.agents.pipeline import Pipeline, TrainBatch, staleness_metrics
from verl.config.run import TrainerConfig
from verl.data.batch import Batch
from verl.data.dataset import PromptLoader
from verl.monitoring.ledger import LEDGER_FILE, Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.trainer.streamed_step import StreamedStep

T = TypeVar("T")
# Stages whose waits are metrics: training waits for a batch, generation for room.
_TOLD = ("training", "admission")


class BatchProducer:
    """Collects batches ahead of the step, as the settings of `pipeline` say.

    Args:
        collector: answers and rewards.
        loader: of the prompts.
        config: of the run.
        pool: engines beside training; None: the policy's own processes answer, in turn with training.
        waits: takes what is waited for.
        folder: of the run, which gets the ledger; None: it is kept in memory alone.
        note: is told what happened, for people.
    """

    def __init__(
        self,
        collector: DataCollector,
        loader: PromptLoader,
        config: TrainerConfig,
        *,
        pool: ThreadedInferencePool | None,
        waits: WaitTracker,
        folder: Path | None,
        note: Callable[[str], None],
    ) -> None:
        self._collector, self._loader, self._pool, self._waits = collector, loader, pool, waits
        samples, algorithm = config.samples_per_prompt, config.algorithm
        self.pipeline = Pipeline(
            loader.take,
            FromFleet(collector, samples, pool.fleet, waits) if pool else InTurn(collector, samples, waits),
            Ledger(folder / LEDGER_FILE if folder else None),
            config.pipeline,
            prompts_per_step=config.prompts_per_step,
            waits=waits,
            replace_dead=algorithm.max_resamples if algorithm.dynamic_sampling else 0,
            note=note,
        )
        self._loop = asyncio.new_event_loop()
        self._counted: Counter[str] = Counter()

    def take(self, streamed: StreamedStep | None = None) -> RolloutBatch:
        """What the next step learns from.

        Args:
            streamed: learns from groups as they come.

        Raises:
            RuntimeError: too many groups have no reward.
        """
        batch = (
            self._at_work(self.pipeline.take()) if streamed is None else self._learned_on_the_way(streamed)
        )
        alive = [group.answers for group in batch.groups if not group.has_no_signal]
        collected = self._collector.collected(
            alive, [group.answers for group in batch.everything if group.answers]
        )
        if streamed is not None:
            collected.finish = streamed.finish
        collected.metrics["resample_draws"] = float(batch.num_refills)
        self._collector.dispatched = self.pipeline.ledger.counts().dispatched
        collected.metrics |= staleness_metrics(collected.rows, self.pipeline.version) | self._metrics()
        return collected

    def _at_work(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for something while engines have the weights, and those that come meanwhile get them."""
        if self._pool is None:
            return self._run(work)
        self._collector.engine.generate([], [])  # engines that follow the policy have its weights afterwards
        with self._pool.policy_sends():
            return self._run(work)

    def _learned_on_the_way(self, streamed: StreamedStep) -> TrainBatch:
        portions = self.pipeline.portions()
        num_learned = 0
        while portion := self._at_work(_next(portions)):
            alive = [group for group in portion if not group.has_no_signal]
            num_learned += self._learn_from(alive, streamed)
        batch = self._run(self._taken())
        if not num_learned:
            self._learn_from(batch.groups, streamed)  # there is nothing that teaches more
        return batch

    def _learn_from(self, groups: Sequence[Group], streamed: StreamedStep) -> int:
        """Begins to learn from the answers that have a reward; how many there are."""
        for group in groups:
            for trajectory in group.answers:
                trajectory.group = group.number
        kept = [t for group in groups for t in group.answers if t.outcome == "ok"]
        if kept:
            streamed.add(Batch.from_trajectories(kept))
        return len(kept)

    def settle(self) -> None:
        """Returns when a new version of the policy may be published."""
        self._run(self.pipeline.settle())

    def published(self, version: int) -> None:
        """Goes on with a new version."""
        self._run(self._published(version))

    def state(self) -> dict[str, Any]:
        """For a checkpoint: all groups in work, and where the prompts go on, of one moment."""
        loader, ledger, groups = self._run(self._snapshot())
        return {"loader": loader, "ledger": ledger, "groups": saved_groups(groups)}

    def load_state(self, state: Mapping[str, Any], version: int) -> None:
        """See `Pipeline.load_state`."""
        prompts = {prompt.index: prompt for prompt in self._loader.prompts}
        self.pipeline.load_state(state, version, prompts)
        self._counted = self._counts()

    def close(self) -> None:
        """Aborts what is in flight."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.close()

    def _metrics(self) -> dict[str, float]:
        """What is in work, what was dropped, failed or tried again since this was last asked, and who has
        waited for how long.
        """
        totals = self._counts()
        fresh, self._counted = totals - self._counted, totals
        waited = {
            f"time/wait_{stage}_s": seconds
            for stage, seconds in self._waits.take_seconds().items()
            if stage in _TOLD
        }
        return self.pipeline.metrics() | {name: float(count) for name, count in fresh.items()} | waited

    def _counts(self) -> Counter[str]:
        counts = self.pipeline.ledger.counts()
        kinds = {"dropped": counts.dropped, "failed": counts.failed, "retried": counts.retries}
        return Counter(
            {
                f"pipeline/{kind}_{name}": count
                for kind, of_kind in kinds.items()
                for name, count in of_kind.items()
            }
        )

    async def _published(self, version: int) -> None:
        self.pipeline.published(version)

    async def _snapshot(self) -> tuple[dict[str, Any], dict[str, Any], list[Group]]:
        return self._loader.state_dict(), *self.pipeline.snapshot()

    async def _taken(self) -> TrainBatch:
        return self.pipeline.taken()

    async def _close(self) -> None:
        self.pipeline.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs something where the pipeline lives."""
        if self._pool is not None:
            return self._pool.run(work)
        with outside_loops():
            task = self._loop.create_task(work)
            try:
                return self._loop.run_until_complete(task)
            except BaseException:  # also an interrupt, which leaves the task as it is
                task.cancel()
                self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
                raise


async def _next(portions: AsyncIterator[list[Group]]) -> list[Group]:
    """The next portion of a batch; nothing after the last."""
    return await anext(portions, [])
