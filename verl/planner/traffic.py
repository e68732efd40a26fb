"""Bytes and memory of a change of layout by a plan, and of the same change by other methods.

The other methods are those of HybridFlow, https://arxiv.org/abs/2409.19256, table 2. Memory is what
generation needs besides the weights of training: its own weights, whole tensors that are gathered, and
buckets in flight. Weights of training that share the memory of generation's weights, as in the hybrid
engine, are counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from verl.weight_sync.copy_pattern import CopyPattern
from verl.weight_sync.layout import Bounds, ShardLayout, full_bounds, num_elements
from verl.weight_sync.meshes import Mesh
from verl.weight_sync.reshard_plan import BUCKET_BYTES, RANKS_PER_NODE
from verl.weight_sync.reshard_planner import ReshardPlanner

Counts = np.ndarray[Any, np.dtype[np.int64]]

NVLINK_BYTES_PER_S = 600e9  # of a device, within its node
NETWORK_BYTES_PER_S = 200e9 / 8  # of a node


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages of a plan.

    Attributes:
        buckets: bytes by bucket, sender and receiver, [K, N, N].
        local: bytes that each rank copies from itself, [N].
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
        """Messages that each rank receives, [N]; all that one rank sends it in one bucket is one message."""
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
        """Largest number of bytes that a node sends to other nodes or receives from them."""
        nodes = np.arange(len(self.local)) // self.ranks_per_node
        is_on_node = (nodes[:, None] == np.arange(nodes[-1] + 1)).astype(np.int64)  # [N, nodes]
        between = is_on_node.T @ self.between @ is_on_node
        np.fill_diagonal(between, 0)
        return int(max(between.sum(0).max(), between.sum(1).max()))

    @property
    def in_flight_bytes(self) -> int:
        """Largest memory of one bucket on a rank: what it receives and what it sends."""
        return int((self.buckets.sum(1) + self.buckets.sum(2)).max(initial=0))

    @property
    def critical_bytes(self) -> int:
        """Sum over the buckets of the bytes of the busiest rank: sets the time if buckets run one by one."""
        return int(np.maximum(self.buckets.sum(1), self.buckets.sum(2)).max(1, initial=0).sum())


def traffic(
    source: ShardLayout,
    target: ShardLayout,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Traffic:
    """Traffic of the plan that `make_plan` of `verl.weight_sync.reshard_plan` makes of the same arguments.

    Faster than the plan, since copies are summed by pattern and not listed for each layer.

    Raises:
        ValueError: as `make_plan`.
    """
    planner = ReshardPlanner(
        source, target, itemsize=itemsize, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node
    )
    num_ranks = source.num_ranks
    buckets: list[Counts] = []
    local = np.zeros(num_ranks, dtype=np.int64)
    known: dict[int, _PatternTraffic] = {}
    for tensor in planner.tensors():
        new = planner.num_buckets - len(buckets)
        buckets += [np.zeros((num_ranks, num_ranks), dtype=np.int64) for _ in range(new)]
        if id(tensor.pattern) not in known:
            known[id(tensor.pattern)] = _PatternTraffic(tensor.pattern, num_ranks)
        pattern = known[id(tensor.pattern)]
        local += pattern.local
        receivers: dict[int, list[int]] = {}
        for receiver, bucket in tensor.receiver_buckets.items():
            receivers.setdefault(bucket, []).append(receiver)
        for bucket, columns in receivers.items():
            buckets[bucket][:, columns] += pattern.between[:, columns]
        # Copies whose sender or bucket differs between tensors of the same pattern.
        for index in {*tensor.chosen, *tensor.copy_buckets}:
            copy, own_bucket = tensor.pattern.copies[index], tensor.bucket_of(index)
            assert own_bucket is not None, "a local copy has no choice and no bucket"
            buckets[own_bucket][tensor.source_of(index).rank, copy.receiver] += copy.num_bytes
    stacked = np.stack(buckets) if buckets else np.zeros((0, num_ranks, num_ranks), dtype=np.int64)
    return Traffic(stacked, local, ranks_per_node)


class _PatternTraffic:
    """Bytes that are equal for every tensor of a pattern.

    Attributes:
        between: of copies with a single source, by sender and receiver, [N, N].
        local: that each rank copies from itself, [N].
    """

    def __init__(self, pattern: CopyPattern, num_ranks: int) -> None:
        self.between = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        self.local = np.zeros(num_ranks, dtype=np.int64)
        for copy in pattern.copies:
            if copy.is_local:
                self.local[copy.receiver] += copy.num_bytes
            elif len(copy.sources) == 1:
                self.between[copy.sources[0].rank, copy.receiver] += copy.num_bytes


@dataclass(frozen=True)
class ReshardCost:
    """Cost of a method to change the layout.

    Attributes:
        way: name of the method.
        received_bytes: of the rank that receives most.
        sent_bytes: of the rank that sends most.
        node_bytes: of the node that sends or receives most, from and to other nodes.
        peak_bytes: memory of the rank that needs most.
        num_messages: of the rank that receives most messages; a ring of n ranks passes n - 1 for each bucket.
        formula: received bytes as a share of the model, by the paper's formula; None: it has none.
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
        """Least time if only bandwidth counts, with links in nodes and between them busy at the same time."""
        return max(
            max(self.received_bytes, self.sent_bytes) / NVLINK_BYTES_PER_S,
            self.node_bytes / NETWORK_BYTES_PER_S,
        )


def plan_cost(
    way: str, moved: Traffic, target: ShardLayout, *, itemsize: int, formula: float | None = None
) -> ReshardCost:
    """Cost of a plan; its memory is the target's weights and one bucket in flight."""
    return ReshardCost(
        way,
        received_bytes=int(moved.received.max()),
        sent_bytes=int(moved.sent.max()),
        node_bytes=moved.node_bytes,
        peak_bytes=_max_weight_bytes(target, itemsize) + moved.in_flight_bytes,
        num_messages=int(moved.messages.max()),
        formula=formula,
    )


def gather_costs(
    source: ShardLayout,
    target: ShardLayout,
    mesh: Mesh,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
) -> list[ReshardCost]:
    """Costs of methods that gather whole tensors in a ring.

    "by bucket" gathers one bucket of tensors at a time, "HybridFlow-V" the whole model; "DS-Chat" the whole
    model, sharded over all ranks and not over those of a replica. What a node lacks enters it once.
    """
    sizes = [num_elements(full_bounds(shape)) * itemsize for shape in target.shapes.values()]
    total = sum(sizes)
    replica = mesh.num_ranks // (mesh.replicas * mesh.sequence)
    lacking = total - min(_distinct_elements(source, [rank]) for rank in range(source.num_ranks)) * itemsize
    weights = _max_weight_bytes(target, itemsize)
    nodes = [
        list(range(first, min(source.num_ranks, first + ranks_per_node)))
        for first in range(0, source.num_ranks, ranks_per_node)
    ]
    into_node = total - min(_distinct_elements(source, ranks) for ranks in nodes) * itemsize
    num_buckets = -(-total // max(bucket_bytes, max(sizes)))
    messages = num_buckets * (replica - 1)
    share = (replica - 1) / replica
    num_ranks, num_nodes = mesh.num_ranks, -(-mesh.num_ranks // ranks_per_node)
    zero = total - total // num_ranks
    zero_into_node = total - total // num_nodes if num_nodes > 1 else 0
    bucket_peak = weights + max(bucket_bytes, *sizes)
    return [
        ReshardCost("by bucket", lacking, lacking, into_node, bucket_peak, messages, share),
        ReshardCost("HybridFlow-V", lacking, lacking, into_node, total, messages, share),
        ReshardCost(
            "DS-Chat",
            zero,
            zero,
            zero_into_node,
            total,
            num_buckets * (num_ranks - 1),
            (num_ranks - 1) / num_ranks,
        ),
    ]


def received_share(mesh: Mesh, *, tensor: int, pipeline: int) -> float:
    """Received bytes as a share of the model, (t p - t_g p_g) / (t_g p_g t p).

    The formula of HybridFlow's table 2; exact where sizes divide and every weight is split.
    """
    trained, generating = mesh.tensor * mesh.shards * mesh.pipeline, tensor * pipeline
    return (trained - generating) / (generating * trained)


def _max_weight_bytes(layout: ShardLayout, itemsize: int) -> int:
    """Bytes of the weights on the rank that has most."""
    return max(layout.num_elements(rank) for rank in range(layout.num_ranks)) * itemsize


def _distinct_elements(layout: ShardLayout, ranks: list[int]) -> int:
    """Elements that some ranks have together; replicas count once."""
    bounds: dict[str, set[Bounds]] = {}
    for rank in ranks:
        for shard in layout.shards[rank]:
            bounds.setdefault(shard.name, set()).add(shard.bounds)
    return sum(num_elements(own) for distinct in bounds.values() for own in distinct)
