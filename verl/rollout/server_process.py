"""A server in a process of its own: its log is kept, and it ends with all processes that it started."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from verl.controller.worker_process import tail
from verl.rollout.inference_server import EngineError
from verl.utils.network import proxy_exceptions, socket_folder

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_EXCEPTION = re.compile(r"(^|[\s.])[A-Z]\w*(Error|Exception): ")
_LOWER_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|W\d{4})\b")
# Loaded at import: nothing may be loaded between fork and exec.
_LIBC = ctypes.CDLL(None)


class ServerProcess:
    """A command that serves until it is ended.

    It leads a process group, which is ended as a whole. On Linux it is killed when this process ends in any
    way.

    Args:
        name: for messages.
        command: program and arguments.
        environment: variables added to those of this process; None removes one.
        log: file that its output is appended to.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str | None], log: Path
    ) -> None:
        self._name, self._log = name, log
        variables = {**os.environ, **proxy_exceptions(), "TMPDIR": socket_folder(), **environment}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={name: value for name, value in variables.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        """Id of the process and of its process group."""
        return self._process.pid

    def check(self) -> None:
        """Raise EngineError, with cause and last lines of the log, if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise EngineError(f"{self._name} has ended with code {code}{self.last_lines()}")

    def last_lines(self) -> str:
        """First error and last lines of the log, to append to a message."""
        last = tail(self._log)
        lines = "\n".join(f"    {line}" for line in last) or "    (nothing)"
        cause = first_error(self.log_lines())
        # The end of a log says that a process failed because another one did; the cause stands above.
        above = f"\n  the first error in its log:\n    {cause}" if cause and cause not in last[-1:] else ""
        return f"{above}\n  the last lines of its log, {self._log}:\n{lines}"

    def log_lines(self) -> list[str]:
        """Lines of the log since the start of this process."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    async def end(self, *, grace_s: float = 5.0) -> None:
        """End the whole process group: terminate it, and kill it after the grace period."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
            # A stopped process handles the signal only after it is continued.
            os.killpg(self.pid, signal.SIGCONT)
        waited_s = 0.0
        while waited_s < grace_s and self._process.poll() is None:
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        waited_s = 0.0
        # Even a killed process stays while it waits for a device.
        while waited_s < grace_s and (self._process.poll() is None or group_exists(self.pid)):
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S


def first_error(lines: Iterable[str]) -> str | None:
    """The first line with an exception, without those of lower levels, such as of an optional import."""
    found = (line for line in lines if _EXCEPTION.search(line) and not _LOWER_LEVEL.search(line))
    return next((line.strip() for line in found), None)


def group_exists(group: int) -> bool:
    """True if a process group has processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def cause_of(error: EngineError, check: Callable[[], None] | None) -> EngineError:
    """The end of the process as the cause of an error, if it ends within a second, else the error.

    A process that dies closes its sockets before its end can be seen, so a request may fail first.

    Args:
        error: of a request.
        check: raises EngineError if the process has ended; None: the process is not ours.
    """
    if check is None:
        return error
    for _ in range(20):
        try:
            check()
        except EngineError as ended:
            return ended
        await asyncio.sleep(0.05)
    return error
