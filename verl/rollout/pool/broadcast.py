"""Weights to an engine on another machine: a process group of this process and the ranks of that engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from verl.rollout.engine import EngineError, InferenceServer
from verl.weight_sync.process_group import broadcast, open_group, send
from verl.weight_sync.shard_tracking import ShardRanges, slices_of
from verl.weight_sync.shared_memory import map_file, num_bytes_of, shards_in, unpack
from verl.weight_sync.types import TensorInfo, WeightChunk

_LOOPBACK = "127.0.0.1"


class Broadcaster:
    """Rank 0 of a group with the ranks of one engine: an engine that dies takes nobody else along.

    Args:
        group: with this process as rank 0.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    @classmethod
    async def meet(cls, engine: InferenceServer) -> Broadcaster:
        """Listens, and waits for the engine's ranks.

        Raises:
            EngineError: they do not come.
        """
        address, num_ranks, backend = address_towards(engine.spec.address), 1 + engine.num_ranks, "gloo"
        port, limit_s = free_port_at(address), engine.spec.timeout_s
        opened = asyncio.to_thread(
            open_group, address, port, rank=0, num_ranks=num_ranks, backend=backend, timeout_s=limit_s
        )
        joined = engine.join_group(
            address=address, port=port, first_rank=1, num_ranks=num_ranks, backend=backend
        )
        group, _ = await both(opened, joined, f"engine {engine.spec.name} did not join the group for weights")
        return cls(group)

    async def send(self, part: WeightChunk, engine: InferenceServer) -> None:
        """Sends the bytes of a part while the engine loads them: all to all ranks, or to each what it reads.

        Raises:
            EngineError: they do not get there.
        """
        content = map_file(Path(part.location["path"]), num_bytes_of(part.tensors))
        sent = asyncio.to_thread(self._send, content, part)
        loaded = engine.load(WeightChunk(part.tensors, "group", ranges=part.ranges))
        await both(sent, loaded, f"weights did not reach engine {engine.spec.name}")

    def _send(self, content: Tensor, part: WeightChunk) -> None:
        if not part.ranges:
            broadcast(self._group, content)
            return
        tensors = {info.name: tensor for info, tensor in unpack(content, part.tensors)}
        send(
            self._group,
            {1 + rank: _packed(tensors, reads, part.tensors) for rank, reads in enumerate(part.ranges)},
        )


def address_towards(url: str | None) -> str:
    """The address of this machine from which another one is reached; no other one: the loopback interface."""
    if url is None:
        return _LOOPBACK
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it asks the routing table.
        probe.connect((parts.hostname or _LOOPBACK, parts.port or 80))
        address: str = probe.getsockname()[0]
        return address


def free_port_at(address: str) -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind((address, 0))
        port: int = free.getsockname()[1]
        return port


def _packed(tensors: Mapping[str, Tensor], reads: ShardRanges, infos: Sequence[TensorInfo]) -> Tensor:
    """[bytes] uint8, what a rank reads of the tensors, end to end."""
    pieces = [tensors[piece.name][slices_of(bounds)] for piece, bounds in shards_in(infos, reads)]
    return torch.cat(
        [
            torch.empty(0, dtype=torch.uint8),
            *(piece.contiguous().view(-1).view(torch.uint8) for piece in pieces),
        ]
    )


async def both(ours: Any, theirs: Any, what: str) -> tuple[Any, Any]:
    """Our side and the engine's at once; what fails on ours is told as the engine's error, which is what
    keeps it from coming.
    """
    results: tuple[Any, Any] = await asyncio.gather(ours, theirs, return_exceptions=True)
    errors = [result for result in reversed(results) if isinstance(result, BaseException)]
    if not errors:
        return results
    if isinstance(errors[0], EngineError | ValueError):
        raise errors[0]
    raise EngineError(f"{what}: {errors[0]}") from errors[0]
