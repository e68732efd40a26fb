"""A server in a process of its own: started with a log, ended with all that it started, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from verl.controller.worker_process import tail
from verl.rollout.engine import EngineError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
# Loaded here: between fork and exec nothing may be.
_LIBC = ctypes.CDLL(None)


class ServerProcess:
    """A command that serves until it is ended.

    It is the leader of a process group, which is ended as a whole, and dies with this process, however that
    ends.

    Args:
        name: for messages.
        command: program and arguments.
        environment: added to that of this process; None removes a variable.
        log: takes its output, after what is there already.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str | None], log: Path
    ) -> None:
        self._name, self._log = name, log
        settings = {**os.environ, **environment}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={name: value for name, value in settings.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        """Of the process, which is the number of its group, too."""
        return self._process.pid

    def check(self) -> None:
        """Returns if it runs.

        Raises:
            EngineError: it has ended, with the last lines of its log.
        """
        if self._process.poll() is not None:
            raise EngineError(
                f"{self._name} has ended with code {self._process.returncode}{self.last_lines()}"
            )

    def last_lines(self) -> str:
        """The end of its log, to be put after a message."""
        lines = "\n".join(f"    {line}" for line in tail(self._log)) or "    (nothing)"
        return f"\n  the last lines of its log, {self._log}:\n{lines}"

    async def end(self, *, grace_s: float = 5.0) -> None:
        """Ends the whole group: asked first, killed after the grace."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
            # One that is stopped would not hear it.
            os.killpg(self.pid, signal.SIGCONT)
        waited_s = 0.0
        while waited_s < grace_s and self._process.poll() is None:
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        waited_s = 0.0
        # One that waits for a device cannot even be killed until that answers.
        while waited_s < grace_s and (self._process.poll() is None or _has_members(self.pid)):
            await asyncio.sleep(_POLL_S)
            waited_s += _POLL_S


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
