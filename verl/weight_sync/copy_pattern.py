"""Copies that a tensor needs between two layouts, with all ranks that each of them can come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from verl.weight_sync.layout import (
    Bounds,
    TensorShard,
    difference,
    intersection,
    local_offset,
    num_elements,
    shape_of,
)

RankedShards = list[tuple[int, TensorShard]]  # the shards of one tensor, with their ranks


@dataclass(frozen=True, slots=True)
class CopySource:
    """A rank that a part can be copied from.

    Attributes:
        rank: that has the part.
        shard: index of the source shard that contains the part.
        offset: start of the part in the local tensor of that shard.
    """

    rank: int
    shard: int
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PendingCopy:
    """A part that a rank needs, before one of its sources is chosen.

    Attributes:
        bounds: of the part.
        num_bytes: of the part, as sent.
        receiver: rank that needs it.
        shard: index of the target shard that contains the part.
        offset: start of the part in the local tensor of that shard.
        sources: the receiver alone if it has the part itself, else one or several other ranks.
    """

    bounds: Bounds
    num_bytes: int
    receiver: int
    shard: int
    offset: tuple[int, ...]
    sources: tuple[CopySource, ...]

    @property
    def is_local(self) -> bool:
        """True if the receiver has the part itself."""
        return self.sources[0].rank == self.receiver


@dataclass
class CopyPattern:
    """Copies of every tensor that is sharded in the same way; layers repeat, so there are few patterns.

    Attributes:
        copies: ordered by receiver.
        received: bytes that each receiver gets from other ranks.
        sent: bytes by receiver and sender, of copies with a single source.
        choices: indices of copies with several sources.
    """

    copies: list[PendingCopy]
    received: Counter[int] = field(default_factory=Counter)
    sent: dict[int, Counter[int]] = field(default_factory=dict)
    choices: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._involving: dict[int, list[int]] = {}
        for index, copy in enumerate(self.copies):
            if copy.is_local:
                continue
            self.received[copy.receiver] += copy.num_bytes
            if len(copy.sources) > 1:
                self.choices.append(index)
            else:
                self.sent.setdefault(copy.receiver, Counter())[copy.sources[0].rank] += copy.num_bytes

    def involving(self, rank: int) -> list[int]:
        """Indices of the copies that a rank receives or may send."""
        if rank not in self._involving:
            parties = ((copy.receiver, *(source.rank for source in copy.sources)) for copy in self.copies)
            self._involving[rank] = [index for index, ranks in enumerate(parties) if rank in ranks]
        return self._involving[rank]


def pattern_key(source: RankedShards, target: RankedShards) -> object:
    """Key that is equal for tensors with the same pattern: same bounds and offsets on the same ranks."""
    return tuple(
        tuple((rank, shard.bounds, shard.offset) for rank, shard in shards) for shards in (source, target)
    )


def copy_pattern(
    name: str,
    source: RankedShards,
    target: RankedShards,
    *,
    itemsize: int,
    bucket_bytes: int,
    ranks_per_node: int,
) -> CopyPattern:
    """Pattern of a tensor.

    Args:
        name: of the tensor, for messages.
        source: its shards as they are.
        target: its shards as they shall be.
        itemsize: bytes per element as sent.
        bucket_bytes: a larger part is split.
        ranks_per_node: of consecutive ranks; sources on the receiver's node come before others.

    Raises:
        ValueError: the source lacks a part of the target.
    """
    regions = _disjoint_regions(source)
    max_elements = max(1, bucket_bytes // itemsize)
    # Replicas need the same parts: they are cut once for all shards of equal bounds.
    parts_of: dict[Bounds, list[tuple[Bounds, list[int]]]] = {}
    copies = []
    for index, (receiver, shard) in enumerate(target):
        if shard.bounds not in parts_of:
            common = ((intersection(region, shard.bounds), owners) for region, owners in regions)
            parts_of[shard.bounds] = sorted(
                (part, owners)
                for bounds, owners in common
                if bounds is not None
                for part in _split(bounds, max_elements)
            )
        parts = parts_of[shard.bounds]
        if sum(num_elements(part) for part, _ in parts) != num_elements(shard.bounds):
            raise ValueError(
                f"need all of {name} in the source, it lacks some of {shard.bounds}, "
                f"which rank {receiver} wants"
            )
        for part, owners in parts:
            usable = _usable_shards(receiver, source, owners, ranks_per_node)
            sources = tuple(CopySource(source[i][0], i, local_offset(part, source[i][1])) for i in usable)
            offset = local_offset(part, shard)
            copies.append(PendingCopy(part, num_elements(part) * itemsize, receiver, index, offset, sources))
    return CopyPattern(copies)


def _usable_shards(receiver: int, source: RankedShards, owners: list[int], ranks_per_node: int) -> list[int]:
    """Shards to copy from, one for each rank: the receiver's own, else those on its node, else all."""
    by_rank = {source[i][0]: i for i in reversed(owners)}
    if receiver in by_rank:
        return [by_rank[receiver]]
    near = [rank for rank in by_rank if rank // ranks_per_node == receiver // ranks_per_node]
    # From the receiver's number on: between equal loads the first one wins, which shall not always be rank 0.
    order = sorted(near or by_rank, key=lambda rank: (rank < receiver, rank))
    return [by_rank[rank] for rank in order]


def _disjoint_regions(shards: RankedShards) -> list[tuple[Bounds, list[int]]]:
    """Disjoint regions of a tensor, each with the indices of all shards that contain it."""
    owners: dict[Bounds, list[int]] = {}
    for index, (_, shard) in enumerate(shards):
        owners.setdefault(shard.bounds, []).append(index)
    regions: list[tuple[Bounds, list[int]]] = []
    for bounds, indices in owners.items():
        rest, cut = [bounds], []
        for region, others in regions:
            common = intersection(region, bounds)
            if common is None:
                cut.append((region, others))
                continue
            cut += [(common, others + indices), *((part, others) for part in difference(region, common))]
            rest = [part for box in rest for part in _without(box, common)]
        regions = [*cut, *((box, indices) for box in rest)]
    return regions


def _without(box: Bounds, other: Bounds) -> list[Bounds]:
    common = intersection(box, other)
    return [box] if common is None else difference(box, common)


def _split(bounds: Bounds, max_elements: int) -> Iterator[Bounds]:
    """Parts of at most `max_elements`, cut along the first dimension with a size above 1."""
    size = num_elements(bounds)
    if size <= max_elements:
        yield bounds
        return
    dim = next(dim for dim, length in enumerate(shape_of(bounds)) if length > 1)
    start, stop = bounds[dim]
    width = max(1, max_elements // (size // (stop - start)))
    for first in range(start, stop, width):
        part = (first, min(stop, first + width))
        # One row may still be too large: then it is cut along the next dimension.
        yield from _split((*bounds[:dim], part, *bounds[dim + 1 :]), max_elements)
