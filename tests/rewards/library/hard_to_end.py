"""A function for worker processes that is hard to end; its module loads nothing else."""

from __future__ import annotations

import os
import signal

from verl.rewards.execution.own_limits import run_limited


def hard_to_end(response):
    """Does not return to Python, is killed, or takes much memory."""
    if response == "deaf":
        return run_limited(lambda: sum(range(10**14)), cpu_s=0.05, memory_bytes=1 << 30)
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "large":
        try:
            return run_limited(lambda: len(bytearray(1 << 32)), cpu_s=9.0, memory_bytes=1 << 28)
        except MemoryError:
            return 0.25
    return 1.0
