"""Weight updates of an SGLang server: orders to the loader in each rank, and its reports."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from verl.rollout.inference_server import EngineError
from verl.rollout.sglang.client import SGLangClient
from verl.rollout.sglang.worker import LOADER, connect_store, report_file, report_key
from verl.weight_sync.types import WeightChunk


class WeightUpdater:
    """Sends updates to `verl.rollout.sglang.worker.load` in each rank of a server.

    The loader takes an order as JSON and reports what it loaded: in a file, or in the store of the process
    group where the server may see no folder of this run.

    Args:
        client: of the server.
        name: of the engine, for messages.
        folder: for reports, readable by this user alone.
        num_ranks: of the server.
        has_sessions: the server has calls for begin and end of an update.

    Attributes:
        digests: of this update, for each rank: digest of each tensor given to the model.
        read_ranges: of this update, for each rank: bounds that the model read of recorded tensors.
        num_bytes: of this update, received by each rank.
    """

    def __init__(
        self, client: SGLangClient, *, name: str, folder: Path, num_ranks: int, has_sessions: bool
    ) -> None:
        self._client, self._name, self._folder = client, name, folder
        self._num_ranks, self._has_sessions = num_ranks, has_sessions
        self._store: Any = None
        self._in_session = False
        self._num_orders = 0
        self._reset()

    async def join_group(self, address: str, port: int, *, timeout_s: float, **group: Any) -> None:
        """Let each rank join a process group; `group` has the arguments of `InferenceServer.join_group`."""
        self._store = await asyncio.to_thread(
            connect_store, address, port, num_ranks=group["num_ranks"], timeout_s=timeout_s
        )
        location = {"address": address, "port": port, "timeout_s": timeout_s, **group}
        chunk = WeightChunk((), "group", location)
        # The loader is called in a session alone; joining outside of an update needs one of its own.
        opens_session = not self._in_session
        if opens_session:
            await self._begin_session()
        await self._send_order([chunk] * self._num_ranks, kind="join")
        if opens_session:
            await self.end()

    async def begin(self) -> None:
        """Begin an update of all weights."""
        self._reset()
        await self._begin_session()

    async def load(self, chunk: WeightChunk, *, records: bool) -> None:
        """Let each rank load a chunk; with `records`, it records what the model reads of whole tensors."""
        chunks = [chunk.of_rank(rank) for rank in range(self._num_ranks)]
        reports = await self._send_order(chunks, kind=chunk.transport, records=records)
        for rank, report in enumerate(reports):
            self.digests[rank] |= report["digests"]
            self.read_ranges[rank] |= report["read_ranges"]
            self.num_bytes[rank] += report["num_bytes"]

    async def end(self) -> None:
        """End the update."""
        self._in_session = False
        if self._has_sessions:
            await self._client.command("/end_weight_update", {})

    def _reset(self) -> None:
        self.digests: list[dict[str, int]] = [{} for _ in range(self._num_ranks)]
        self.read_ranges: list[dict[str, Any]] = [{} for _ in range(self._num_ranks)]
        self.num_bytes = [0] * self._num_ranks

    async def _begin_session(self) -> None:
        if not self._has_sessions:
            return
        try:
            await self._client.command("/begin_weight_update", {"selector": "target"})
        except EngineError:  # an earlier session was never ended
            await self.end()
            await self._client.command("/begin_weight_update", {"selector": "target"})
        self._in_session = True

    async def _send_order(
        self, chunks: Sequence[WeightChunk], *, kind: str, records: bool = False
    ) -> list[dict[str, Any]]:
        """Send an order to the loader of each rank.

        Args:
            chunks: of each rank.
            kind: transport of the chunks, or "join" to join a process group at their location.
            records: record what the model reads.

        Returns:
            Report of each rank.
        """
        number, self._num_orders = self._num_orders, self._num_orders + 1
        in_store = chunks[0].transport in ("group", "direct")
        orders = [
            {
                "kind": kind,
                "tensors": [(info.name, info.shape, info.dtype) for info in chunk.tensors],
                "location": dict(chunk.location),
                "ranges": chunk.ranges,
                "records": records,
                "number": number,
                "rank": rank,
                "folder": None if in_store else str(self._folder),
            }
            for rank, chunk in enumerate(chunks)
        ]
        body: dict[str, Any] = {
            "serialized_named_tensors": [encode_order(order) for order in orders],
            "load_format": LOADER,
            # The cache is flushed once, at the end of the update.
            "flush_cache": False,
        }
        if self._has_sessions:
            body["selector"] = "target"
        await self._client.command("/update_weights_from_tensor", body)
        reports = [await self._read_report(number, rank, in_store) for rank in range(self._num_ranks)]
        if errors := [report["error"] for report in reports if "error" in report]:
            raise EngineError(f"{self._name} could not take weights: {errors[0]}")
        return reports

    async def _read_report(self, number: int, rank: int, in_store: bool) -> dict[str, Any]:
        try:
            if in_store:
                content = (await asyncio.to_thread(self._store.get, report_key(number, rank))).decode()
            else:
                content = report_file(self._folder, number, rank).read_text(encoding="utf-8")
        except (OSError, RuntimeError) as error:
            reason = f"rank {rank} of {self._name} has not reported which weights it took: {error}"
            raise EngineError(reason) from error
        report: dict[str, Any] = json.loads(content)
        return report


def encode_order(order: Mapping[str, Any]) -> str:
    """Encode an order in SGLang's form of named tensors: pickled, the JSON as the name of an empty tensor."""
    return base64.b64encode(pickle.dumps([(json.dumps(order), torch.empty(0))])).decode()
