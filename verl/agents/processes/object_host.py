"""Process that holds one object of user code and runs its methods, as the trainer asks.

It is forked from `verl.agents.processes.fork_server` and imports no torch. Plain methods run one after the
other on the main thread; coroutines run at the same time on an event loop that never stands still, so that
connections which they keep stay alive between two calls.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from enum import IntEnum
from socket import socket
from typing import Any

import cloudpickle

from verl.rewards.execution.call_worker import Definition, unpickled
from verl.utils.user_code import exception_text, import_function

# A request: number, length of its body, a pickle of (method, arguments, named arguments); length 0 cancels.
REQUEST = struct.Struct("=QQ")
# A reply: number of the request, kind, length of its body.
REPLY = struct.Struct("=QBQ")
# Method of the request that makes the object.
MAKE = ""
# Longest pickle of a result.
MAX_REPLY_BYTES = 64 << 20


class ReplyKind(IntEnum):
    """Kind of a reply: the pickle of a value, the text of an error, or nothing since it was cancelled."""

    VALUE = 0
    ERROR = 1
    CANCELLED = 2


def loaded(definition: Definition) -> Callable[..., Any]:
    """The class or function of a definition.

    Raises:
        Exception: whatever its import raises.
    """
    if isinstance(definition, bytes):
        found: Callable[..., Any] = unpickled(definition)
        return found
    return import_function(*definition, keeps_class=True)


def seed_libraries(seed: int | None) -> None:
    """Seed the global random numbers of the libraries that are loaded; a fork would share those of NumPy."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(None if seed is None else seed % (1 << 32))
    if (torch := sys.modules.get("torch")) and seed is not None:
        torch.manual_seed(seed)


async def attempt_coroutine(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, str]:
    """Value of a coroutine and "", or None and its error in words; SystemExit would end the loop."""
    try:
        return await coroutine, ""
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # user code, which may raise anything
        return None, exception_text(error)


class ObjectHost:
    """One object, and the loop that runs its methods until the trainer closes the connection.

    Args:
        connection: to the trainer.
        definition: of the object, if it has not been loaded yet.
        factory: makes the object; None: load the definition.
    """

    def __init__(
        self, connection: socket, definition: Definition, factory: Callable[..., Any] | None
    ) -> None:
        self._connection, self._definition, self._factory = connection, definition, factory
        self._object: Any = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[int, asyncio.Task[Any]] = {}

    def serve(self) -> None:
        """Run requests until the connection closes."""
        while header := self._receive(REQUEST.size):
            number, length = REQUEST.unpack(header)
            if length == 0:
                self._cancel(number)
            elif body := self._receive(length):
                self._run(number, body)

    def _run(self, number: int, body: bytes) -> None:
        try:
            method, args, kwargs = unpickled(body)
            value = None
            if method == MAKE:
                self._object = self._made(args, kwargs)
            else:
                value = getattr(self._object, method)(*args, **kwargs)
        except BaseException as error:  # user code, which may raise anything
            self._reply(number, ReplyKind.ERROR, exception_text(error).encode())
            return
        if not asyncio.iscoroutine(value):
            self._reply_value(number, value)
            return
        self._own_loop().call_soon_threadsafe(self._begin, number, value)

    def _begin(self, number: int, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._running[number] = task = asyncio.ensure_future(attempt_coroutine(coroutine))
        task.add_done_callback(lambda task: self._reply_task(number, task))

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seed, *args_of_object = args
        if self._factory is None:
            self._factory = loaded(self._definition)
        seed_libraries(seed)
        return self._factory(*args_of_object, **kwargs)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="coroutines", daemon=True).start()
        return self._loop

    def _cancel(self, number: int) -> None:
        if self._loop is not None:
            # A coroutine may swallow it; then there is no reply, and the trainer kills this process.
            self._loop.call_soon_threadsafe(
                lambda: number in self._running and self._running[number].cancel()
            )

    def _reply_task(self, number: int, task: asyncio.Task[Any]) -> None:
        del self._running[number]
        if task.cancelled():
            self._reply(number, ReplyKind.CANCELLED, b"")
            return
        value, error = task.result()
        if error:
            self._reply(number, ReplyKind.ERROR, error.encode())
        else:
            self._reply_value(number, value)

    def _reply_value(self, number: int, value: Any) -> None:
        try:
            body = cloudpickle.dumps(value)
        except BaseException as error:  # the value's own code may raise anything
            text = f"need a result that can leave its process, got {type(value).__name__}: {error}"
            self._reply(number, ReplyKind.ERROR, text.encode())
            return
        if len(body) > MAX_REPLY_BYTES:
            text = (
                f"need a result of at most {MAX_REPLY_BYTES >> 20} MiB, got {type(value).__name__} with "
                f"{len(body) >> 20} MiB; return less"
            )
            self._reply(number, ReplyKind.ERROR, text.encode())
            return
        self._reply(number, ReplyKind.VALUE, body)

    def _reply(self, number: int, kind: ReplyKind, body: bytes) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # user code may have closed or replaced it
                stream.flush()
        with self._lock:
            self._connection.sendall(REPLY.pack(number, kind, len(body)) + body)

    def _receive(self, length: int) -> bytes:
        """That many bytes; none if the trainer has closed its end."""
        received = bytearray()
        while len(received) < length:
            chunk = self._connection.recv(min(length - len(received), 1 << 20))
            if not chunk:
                return b""
            received += chunk
        return bytes(received)


def host_object(connection: socket, definition: Definition, factory: Callable[..., Any] | None) -> None:
    """Serve one object, then end the process; threads of users' libraries do not keep it alive."""
    code = 1
    with suppress(OSError):  # the trainer has gone
        ObjectHost(connection, definition, factory).serve()
        code = 0
    os._exit(code)
