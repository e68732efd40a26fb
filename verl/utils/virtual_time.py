"""An event loop whose time is no clock's: it jumps to the next timer when nothing else is to be done, the
same in every run.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")
# Rounds of the loop at one instant after which nothing will change any more, and the time that tasks have to
# end in.
_MOST_ROUNDS, _ENDING_S = 1_000_000, 86_400.0
_FEW = 1000


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Runs asyncio programs that wait for nothing but timers and each other; hours of waiting take no time.

    What is handed to a thread is done at once, in no time; there are no sockets, processes or signals. A
    program that would wait forever is ended with an error: when no timer is left, at the limit, or when it
    goes round without any time passing.

    Args:
        limit_s: time at which it is ended.
    """

    def __init__(self, *, limit_s: float = math.inf) -> None:
        super().__init__()
        self.limit_s = limit_s
        self._selector = self
        # In the order in which they were begun; asyncio itself keeps a set.
        self._tasks: list[asyncio.Task[Any]] = []
        self._most_tasks = _FEW
        self._set_now(0.0)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def pending(self) -> list[asyncio.Task[Any]]:
        """Tasks that are not done, the oldest first."""
        return [task for task in self._tasks if not task.done()]

    @override
    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coro, **options)
        self._tasks.append(task)
        if len(self._tasks) > self._most_tasks:
            self._tasks = self.pending()
            self._most_tasks = 2 * len(self._tasks) + _FEW
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Calls the function here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # belongs to the one who awaits it
            future.set_exception(error)
        return future

    def select(self, timeout: float | None) -> list[Any]:
        """What the base class asks of its selector: to wait until something happens, here by a jump to the
        next timer.

        Raises:
            RuntimeError: nothing will ever happen again, or not before the limit.
        """
        if timeout == 0:
            self._rounds += 1
            if self._rounds > _MOST_ROUNDS:
                raise self._stuck("it goes round and round")
            return []
        if timeout is None:
            raise self._stuck("nothing will ever happen again")
        next_s = self._scheduled[0].when()  # type: ignore[attr-defined]
        if next_s > self.limit_s:
            raise self._stuck(f"the limit of {self.limit_s:g} s comes first")
        self._set_now(max(self._now, next_s))
        return []

    def _set_now(self, now: float) -> None:
        self._now, self._rounds = now, 0
        # Timers count as due before now and this: the least that makes those of now due, and none that are
        # later.
        self._clock_resolution = math.ulp(now)

    def _stuck(self, why: str) -> RuntimeError:
        waiting = "; ".join(map(described, self.pending())) or "no task"
        return RuntimeError(f"at {self._now:g} s {why}, and these wait: {waiting}")

    def _process_events(self, events: list[Any]) -> None:
        return

    def _write_to_self(self) -> None:
        return


def run(main: Coroutine[Any, Any, T], *, limit_s: float = math.inf) -> T:
    """Runs a program from second 0 to its end, then ends the tasks that it has left, the oldest first.

    Raises:
        RuntimeError: it would never end, or not before the limit, with the tasks that wait and where.
    """
    loop = VirtualTimeLoop(limit_s=limit_s)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            loop.limit_s = loop.time() + _ENDING_S
            _end_tasks(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def described(task: asyncio.Task[Any]) -> str:
    """A task and the line in which it waits."""
    *_, frame = _frames(task.get_coro())
    return (
        f"{task.get_name()} in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"
        if frame
        else task.get_name()
    )


def _frames(waiting: Any) -> Iterator[FrameType | None]:
    """Of coroutines that wait for one another, the outermost first."""
    yield None
    while inspect.iscoroutine(waiting) and waiting.cr_frame is not None:
        yield waiting.cr_frame
        waiting = waiting.cr_await


def _end_tasks(loop: VirtualTimeLoop) -> None:
    tasks = loop.pending()
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            loop.call_exception_handler(
                {"message": "a task failed when it was ended", "exception": error, "task": task}
            )
