"""Processes that hold equal objects without state, lent to one call at a time."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

from verl.agents.processes.object_processes import ObjectProcess, ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure


class ReusableProcesses:
    """Calls of equal objects: each takes a free process, or starts one, or waits for one.

    Calls may come from several event loops.

    Args:
        processes: makes them; nobody else opens any.
        args: of the objects.
        max_processes: at a time.
    """

    def __init__(self, processes: ObjectProcesses, args: tuple[Any, ...] = (), *, max_processes: int) -> None:
        self._processes, self._args, self._max_processes = processes, args, max_processes
        self._lock = threading.Lock()
        self._free: list[ObjectProcess] = []
        self._num_processes = 0
        # Each gets a process, or None: the right to start one.
        self._waiting: deque[Future[ObjectProcess | None]] = deque()

    async def call(self, method: str, /, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Result of a method; its time limit does not count the wait for a process.

        Raises:
            ProcessFailure: it gave no value; a process that is lost is replaced.
        """
        process = await self._take()
        try:
            process = process or await self._processes.open(*self._args)
            result = await process.call(method, *args, timeout_s=timeout_s, **kwargs)
        except ProcessFailure as failure:
            if process is None or failure.is_lost:
                await self._replace(process)
            else:
                self._give_back(process)
            raise
        except BaseException:  # also a cancellation: its code may still run
            await asyncio.shield(self._replace(process))
            raise
        self._give_back(process)
        return result

    def close(self) -> None:
        """Kill all processes; may be called again."""
        with self._lock:
            self._free, self._num_processes = [], 0
        self._processes.close()

    async def _take(self) -> ObjectProcess | None:
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._num_processes < self._max_processes:
                self._num_processes += 1
                return None
            place: Future[ObjectProcess | None] = Future()
            self._waiting.append(place)
        try:
            return await asyncio.wrap_future(place)
        except BaseException:
            if not place.cancel() and not place.cancelled():  # it was given one meanwhile
                self._give_back(place.result())
            raise

    def _give_back(self, process: ObjectProcess | None) -> None:
        """Lend a process, or the right to start one, to the next call."""
        with self._lock:
            while self._waiting:
                place = self._waiting.popleft()
                if place.set_running_or_notify_cancel():
                    place.set_result(process)
                    return
            if process is None:
                self._num_processes -= 1
            else:
                self._free.append(process)

    async def _replace(self, process: ObjectProcess | None) -> None:
        try:
            if process is not None:
                await process.close()
        finally:
            self._give_back(None)
