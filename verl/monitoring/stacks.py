"""Where everything in this process is: the stacks of all threads, and of the tasks of their event loops."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections import Counter
from types import FrameType
from typing import Any


def all_stacks() -> str:
    """The stacks of all threads but this one, and of the tasks of the event loops that run in them; tasks at
    the same place once.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        name = names.get(ident, f"unknown {ident}")
        parts.append(f"thread {name}:\n{''.join(traceback.format_stack(frame))}")
        if (loop := _loop_of(frame)) is not None:
            parts += [
                f"{num} task{'s' if num > 1 else ''} of thread {name}:\n{text}"
                for text, num in _tasks(loop).items()
            ]
    return "\n".join(parts)


def _loop_of(frame: FrameType | None) -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in a stack, if one does."""
    while frame is not None:
        if frame.f_code.co_name == "run_forever" and isinstance(
            loop := frame.f_locals.get("self"), asyncio.AbstractEventLoop
        ):
            return loop
        frame = frame.f_back
    return None


def _tasks(loop: asyncio.AbstractEventLoop) -> Counter[str]:
    try:
        tasks = asyncio.all_tasks(loop)
    except RuntimeError:  # they came and went too fast
        return Counter()
    return Counter(sorted(_task(task.get_coro()) for task in tasks))


def _task(waiting: Any) -> str:
    """The stack of what a task awaits, from the outside in; what is awaited at last is named."""
    lines = []
    while (frame := _frame_of(waiting)) is not None:
        lines += traceback.format_stack(frame, limit=1)
        waiting = _awaited_by(waiting)
    return "".join(lines) + (f"  awaits {type(waiting).__name__}\n" if waiting is not None else "")


def _frame_of(waiting: Any) -> FrameType | None:
    """Of a coroutine, an asynchronous generator or a generator that has not ended."""
    return next(
        (
            frame
            for name in ("cr_frame", "ag_frame", "gi_frame")
            if (frame := getattr(waiting, name, None)) is not None
        ),
        None,
    )


def _awaited_by(waiting: Any) -> Any:
    return next(
        (
            inner
            for name in ("cr_await", "ag_await", "gi_yieldfrom")
            if (inner := getattr(waiting, name, None)) is not None
        ),
        None,
    )
