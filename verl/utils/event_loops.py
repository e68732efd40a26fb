"""Event loops beside synchronous code: gathered requests, blocking calls in threads, and a reusable loop."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from typing import Any, Generic, TypeVar

from typing_extensions import override

from verl.utils.thread_interrupt import InterruptibleBlock

A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")
# Between two checks of a wait: an exception that is sent to a thread arrives only between two waits.
_POLL_S = 1.0
# An interrupted call in a thread gets this long to end: a nested wait ends at its next poll.
_PATIENCE_S = 2 * _POLL_S


class Gatherer(Generic[A, R]):
    """Gathers the requests of one turn of the event loop into one call.

    Args:
        call: answers several requests, in order. It blocks the loop, in whose thread an interrupt ends it.
    """

    def __init__(self, call: Callable[[list[A]], Sequence[R]]) -> None:
        self._call = call
        self._waiting: list[tuple[A, asyncio.Future[R]]] = []

    async def ask(self, request: A) -> R:
        """Answer to one request; an error of the call reaches all requests that were gathered."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # Behind the tasks that are ready now, which make the other requests of this turn.
            loop.call_soon(self._answer)
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((request, future))
        return await future

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        gathered = [(request, future) for request, future in waiting if not future.done()]
        try:
            answers = self._call([request for request, _ in gathered]) if gathered else ()
            if len(answers) != len(gathered):
                raise ValueError(f"need an answer to each of {len(gathered)} requests, got {len(answers)}")
        except (Exception, asyncio.CancelledError) as error:
            # A task that the call waits for was cancelled, not those that wait for the call.
            failure = error if isinstance(error, Exception) else RuntimeError("the call was cancelled")
            for _, future in gathered:
                future.set_exception(failure)
        except BaseException:  # an interrupt ends the loop: nobody may wait for these any more
            for _, future in gathered:
                future.cancel()
            raise
        else:
            for (_, future), answer in zip(gathered, answers, strict=True):
                future.set_result(answer)


class OwnLoop:
    """Base of classes with an event loop that stands still while nothing is run in it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interrupt cancels it, and all tasks that it has started.

        Where an event loop is running already, as in a notebook, it runs in a thread of its own.
        """
        if _is_loop_running():
            # However long it takes to end: this loop can't be entered before.
            return wait_for_thread(lambda: self.run(work), name="event loop", patience_s=math.inf)
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:  # also an interrupt, which leaves the task as it is
            left = [task, *(asyncio.all_tasks(self._loop) - {task})]
            for each in left:
                each.cancel()
            with suppress(KeyboardInterrupt):  # raised again by a task in which it came up
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            raise

    def close_loop(self) -> None:
        """Close the loop; may be called again."""
        self._loop.close()


class BackgroundLoop:
    """An event loop in a daemon thread, whose coroutines several threads may wait for at once.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Result of a coroutine in the loop; an interrupt of the wait cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return wait_for(future)
        except BaseException:
            future.cancel()
            raise

    async def result_of(self, work: Coroutine[Any, Any, T]) -> T:
        """Result of a coroutine in this loop, awaited in another one, whose cancellation cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def call_soon(self, call: Callable[[], object]) -> None:
        """Call a function in this loop, behind what other threads have asked of it before."""
        self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Cancel all tasks and end the thread; may be called again."""
        if self.is_closed:
            return
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def wait_for(future: Future[T], *, check: Callable[[], None] = lambda: None) -> T:
    """Result of a future; `check` may raise between two waits for it."""
    while not wait([future], timeout=_POLL_S).done:
        check()
    return future.result()


def wait_for_thread(call: Callable[[], T], *, name: str, patience_s: float = _PATIENCE_S) -> T:
    """Result of a call in a daemon thread, outside of the event loop of this one.

    An interrupt of the wait also interrupts the call, which then gets up to `patience_s` to end.
    """
    block, has_begun, has_ended = InterruptibleBlock(), threading.Event(), threading.Event()

    def run() -> T:
        try:
            with block:
                has_begun.set()
                return call()
        finally:
            has_ended.set()

    try:
        return wait_for(_DaemonThread(name).submit(run))
    except BaseException:  # also an interrupt
        until_s = time.monotonic() + patience_s
        # If it has not begun soon, then the interrupt was before its thread.
        while has_begun.wait(_POLL_S) and not has_ended.wait(_POLL_S / 10) and time.monotonic() < until_s:
            block.interrupt()
        raise


async def gather_all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of concurrent coroutines; if one fails, the others are cancelled before it raises."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def within(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine, which is cancelled after some seconds; None: never.

    A loop that was blocked meanwhile, as by generation in turn with training, gives it one more look.

    Raises:
        TimeoutError: it was cancelled, and has ended.
    """
    if seconds is None:
        return await work
    # asyncio.wait_for of Python before 3.12 may lose a cancellation, and 3.10 has no asyncio.timeout.
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            await asyncio.sleep(0)
        if task.done():
            return task.result()
        raise TimeoutError(f"no result after {seconds:g} s")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def call_in_thread(call: Callable[[], T], *, name: str) -> T:
    """Result of a blocking call in a daemon thread, which does not delay the end of the program."""
    return await asyncio.get_running_loop().run_in_executor(_DaemonThread(name), call)


class SerialThread:
    """A daemon thread that runs blocking calls for an event loop, one after the other.

    One thread for all calls: a library with threads of its own, such as PyTorch, makes them once.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Result of a call; a cancellation interrupts it, and waits some seconds for its end."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_all, name=self._name, daemon=True)
            self._thread.start()
        block, result, has_begun = InterruptibleBlock(), Future[T](), threading.Event()

        def run() -> None:
            try:
                with block:
                    has_begun.set()
                    result.set_result(call())
            except BaseException as error:  # raised in the event loop
                result.set_exception(error)

        self._calls.put(run)
        waiting = asyncio.wrap_future(result)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            until_s = time.monotonic() + _PATIENCE_S
            while not result.done() and time.monotonic() < until_s:
                if has_begun.is_set():
                    block.interrupt()
                await asyncio.wait([waiting], timeout=_POLL_S / 100)
            # Nobody else looks at it: asyncio would log an error that is not retrieved.
            waiting.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise

    def close(self) -> None:
        """End the thread after its calls; may be called again."""
        self._calls.put(None)

    def _run_all(self) -> None:
        while (run := self._calls.get()) is not None:
            run()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _DaemonThread(Executor):
    """Runs each call in a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name

    @override
    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(fn(*args, **kwargs))
            except BaseException as error:  # raised in the thread that waits
                result.set_exception(error)

        threading.Thread(target=run, name=self._name, daemon=True).start()
        return result


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
