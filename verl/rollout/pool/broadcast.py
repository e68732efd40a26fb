"""Weights to an engine on another machine, over a process group of this process and the engine's ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from verl.rollout.inference_server import EngineError, InferenceServer
from verl.utils.network import address_towards, free_port
from verl.weight_sync.process_group import broadcast, open_group, send
from verl.weight_sync.shard_tracking import slices_of
from verl.weight_sync.shared_memory import map_file, num_bytes_of, shards_in, unpack
from verl.weight_sync.types import WeightChunk

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


class Broadcaster:
    """Rank 0 of a process group with the ranks of one engine.

    Each engine has a group of its own, so that one that dies does not break the transfers to the others.

    Args:
        group: with this process as rank 0.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    @classmethod
    async def connect(cls, engine: InferenceServer) -> Broadcaster:
        """Listen, and wait for the engine's ranks.

        Raises:
            EngineError: they do not join in time.
        """
        address, num_ranks, backend = address_towards(engine.spec.address), 1 + engine.num_ranks, "gloo"
        port, limit_s = free_port(address), engine.spec.timeout_s
        group, _ = await run_both(
            asyncio.to_thread(
                open_group, address, port, rank=0, num_ranks=num_ranks, backend=backend, timeout_s=limit_s
            ),
            engine.join_group(address=address, port=port, first_rank=1, num_ranks=num_ranks, backend=backend),
            f"engine {engine.spec.name} did not join the group for weights",
        )
        return cls(group)

    async def send(self, chunk: WeightChunk, engine: InferenceServer) -> None:
        """Send a chunk while the engine loads it: all of it to every rank, or to each rank its ranges.

        Raises:
            EngineError: the transfer failed.
        """
        content = map_file(Path(chunk.location["path"]), num_bytes_of(chunk.tensors))
        await run_both(
            asyncio.to_thread(self._send, content, chunk),
            engine.load(WeightChunk(chunk.tensors, "group", ranges=chunk.ranges)),
            f"weights did not reach engine {engine.spec.name}",
        )

    def _send(self, content: Tensor, chunk: WeightChunk) -> None:
        if not chunk.ranges:
            broadcast(self._group, content)
            return
        tensors = {info.name: tensor for info, tensor in unpack(content, chunk.tensors)}
        messages = {}
        for rank, ranges in enumerate(chunk.ranges, start=1):
            shards = [
                tensors[info.name][slices_of(bounds)] for info, bounds in shards_in(chunk.tensors, ranges)
            ]
            packed = [shard.contiguous().view(-1).view(torch.uint8) for shard in shards]
            # A rank that loads nothing of the chunk still needs a tensor: cat refuses an empty list.
            messages[rank] = torch.cat([torch.empty(0, dtype=torch.uint8), *packed])
        send(self._group, messages)


async def run_both(
    ours: Coroutine[Any, Any, Ours], theirs: Coroutine[Any, Any, Theirs], failure: str
) -> tuple[Ours, Theirs]:
    """Run our side of a transfer and the engine's at the same time.

    Raises:
        EngineError: either side failed. The engine's own error goes first: an engine that failed keeps our
            side waiting until its time limit.
        ValueError: the engine refused.
    """
    results: tuple[Any, Any] = await asyncio.gather(ours, theirs, return_exceptions=True)
    errors = [result for result in reversed(results) if isinstance(result, BaseException)]
    if not errors:
        return results
    if isinstance(errors[0], EngineError | ValueError):
        raise errors[0]
    raise EngineError(f"{failure}: {errors[0]}") from errors[0]
