"""Groups answered ahead of training, within a bound on their staleness.

```
            prompts                       groups                        batch
  loader ------------> admission ------------------> complete groups ----------> trainer
            draw(n)        ^        |            ^                        |
                           |        v            | rewarded               v
                           |   answers: engine --+                  drain_in_flight,
                           |   (a task per group, retried           sync_weights, advance
                           |    by RetryPolicy)                           |
                           +--------- room for a new version <------------+
```

| loop | consumes | waits for (name of the wait) | unblocked by |
|---|---|---|---|
| admission | prompts | room for more groups (`admission`) | `advance`: the policy has a new version |
| a group's task | the engine | answers (`generation`), rewards (`rewards`) | the engine, reward functions |
| `next_batch` | complete groups | groups for the batch (`training`) | the last group that the batch needs |
| `drain_in_flight` | - | groups of the old version (`publishing`), in order only | their last answer |

All of it runs in one event loop, whose clock is the only one that is read: tests run it on virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from verl.agents.admission import Admission
from verl.agents.group_source import Source
from verl.agents.group_state import groups_from
from verl.agents.groups import Group, mark_low_deviation
from verl.agents.retry_policy import RetryPolicy
from verl.config.pipeline import PipelineConfig
from verl.data.batch import Batch
from verl.data.trajectory import Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.utils.sampling_types import Prompt

Draw = Callable[[int], Sequence[Prompt]]
# Largest staleness whose share is a metric of its own.
_MOST_SHARES = 8


@dataclass
class TrainBatch:
    """The groups of a step.

    Attributes:
        groups: to be learned from, in the order of their numbers.
        dropped: groups that were answered, and dropped or failed, since the batch before.
        num_refills: rounds in which groups without signal were replaced by other prompts.
    """

    groups: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    num_refills: int = 0

    @property
    def all_groups(self) -> list[Group]:
        """Groups of the batch and dropped ones, in the order of their numbers."""
        return sorted([*self.groups, *self.dropped], key=lambda group: group.number)


class Pipeline:
    """Keeps groups in work ahead of the step; runs in one event loop.

    A group is dispatched, and then trained on, dropped, failed or in work: the ledger has each of them. The
    pipeline admits as many groups as batches within `max_staleness` need, so it rarely discards one. A
    version of the policy is published only if no group becomes too stale by it.

    Args:
        draw: gives n prompts; fewer if there are no more, and then batches are smaller.
        source: answers and rewards groups.
        ledger: the account of all groups.
        config: staleness, retries and the other rules.
        prompts_per_step: groups of a batch.
        waits: takes the waits of training and admission.
        max_resamples: rounds of a step in which groups without signal are replaced by other prompts; 0: they
            stay.
        kept_share: share of the groups of a batch that is learned from, see `mark_low_deviation`.
        observe: called once with each group that ended with rewards: after the policy has learned from it,
            or when it is replaced for want of a signal.

    Attributes:
        version: of the policy.
    """

    def __init__(
        self,
        draw: Draw,
        source: Source,
        ledger: Ledger,
        config: PipelineConfig,
        *,
        prompts_per_step: int,
        waits: WaitTracker,
        max_resamples: int = 0,
        kept_share: float = 1.0,
        observe: Callable[[Group], None] | None = None,
    ) -> None:
        self.version = 0
        self.ledger = ledger
        self._draw, self._source, self._config, self._waits = draw, source, config, waits
        self._observe, self._kept_share = observe or (lambda group: None), kept_share
        # Groups that are answered in one call come back at once, in their order.
        self._in_order = source.in_turn or config.batches == "deterministic"
        self.rules = Admission(prompts_per_step, config.max_staleness, config.oversample, self._in_order)
        self._retries = RetryPolicy(
            config,
            source,
            ledger,
            in_order=self._in_order,
            prompts_per_step=prompts_per_step,
            max_resamples=max_resamples,
        )
        # Version that the batch in work is for; one more when the batch is complete and not learned from.
        self._batches = 0
        self._groups: dict[int, Group] = {}  # in flight, or complete and in no batch
        self._in_flight: dict[int, asyncio.Future[None]] = {}
        self._came_back: dict[int, asyncio.Future[None]] = {}
        self._current_batch: list[Group] = []
        self._to_resume: list[Group] = []  # in flight before a restart or an interrupt
        self._next = TrainBatch()
        self._ended: list[Group] = []  # since the last batch
        self._num_arrived = self._num_checked = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._idle = _IdleWait(
            waits,
            lambda: (
                f"room for more groups: those within {config.max_staleness} steps of version {self.version} "
                "are answered"
            ),
        )

    async def next_batch(self) -> TrainBatch:
        """The next batch, when it is complete.

        Raises:
            RuntimeError: too many groups failed, in a row or in share.
        """
        async for _ in self.stream_groups(least=self.rules.prompts_per_step):
            pass
        return self.finish_batch()

    async def stream_groups(self, *, least: int = 1) -> AsyncIterator[list[Group]]:
        """Portions of the next batch, each as soon as `least` groups, or all that are left, are complete."""
        left = self.rules.prompts_per_step
        self._requeue_unfinished()
        while left > 0:
            self._fill()
            with self._waits.track("training", self._describe_wait):
                chosen = await self._choose(left, min(least, left))
            self._waits.mark_progress("training")
            left = left - len(chosen) if chosen else 0  # none: there are no more prompts
            self._current_batch += chosen
            yield chosen
        for number in self.rules.too_late(list(self._groups.values()), self.version):
            self._abort(self._groups[number])
        self._batches = self.version + 1
        self._fill_ahead()

    def finish_batch(self) -> TrainBatch:
        """The batch whose portions have all been streamed.

        Raises:
            RuntimeError: too many of its answers have no reward.
        """
        batch, self._next, self._ended, self._num_checked = self._next, TrainBatch(), [], 0
        groups = batch.groups = sorted(self._current_batch, key=lambda group: group.number)
        if all(group.has_no_signal for group in groups):
            for group in groups:
                group.has_no_signal = False  # there is nothing else to learn from
        mark_low_deviation(groups, self._kept_share)
        self._source.check([t for group in batch.all_groups for t in group.answers])
        return batch

    async def drain_in_flight(self) -> None:
        """Wait until the next version may be published; in order, until no group is in flight.

        Raises:
            RuntimeError: a group would be too stale.
        """
        while self._in_order and self._in_flight and not self._error:
            with self._waits.track(
                "publishing",
                lambda: f"{len(self._in_flight)} groups that are still answered by version {self.version}",
            ):
                self._changed.clear()
                await self._changed.wait()
        self._raise_error()
        if not self._current_batch:  # the policy learned from a batch of the user's own
            for number in self.rules.too_late(list(self._groups.values()), self.version):
                self._abort(self._groups[number])
        self.rules.check(list(self._groups.values()), self.version + 1)

    def advance(self, version: int) -> None:
        """Note that the policy has learned from the batch, and that `version` of it answers from now on."""
        for group in self._current_batch:
            self._observe(group)
            if group.drop_reason:
                self.ledger.drop(group.number, group.drop_reason)
            else:
                self.ledger.train(group.number, step=version)
        self._current_batch = []
        self.version = self._batches = version
        self._retries.begin_step()
        self.ledger.commit(version)
        self._waits.mark_progress("training")
        self._fill_ahead()

    def metrics(self) -> dict[str, float]:
        """Numbers of groups in flight, and of complete ones that wait."""
        num_waiting = sum(group.arrival is not None for group in self._groups.values())
        return {
            "pipeline/in_flight": float(len(self._in_flight)),
            "pipeline/in_queue": float(num_waiting),
        }

    def snapshot(self) -> tuple[dict[str, Any], list[Group]]:
        """State for a checkpoint: the ledger, and the groups that wait or are in flight, as they are now."""
        return self.ledger.state_dict(), [replace(group) for group in self._groups.values()]

    def load_state(self, state: Mapping[str, Any], version: int, prompts: Mapping[int, Prompt]) -> None:
        """Continue from a checkpoint; groups that were in flight are answered again, by this version.

        Args:
            state: `ledger` and, from `saved_groups`, `groups` of a `snapshot`.
            version: of the policy.
            prompts: by their index in the data.
        """
        self.version = self._batches = version
        self.ledger.load_state_dict(state["ledger"])
        for group in groups_from(state["groups"], prompts):
            if group.arrival is not None and group.oldest < version - self._config.max_staleness:
                self.ledger.drop(group.number, "surplus")  # the bound was wider
                continue
            self._groups[group.number] = group
            if group.arrival is None:
                group.oldest = version
                self.ledger.redispatch(group.number, version=version)
        arrived = [group.arrival for group in self._groups.values() if group.arrival is not None]
        self._num_arrived = max(arrived, default=-1) + 1

    def close(self) -> None:
        """Abort all groups in flight."""
        for future in self._in_flight.values():
            future.cancel()
        self._in_flight = {}
        self._idle.update(is_idle=False)

    def _requeue_unfinished(self) -> None:
        """Take up what an interrupted step left: groups not learned from, and groups that nobody answers."""
        self._groups.update({group.number: group for group in self._current_batch})
        self._current_batch, self._batches = [], self.version
        self._to_resume = [
            group
            for group in self._groups.values()
            if group.arrival is None and group.number not in self._in_flight
        ]

    def _fill(self) -> None:
        """Admit as many groups as there is room for, and resume those that wait for it."""
        # Groups of a batch that is not complete keep their room.
        num_of_batch = len(self._current_batch) if self._batches <= self.version else 0
        outstanding = len(self._groups) + num_of_batch
        room = self.rules.room(self.version, batches=self._batches, outstanding=outstanding)
        started, self._to_resume = self._to_resume, []
        for prompt in self._draw(room) if room else ():
            number = self.ledger.dispatch(prompt.index, version=self.version)
            group = self._groups[number] = Group(number, prompt, self.version)
            started.append(group)
        self._start(started)

    def _fill_ahead(self) -> None:
        if not self._source.in_turn and self._error is None:
            self._fill()

    def _start(self, groups: Sequence[Group]) -> None:
        for group in groups:
            future = self._in_flight[group.number] = self._source.start(group)
            future.add_done_callback(partial(self._on_done, group))
        self._idle.update(is_idle=not self._in_flight and not self._source.in_turn)

    def _on_done(self, group: Group, future: asyncio.Future[None]) -> None:
        """Callback of a group's task."""
        if self._in_flight.get(group.number) is not future:
            return  # it was aborted
        self._came_back[group.number] = future
        # In order, the decision on one group depends on those before it: which prompt comes next.
        if not self._in_order or len(self._came_back) == len(self._in_flight):
            try:
                self._take_in()
            except Exception as error:  # nobody awaits a callback: whoever waits for the batch raises it
                self._error = error
        self._idle.update(is_idle=not self._in_flight and not self._source.in_turn)
        self._changed.set()

    def _take_in(self) -> None:
        """Decide on the groups that came back, and start what follows from it."""
        came_back, self._came_back = self._came_back, {}
        for number in came_back:  # all of them first: the next step resumes those behind an error
            del self._in_flight[number]
        interrupted = {number for number, future in came_back.items() if _is_interrupted(future)}
        retried = []
        for number in sorted(came_back):
            group, future = self._groups[number], came_back[number]
            if number in interrupted:
                if not self._source.in_turn:
                    raise RuntimeError(f"group {number} was cancelled, but not by the pipeline")
                self._to_resume.append(group)
                continue
            decision = self._retries.decide(group, future)
            if decision == "retry":
                group.oldest = group.oldest if group.answers else self.version
                retried.append(group)
                continue
            self._ended.append(group)
            if decision == "gone":
                del self._groups[number]
                self._observe(group)
                self._next.dropped.append(group)
                self._retries.check_failures()
                continue
            versions = [version for t in group.answers for version in t.all_versions] or [group.oldest]
            group.oldest, group.arrival = min(versions), self._num_arrived
            self._num_arrived += 1
            self.ledger.complete(number, versions=(group.oldest, max(versions)))
        self._start(retried)
        self._next.num_refills += self._retries.end_round()
        # A run in which too many answers have no reward stops as soon as there are as many as a step has.
        if len(self._ended) - self._num_checked >= self.rules.prompts_per_step:
            self._num_checked = len(self._ended)
            self._source.check([t for group in self._ended for t in group.answers])
        # In order, whether training has its batch by now or not: `drain_in_flight` waits for these groups.
        self._fill_ahead()

    def _abort(self, group: Group) -> None:
        """Drop a group that no batch may have."""
        if (future := self._in_flight.pop(group.number, None)) is not None:
            future.cancel()
        self._came_back.pop(group.number, None)
        del self._groups[group.number]
        self.ledger.drop(group.number, "surplus" if group.arrival is not None else "straggler")

    async def _choose(self, left: int, least: int) -> list[Group]:
        """Groups for a batch that needs `left` more; none if there are no more prompts."""

        def must_train_now(group: Group) -> bool:
            return group.oldest <= self.version - self._config.max_staleness

        due = [self._groups[number] for number in self._in_flight if must_train_now(self._groups[number])]
        while True:
            self._raise_error()
            # While more of these are in flight than may be left out, the batch can't be complete.
            num_late = sum(group.number in self._in_flight and must_train_now(group) for group in due)
            num_complete = len(self._groups) - len(self._in_flight)
            is_near = num_complete >= least and (least < left or num_late <= self._config.oversample)
            # In turn, nothing is generated while the policy learns: wait for groups of later batches too.
            if (is_near and not self._source.in_turn) or not self._in_flight:
                numbers = self.rules.chosen(list(self._groups.values()), self.version, left=left)
                if numbers:
                    return [self._groups.pop(number) for number in numbers]
            if not self._in_flight:
                self._fill()
            if not self._in_flight:
                return []
            self._changed.clear()
            await self._changed.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _describe_wait(self) -> str:
        late = [group for group in self._groups.values() if group.arrival is None]
        oldest = (
            f", the oldest is group {late[0].number}, answered since version {late[0].oldest}" if late else ""
        )
        return (
            f"groups for the batch of version {self.version}: it has {len(self._current_batch)}, "
            f"{len(late)} are in flight{oldest}"
        )


class _IdleWait:
    """The wait of generation for training, while it has nothing to do."""

    def __init__(self, waits: WaitTracker, describe: Callable[[], str]) -> None:
        self._waits, self._describe = waits, describe
        self._tracked: ExitStack | None = None

    def update(self, *, is_idle: bool) -> None:
        """Begin or end the wait."""
        if is_idle and self._tracked is None:
            self._tracked = ExitStack()
            self._tracked.enter_context(self._waits.track("admission", self._describe))
        elif not is_idle and self._tracked is not None:
            self._tracked.close()
            self._tracked = None


def _is_interrupted(future: asyncio.Future[None]) -> bool:
    """True for a task that an interrupt ended: inside of it, or by the cancellation of all tasks."""
    return future.cancelled() or isinstance(future.exception(), (KeyboardInterrupt, SystemExit))


def waiting_answers(groups: Sequence[Group], version: int) -> list[Trajectory]:
    """Answers of complete groups, all of whose tokens this version of the policy has sampled."""
    return [
        t
        for group in groups
        for t in group.answers
        if group.arrival is not None and t.rollout_logprobs is not None and set(t.all_versions) == {version}
    ]


def staleness_metrics(rows: Batch, version: int) -> dict[str, float]:
    """Age of sampled tokens in steps, by the version that learns from them: mean, most, share of each age."""
    ages = (version - rows.ragged("versions").values)[rows.ragged("mask").values]
    if not len(ages):
        return {}
    shares = ages.clamp(min=0).bincount().tolist()[: _MOST_SHARES + 1]
    return {
        "staleness/mean": float(ages.double().mean()),
        "staleness/max": float(ages.max()),
        **{f"staleness/share_{age}": count / len(ages) for age, count in enumerate(shares) if count},
    }
