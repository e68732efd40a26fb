"""Worker side of calls: runs the calls that the trainer sends, in a process of its own or on a thread.

A worker process imports this module and no torch, so that it starts in some 50 ms.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import pickle
import signal
import struct
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import cloudpickle
from typing_extensions import override

from verl.rewards.failures import RewardFailure, attempt, attempt_async
from verl.rewards.reward_log import logging_call
from verl.utils.user_code import import_function

# Sent to the trainer with the number of a call: its function is loaded and begins; it cannot be loaded here;
# its value or failure.
EventKind = Literal["started", "unloadable", "done"]
# A function as it is sent: its place and name, or its pickle.
Definition = tuple[str, str] | bytes
Call = Callable[[], Any]
# Number of a call, and what loads its function and arguments: returns the call, or raises `UnloadableError`.
Request = tuple[int, Callable[[], Call]]
# The number of the call whose code runs, in memory that the trainer maps too.
RUNNING = struct.Struct("=Q")
_is_worker = threading.Event()
_PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html


class UnloadableError(Exception):
    """A function that cannot be loaded in this process."""


class TrainerLink(ABC):
    """The worker's end of its connection to the trainer."""

    @abstractmethod
    def receive(self) -> Request | None:
        """The next request; None when the trainer has closed its end."""

    @abstractmethod
    def send(self, kind: EventKind, number: int, value: Any = None) -> None:
        """Reports an event of a call."""

    @abstractmethod
    def mark_running(self, number: int) -> None:
        """Notes whose code holds the event loop from now on; 0 for nobody's."""


class PipeLink(TrainerLink):
    """A link of a worker process; requests are (number, key of the function, definition, arguments)."""

    def __init__(self, connection: Connection, running: mmap.mmap) -> None:
        self._connection, self._running = connection, running
        self._functions: dict[int, Callable[..., Any]] = {}

    @override
    def receive(self) -> Request | None:
        try:
            number, key, definition, arguments = self._connection.recv()
        except (EOFError, OSError):
            return None
        return number, partial(self._prepare, key, definition, arguments)

    @override
    def send(self, kind: EventKind, number: int, value: Any = None) -> None:
        try:
            body = cloudpickle.dumps(value)
        except BaseException as error:  # user code, which may raise anything
            cause = f"need a number, got {type(value).__name__}, which cannot leave its process: {error}"
            body = pickle.dumps(RewardFailure("reward_wrong_type", cause))
        self._connection.send((kind, number, body))

    @override
    def mark_running(self, number: int) -> None:
        RUNNING.pack_into(self._running, 0, number)

    def _prepare(self, key: int, definition: Definition, arguments: bytes) -> Call:
        if key not in self._functions:
            try:
                function = (
                    unpickled(definition) if isinstance(definition, bytes) else import_function(*definition)
                )
            except BaseException as error:  # user code, which may raise anything
                raise UnloadableError(f"{type(error).__name__}: {error}") from error
            self._functions[key] = function
        positional, named = unpickled(arguments)
        return logging_call(self._functions[key], positional, named)


def unpickled(body: bytes) -> Any:
    """Object that the trainer or its own worker process has pickled; never use it for data from outside."""
    return pickle.loads(body)


def serve_plain(link: TrainerLink) -> None:
    """Runs calls one after the other until the trainer closes the link."""
    while (request := link.receive()) is not None:
        number, prepare = request
        call = _prepared(link, number, prepare)
        if call is not None:
            link.send("done", number, attempt(call))


async def serve_async(link: TrainerLink, timeout_s: float) -> None:
    """Runs calls at the same time on one event loop, each for at most `timeout_s`, until the link closes."""
    loop = asyncio.get_running_loop()
    requests: asyncio.Queue[Any] = asyncio.Queue()
    threading.Thread(target=_forward, args=(link, loop, requests), daemon=True).start()
    tasks: set[asyncio.Task[None]] = set()  # The loop itself keeps only weak references.
    while (request := await requests.get()) is not None:
        task = loop.create_task(_serve_one(link, *request, timeout_s=timeout_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _forward(link: TrainerLink, loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[Any]) -> None:
    """Passes requests from a link, which blocks, on to the event loop."""
    with suppress(RuntimeError):  # The loop has been closed meanwhile.
        while (request := link.receive()) is not None:
            loop.call_soon_threadsafe(requests.put_nowait, request)
        loop.call_soon_threadsafe(requests.put_nowait, None)


async def _serve_one(
    link: TrainerLink, number: int, prepare: Callable[[], Call], *, timeout_s: float
) -> None:
    link.mark_running(number)
    call = _prepared(link, number, prepare)
    link.mark_running(0)
    if call is None:
        return
    task = asyncio.ensure_future(_MarkedCoroutine(attempt_async(call), number, link))
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    link.send("done", number, task.result() if done else RewardFailure.timeout(timeout_s))
    if not done:
        task.cancel()  # It is not waited for: a coroutine may swallow its cancellation.


def _prepared(link: TrainerLink, number: int, prepare: Callable[[], Call]) -> Call | None:
    """The call, reported as started; None if it cannot be made, which is reported too."""
    try:
        call = prepare()
    except UnloadableError as error:
        link.send("unloadable", number, str(error))
    except BaseException as error:  # An argument runs its own code when it is unpickled.
        link.send("done", number, RewardFailure.from_exception(error))
    else:
        link.send("started", number)
        return call
    return None


class _MarkedCoroutine(Coroutine[Any, Any, Any]):
    """A coroutine that marks its call as running while its own code holds the event loop."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, link: TrainerLink) -> None:
        self._coroutine, self._number, self._link = coroutine, number, link

    def send(self, value: Any) -> Any:
        self._link.mark_running(self._number)
        try:
            return self._coroutine.send(value)
        finally:
            self._link.mark_running(0)

    def throw(self, *error: Any) -> Any:
        self._link.mark_running(self._number)
        try:
            return self._coroutine.throw(*error)
        finally:
            self._link.mark_running(0)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()


def is_worker_process() -> bool:
    """True in a process that runs nothing but calls."""
    return _is_worker.is_set()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Has the system send this process a signal when its parent ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def be_first_out_of_memory() -> None:
    """Has the system end this process, and not the trainer, where memory runs out; on Linux only."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as score:
        score.write("1000")


def main(connection_fd: int, running_fd: int, is_async: bool, timeout_s: float) -> None:
    """Body of a worker process.

    Args:
        connection_fd: of the socket to the trainer.
        running_fd: of the file that holds `RUNNING`.
        is_async: serve coroutines; else plain calls.
        timeout_s: limit of a coroutine.
    """
    _is_worker.set()
    # A function that hangs must not outlive a trainer that was killed.
    die_with_parent()
    be_first_out_of_memory()
    # A killed process would lose what its functions printed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    link = PipeLink(Connection(connection_fd), mmap.mmap(running_fd, RUNNING.size))
    if is_async:
        asyncio.run(serve_async(link, timeout_s))
    else:
        serve_plain(link)
    os._exit(0)  # Threads of users' libraries do not keep the process alive.
