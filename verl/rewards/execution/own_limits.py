"""Limits that a call sets itself in a worker process: processor time and memory.

A call that uses up its time limit in `verl.rewards.execution.call_pool` costs its answer the reward, whatever
the cause. A function that knows that only its input can be at fault ends sooner, by these limits, and says
so. They count processor time, so a busy machine changes no reward.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from verl.rewards.execution import call_worker

T = TypeVar("T")
# The process ends at this many times the limit at which Python code is interrupted.
_LAST_LIMIT = 2
# The signal that ends it: of a timer that counts processor time.
LIMIT_SIGNAL = signal.SIGVTALRM
_STATM = Path("/proc/self/statm")


class OverLimitError(BaseException):
    """The call has used up its processor time. Code with `except Exception` lets it through."""


def run_limited(function: Callable[[], T], *, cpu_s: float, memory_bytes: int) -> T:
    """Value of a function within limits.

    In a worker process, code that does not return to Python within twice the time ends the process with
    `LIMIT_SIGNAL`. Only there the memory is limited, which on Linux raises MemoryError.

    Args:
        function: the function.
        cpu_s: processor time in seconds.
        memory_bytes: address space that it may take beyond what the process has.

    Raises:
        OverLimitError: the time is used up.
        RuntimeError: this is not the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("need the main thread of a process for a limit of processor time, got another one")
    # Outside of the inner `try`, since the signal may come while the timers are being stopped.
    try:
        try:
            _start_timers(cpu_s)
            with _memory_limit(memory_bytes):
                return function()
        finally:
            _stop_timers()
    except OverLimitError:
        _stop_timers()
        raise


def _start_timers(cpu_s: float) -> None:
    signal.signal(signal.SIGPROF, _interrupt)
    if call_worker.is_worker_process():
        signal.signal(LIMIT_SIGNAL, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, _LAST_LIMIT * cpu_s)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _stop_timers() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    if call_worker.is_worker_process():
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _interrupt(number: int, frame: Any) -> None:
    raise OverLimitError


@contextmanager
def _memory_limit(memory_bytes: int) -> Iterator[None]:
    """Bounds the address space of a worker process; that of another process has other owners."""
    if not (call_worker.is_worker_process() and _STATM.exists()):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(_STATM.read_text().split()[0]) * resource.getpagesize() + memory_bytes
    bounds = [limit for limit in (soft, hard, bound) if limit != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
