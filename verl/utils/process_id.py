"""Which process one was, so that another can ask later whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProcessState = Literal["works", "is stopped", "waits in the system", "is gone", "is on another host"]
# Letters of /proc/PID/stat, https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
_LIVES: dict[str, ProcessState] = {
    "T": "is stopped",
    "t": "is stopped",
    "D": "waits in the system",
    "Z": "is gone",
    "X": "is gone",
}


@dataclass(frozen=True)
class ProcessId:
    """A process among all that ever were.

    Attributes:
        host: its machine or container.
        pid: its number there.
        started: when it began, in the units of its system; 0 where that is not known. Numbers of processes
            come again, these do not.
    """

    host: str
    pid: int
    started: int = 0


def this_process() -> ProcessId:
    """The one that asks."""
    return ProcessId(socket.gethostname(), os.getpid(), _stat(os.getpid())[1])


def process_state(process: ProcessId) -> ProcessState:
    """What a process does."""
    if process.host != socket.gethostname():
        return "is on another host"
    letter, started = _stat(process.pid)
    if letter:
        return "is gone" if process.started and started != process.started else _LIVES.get(letter, "works")
    return "is gone" if Path("/proc/self/stat").exists() or not _answers(process.pid) else "works"


def _stat(pid: int) -> tuple[str, int]:
    """State and start of a process as Linux tells them; ("", 0) without."""
    try:
        # The name of the program is in parentheses, and may have some of its own.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
