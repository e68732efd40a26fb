"""Ends the process when something keeps the interpreter to itself for too long; the one place that sets the
timer for it.

A regular expression without end, or C code, may never give the interpreter back. Then no Python runs that
could count the time, and only a timer of the C library helps. There is one such timer in a process, and it is
set for the nearest of all deadlines.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

_lock = threading.Lock()
_deadlines: dict[object, float] = {}


def arm(owner: object, seconds: float) -> None:
    """Ends the process with exit code 1, all stacks on standard error, unless the owner arms anew or disarms
    within so many seconds.

    Args:
        owner: who has the deadline; each has one.
        seconds: from now.
    """
    with _lock:
        _deadlines[owner] = time.monotonic() + seconds
        _set()


def disarm(owner: object) -> None:
    """Takes the deadline of an owner back; nothing happens if it has none."""
    with _lock:
        if _deadlines.pop(owner, None) is not None:
            _set()


def _set() -> None:
    if not _deadlines:
        faulthandler.cancel_dump_traceback_later()
    # Without a standard error there is nowhere to say why.
    elif sys.__stderr__ is not None:
        left_s = min(_deadlines.values()) - time.monotonic()
        faulthandler.dump_traceback_later(max(left_s, 1e-3), exit=True, file=sys.__stderr__)
