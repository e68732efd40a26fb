"""Groups that are answered ahead of training: admitted, tried again, dropped, and made into batches within a
bound on their staleness.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from verl.agents.admission import Admission
from verl.agents.group_source import Group, GroupError, Source
from verl.agents.group_state import groups_from
from verl.config.pipeline import FailureClass, PipelineConfig
from verl.data.batch import Batch, Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.utils.sampling_types import Prompt

Draw = Callable[[int], Sequence[Prompt]]
# Failures of a reward that another try may mend.
_PASSING = ("reward_error", "reward_timeout")
# Before a group is tried again beside training, and by how much longer each time: what is down needs time to
# come back.
_FIRST_PAUSE_S, _LONGER = 2.0, 3.0
# Largest staleness whose share is a metric of its own.
_MOST_SHARES = 8


@dataclass
class TrainBatch:
    """The groups of a step.

    Attributes:
        groups: to be learned from, in the order of their numbers.
        dropped: groups that were answered, and dropped or failed, since the batch before.
        num_refills: times that groups were asked for in place of such as teach nothing.
    """

    groups: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    num_refills: int = 0

    @property
    def everything(self) -> list[Group]:
        """All groups of the batch, and those that were dropped meanwhile."""
        return sorted([*self.groups, *self.dropped], key=lambda group: group.number)


class Pipeline:
    """Keeps groups in work ahead of the step; runs in one event loop, of which it reads the time.

    A group is dispatched, and then trained on, dropped, failed or in work: the ledger says so of each.
    Samples are paced, not thrown
    away: as many groups are admitted as batches within `max_staleness` need. A version of the policy is
    published only if no group becomes too stale by it.

    Args:
        draw: gives so many prompts.
        source: answers them.
        ledger: takes what becomes of each.
        config: staleness, retries and the other rules.
        prompts_per_step: groups of a batch.
        waits: takes what is waited for.
        replace_dead: a group that teaches nothing gives way to another prompt, at most so many times the
            prompts of a step; 0: it stays.
        note: is told what happened, for people.

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
        replace_dead: int = 0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.version = 0
        self.ledger = ledger
        self._draw, self._source, self._config, self._waits, self._note = draw, source, config, waits, note
        # What is answered in one call is complete at once, in its order.
        self._in_order = source.is_in_turn or config.batches == "deterministic"
        self.rules = Admission(prompts_per_step, config.max_staleness, config.oversample, self._in_order)
        self._replaces_dead = replace_dead
        self._batches = 0
        self._groups: dict[int, Group] = {}
        self._futures: dict[int, asyncio.Future[None]] = {}
        self._landed: dict[int, asyncio.Future[None]] = {}
        self._hand: list[Group] = []
        self._next = TrainBatch()
        self._ended: list[Group] = []  # since the last batch
        self._again: list[Group] = []  # in flight before a restart
        self._arrivals = self._failures_in_a_row = self._num_dead = self._num_rounds = self._num_checked = 0
        self._error: BaseException | None = None
        self._changed: asyncio.Future[None] | None = None
        self._idle, self._is_idle = ExitStack(), False

    async def take(self) -> TrainBatch:
        """The next batch; waits until it is complete.

        Raises:
            RuntimeError: too many groups failed, one after the other or in share.
        """
        async for _ in self.portions(least=self.rules.prompts_per_step):
            pass
        return self.taken()

    def taken(self) -> TrainBatch:
        """The batch whose portions have all been taken.

        Raises:
            RuntimeError: too many of its answers have no reward.
        """
        batch, self._next, self._ended, self._num_checked = self._next, TrainBatch(), [], 0
        groups = batch.groups = sorted(self._hand, key=lambda group: group.number)
        if all(group.has_no_signal for group in groups):
            for group in groups:
                group.has_no_signal = False  # there is nothing else to learn from
        self._source.check([t for group in batch.everything for t in group.answers])
        return batch

    async def portions(self, *, least: int = 1) -> AsyncIterator[list[Group]]:
        """The next batch, some groups at a time: as soon as `least` of them, or all that are left, are
        complete.
        """
        left = self.rules.prompts_per_step
        self._begin_anew()
        while left > 0:
            self._fill()
            with self._waits.track("training", self._wanted):
                chosen = await self._chosen(left, min(least, left))
            self._waits.mark_progress("training")
            left -= len(chosen)
            self._hand += chosen
            yield chosen
        for number in self.rules.too_late(list(self._groups.values()), self.version):
            self._abort(self._groups[number])
        self._batches = self.version + 1
        self._fill_unless_in_turn()

    def _begin_anew(self) -> None:
        """What an interrupted step has left behind is taken up again: groups not learned from, and those that
        nobody answers any more.
        """
        self._groups.update({group.number: group for group in self._hand})
        self._hand, self._batches = [], self.version
        self._again = [
            group
            for group in self._groups.values()
            if group.arrival is None and group.number not in self._futures
        ]

    async def settle(self) -> None:
        """Returns when the next version may be published: where each group is answered by one version,
        nothing is in flight.

        Raises:
            RuntimeError: a group would be too stale.
        """
        while self._in_order and self._futures and not self._error:
            with self._waits.track(
                "publishing",
                lambda: f"{len(self._futures)} groups that are still answered by version {self.version}",
            ):
                await self._change()
        self._raise_error()
        if not self._hand:  # learned from a batch of the user's own
            for number in self.rules.too_late(list(self._groups.values()), self.version):
                self._abort(self._groups[number])
        self.rules.check(list(self._groups.values()), self.version + 1)

    def published(self, version: int) -> None:
        """The policy has learned from the batch that was taken, and this version of it answers from now on."""
        for group in self._hand:
            if group.has_no_signal:
                self.ledger.drop(group.number, "dead")
            else:
                self.ledger.train(group.number, step=version)
        self._hand = []
        self.version = self._batches = version
        self._num_dead = self._num_rounds = 0
        self.ledger.commit(version)
        self._waits.mark_progress("training")
        self._fill_unless_in_turn()

    def metrics(self) -> dict[str, float]:
        """What is in work now."""
        waiting = [group for group in self._groups.values() if group.arrival is not None]
        return {"pipeline/in_flight": float(len(self._futures)), "pipeline/in_queue": float(len(waiting))}

    def snapshot(self) -> tuple[dict[str, Any], list[Group]]:
        """For a checkpoint: the ledger, the groups that wait with their answers, and those in flight, as they
        are now.
        """
        return self.ledger.state_dict(), [replace(group) for group in self._groups.values()]

    def load_state(self, state: Mapping[str, Any], version: int, prompts: Mapping[int, Prompt]) -> None:
        """Goes on from a checkpoint; groups that were in flight are answered anew, by this version.

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
        self._arrivals = max(
            [group.arrival + 1 for group in self._groups.values() if group.arrival is not None], default=0
        )

    def close(self) -> None:
        """Aborts what is in flight."""
        for future in self._futures.values():
            future.cancel()
        self._futures = {}
        self._idle.close()
        self._source.close()

    def _fill(self) -> None:
        """Admits as many groups as there is room for, and those that go on after a restart."""
        again, self._again = self._again, []
        room = self.rules.room(
            self.version, batches=self._batches, outstanding=len(self._groups) + len(self._hand_in_work)
        )
        fresh = [self._admitted(prompt) for prompt in self._draw(room)] if room else []
        self._start([*again, *fresh])

    def _fill_unless_in_turn(self) -> None:
        if not self._source.is_in_turn and self._error is None:
            self._fill()

    @property
    def _hand_in_work(self) -> list[Group]:
        """Groups of a batch that is not complete; they keep their room."""
        return self._hand if self._batches <= self.version else []

    def _admitted(self, prompt: Prompt) -> Group:
        number = self.ledger.dispatch(prompt.index, version=self.version)
        group = self._groups[number] = Group(number, prompt, self.version)
        return group

    def _start(self, groups: Sequence[Group]) -> None:
        for group, future in zip(groups, self._source.start(groups), strict=True) if groups else ():
            self._futures[group.number] = future
            future.add_done_callback(partial(self._land, group))
        self._note_idleness()

    def _land(self, group: Group, future: asyncio.Future[None]) -> None:
        """A group was answered, or could not be."""
        try:
            self._landed_now(group, future)
        except Exception as error:  # nobody waits for this call: whoever waits for the batch gets to know
            self._error = error
        self._note_idleness()
        self._wake()

    def _landed_now(self, group: Group, future: asyncio.Future[None]) -> None:
        if self._futures.get(group.number) is not future:
            return  # it was aborted
        self._landed[group.number] = future
        if self._in_order and len(self._landed) < len(self._futures):
            return  # what becomes of one decides which prompt comes next
        landed, self._landed = self._landed, {}
        num_dead = self._num_dead
        self._start(
            [
                self._groups[number]
                for number in sorted(landed)
                if self._goes_on(self._groups[number], landed[number])
            ]
        )
        if self._num_dead > num_dead:
            self._num_rounds += 1
            self._next.num_refills += 1
        # Stops a run in which too many answers have no reward as soon as there are as many as a step has.
        if len(self._ended) - self._num_checked >= self.rules.prompts_per_step:
            self._num_checked = len(self._ended)
            self._source.check([t for group in self._ended for t in group.answers])
        # In order, whether training has its batch by then or not: `settle` waits for what is begun here.
        self._fill_unless_in_turn()

    def _goes_on(self, group: Group, future: asyncio.Future[None]) -> bool:
        """What becomes of a group that has landed; whether it is tried again."""
        del self._futures[group.number]
        error = (
            RuntimeError(f"group {group.number} was cancelled by nobody")
            if future.cancelled()
            else future.exception()
        )
        if isinstance(error, GroupError):
            return self._may_go_on(group, error.failure, error.cause)
        if error is not None:
            raise error
        if passing := [
            t for t in group.everything if t.outcome in _PASSING and self._has_try(group, "reward")
        ]:
            self._note_try(group, "reward", passing[0].detail)
            for trajectory in passing:
                trajectory.outcome, trajectory.detail = "ok", ""
            return True
        return self._complete(group)

    def _complete(self, group: Group) -> bool:
        """A group has its answers and rewards; whether it is tried again all the same."""
        teaches = self._source.finish(group)
        failed = [t for t in group.answers if t.outcome != "ok"]
        if len(group.answers) - len(failed) < self._config.survivors.options.get("least", 1):
            return self._refilled(group, failed[0])
        self._failures_in_a_row = 0
        self._ended.append(group)
        if not teaches and self._replaces_dead:
            # In turn a round of a step's prompts counts once, however many of them are dead.
            spent = self._num_rounds if self._in_order else self._num_dead / self.rules.prompts_per_step
            if spent < self._replaces_dead:
                self._num_dead += 1
                self._drop(group, "dead")
                return False
            group.has_no_signal = True
        versions = [version for t in group.answers for version in t.versions] or [group.oldest]
        group.oldest, group.arrival = min(versions), self._arrivals
        self._arrivals += 1
        self.ledger.complete(group.number, versions=(group.oldest, max(versions)))
        return False

    def _refilled(self, group: Group, failed: Trajectory) -> bool:
        """A group with too few rewarded answers is answered anew, or gives way to another prompt; whether it
        is the former.
        """
        failure: FailureClass = "environment" if failed.outcome.startswith("environment") else "reward"
        cause = f"{failed.outcome}: {failed.detail}"
        if self._config.survivors.name == "refill":
            group.draw += 1
            return self._may_go_on(group, failure, cause)
        self._ended.append(group)
        self._drop(group, "too_few")
        self._count_failure(cause)
        return False

    def _has_try(self, group: Group, failure: FailureClass) -> bool:
        return group.tries.get(failure, 0) < self._config.retries[failure]

    def _note_try(self, group: Group, failure: FailureClass, cause: str) -> None:
        group.tries[failure] = group.tries.get(failure, 0) + 1
        group.pause_s = _FIRST_PAUSE_S * _LONGER ** (group.tries[failure] - 1)
        self.ledger.retry(group.number, failure, cause)

    def _may_go_on(self, group: Group, failure: FailureClass, cause: str) -> bool:
        """Whether a group is answered anew after a failure; else it has failed."""
        if self._has_try(group, failure):
            self._note_try(group, failure, cause)
            group.answers, group.baseline, group.oldest = [], None, self.version
            return True
        self._ended.append(group)
        self._next.dropped.append(group)
        del self._groups[group.number]
        self.ledger.fail(group.number, failure, cause)
        self._count_failure(f"{failure}: {cause}")
        return False

    def _drop(self, group: Group, reason: str) -> None:
        del self._groups[group.number]
        self._next.dropped.append(group)
        self.ledger.drop(group.number, reason)

    def _count_failure(self, cause: str) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self._config.max_failures_in_a_row:
            raise RuntimeError(
                f"{self._failures_in_a_row} groups failed one after the other, the last with {cause}; mend the cause, or "
                "raise pipeline.max_failures_in_a_row"
            )

    def _abort(self, group: Group) -> None:
        """Drops a group that no batch may have."""
        if (future := self._futures.pop(group.number, None)) is not None:
            future.cancel()
        self._landed.pop(group.number, None)
        del self._groups[group.number]
        self.ledger.drop(group.number, "surplus" if group.arrival is not None else "straggler")

    async def _chosen(self, left: int, least: int) -> list[Group]:
        """Some groups for the batch that needs so many more."""
        due = [self._groups[number] for number in self._futures if self._is_due(self._groups[number])]
        while True:
            self._raise_error()
            # While more of these are in flight, a whole batch cannot be made.
            num_late = sum(group.number in self._futures and self._is_due(group) for group in due)
            is_near = len(self._groups) - len(self._futures) >= least and (
                least < left or num_late <= self._config.oversample
            )
            if is_near or not self._futures:
                numbers = self.rules.chosen(list(self._groups.values()), self.version, left=left)
                if numbers:
                    return [self._groups.pop(number) for number in numbers]
            if not self._futures:
                self._fill()
                assert self._futures or self._landed or len(self._groups) > 0, "there is room, or a batch"
            if self._futures:
                await self._change()

    def _is_due(self, group: Group) -> bool:
        return group.oldest <= self.version - self._config.max_staleness

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    async def _change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _wanted(self) -> str:
        """What a batch waits for, for people."""
        late = [group for group in self._groups.values() if group.arrival is None]
        oldest = (
            f", the oldest is group {late[0].number}, answered since version {late[0].oldest}" if late else ""
        )
        return f"groups for the batch of version {self.version}: it has {len(self._hand)}, {len(late)} are in flight{oldest}"

    def _note_idleness(self) -> None:
        """Generation waits for training while it has nothing to do."""
        is_idle = not self._futures and not self._source.is_in_turn
        if is_idle == self._is_idle:
            return
        self._is_idle = is_idle
        self._idle.close()
        if is_idle:
            self._idle.enter_context(self._waits.track("admission", self._room_wanted))

    def _room_wanted(self) -> str:
        return f"room for more groups: those within {self._config.max_staleness} steps of version {self.version} are answered"


def staleness_metrics(rows: Batch, version: int) -> dict[str, float]:
    """How many steps before the version that learns from them tokens were sampled: mean, most, and the share
    of each number.
    """
    ages = (version - rows.ragged("versions").values)[rows.ragged("mask").values]
    if not len(ages):
        return {}
    shares = ages.clamp(min=0).bincount().tolist()[: _MOST_SHARES + 1]
    return {
        "staleness/mean": float(ages.double().mean()),
        "staleness/max": float(ages.max()),
        **{f"staleness/share_{age}": count / len(ages) for age, count in enumerate(shares) if count},
    }
