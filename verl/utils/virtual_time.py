"""A deterministic event loop on virtual time, which jumps to the next timer whenever all tasks wait."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")
# A program that takes this many rounds of the loop at one instant will never let time pass.
_MAX_ROUNDS = 1_000_000
# Virtual seconds that cancelled tasks have for their cleanup.
_CLEANUP_S = 86_400.0
# Finished tasks are removed from the list when it has grown to twice the pending ones, and this many more.
_MIN_FINISHED = 1000


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Runs asyncio programs that wait only for timers and each other; hours of waiting take no time.

    Calls for a thread run immediately and take no virtual time; there are no sockets, processes or signals. A
    program that would wait forever ends with an error: when no timer is left, at the time limit, or when it
    keeps running without letting time pass.

    Args:
        limit_s: virtual time at which the program is ended.
    """

    def __init__(self, *, limit_s: float = math.inf) -> None:
        super().__init__()
        self.limit_s = limit_s
        self._selector = self
        # In the order of their start; asyncio itself keeps a set, whose order differs between runs.
        self._tasks: list[asyncio.Task[Any]] = []
        self._max_tasks = _MIN_FINISHED
        self._set_now(0.0)

    @override
    def time(self) -> float:
        return self._now

    def pending(self) -> list[asyncio.Task[Any]]:
        """Tasks that have not finished, oldest first."""
        return [task for task in self._tasks if not task.done()]

    @override
    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coro, **options)
        self._tasks.append(task)
        if len(self._tasks) > self._max_tasks:
            self._tasks = self.pending()
            self._max_tasks = 2 * len(self._tasks) + _MIN_FINISHED
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call the function immediately, in this thread."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # raised where the future is awaited
            future.set_exception(error)
        return future

    def select(self, timeout: float | None) -> list[Any]:
        """Jump to the next timer; the base class calls this, as of a selector, when it has to wait.

        Raises:
            RuntimeError: nothing will ever happen again, or not before the limit.
        """
        if timeout == 0:
            self._rounds += 1
            if self._rounds > _MAX_ROUNDS:
                raise self._stuck("it runs without letting time pass")
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
        # asyncio runs timers that are due before now + resolution. With one ulp, timers of this very instant
        # are due and no later ones.
        self._clock_resolution = math.ulp(now)

    def _stuck(self, why: str) -> RuntimeError:
        waiting = "; ".join(map(describe_task, self.pending())) or "no task"
        return RuntimeError(f"at {self._now:g} s {why}, and these wait: {waiting}")

    def _process_events(self, events: list[Any]) -> None:
        return

    def _write_to_self(self) -> None:
        return


def run(main: Coroutine[Any, Any, T], *, limit_s: float = math.inf) -> T:
    """Run a program from second 0 to its end, then cancel the tasks that it has left, oldest first.

    Raises:
        RuntimeError: it would never end, or not before the limit; names the waiting tasks with their lines.
    """
    loop = VirtualTimeLoop(limit_s=limit_s)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            loop.limit_s = loop.time() + _CLEANUP_S
            _cancel_tasks(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def describe_task(task: asyncio.Task[Any]) -> str:
    """Name of a task, and the line of its innermost coroutine."""
    frame: FrameType | None = None
    awaited: Any = task.get_coro()
    while inspect.iscoroutine(awaited) and awaited.cr_frame is not None:
        frame, awaited = awaited.cr_frame, awaited.cr_await
    if frame is None:
        return task.get_name()
    return f"{task.get_name()} in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}"


def _cancel_tasks(loop: VirtualTimeLoop) -> None:
    tasks = loop.pending()
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            loop.call_exception_handler(
                {"message": "a task failed when it was cancelled", "exception": error, "task": task}
            )
