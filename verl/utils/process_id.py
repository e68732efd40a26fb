"""Identity of a process, with which another one can check whether it still runs; its end in words."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ProcessState = Literal["running", "stopped", "in uninterruptible sleep", "gone", "on another host"]
# Letters of /proc/PID/stat, https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html; others are running.
_STATES: dict[str, ProcessState] = {
    "T": "stopped",
    "t": "stopped",
    "D": "in uninterruptible sleep",
    "Z": "gone",
    "X": "gone",
}


@dataclass(frozen=True)
class ProcessId:
    """A process, distinguished from others that had the same pid.

    Attributes:
        host: name of its machine or container.
        pid: its number there.
        started: start time in clock ticks since the machine booted; 0 where it is unknown. Exact, unlike a
            time of day, which shifts when the clock is set.
    """

    host: str
    pid: int
    started: int = 0


def this_process() -> ProcessId:
    """The calling process."""
    return ProcessId(socket.gethostname(), os.getpid(), _read_stat(os.getpid())[1])


def process_state(process: ProcessId) -> ProcessState:
    """The current state of a process, as far as it can be seen from this one."""
    if process.host != socket.gethostname():
        return "on another host"
    letter, started = _read_stat(process.pid)
    if letter:
        is_other = process.started and started != process.started
        return "gone" if is_other else _STATES.get(letter, "running")
    if Path("/proc/self/stat").exists():
        return "gone"
    # Outside Linux a signal without effect shows whether the process exists.
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # it exists, and is another user's
        return "running"
    return "running"


def exit_text(code: int) -> str:
    """The end of a process in words, such as "ended with exit code 1".

    Args:
        code: exit code, negative for a signal.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"was killed by {name}{', maybe for lack of memory' * (name == 'SIGKILL')}"


def _read_stat(pid: int) -> tuple[str, int]:
    """State letter and start time of a process on Linux; ("", 0) if it is gone, or on another system."""
    try:
        # The program's name is in parentheses and may contain some, so fields count from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])
