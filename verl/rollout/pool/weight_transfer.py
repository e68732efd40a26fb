"""Transfer of a weight snapshot to one engine, verified by the fingerprint of what the engine loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from verl.rollout.inference_server import EngineError, InferenceServer
from verl.rollout.pool.broadcast import Broadcaster
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.weight_sync.fingerprint import fingerprint_of_ranks
from verl.weight_sync.shared_memory import chunk_ranges
from verl.weight_sync.types import WeightChunk


class WeightTransfer:
    """Sends snapshots to one engine by its transport.

    Args:
        engine: started, and paused during a transfer.
        note: is called with human-readable messages.

    Attributes:
        num_bytes: of the last snapshot, over all ranks of the engine.
        num_repaired: snapshots that arrived damaged and were sent again, since it was last reset.
    """

    def __init__(self, engine: InferenceServer, note: Callable[[str], None]) -> None:
        self.num_bytes = self.num_repaired = 0
        self._engine, self._note = engine, note
        self._broadcaster: Broadcaster | None = None

    async def load(self, snapshot: WeightSnapshot, incarnation: object) -> None:
        """Let the engine load a snapshot; one that arrives damaged is sent a second time, complete.

        Args:
            snapshot: to load.
            incarnation: of the engine; process groups with an earlier one are not used.

        Raises:
            EngineError: the engine did not load exactly these weights.
        """
        name, version = self._engine.spec.name, snapshot.version
        problem = await self._try(snapshot, incarnation)
        if problem:
            self._note(f"engine {name} did not get version {version} whole ({problem}); it is sent again")
            self.num_repaired += 1
            # Complete, and as plain tensors if only the ranges to read were unknown before: the engine's own
            # loader may fail on tensors that record what is read.
            self._engine.records_reads = self._engine.read_ranges is not None
            self._engine.read_ranges = None
            problem = await self._try(snapshot, incarnation)
        if problem:
            raise EngineError(f"engine {name} did not get version {version} in two tries: {problem}")

    def disconnect(self) -> None:
        """Forget the process group with an engine that has ended."""
        self._broadcaster = None

    async def _try(self, snapshot: WeightSnapshot, incarnation: object) -> str:
        """Send a snapshot once; return what is wrong with the weights that the engine has now, or ""."""
        try:
            loaded, expected = await self._send(snapshot, incarnation)
        except EngineError as error:
            return str(error)
        return "" if loaded == expected else f"fingerprint {loaded}, sent {expected}"

    async def _send(self, snapshot: WeightSnapshot, incarnation: object) -> tuple[str, str]:
        """Send all weights, or to each rank the ranges that it reads.

        Returns:
            The fingerprint of what the engine says that it loaded, and of what was sent.
        """
        engine, version = self._engine, snapshot.version
        if snapshot.lora_adapter is not None:
            self.num_bytes = snapshot.num_bytes
            return await engine.load_lora_adapter(snapshot.lora_adapter, version), snapshot.fingerprint
        ranges, chunks = engine.read_ranges or (), snapshot.chunks
        if engine.transport == "disk":
            ranges, chunks = (), (await asyncio.to_thread(snapshot.as_files, Path(engine.spec.model)),)
        if not snapshot.can_verify(ranges):
            ranges = ()
        self.num_bytes = snapshot.num_bytes_of(ranges) if ranges else snapshot.num_bytes * engine.num_ranks
        digests: list[dict[str, int]] = [{} for _ in range(engine.num_ranks)]
        await engine.begin_update()
        for chunk in chunks:
            own = replace(chunk, ranges=chunk_ranges(ranges, chunk))
            if snapshot.p2p_sender is None:
                await self._load_chunk(own)
                continue
            for rank, sent in enumerate(await snapshot.p2p_sender.send(own, engine, incarnation)):
                digests[rank] |= sent
        loaded = await engine.end_update(version)
        if snapshot.p2p_sender is not None:
            return loaded, fingerprint_of_ranks(digests)
        snapshot.track(engine.read_ranges or ())
        return loaded, snapshot.fingerprint_of(ranges) if ranges else snapshot.fingerprint

    async def _load_chunk(self, chunk: WeightChunk) -> None:
        if self._engine.transport != "group":
            await self._engine.load(chunk)
            return
        if self._broadcaster is None:
            self._broadcaster = await Broadcaster.connect(self._engine)
        try:
            await self._broadcaster.send(chunk, self._engine)
        except BaseException:
            # A broadcast that failed leaves the group in an unknown state.
            self._broadcaster = None
            raise
