"""The batches of a trainer: its pipeline, driven from the trainer's thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from verl.agents.collector import DataCollector, RolloutBatch
from verl.agents.group_state import saved_groups
from verl.agents.groups import Group
from verl.agents.pipeline import Pipeline, TrainBatch, staleness_metrics, waiting_answers
from verl.algorithms.mismatch import fresh_mask
from verl.config.run import TrainerConfig
from verl.data.batch import Batch
from verl.data.loading.loader import Loader
from verl.data.loading.prompt_sampler import GroupFeedback
from verl.data.loading.prompt_store import prompt_of_tensor, prompt_tensor
from verl.data.trajectory import Trajectory
from verl.engines.streaming import concat_portions
from verl.monitoring.ledger import LEDGER_FILE, Ledger
from verl.utils.sampling_types import Prompt

# Stages whose waits are metrics: training waits for a batch, generation for room, or for the tools and
# environments of all episodes.
_MEASURED_STAGES = ("training", "admission", "environments")
# Answers on which sampler and trainer are compared where the batch has none that both have sampled.
_MAX_FRESH_ROWS, _MAX_FRESH_TOKENS = 8, 2048


class BatchProducer:
    """Produces batches in turn with training, or ahead of it, as the settings of `pipeline` say.

    Args:
        collector: answers and rewards.
        loader: of the prompts.
        config: of the run.
        folder: of the run, which gets the ledger; None: it is kept in memory alone.
        check: called with the prompts of streams when they are drawn; raises ValueError for one that cannot
            be rewarded. Other prompts are checked before the first step.
    """

    def __init__(
        self,
        collector: DataCollector,
        loader: Loader,
        config: TrainerConfig,
        *,
        folder: Path | None,
        check: Callable[[Sequence[Prompt]], None] | None = None,
    ) -> None:
        self._collector, self._loader, self._check = collector, loader, check
        self._is_streamed = config.pipeline.batches == "streamed"
        algorithm = config.algorithm
        self.pipeline = Pipeline(
            self._draw,
            collector.source(config.samples_per_prompt),
            Ledger(folder / LEDGER_FILE if folder else None),
            config.pipeline,
            prompts_per_step=config.prompts_per_step,
            waits=collector.waits,
            max_resamples=algorithm.max_resamples if algorithm.dynamic_sampling else 0,
            kept_share=algorithm.kept_groups_share,
            observe=self._observe,
        )
        self._counted: Counter[str] = Counter()
        self._is_closed = False
        # Of a streamed batch: what was yielded of it.
        self._streamed: TrainBatch | None = None
        self._portions: list[tuple[list[Trajectory], Batch]] = []

    def portions(self) -> Iterator[Batch]:
        """Rows of groups of the next batch as they complete; none unless `pipeline.batches` is streamed."""
        if not self._is_streamed:
            return
        self._streamed, self._portions = None, []
        groups = self.pipeline.stream_groups()
        while portion := self._collector.synced_engine().run(_next(groups)):
            yield from self._portion([group for group in portion if not group.has_no_signal])
        self._streamed = self._collector.synced_engine().run(_call(self.pipeline.finish_batch))
        if not self._portions:
            yield from self._portion(self._streamed.groups)  # there is nothing else to learn from

    def next_batch(self) -> RolloutBatch:
        """The batch that the next step learns from; a streamed one joins its portions.

        Raises:
            RuntimeError: too many groups have no reward.
        """
        if self._streamed is None:
            batch = self._collector.rollout_batch(
                self._collector.synced_engine().run(self.pipeline.next_batch())
            )
        else:
            batch = self._collector.rollout_batch(self._streamed)
            batch.trajectories = [t for trajectories, _ in self._portions for t in trajectories]
            batch.rows = concat_portions([rows for _, rows in self._portions])
            self._streamed, self._portions = None, []
        self._collector.dispatched = self.pipeline.ledger.counts().dispatched
        batch.metrics |= staleness_metrics(batch.rows, self.pipeline.version) | self._metrics()
        batch.fresh = self._fresh_rows(batch.rows)
        return batch

    def drain_in_flight(self) -> None:
        """Return when a new version of the policy may be published."""
        self._collector.engine.run(self.pipeline.drain_in_flight())

    def advance(self, version: int) -> None:
        """Continue with a new version of the policy."""
        self._collector.engine.run(_call(lambda: self.pipeline.advance(version)))

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, of one moment: all groups in work, and the position in the prompts."""
        loader, (ledger, groups) = self._collector.engine.run(
            _call(lambda: (self._loader.state_dict(), self.pipeline.snapshot()))
        )
        prompts = {group.prompt.index: group.prompt for group in groups}
        known = self._loader.prompts_by_index(prompts)
        streamed = {i: prompt_tensor(prompt) for i, prompt in prompts.items() if i not in known}
        return {"loader": loader, "ledger": ledger, "groups": saved_groups(groups), "prompts": streamed}

    def load_state(self, state: Mapping[str, Any], version: int) -> None:
        """Continue from a checkpoint, see `Pipeline.load_state`."""
        needed = [group["prompt"] for group in state["groups"]["groups"]]
        prompts = self._loader.prompts_by_index(needed)
        prompts |= {index: prompt_of_tensor(body) for index, body in state.get("prompts", {}).items()}
        self.pipeline.load_state(state, version, prompts)
        self._counted = self._counts()

    def close(self) -> None:
        """Abort all groups in flight; may be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._collector.engine.run(_call(self.pipeline.close))

    def _draw(self, n: int) -> list[Prompt]:
        """The next n prompts; those of streams are checked."""
        drawn = self._loader.take(n)
        if self._check is not None:
            self._check([prompt for prompt in drawn if self._loader.prompt(prompt.index) is None])
        return drawn

    def _observe(self, group: Group) -> None:
        """Report the rewards of a group to the loader."""
        rewarded = [t for t in group.answers if t.reward is not None]
        if rewarded:
            rewards = [t.reward for t in rewarded if t.reward is not None]
            accuracies = [t.scores["accuracy"] for t in rewarded if "accuracy" in t.scores]
            self._loader.observe(group.prompt, GroupFeedback(rewards, accuracies))

    def _fresh_rows(self, rows: Batch) -> Batch | None:
        """A few answers of the present version that wait for a later batch; None if `rows` have some."""
        if "rollout_logprobs" not in rows:
            return None
        if fresh_mask(rows["mask"], self.pipeline.version - rows["versions"]).any():
            return None
        _, groups = self._collector.engine.run(_call(self.pipeline.snapshot))
        answers = waiting_answers(groups, self.pipeline.version)[:_MAX_FRESH_ROWS]
        ends = list(accumulate(len(t.prompt_ids) + len(t.response_ids) for t in answers))
        fresh = [t for t, end in zip(answers, ends, strict=True) if end <= _MAX_FRESH_TOKENS]
        return Batch.from_trajectories(fresh) if fresh else None

    def _portion(self, groups: list[Group]) -> Iterator[Batch]:
        """Rows of the answers that have a reward, if there are any."""
        for group in groups:
            for trajectory in group.answers:
                trajectory.group = group.number
        kept = [t for group in groups for t in group.answers if t.outcome == "ok"]
        if kept:
            rows = Batch.from_trajectories(kept)
            self._portions.append((kept, rows))
            yield rows

    def _metrics(self) -> dict[str, float]:
        """Groups in work; dropped, failed and retried since the last call; seconds that each stage waited."""
        totals = self._counts()
        fresh, self._counted = totals - self._counted, totals
        seconds = self._collector.waits.take_seconds()
        waited = {f"time/wait_{stage}_s": seconds[stage] for stage in _MEASURED_STAGES if stage in seconds}
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


async def _next(groups: AsyncIterator[list[Group]]) -> list[Group]:
    """The next portion of a batch; empty after the last."""
    return await anext(groups, [])


async def _call(function: Any) -> Any:
    """Result of a function that belongs into the event loop of the pipeline."""
    return function()
