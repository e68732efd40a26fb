"""Plan of the copies that bring tensors from one layout into another: each rank gets what it lacks, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from verl.weight_sync.layout import Bounds, ShardLayout, num_elements
from verl.weight_sync.reshard_planner import ReshardPlanner

BUCKET_BYTES = 2**28
RANKS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a whole tensor that is copied from a local tensor into another.

    Attributes:
        name: of the whole tensor.
        bounds: of the part.
        sender: rank that has it.
        sender_tensor: name of the sender's local tensor.
        sender_offset: start of the part in that tensor.
        receiver: rank that needs it.
        receiver_tensor: name of the receiver's local tensor.
        receiver_offset: start of the part in that tensor.
    """

    name: str
    bounds: Bounds
    sender: int
    sender_tensor: str
    sender_offset: tuple[int, ...]
    receiver: int
    receiver_tensor: str
    receiver_offset: tuple[int, ...]


@dataclass(frozen=True)
class ReshardPlan:
    """All copies between two layouts, or those of one rank.

    Attributes:
        num_ranks: of both layouts.
        itemsize: bytes per element as sent.
        local: copies within a rank, which do not travel.
        buckets: copies between ranks. Each rank receives in the order of the target's tensors; with a
            pipeline it begins with those of the stage after its own. No rank receives more than
            `bucket_bytes` in one bucket. What it receives of one tensor is in one bucket, unless that is
            more than `bucket_bytes`.
        rank: whose copies these are; None: of all ranks.
    """

    num_ranks: int
    itemsize: int
    local: tuple[Copy, ...]
    buckets: tuple[tuple[Copy, ...], ...]
    rank: int | None = None

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank sends to others."""
        return self._total("sent", rank)

    def received_bytes(self, rank: int) -> int:
        """Bytes that a rank receives from others."""
        return self._total("received", rank)

    def local_bytes(self, rank: int) -> int:
        """Bytes that a rank copies from itself."""
        return self._total("local", rank)

    def num_messages(self, rank: int) -> int:
        """Messages that a rank receives; all that one rank sends it in one bucket is one message."""
        return self._total("messages", rank)

    def _total(self, quantity: Literal["sent", "received", "local", "messages"], rank: int) -> int:
        if not 0 <= rank < self.num_ranks or self.rank not in (None, rank):
            known = f"0 to {self.num_ranks - 1}" if self.rank is None else str(self.rank)
            raise ValueError(f"need a rank of this plan, {known}, got {rank}")
        return self._totals[quantity][rank]

    @cached_property
    def _totals(self) -> dict[str, Counter[int]]:
        """Totals of each rank, by quantity."""
        totals: dict[str, Counter[int]] = {
            quantity: Counter() for quantity in ("sent", "received", "local", "messages")
        }
        for bucket in self.buckets:
            for copy in bucket:
                num_bytes = num_elements(copy.bounds) * self.itemsize
                totals["sent"][copy.sender] += num_bytes
                totals["received"][copy.receiver] += num_bytes
            pairs = {(copy.sender, copy.receiver) for copy in bucket}
            totals["messages"].update(receiver for _, receiver in pairs)
        for copy in self.local:
            totals["local"][copy.receiver] += num_elements(copy.bounds) * self.itemsize
        return totals


def make_plan(
    source: ShardLayout,
    target: ShardLayout,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
    rank: int | None = None,
) -> ReshardPlan:
    """Copies that fill a target from a source with the fewest bytes between ranks; equal on every rank.

    What a rank has itself does not travel. What several other ranks have comes from one on the receiver's
    node, else from any node; among these from the one that has least to send in the same bucket, and then in
    all buckets.

    Args:
        source: layout of the tensors as they are.
        target: layout as it shall be, of the same ranks.
        itemsize: bytes per element as sent.
        bucket_bytes: largest size of a bucket for one receiver. A larger part is split.
        ranks_per_node: of consecutive ranks with fast links between them.
        rank: list only the copies that this rank sends or receives, which is faster; None: all.

    Raises:
        ValueError: layouts of different ranks or tensors, or the source lacks a part of the target.
    """
    planner = ReshardPlanner(
        source, target, itemsize=itemsize, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node
    )
    if rank is not None and not 0 <= rank < source.num_ranks:
        raise ValueError(f"need a rank from 0 to {source.num_ranks - 1}, got {rank}")
    local: list[Copy] = []
    buckets: list[list[Copy]] = []
    for tensor in planner.tensors():
        buckets.extend([] for _ in range(planner.num_buckets - len(buckets)))
        for pending, sender, bucket in tensor.copies(rank):
            copy = Copy(
                tensor.name,
                pending.bounds,
                sender.rank,
                tensor.source[sender.shard][1].local_name,
                sender.offset,
                pending.receiver,
                tensor.target[pending.shard][1].local_name,
                pending.offset,
            )
            (local if bucket is None else buckets[bucket]).append(copy)
    return ReshardPlan(source.num_ranks, itemsize, tuple(local), tuple(map(tuple, buckets)), rank)
