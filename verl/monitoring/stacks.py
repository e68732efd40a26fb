"""The stacks of all threads of this process, and of the asyncio tasks of their event loops."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import Counter
from types import FrameType
from typing import Any

# Attributes of a coroutine, an asynchronous generator and a generator: its frame, and what it awaits.
_FRAMES = ("cr_frame", "ag_frame", "gi_frame")
_AWAITED = ("cr_await", "ag_await", "gi_yieldfrom")


def all_stacks() -> str:
    """Stacks of all threads but this one, and of the tasks of their event loops; equal tasks once."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        name = names.get(ident, f"unknown {ident}")
        parts.append(f"thread {name}:\n{''.join(traceback.format_stack(frame))}")
        loop = running_loop(frame)
        parts += [
            f"{num} task{'s' if num > 1 else ''} of thread {name}:\n{text}"
            for text, num in (task_stacks(loop).items() if loop else ())
        ]
    return "\n".join(parts)


def running_loop(frame: FrameType | None) -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in a stack, given its innermost frame; None without one."""
    while frame is not None:
        if frame.f_code.co_name == "run_forever":
            loop = frame.f_locals.get("self")
            if isinstance(loop, asyncio.AbstractEventLoop):
                return loop
        frame = frame.f_back
    return None


def task_stacks(loop: asyncio.AbstractEventLoop) -> Counter[str]:
    """Stacks of the tasks of a loop, from the outermost coroutine inwards, with the number of equal ones."""
    try:
        tasks = asyncio.all_tasks(loop)
    except RuntimeError:  # the set of tasks changed during each of asyncio's attempts to copy it
        return Counter()
    stacks = []
    for task in tasks:
        lines, awaited = [], task.get_coro()
        while (frame := _first_attribute(awaited, _FRAMES)) is not None:
            lines += traceback.format_stack(frame, limit=1)
            awaited = _first_attribute(awaited, _AWAITED)
        end = f"  awaits {type(awaited).__name__}\n" if awaited is not None else ""
        stacks.append("".join(lines) + end)
    return Counter(sorted(stacks))


def _first_attribute(value: Any, names: tuple[str, ...]) -> Any:
    """The first of these attributes that is there and not None; None without one."""
    return next((found for name in names if (found := getattr(value, name, None)) is not None), None)
