"""Tasks of an event loop that nobody awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class BackgroundTasks:
    """Tasks that nobody awaits; an error in one is reported.

    Args:
        note: is called with a human-readable message for each task that fails.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        # asyncio keeps only weak references. A dictionary has the same order in every run.
        self._tasks: dict[asyncio.Task[None], None] = {}

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the current event loop."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    async def cancel(self) -> None:
        """Cancel all tasks; return when they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(f"a task of the inference pool failed: {type(error).__name__}: {error}")
