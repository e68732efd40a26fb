"""Calls of users' functions, each with its own time limit: plain ones on daemon threads, coroutines on one
event loop.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from verl.monitoring import interpreter_watchdog

_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_MAX_DETAIL_CHARS = 300
# Beyond twice the limit of a call: time for a busy machine to come back to the thread that waits.
_GUARD_MARGIN_S = 5.0


@dataclass(frozen=True)
class RewardFailure:
    """Why a call gave nothing: `outcome` and `detail` as on a trajectory, `interrupt` if the program was
    asked to end.
    """

    outcome: str
    detail: str
    interrupt: BaseException | None = None

    @classmethod
    def raised(cls, error: BaseException) -> RewardFailure:
        """From what user code raised: the traceback's last line, and the last place in the user's own file."""
        cause = " ".join("".join(traceback.format_exception_only(error)).split())[:_MAX_DETAIL_CHARS]
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        outside = [(file, line) for file, line in frames if not file.startswith(_OWN_FOLDER)]
        # A library's inner line says little to the author of the function that called it.
        lines = [line for file, line in outside if file == outside[0][0]]
        place = f" ({outside[0][0]}:{lines[-1]})" if outside else ""
        interrupt = error if isinstance(error, (KeyboardInterrupt, SystemExit)) else None
        return cls("reward_error", cause + place, interrupt)


class _Pending:
    """The result of a call that has none yet."""


PENDING: Final = _Pending()


class RewardCall:
    """One call of a user's function.

    Attributes:
        name: of the function, for messages.
        function: takes nothing; returns the value, or a coroutine of it if `is_async`.
        result: the value or a `RewardFailure`; `PENDING` until the call has settled.
        started: clock when the function was entered, in seconds; None while the call waits for its turn.
        lane: the thread that it runs on; for a coroutine already while it waits.
    """

    def __init__(self, name: str, function: Callable[[], Any], *, is_async: bool) -> None:
        self.name, self.function, self.is_async = name, function, is_async
        self.result: Any = PENDING
        self.started: float | None = None
        self.lane: _ThreadLane | _LoopLane | None = None
        self.round: _Round | None = None

    @property
    def wanted(self) -> bool:
        """Whether someone still waits for the result."""
        return self.round is not None and not self.round.over.is_set() and self.result is PENDING

    def settle(self, result: Any) -> bool:
        """Stores the first result and drops later ones; returns whether this was the first."""
        assert self.round is not None
        return self.round.settle(self, result)


class _Round:
    """The calls of one `CallPool.run`; `over` when all have settled or nobody waits any more."""

    def __init__(self, calls: Sequence[RewardCall]) -> None:
        self.over = threading.Event()
        self.interrupt: BaseException | None = None
        self._lock = threading.Lock()
        self._unsettled = len(calls)
        for call in calls:
            call.round = self

    def settle(self, call: RewardCall, result: Any) -> bool:
        with self._lock:
            if call.result is not PENDING:
                return False
            call.result = result
            self._unsettled -= 1
            if isinstance(result, RewardFailure) and result.interrupt is not None:
                self.interrupt = result.interrupt
            if self._unsettled == 0 or self.interrupt is not None:
                self.over.set()
            return True


class _ThreadLane:
    """A daemon thread that takes one plain call after the other."""

    def __init__(self, inbox: queue.SimpleQueue[RewardCall | None]) -> None:
        self.abandoned = False
        self._inbox = inbox
        self.thread = threading.Thread(target=self._serve, name="verl-reward", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while not self.abandoned and (call := self._inbox.get()) is not None:
            if call.wanted:
                call.lane = self
                call.started = time.monotonic()
                call.settle(_attempt(call.function))

    def abandon(self) -> None:
        """Lets the thread end as soon as the call that it is in returns."""
        self.abandoned = True


class _LoopLane:
    """A daemon thread with an event loop that runs a limited number of coroutines at a time."""

    def __init__(self, timeout_s: float, max_concurrent: int) -> None:
        self.abandoned = False
        self._timeout_s = timeout_s
        self._num_free = max_concurrent
        self._waiting: deque[RewardCall] = deque()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # The loop itself keeps only weak references.
        self.thread = threading.Thread(target=self._serve, name="verl-reward-loop", daemon=True)
        self.thread.start()

    def submit(self, calls: Sequence[RewardCall]) -> None:
        for call in calls:
            call.lane = self
        self._loop.call_soon_threadsafe(self._receive, calls)

    def abandon(self) -> None:
        """Ends the loop as soon as it comes to itself."""
        self.abandoned = True
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left, timeout=self._timeout_s))
        self._loop.close()

    def _receive(self, calls: Sequence[RewardCall]) -> None:
        self._waiting.extend(calls)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._num_free > 0:
            call = self._waiting.popleft()
            if call.wanted:
                self._num_free -= 1
                task = self._loop.create_task(self._run(call))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(self, call: RewardCall) -> None:
        if call.lane is not self:  # It was given to another loop while this one was stuck.
            return
        call.started = time.monotonic()
        limit = self._loop.call_later(self._timeout_s, self._end_late, call, asyncio.current_task())
        result = await _attempt_async(call.function)
        limit.cancel()
        self._end(call, result)

    def _end_late(self, call: RewardCall, task: asyncio.Task[Any] | None) -> None:
        assert task is not None
        # Settled before it is cancelled: a coroutine may swallow its cancellation, and nobody waits for that.
        self._end(call, RewardFailure("reward_timeout", f"no answer within {self._timeout_s:g} s"))
        task.cancel()

    def _end(self, call: RewardCall, result: Any) -> None:
        if call.settle(result):
            self._num_free += 1
            self._fill()


class CallPool:
    """Threads and an event loop that outlive the calls; a call over its limit is left behind with its thread.

    Args:
        timeout_s: limit of each call, from when its function is entered.
        num_threads: plain calls at the same time.
        max_concurrent: coroutines at the same time.
        max_abandoned: threads still stuck in a call over its limit, beyond which `run` raises.
    """

    def __init__(
        self, *, timeout_s: float, num_threads: int = 8, max_concurrent: int = 64, max_abandoned: int = 16
    ) -> None:
        self._timeout_s, self._max_abandoned = timeout_s, max_abandoned
        self._num_threads, self._max_concurrent = num_threads, max_concurrent
        self._inbox: queue.SimpleQueue[RewardCall | None] = queue.SimpleQueue()
        self._threads: list[_ThreadLane] = []
        self._loop: _LoopLane | None = None
        self._abandoned: list[_ThreadLane | _LoopLane] = []
        self._lock = threading.RLock()

    def run(self, calls: Sequence[RewardCall]) -> None:
        """Settles every call: its `result` is then the value or a `RewardFailure`; several threads may call it at
        once.

        A function that keeps the interpreter to itself for more than twice the limit ends the process, with
        exit code 1 and its stack on standard error: nothing else can stop it.

        Raises:
            RuntimeError: too many threads are stuck in calls that never return.
            KeyboardInterrupt, SystemExit: user code raised it.
        """
        if not calls:
            return
        current = _Round(calls)
        try:
            self._check_abandoned(calls[0].name)
            self._submit(calls)
            self._guard(current)
            while not current.over.wait(self._patience_s(calls)):
                self._guard(current)
                self._expire(calls)
        finally:
            current.over.set()
            interpreter_watchdog.disarm(current)
        if current.interrupt is not None:
            raise current.interrupt

    def close(self) -> None:
        """Lets all threads end; those in a call, when it returns."""
        with self._lock:
            for _ in self._threads:
                self._inbox.put(None)
            if self._loop is not None:
                self._loop.abandon()
            self._threads, self._loop, self._inbox = [], None, queue.SimpleQueue()

    def _guard(self, current: _Round) -> None:
        # A regular expression without end, or C code, may never give the interpreter back: then no Python
        # runs that could count the time. Only ending the process helps, with the stack of the function that
        # does it.
        interpreter_watchdog.arm(current, 2 * self._timeout_s + _GUARD_MARGIN_S)

    def _submit(self, calls: Sequence[RewardCall]) -> None:
        plain = [call for call in calls if not call.is_async]
        coroutines = [call for call in calls if call.is_async]
        with self._lock:
            for _ in range(min(self._num_threads, len(plain)) - len(self._threads)):
                self._threads.append(_ThreadLane(self._inbox))
            if coroutines:
                self._loop = self._loop or _LoopLane(self._timeout_s, self._max_concurrent)
                self._loop.submit(coroutines)
        for call in plain:
            self._inbox.put(call)

    def _limit_s(self, call: RewardCall) -> float:
        # The event loop ends late coroutines itself. If it has not by twice the limit, then for at least the
        # limit some coroutine has not let it: it hangs without awaiting.
        return 2 * self._timeout_s if call.is_async else self._timeout_s

    def _patience_s(self, calls: Sequence[RewardCall]) -> float:
        """Seconds until the next call can be over its limit."""
        now = time.monotonic()
        left = [
            call.started + self._limit_s(call) - now
            for call in calls
            if call.result is PENDING and call.started is not None
        ]
        return min(max(min(left, default=self._timeout_s), 0.0), self._timeout_s)

    def _expire(self, calls: Sequence[RewardCall]) -> None:
        now = time.monotonic()
        for call in calls:
            if (
                call.started is not None
                and call.result is PENDING
                and call.started + self._limit_s(call) <= now
            ):
                self._leave_behind(call)
        stranded = [
            call for call in calls if call.started is None and call.lane is not None and call.lane.abandoned
        ]
        if stranded:
            self._submit(stranded)

    def _leave_behind(self, call: RewardCall) -> None:
        cause = f"no answer within {self._timeout_s:g} s"
        if call.is_async:
            cause += (
                ", and an async function held the event loop; await inside it, or make it a plain function"
            )
        lane = call.lane
        if not call.settle(RewardFailure("reward_timeout", cause)) or lane is None:
            return
        with self._lock:
            if not lane.abandoned:
                lane.abandon()
                self._abandoned.append(lane)
                self._replace(lane)
        self._check_abandoned(call.name)

    def _replace(self, lane: _ThreadLane | _LoopLane) -> None:
        if isinstance(lane, _LoopLane):
            self._loop = None  # The next coroutine starts a new one.
        elif lane in self._threads:
            self._threads[self._threads.index(lane)] = _ThreadLane(self._inbox)

    def _check_abandoned(self, name: str) -> None:
        with self._lock:
            self._abandoned = [lane for lane in self._abandoned if lane.thread.is_alive()]
            stuck = len(self._abandoned)
        if stuck > self._max_abandoned:
            raise RuntimeError(
                f"need at most {self._max_abandoned} reward calls that never return, got {stuck}, the last one of {name!r}; "
                f"give the function a time limit of its own, below {self._timeout_s:g} s"
            )


def _attempt(function: Callable[[], Any]) -> Any:
    # User code: whatever it raises is kept on the trajectory, and must not end the thread.
    try:
        return function()
    except BaseException as error:
        return RewardFailure.raised(error)


async def _attempt_async(function: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await function()
    except BaseException as error:
        return RewardFailure.raised(error)
