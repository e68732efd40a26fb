"""Weights from the policy's ranks directly to the ranks of an engine, which get only what they load."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from verl.controller.worker_group import WorkerGroup
from verl.engines.roles.weight_sender import PolicyWeightSender, Rendezvous, TransferPlans
from verl.rollout.inference_server import EngineError, InferenceServer
from verl.rollout.pool.broadcast import run_both
from verl.utils.network import address_towards
from verl.weight_sync.layout import full_bounds
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.shard_tracking import ShardRanges
from verl.weight_sync.types import WeightChunk

# Of an address in no network (RFC 5737), to find the interface that leads out of this machine; nothing is
# sent.
_ELSEWHERE = "http://192.0.2.1"


class P2PSender:
    """Lets the policy's ranks send to engines, one engine at a time, while nobody else calls the policy.

    Args:
        policy: its ranks, each a `PolicyWeightSender`.
    """

    def __init__(self, policy: WorkerGroup) -> None:
        self._policy = policy
        self._turn = asyncio.Lock()
        self._plans: TransferPlans | None = None
        self._policy_is_local = False
        self._joined: dict[str, object] = {}

    async def send(
        self, chunk: WeightChunk, engine: InferenceServer, incarnation: object
    ) -> list[dict[str, int]]:
        """Send a chunk while the engine loads it.

        Args:
            chunk: with the ranges that each rank of the engine loads; without them, each loads all of it.
            engine: which has begun an update.
            incarnation: another one than before means that the engine has restarted and joins a new group.

        Returns:
            For each rank of the engine the digests of what it was sent, by `shard_key`.

        Raises:
            EngineError: the transfer failed. The group is given up, and the next chunk begins with a new one.
        """
        async with self._turn:
            name = engine.spec.name
            try:
                if self._joined.get(name) is not incarnation:
                    await self._join(engine)
                    self._joined[name] = incarnation
                return await self._send(chunk, engine)
            except BaseException:
                self._joined.pop(name, None)
                await self._call(PolicyWeightSender.leave_engine, name)
                raise

    async def _join(self, engine: InferenceServer) -> None:
        """Open a process group of the policy's ranks and those of the engine."""
        name, failure = engine.spec.name, f"engine {engine.spec.name} did not join the policy for weights"
        plans = await self._all_plans()
        is_local = engine.spec.address is None and self._policy_is_local
        url = None if is_local else engine.spec.address or f"http://{address_towards(_ELSEWHERE)}"
        address, port = await self._call(PolicyWeightSender.rendezvous_address, url)
        num_senders = len(plans.shards)
        num_ranks = num_senders + engine.num_ranks
        rendezvous = Rendezvous(address, port, num_senders, num_ranks, engine.spec.timeout_s)
        errors, _ = await run_both(
            self._call(PolicyWeightSender.join_engine, name, rendezvous, plans.shards),
            engine.join_group(
                address=address, port=port, first_rank=num_senders, num_ranks=num_ranks, backend="gloo"
            ),
            failure,
        )
        _raise_first(errors, failure)

    async def _send(self, chunk: WeightChunk, engine: InferenceServer) -> list[dict[str, int]]:
        name, failure = engine.spec.name, f"weights did not reach engine {engine.spec.name}"
        plans = await self._all_plans()
        complete: ShardRanges = {info.name: (full_bounds(info.shape),) for info in chunk.tensors}
        ranges: tuple[ShardRanges, ...] = tuple(
            {key: tuple(own[key]) for key in complete} for own in chunk.ranges
        )
        ranges = ranges or (complete,) * engine.num_ranks
        buckets = plans.plan(chunk.tensors, ranges).buckets
        first = len(plans.shards)
        copies = [
            [[(c.name, c.bounds, c.sender) for c in bucket if c.receiver == rank] for bucket in buckets]
            for rank in range(first, first + engine.num_ranks)
        ]
        results, _ = await run_both(
            self._call(PolicyWeightSender.send_weights, name, chunk.tensors, ranges),
            engine.load(WeightChunk(chunk.tensors, "direct", {"copies": copies}, chunk.ranges)),
            failure,
        )
        _raise_first([error for _, error in results], failure)
        digests: list[dict[str, int]] = [{} for _ in range(engine.num_ranks)]
        for sent, _ in results:
            for rank, own in sent.items():
                digests[rank] |= own
        return digests

    async def _all_plans(self) -> TransferPlans:
        if self._plans is None:
            held = await self._call(PolicyWeightSender.held_shards)
            self._plans = TransferPlans([shards for shards, _ in held])
            self._policy_is_local = {machine for _, machine in held} == {shared_memory_id()}
        return self._plans

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call all ranks of the policy without blocking the event loop."""
        return await asyncio.to_thread(lambda: self._policy.call(method, *args).result())


def _raise_first(errors: Sequence[str], failure: str) -> None:
    if found := [error for error in errors if error]:
        raise EngineError(f"{failure}: {found[0]}")
