"""Routing of requests to replicas with free slots, and the queue of requests that wait for one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from verl.rollout.pool.replica import Replica
from verl.utils.sampling_types import PrefixAffinity

WaitQueue = deque[asyncio.Future[None]]


class Router:
    """Replicas by their free slots: the one with the most is found without a scan of all.

    Args:
        max_running: requests that a replica gets at a time.
        num_free: free slots of a replica; `update` must be called whenever this may have changed.

    Attributes:
        num_free: free slots of all replicas.
    """

    def __init__(self, max_running: int, num_free: Callable[[Replica], int]) -> None:
        self.num_free = 0
        self._num_free_of = num_free
        # Replicas by free slots, in the order in which they came to have so many.
        self._by_count: list[dict[Replica, None]] = [{} for _ in range(max_running + 1)]
        self._counts: dict[Replica, int] = {}
        # At least the largest count of any replica.
        self._highest = 0
        self._waiting: WaitQueue = deque()
        # Requests whose replica loads weights.
        self._waiting_for: dict[Replica, WaitQueue] = {}
        self._closed_because: str | None = None

    @property
    def has_waiters(self) -> bool:
        """True if a request waits for a slot."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        return bool(self._waiting or self._waiting_for)

    def update(self, replica: Replica) -> None:
        """Read the free slots of a replica again; for each additional one, a waiting request is woken."""
        before, count = self._counts.get(replica, 0), self._num_free_of(replica)
        is_expected = replica.is_syncing and not count
        num_own = 0 if is_expected else _wake(self._waiting_for.pop(replica, deque()))
        if before == count:
            return
        if before:
            del self._by_count[before][replica]
        if count:
            self._by_count[count][replica] = None
        self._counts[replica] = count
        self._highest = max(self._highest, count)
        self.num_free += count - before
        _wake(self._waiting, count - before - num_own)

    async def route(self, affinity: PrefixAffinity) -> Replica:
        """A replica with a free slot: that of the affinity, else the freest, which the affinity then gets.

        While the replica of a group is full, the affinity of the group stays. An episode goes on where its
        last turn was, which has its history.

        A replica that loads weights is waited for: otherwise all requests would move to the first replica
        that has the new weights.

        Raises:
            RuntimeError: the waits were ended by `fail_waiters` or `close`.
        """
        was_woken = False
        while self._closed_because is None:
            own = affinity.preferred
            if own is not None and self._num_free_of(own):
                affinity.settle(own)
                return own
            if own is not None and own.is_syncing:
                # This request will not use the slot for which it was woken.
                _wake(self._waiting, int(was_woken))
                await self._wait(self._waiting_for.setdefault(own, deque()), is_first=False)
                was_woken = False
                continue
            freest = self._freest()
            if freest is not None:
                if own is None or own.state != "serving" or affinity.group is not None:
                    affinity.settle(freest)
                return freest
            await self._wait(self._waiting, is_first=was_woken)
            was_woken = True
        raise RuntimeError(self._closed_because)

    def fail_waiters(self, cause: str) -> None:
        """Let all requests that wait for a slot raise."""
        for queue in (self._waiting, *self._waiting_for.values()):
            while queue:
                if not (waiting := queue.popleft()).done():
                    waiting.set_exception(RuntimeError(cause))
        self._waiting_for.clear()

    def close(self, cause: str) -> None:
        """Let all requests raise that wait for a slot, now or later."""
        self._closed_because = cause
        self.fail_waiters(cause)

    def _freest(self) -> Replica | None:
        while self._highest and not self._by_count[self._highest]:
            self._highest -= 1
        return next(iter(self._by_count[self._highest]), None)

    async def _wait(self, queue: WaitQueue, *, is_first: bool) -> None:
        """Wait in a queue; a request that was woken, but found the slot taken, goes back to its head."""
        waiting = asyncio.get_running_loop().create_future()
        (queue.appendleft if is_first else queue.append)(waiting)
        try:
            await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                # It was woken and cancelled at the same time: the slot goes to the next request.
                _wake(self._waiting, 1)
            raise


def _wake(queue: WaitQueue, limit: int | None = None) -> int:
    """Wake the requests that have waited longest, at most `limit`; return how many."""
    woken = 0
    while queue and (limit is None or woken < limit):
        waiting = queue.popleft()
        if not waiting.done():
            waiting.set_result(None)
            woken += 1
    return woken
