"""What a change of layout costs, without listing copies; and what others' ways to do it cost on the same
layouts.

The other ways are those of HybridFlow, https://arxiv.org/abs/2409.19256, table 2. Counted as memory is what
generation needs beside the weights of training: its own weights, whole tensors that are gathered, and buckets
on their way. Weights of training that lie in the weights of generation, as the engine with shared storage has
them, take no memory twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from verl.weight_sync.layout import Bounds, ShardLayout, full_bounds, num_elements
from verl.weight_sync.meshes import Mesh
from verl.weight_sync.reshard_plan import (
    BUCKET_BYTES,
    RANKS_PER_NODE,
    CopyPattern,
    ReshardPlanner,
    TensorCopies,
)

Counts = np.ndarray[Any, np.dtype[np.int64]]

NVLINK_BYTES_PER_S = 600e9  # of a device, within its node
NETWORK_BYTES_PER_S = 200e9 / 8  # of a node


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages of a plan.

    Attributes:
        buckets: bytes by bucket, sender and receiver, [K, N, N].
        local: bytes that each rank takes from itself, [N].
        ranks_per_node: of consecutive ranks.
    """

    buckets: Counts
    local: Counts
    ranks_per_node: int

    @cached_property
    def between(self) -> Counts:
        """Bytes by sender and receiver, [N, N]."""
        total: Counts = self.buckets.sum(0)
        return total

    @property
    def sent(self) -> Counts:
        """Bytes that each rank sends, [N]."""
        total: Counts = self.between.sum(1)
        return total

    @property
    def received(self) -> Counts:
        """Bytes that each rank receives, [N]."""
        total: Counts = self.between.sum(0)
        return total

    @property
    def messages(self) -> Counts:
        """Messages that each rank receives, [N]: what one rank sends another in a bucket travels together."""
        total: Counts = (self.buckets > 0).sum((0, 1))
        return total

    @property
    def from_other_nodes(self) -> Counts:
        """Bytes that each rank receives from other nodes, [N]."""
        nodes = np.arange(len(self.local)) // self.ranks_per_node
        total: Counts = np.where(nodes[:, None] != nodes[None, :], self.between, 0).sum(0)
        return total

    @property
    def node_bytes(self) -> int:
        """What the fullest node sends to or receives from the others."""
        nodes = np.arange(len(self.local)) // self.ranks_per_node
        members = (nodes[:, None] == np.arange(nodes[-1] + 1)).astype(np.int64)  # [N, nodes]
        between = members.T @ self.between @ members
        np.fill_diagonal(between, 0)
        return int(max(between.sum(0).max(), between.sum(1).max()))

    @property
    def in_flight_bytes(self) -> int:
        """The most that one rank has of one bucket: what comes and what goes."""
        return int((self.buckets.sum(1) + self.buckets.sum(2)).max(initial=0))

    @property
    def critical_bytes(self) -> int:
        """Sum over the buckets of what the busiest rank sends or receives: what takes the time if buckets
        follow one another.
        """
        return int(np.maximum(self.buckets.sum(1), self.buckets.sum(2)).max(1, initial=0).sum())


def traffic(
    source: ShardLayout,
    target: ShardLayout,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Traffic:
    """What `verl.weight_sync.reshard_plan.make_plan` with the same arguments makes travel; faster, as layers
    repeat.

    Raises:
        ValueError: as `make_plan`.
    """
    walk = ReshardPlanner(
        source, target, itemsize=itemsize, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node
    )
    num_ranks = source.num_ranks
    buckets: list[Counts] = []
    local = np.zeros(num_ranks, dtype=np.int64)
    fixed: dict[int, _Fixed] = {}
    for step in walk.steps():
        buckets += [
            np.zeros((num_ranks, num_ranks), dtype=np.int64) for _ in range(walk.num_buckets - len(buckets))
        ]
        if id(step.pattern) not in fixed:
            fixed[id(step.pattern)] = _Fixed(step.pattern, num_ranks)
        known = fixed[id(step.pattern)]
        local += known.local
        for index, receivers in _by_bucket(step).items():
            buckets[index][:, receivers] += known.between[:, receivers]
        for number in {*step.chosen, *step.spread}:
            transfer = step.pattern.transfers[number]
            holder = step.chosen.get(number) or transfer.holders[0]
            index = step.spread[number] if number in step.spread else step.buckets[transfer.receiver]
            buckets[index][holder.rank, transfer.receiver] += transfer.num_bytes
    stacked = np.stack(buckets) if buckets else np.zeros((0, num_ranks, num_ranks), dtype=np.int64)
    return Traffic(stacked, local, ranks_per_node)


class _Fixed:
    """What is the same for every tensor of a pattern: transfers that have one sender, [sender, receiver], and
    local ones.
    """

    def __init__(self, pattern: CopyPattern, num_ranks: int) -> None:
        self.between = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        self.local = np.zeros(num_ranks, dtype=np.int64)
        for transfer in pattern.transfers:
            if transfer.is_local:
                self.local[transfer.receiver] += transfer.num_bytes
            elif len(transfer.holders) == 1:
                self.between[transfer.holders[0].rank, transfer.receiver] += transfer.num_bytes


def _by_bucket(step: TensorCopies) -> dict[int, list[int]]:
    """Receivers of each bucket, without those of which every transfer has its own."""
    receivers: dict[int, list[int]] = {}
    for receiver, bucket in step.buckets.items():
        receivers.setdefault(bucket, []).append(receiver)
    return receivers


@dataclass(frozen=True)
class ReshardCost:
    """What a way to change the layout costs.

    Attributes:
        way: its name.
        received_bytes: by the rank that receives most.
        sent_bytes: by the rank that sends most.
        node_bytes: into or out of the fullest node.
        peak_bytes: memory of the fullest rank.
        num_messages: that the rank with most of them receives; a ring of n ranks passes n - 1 for each
            bucket.
        formula: of the received bytes in the paper, as a share of the model; None: it has none.
    """

    way: str
    received_bytes: int
    sent_bytes: int
    node_bytes: int
    peak_bytes: int
    num_messages: int
    formula: float | None = None

    @property
    def seconds(self) -> float:
        """Of a model in which only bandwidth counts: links within nodes and between them are busy at a time,
        each at full speed.
        """
        return max(
            max(self.received_bytes, self.sent_bytes) / NVLINK_BYTES_PER_S,
            self.node_bytes / NETWORK_BYTES_PER_S,
        )


def plan_cost(
    way: str, moved: Traffic, target: ShardLayout, *, itemsize: int, formula: float | None = None
) -> ReshardCost:
    """Cost of a plan: the target's weights, and one bucket on its way."""
    weights = max(target.num_elements(rank) for rank in range(target.num_ranks)) * itemsize
    peak = weights + moved.in_flight_bytes
    numbers = (
        int(moved.received.max()),
        int(moved.sent.max()),
        moved.node_bytes,
        peak,
        int(moved.messages.max()),
    )
    return ReshardCost(way, *numbers, formula)


def gather_costs(
    source: ShardLayout,
    target: ShardLayout,
    mesh: Mesh,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
) -> list[ReshardCost]:
    """Costs of gathering whole tensors: bucket by bucket, as HybridFlow-V, and as DS-Chat, which shards over
    all ranks.

    A ring in which what comes into a node comes once.
    """
    shapes = [(name, full_bounds(shape)) for name, shape in target.shapes.items()]
    total = sum(num_elements(bounds) for _, bounds in shapes) * itemsize
    sizes = [num_elements(bounds) * itemsize for _, bounds in shapes]
    replica = mesh.num_ranks // (mesh.replicas * mesh.sequence)
    lacking = total - min(_distinct(source, [rank]) for rank in range(source.num_ranks)) * itemsize
    weights = max(target.num_elements(rank) for rank in range(target.num_ranks)) * itemsize
    node = _into_nodes(source, total, itemsize, ranks_per_node)
    num_buckets = -(-total // max(bucket_bytes, max(sizes)))
    messages = num_buckets * (replica - 1)
    share = (replica - 1) / replica
    everywhere, nodes = mesh.num_ranks, -(-mesh.num_ranks // ranks_per_node)
    zero = total - total // everywhere
    return [
        ReshardCost(
            "by bucket", lacking, lacking, node, weights + max(bucket_bytes, *sizes), messages, share
        ),
        ReshardCost("HybridFlow-V", lacking, lacking, node, total, messages, share),
        ReshardCost(
            "DS-Chat",
            zero,
            zero,
            total - total // nodes if nodes > 1 else 0,
            total,
            num_buckets * (everywhere - 1),
            (everywhere - 1) / everywhere,
        ),
    ]


def received_share(mesh: Mesh, *, tensor: int, pipeline: int) -> float:
    """Received bytes as a share of the model, (t p - t_g p_g) / (t_g p_g t p), where sizes divide and every
    weight is split.
    """
    trained, generating = mesh.tensor * mesh.shards * mesh.pipeline, tensor * pipeline
    return (trained - generating) / (generating * trained)


def _distinct(layout: ShardLayout, ranks: list[int]) -> int:
    """Elements that some ranks have together; what several have counts once."""
    pieces: dict[str, set[Bounds]] = {}
    for rank in ranks:
        for piece in layout.shards[rank]:
            pieces.setdefault(piece.name, set()).add(piece.bounds)
    return sum(num_elements(bounds) for found in pieces.values() for bounds in found)


def _into_nodes(source: ShardLayout, total: int, itemsize: int, ranks_per_node: int) -> int:
    """The most that a node lacks of the whole model."""
    firsts = range(0, source.num_ranks, ranks_per_node)
    held = [
        _distinct(source, list(range(first, min(source.num_ranks, first + ranks_per_node))))
        for first in firsts
    ]
    return total - min(held) * itemsize
