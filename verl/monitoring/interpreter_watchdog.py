"""Deadlines after which the process ends even if some code never releases the GIL.

A regular expression with catastrophic backtracking, or C code, may hold Python's global interpreter lock
forever. Then no Python code can enforce a time limit, and only the watchdog thread of `faulthandler`, which
needs no GIL, can. A process has one such timer, so it is set to the earliest of all deadlines, and no other
module may use it.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

_lock = threading.Lock()
_deadlines: dict[object, float] = {}


def arm(owner: object, seconds: float) -> None:
    """End the process with exit code 1 and all stacks on standard error if the deadline passes.

    Args:
        owner: identifies the deadline; arming again replaces it, `disarm` removes it.
        seconds: from now.
    """
    with _lock:
        _deadlines[owner] = time.monotonic() + seconds
        _set_timer()


def disarm(owner: object) -> None:
    """Remove the deadline of an owner, if it has one."""
    with _lock:
        if _deadlines.pop(owner, None) is not None:
            _set_timer()


def _set_timer() -> None:
    """Set the timer to the earliest deadline; `_lock` must be held."""
    if not _deadlines:
        faulthandler.cancel_dump_traceback_later()
    # Without a standard error there is nowhere to write the stacks.
    elif sys.__stderr__ is not None:
        left_s = min(_deadlines.values()) - time.monotonic()
        faulthandler.dump_traceback_later(max(left_s, 1e-3), exit=True, file=sys.__stderr__)
