"""Which engine has room for a request, and who waits until one has."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from verl.rollout.pool.replica import Replica

Queue = deque[asyncio.Future[None]]


@dataclass
class PrefixAffinity:
    """Requests that share a prefix, and the engine that has it in its cache."""

    replica: Replica | None = None


class Router:
    """Engines by how many further requests they could take: the one that could take most is found without a
    look at all of them.

    Args:
        most: requests that an engine gets at a time.
        free: how many further ones it could take now; `changed` is called whenever that may be another number
            than before.

    Attributes:
        num_free: further requests that all of them could take now.
    """

    def __init__(self, most: int, free: Callable[[Replica], int]) -> None:
        self.num_free = 0
        self._free = free
        # In the order in which they came to have so much room.
        self._by_count: list[dict[Replica, None]] = [{} for _ in range(most + 1)]
        self._counts: dict[Replica, int] = {}
        self._highest = 0
        self._waiting: Queue = deque()
        self._coming: dict[Replica, Queue] = {}
        self._closed_because: str | None = None

    @property
    def has_waiters(self) -> bool:
        """Whether a request waits for room."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        return bool(self._waiting or self._coming)

    def changed(self, replica: Replica) -> None:
        """An engine may have more or less room than before; for each place more, one that waits is woken."""
        before, count = self._counts.get(replica, 0), self._free(replica)
        came = 0 if replica.is_syncing and not count else _wake(self._coming.pop(replica, deque()))
        if before == count:
            return
        if before:
            del self._by_count[before][replica]
        if count:
            self._by_count[count][replica] = None
        self._counts[replica] = count
        self._highest = max(self._highest, count)
        self.num_free += count - before
        _wake(self._waiting, count - before - came)

    async def find(self, session: PrefixAffinity) -> Replica:
        """An engine with room: the one that the session is with, else that with most room, with which the
        session stays.

        While the session's engine takes weights it is waited for: else all would go to the first one that has
        them.

        Raises:
            RuntimeError: the wait was given up.
        """
        was_woken = False
        while self._closed_because is None:
            own = session.replica
            if own is not None and self._free(own):
                return own
            if own is not None and own.is_syncing:
                _wake(self._waiting, int(was_woken))  # whatever room there is is for others
                await self._wait(self._coming.setdefault(own, deque()), is_first=False)
                was_woken = False
                continue
            roomiest = self._roomiest()
            if roomiest is not None:
                if own is None or own.state != "serving":
                    session.replica = roomiest
                return roomiest
            await self._wait(self._waiting, is_first=was_woken)
            was_woken = True
        raise RuntimeError(self._closed_because)

    def give_up(self, cause: str) -> None:
        """Ends all waits for room."""
        for queue in (self._waiting, *self._coming.values()):
            while queue:
                if not (waiting := queue.popleft()).done():
                    waiting.set_exception(RuntimeError(cause))
        self._coming.clear()

    def close(self, cause: str) -> None:
        """Ends all waits for room, also those to come."""
        self._closed_because = cause
        self.give_up(cause)

    def _roomiest(self) -> Replica | None:
        while self._highest and not self._by_count[self._highest]:
            self._highest -= 1
        return next(iter(self._by_count[self._highest]), None)

    async def _wait(self, queue: Queue, *, is_first: bool) -> None:
        """Returns when there may be room; first are those who were woken before, when somebody else was
        faster.
        """
        waiting = asyncio.get_running_loop().create_future()
        (queue.appendleft if is_first else queue.append)(waiting)
        try:
            await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                _wake(self._waiting, 1)  # the place that it will not take
            raise


def _wake(queue: Queue, most: int | None = None) -> int:
    """Lets those who have waited longest look for room; how many these are."""
    woken = 0
    while queue and (most is None or woken < most):
        waiting = queue.popleft()
        if not waiting.done():
            waiting.set_result(None)
            woken += 1
    return woken
