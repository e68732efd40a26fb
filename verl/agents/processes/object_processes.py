"""Objects of user code, each in a process of its own that can be killed, and their calls from the trainer."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from verl.agents.processes.fork_server_handle import ForkServerHandle, ForkServerLostError, HostedProcess
from verl.agents.processes.object_host import MAKE, MAX_REPLY_BYTES, REPLY, REQUEST, ReplyKind
from verl.agents.processes.process_failure import ProcessFailure
from verl.rewards.execution.call_worker import Definition, unpickled
from verl.utils.event_loops import BackgroundLoop
from verl.utils.process_id import exit_text

# Time for the import of the user's module, and for an object to be made.
LOAD_LIMIT_S = 120.0
# Time for a coroutine that is cancelled to end; then its process is killed.
_CANCEL_S = 0.5
# For a result that lies ready after the time limit, since this process was busy.
_LAST_LOOK_S = 0.05

_LOG = logging.getLogger(__name__)


def definition_of(given: Any) -> Definition:
    """A class or function as it is sent to a process.

    Args:
        given: "file.py:name", "package.module:name", a definition, or the object itself, which
            is pickled by value where its module is the main program, and else by its name.

    Raises:
        ValueError: it cannot be sent.
    """
    if isinstance(given, (tuple, bytes)):
        return given
    if isinstance(given, str):
        place, _, name = given.rpartition(":")
        # The process may be started in another folder.
        return (str(Path(place).expanduser().resolve()) if place.endswith(".py") else place, name)
    try:
        return cloudpickle.dumps(given)
    except Exception as error:  # what it holds may raise anything
        raise ValueError(
            f"need a class or function that can be sent to another process, got {given!r}: {error}; put it "
            'into a file and name it as "file.py:name"'
        ) from error


class ObjectProcess:
    """One object in a process of its own; made by `ObjectProcesses.open`.

    Attributes:
        hosted: its process.
    """

    def __init__(self, hosted: HostedProcess, loop: BackgroundLoop, release: Callable[[], None]) -> None:
        self.hosted = hosted
        self._loop, self._release = loop, release
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._loss = ""
        self._is_closed = False

    @property
    def is_lost(self) -> bool:
        """True if the process has ended or was killed, so that no further call can succeed."""
        return bool(self._loss)

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self.hosted.pid

    async def call(self, method: str, /, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Result of a method, plain or a coroutine; `__call__` for an object that is itself called.

        Plain methods run one after the other, coroutines at the same time. A coroutine that is over its
        limit is cancelled; if that does not end it, and for a plain method, the process is killed.

        Args:
            method: its name.
            *args: its arguments.
            timeout_s: its time limit, counted by a clock that generation in this process does not stop.
            **kwargs: its named arguments.

        Raises:
            ProcessFailure: it gave no value.
        """
        try:
            body = cloudpickle.dumps((method, args, kwargs))
        except Exception as error:  # what they hold may raise anything
            raise ProcessFailure("error", f"the arguments cannot be sent to its process: {error}") from error
        kind, reply = await self._loop.result_of(self._exchange(body, timeout_s))
        if kind == ReplyKind.ERROR:
            raise ProcessFailure("error", reply.decode(errors="replace"))
        try:
            return unpickled(reply)
        except Exception as error:  # the value's own code may raise anything
            raise ProcessFailure("error", f"the result cannot be read: {error}") from error

    async def close(self) -> None:
        """Kill the process and all that it has started; may be called again."""
        await self._loop.result_of(self.end())

    async def serve(self) -> None:
        """Pass replies on until the process ends; runs in the loop of the pool."""
        detail = ""
        try:
            while not detail:
                number, kind, length = REPLY.unpack(await self.hosted.reader.readexactly(REPLY.size))
                if length > MAX_REPLY_BYTES or kind not in set(ReplyKind):
                    detail = "its process sent what is no reply; user code has written to its connection"
                    break
                body = await self.hosted.reader.readexactly(length)
                future = self._waiting.get(number)
                if future and not future.done():
                    future.set_result((kind, body))
        except (asyncio.IncompleteReadError, OSError):
            pass
        code = await self.hosted.exit_code(kill=bool(detail))
        told = "has closed its connection" if code is None else exit_text(code)
        self.lose(detail or f"its process {told}")

    def lose(self, loss: str) -> None:
        """Fail all calls, now and later."""
        self._loss = self._loss or loss
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ProcessFailure("crash", self._loss, is_lost=True))

    async def end(self) -> None:
        """As `close`, in the loop of the pool."""
        if self._is_closed:
            return
        self._is_closed = True
        self.lose("its process was closed")
        try:
            await self.hosted.end()
        finally:
            self._release()

    async def _exchange(self, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        if self._loss:
            raise ProcessFailure("crash", f"{self._loss}, in an earlier call", is_lost=True)
        number = next(self._numbers)
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self.hosted.writer.write(REQUEST.pack(number, len(body)) + body)
            return await self._reply(number, future, timeout_s)
        except asyncio.CancelledError:  # nobody waits any more
            self.hosted.writer.write(REQUEST.pack(number, 0))
            raise
        finally:
            del self._waiting[number]

    async def _reply(
        self, number: int, future: asyncio.Future[tuple[int, bytes]], timeout_s: float
    ) -> tuple[int, bytes]:
        """The reply to a request.

        Raises:
            ProcessFailure: there is none in time.
        """
        for seconds in (timeout_s, _LAST_LOOK_S):
            await asyncio.wait({future}, timeout=seconds)
            if future.done():
                return future.result()
        self.hosted.writer.write(REQUEST.pack(number, 0))
        await asyncio.wait({future}, timeout=_CANCEL_S)
        over = f"no result within {timeout_s:g} s"
        if not future.done():
            future.cancel()
            self.lose(f"its process was killed, since a call gave {over}")
            await self.hosted.end()
            raise ProcessFailure("timeout", over, is_lost=True)
        kind, reply = future.result()
        if kind == ReplyKind.CANCELLED:
            raise ProcessFailure("timeout", over)
        return kind, reply


class ObjectProcesses:
    """Processes that each hold one object of the same definition.

    They are forked from a process that has imported the definition once, and not the trainer; where the
    import starts threads, which a fork would lose, each process imports it itself. None survives the trainer.

    Args:
        definition: makes an object from the arguments of `open`: a class or function, see `definition_of`.
        max_processes: at a time; `open` waits for one of them to be closed.
        name: of the object, for messages and in front of the lines that its code prints.
        preload: further definitions to be imported before the processes are forked.
        load_limit_s: time limit of the import.
        note: called with a sentence for the user.
        python: interpreter of the processes, with packages of its own; None: that of the trainer.
    """

    def __init__(
        self,
        definition: Any,
        *,
        max_processes: int = 64,
        name: str = "object",
        preload: Sequence[Any] = (),
        load_limit_s: float = LOAD_LIMIT_S,
        note: Callable[[str], None] = _LOG.warning,
        python: str | None = None,
    ) -> None:
        self.name, self._python = name, python
        self._start = (definition_of(definition), [definition_of(each) for each in preload])
        self._max_processes, self._load_limit_s, self._note = max_processes, load_limit_s, note
        self._loop: BackgroundLoop | None = None
        self._server: ForkServerHandle | None = None
        self._imports_now = True
        self._tasks: set[asyncio.Task[None]] = set()  # The loop itself keeps only weak references.

    async def open(
        self, *args: Any, random_seed: int | None = None, timeout_s: float = LOAD_LIMIT_S, **kwargs: Any
    ) -> ObjectProcess:
        """A process with a new object.

        Args:
            *args: of the definition.
            random_seed: of the global random numbers of Python, NumPy and PyTorch; None: not repeatable.
            timeout_s: time limit of making the object.
            **kwargs: of the definition.

        Raises:
            ProcessFailure: it cannot be imported or made.
        """
        if self._loop is None or self._loop.is_closed:
            self._loop = BackgroundLoop(f"processes of {self.name}")
            self._free = asyncio.Semaphore(self._max_processes)
            self._starting = asyncio.Lock()
        loop = self._loop
        opened: list[ObjectProcess] = []
        try:
            process = await loop.result_of(self._fork(loop, opened))
            await process.call(MAKE, random_seed, *args, timeout_s=timeout_s, **kwargs)
        except BaseException:
            # Also where this task was cancelled while the process was on its way to it.
            loop.call_soon(lambda: self._end_all(opened))
            raise
        return process

    def close(self) -> None:
        """Kill all processes; may be called again."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.run(self._end_server())
            loop.close()

    async def _fork(self, loop: BackgroundLoop, opened: list[ObjectProcess]) -> ObjectProcess:
        await self._free.acquire()
        try:
            hosted = await self._fork_once()
        except BaseException:
            self._free.release()
            raise
        process = ObjectProcess(hosted, loop, self._free.release)
        self._keep(process.serve())
        opened.append(process)
        return process

    def _end_all(self, processes: Sequence[ObjectProcess]) -> None:
        for process in processes:
            self._keep(process.end())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fork_once(self) -> HostedProcess:
        for _ in range(2):
            server = await self._running_server()
            try:
                return await server.fork()
            except ForkServerLostError:  # user code has killed it: start another one
                await self._end_server()
        raise ProcessFailure("crash", "the process that starts others was killed twice")

    async def _running_server(self) -> ForkServerHandle:
        async with self._starting:
            if self._server is None:
                self._server = await self._started_server()
                if self._server.num_threads:
                    self._note(
                        f"{self.name}: its import starts {self._server.num_threads} threads, so each process "
                        "imports it again, which is slower; start threads in its constructor instead"
                    )
                    await self._server.end()
                    self._imports_now = False
                    self._server = await self._started_server()
            return self._server

    async def _started_server(self) -> ForkServerHandle:
        server = ForkServerHandle(self.name, self._python)
        try:
            await server.start((*self._start, self._imports_now), timeout_s=self._load_limit_s)
        except BaseException:
            await server.end()
            raise
        return server

    async def _end_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.end()
