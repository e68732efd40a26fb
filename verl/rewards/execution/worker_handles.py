"""Trainer side of workers: a process that can be killed, or a thread that can only be left behind."""

from __future__ import annotations

import asyncio
import json
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
from typing_extensions import override

from verl.rewards.execution.call_worker import (
    RUNNING,
    EventKind,
    Request,
    TrainerLink,
    serve_async,
    serve_plain,
    unpickled,
)
from verl.rewards.execution.isolation import Callee
from verl.rewards.failures import RewardFailure
from verl.rewards.reward_log import logging_call
from verl.utils.process_id import exit_text

Event = tuple[EventKind, int, Any]
# Not `python -m`: the module would then be there twice, and the trainer's own path may hold verl.
_PROGRAM = """
import json, sys
path, *arguments = json.loads(sys.argv.pop())
sys.path[:] = path
from verl.rewards.execution.call_worker import main
main(*arguments)
"""
# For a process to be gone after its connection has closed.
_EXIT_S = 1.0


class WorkerLostError(Exception):
    """A worker that has died, or no longer reads; says how.

    Attributes:
        exit_code: of its process, negative for a signal; None if it has not ended.
    """

    def __init__(self, cause: str, exit_code: int | None = None) -> None:
        super().__init__(cause)
        self.exit_code = exit_code


class CallWorker(ABC):
    """Runs calls, of which it reports events."""

    @abstractmethod
    def submit(self, number: int, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Hands it a call, with a number that is not 0.

        Raises:
            ValueError: an argument cannot be sent to it.
            WorkerLostError: it has died.
        """

    @abstractmethod
    def receive(self, timeout_s: float) -> Event | None:
        """Its next event; None if there is none in that time.

        Raises:
            WorkerLostError: it has died.
        """

    @abstractmethod
    def running(self) -> int:
        """Number of the call whose code runs, if calls share it; else 0."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it, whatever it does."""


class ProcessWorker(CallWorker):
    """A process that runs nothing but calls; it and all processes that it starts can be killed at any time.

    It is a fresh interpreter and no fork of the trainer, whose threads and devices a fork would break; nor
    does it import the trainer's main program again, as `multiprocessing` would.

    Args:
        is_async: runs coroutines, at the same time; else plain calls, one by one.
        timeout_s: limit of a coroutine.
    """

    def __init__(self, *, is_async: bool, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        # A worker that is stuck inside a message must not block the trainer with it.
        limit = struct.pack("ll", math.ceil(2 * timeout_s), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._known: set[int] = set()  # keys of the functions that it has been sent
        self._connection = Connection(ours.detach())
        with theirs, tempfile.TemporaryFile() as file:
            file.truncate(RUNNING.size)
            self._running = mmap.mmap(file.fileno(), RUNNING.size)
            arguments = [sys.path, theirs.fileno(), file.fileno(), is_async, timeout_s]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), file.fileno()),
                # Its own group, to be killed as a whole; a Ctrl-C in the terminal is the trainer's alone.
                start_new_session=True,
                # Workers must agree on hashes, or one answer could have two rewards.
                env={"PYTHONHASHSEED": "0", **os.environ},
            )

    @override
    def submit(self, number: int, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        try:
            arguments = cloudpickle.dumps((args, kwargs))
        except Exception as error:  # The data's own code may raise anything.
            raise ValueError(f"the arguments cannot be sent to its process: {error}") from error
        definition = None if callee.key in self._known else callee.definition
        self._known.add(callee.key)
        try:
            self._connection.send((number, callee.key, definition, arguments))
        except OSError as error:
            raise self._loss() from error

    @override
    def receive(self, timeout_s: float) -> Event | None:
        try:
            if not self._connection.poll(timeout_s):
                return None
            kind, number, body = self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._loss() from error
        try:
            return kind, number, unpickled(body)
        except Exception as error:  # The value's own code may raise anything.
            return kind, number, RewardFailure("reward_wrong_type", f"the value cannot be read: {error}")

    @override
    def running(self) -> int:
        (number,) = RUNNING.unpack_from(self._running)
        return int(number)

    @override
    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # It is gone, with all of its group.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _loss(self) -> WorkerLostError:
        """The way in which it has died."""
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return WorkerLostError("its process no longer answers")
        return WorkerLostError(f"its process {exit_text(code)}", code)


class _QueueLink(TrainerLink):
    """A link to a worker on a thread; a request is made ready, since nothing has to be loaded."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.running = 0

    @override
    def receive(self) -> Request | None:
        return self.requests.get()

    @override
    def send(self, kind: EventKind, number: int, value: Any = None) -> None:
        self.events.put((kind, number, value))

    @override
    def mark_running(self, number: int) -> None:
        self.running = number


class ThreadWorker(CallWorker):
    """A daemon thread of the trainer for functions that cannot leave it; `kill` leaves it behind.

    Args:
        is_async: runs coroutines, at the same time; else plain calls, one by one.
        timeout_s: limit of a coroutine.
    """

    def __init__(self, *, is_async: bool, timeout_s: float) -> None:
        self._link = _QueueLink()
        link = self._link
        serve = (
            (lambda: asyncio.run(serve_async(link, timeout_s))) if is_async else partial(serve_plain, link)
        )
        self._thread = threading.Thread(target=serve, name="verl-reward", daemon=True)
        self._thread.start()

    @override
    def submit(self, number: int, callee: Callee, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        bound = logging_call(callee.function, args, kwargs)
        self._link.requests.put((number, lambda: bound))

    @override
    def receive(self, timeout_s: float) -> Event | None:
        try:
            return self._link.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @override
    def running(self) -> int:
        return self._link.running

    @override
    def kill(self) -> None:
        self._link.requests.put(None)

    @property
    def is_alive(self) -> bool:
        """True while it runs, be it left behind or not."""
        return self._thread.is_alive()
