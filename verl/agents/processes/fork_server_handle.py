"""Trainer side of a fork server: starts it, has it fork and kill processes, and relays what they print."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl.agents.processes.fork_server import FORK, KILL, LENGTH, ORDER
from verl.agents.processes.process_failure import ProcessFailure
from verl.rewards.execution.call_worker import Definition
from verl.utils.process_id import exit_text

# Not `python -m`: the module would then be there twice, and the trainer's own path may hold verl. Another
# interpreter keeps its own path, and finds only the packages in `places` where the trainer has them.
_PROGRAM = """
import importlib.machinery, json, sys
path, places, *arguments = json.loads(sys.argv.pop())
class Places:
    @staticmethod
    def find_spec(name, path=None, target=None):
        place = places.get(name) if path is None else None
        return place and importlib.machinery.PathFinder.find_spec(name, [place])
sys.meta_path.append(Places)
if path is not None:
    sys.path[:] = path
from verl.agents.processes.fork_server import main
main(*arguments)
"""
# Packages that a process imports besides Python's own; all are pure Python.
_NEEDED = ("verl", "cloudpickle", "typing_extensions")
# Processes on the same machine agree on hashes, and many of them do not compete for its cores.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
# Printed by one process; beyond that it is left out.
MAX_OUTPUT_BYTES = 1 << 20
# For a process to be gone after it was killed.
_EXIT_S = 5.0


class ForkServerLostError(Exception):
    """The fork server has ended."""


def program_of(python: str | None) -> list[str]:
    """Command of a fork server without its arguments."""
    return [sys.executable if python is None else python, "-c", _PROGRAM]


def paths_of(python: str | None) -> tuple[list[str] | None, dict[str, str]]:
    """The path of a fork server, and where another interpreter finds the packages that it needs."""
    if python is None:
        return sys.path, {}
    specs = {name: importlib.util.find_spec(name) for name in _NEEDED}
    files = {name: Path(spec.origin) for name, spec in specs.items() if spec and spec.origin}
    return None, {
        name: str(file.parents[1] if file.name == "__init__.py" else file.parent)
        for name, file in files.items()
    }


class OutputRelay:
    """Copies what a process prints to standard error of the trainer, line by line, so that it never waits.

    Args:
        name: in front of each line.
        descriptor: reading end of its pipe; closed by `close`.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor, self._rest, self._num_bytes = descriptor, b"", 0
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self.read)

    def read(self) -> bool:
        """Copy a part of what is there; False if there is nothing."""
        try:
            chunk = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._loop.remove_reader(self._descriptor)
            return False
        before, self._num_bytes = self._num_bytes, self._num_bytes + len(chunk)
        if before >= MAX_OUTPUT_BYTES:
            return True
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self.write(lines)
        if self._num_bytes >= MAX_OUTPUT_BYTES:
            self.write([self._rest, b"... printed over %d bytes, the rest is left out" % MAX_OUTPUT_BYTES])
            self._rest = b""
        return True

    def write(self, lines: Sequence[bytes]) -> None:
        """Write lines to standard error."""
        text = "".join(f"[{self.name}] {line.decode(errors='replace')}\n" for line in lines)
        with suppress(OSError, ValueError):  # it is closed
            sys.stderr.write(text)

    def close(self) -> None:
        """Copy the rest and stop; may be called again."""
        if self._descriptor < 0:
            return
        # At most what a pipe holds; a process that was not killed may write on and on.
        for _ in range(64):
            if not self.read():
                break
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._rest:
            self.write([self._rest])


class HostedProcess:
    """A process of a fork server.

    Attributes:
        pid: its number.
        reader, writer: its connection.
        ended: its exit code, negative for a signal.
    """

    def __init__(
        self,
        server: ForkServerHandle,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        output: OutputRelay,
    ) -> None:
        self.pid = 0
        self.reader, self.writer = reader, writer
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._server, self._output = server, output
        self._is_over = False

    async def exit_code(self, *, kill: bool = False) -> int | None:
        """Exit code of the process, whose connection has closed; one that still runs is killed, None."""
        if not kill:
            await asyncio.wait({self.ended}, timeout=1.0)
        code = self.ended.result() if self.ended.done() else None
        await self.end()
        return code

    async def end(self) -> None:
        """Kill it, and wait until it is gone; may be called again."""
        if not self.ended.done() and self.pid:
            self._server.order(KILL, self.pid)
            await asyncio.wait({self.ended}, timeout=_EXIT_S)
        if not self._is_over:
            self._is_over = True
            self.writer.transport.abort()
            self._output.close()


class ForkServerHandle:
    """A fork server, as the trainer sees it; all methods run in one event loop.

    Args:
        name: of the objects, in front of the lines that are printed.
        python: interpreter of its processes; None: that of the trainer.

    Attributes:
        num_threads: that the import of the definition has started.
    """

    def __init__(self, name: str, python: str | None = None) -> None:
        self.name, self.num_threads = name, 0
        self._python = python
        self._numbers = itertools.count(1)
        self._forking: dict[int, tuple[HostedProcess, asyncio.Future[None]]] = {}
        self._hosted: dict[int, HostedProcess] = {}
        self._is_lost = False
        self._reports: asyncio.Task[None] | None = None

    async def start(self, start: tuple[Definition, Sequence[Definition], bool], *, timeout_s: float) -> None:
        """Start the process, and wait for its import.

        Args:
            start: see `fork_server.receive_start`.
            timeout_s: limit of the import.

        Raises:
            ProcessFailure: the import failed.
        """
        output, output_of_child = os.pipe()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*program_of(self._python), json.dumps([*paths_of(self._python), theirs.fileno()])],
                stdin=subprocess.DEVNULL,
                stdout=output_of_child,
                stderr=output_of_child,
                pass_fds=(theirs.fileno(),),
                # A Ctrl-C in the terminal is the trainer's alone.
                start_new_session=True,
                env={**_ENVIRONMENT, **os.environ},
            )
        os.close(output_of_child)
        self._output = OutputRelay(self.name, output)
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        body = pickle.dumps(start)
        self._writer.write(LENGTH.pack(len(body)) + body)
        try:
            line = await asyncio.wait_for(self._reader.readline(), timeout_s)
        except asyncio.TimeoutError:
            raise ProcessFailure("timeout", f"no end of its import within {timeout_s:g} s") from None
        except OSError:
            line = b""
        if not line:
            code = self._process.wait(_EXIT_S)
            raise ProcessFailure("crash", f"its process {exit_text(code)} during the import")
        report = json.loads(line)
        if "failed" in report:
            raise ProcessFailure("error", report["failed"])
        self.num_threads = report["threads"]
        self._reports = asyncio.ensure_future(self._follow_reports())

    async def fork(self) -> HostedProcess:
        """A new process.

        Raises:
            ForkServerLostError: this one has ended.
        """
        ours, theirs = socket.socketpair()
        output, output_of_child = os.pipe()
        reader, writer = await asyncio.open_connection(sock=ours)
        number = next(self._numbers)
        hosted = HostedProcess(self, reader, writer, OutputRelay(self.name, output))
        has_forked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forking[number] = hosted, has_forked
        try:
            self.order(FORK, number, [theirs.fileno(), output_of_child])
            await has_forked
        except BaseException:
            await hosted.end()
            raise
        finally:
            theirs.close()
            os.close(output_of_child)
        return hosted

    def order(self, kind: bytes, number: int, descriptors: Sequence[int] = ()) -> None:
        """Send an order.

        Raises:
            ForkServerLostError: the process has ended, and an order to fork makes no sense.
        """
        try:
            if self._is_lost:
                raise OSError("it has ended")
            socket.send_fds(self._socket, [ORDER.pack(kind, number)], list(descriptors))
        except OSError as error:
            if kind == FORK:
                raise ForkServerLostError(str(error)) from error

    async def end(self) -> None:
        """End it and all of its processes; may be called again."""
        self._writer.transport.abort()
        if self._reports is None:  # it is still importing, and may hang
            self._process.kill()
        else:
            await asyncio.wait({self._reports})
        await asyncio.to_thread(self._process.wait)
        self._mark_lost()
        self._output.close()

    async def _follow_reports(self) -> None:
        with suppress(OSError):
            while line := await self._reader.readline():
                self._note_report(json.loads(line))
        self._mark_lost()

    def _note_report(self, report: dict[str, Any]) -> None:
        if "forked" in report:
            hosted, has_forked = self._forking.pop(report["forked"])
            hosted.pid = report["pid"]
            self._hosted[hosted.pid] = hosted
            if has_forked.cancelled():  # nobody wants it any more
                self.order(KILL, hosted.pid)
            else:
                has_forked.set_result(None)
        else:
            hosted = self._hosted.pop(report["ended"])
            if not hosted.ended.done():
                hosted.ended.set_result(report["code"])

    def _mark_lost(self) -> None:
        self._is_lost = True
        for _, has_forked in self._forking.values():
            if not has_forked.done():
                has_forked.set_exception(ForkServerLostError("it has ended"))
        for hosted in self._hosted.values():
            if not hosted.ended.done():
                hosted.ended.set_result(-signal.SIGKILL)
        self._forking.clear()
        self._hosted.clear()
