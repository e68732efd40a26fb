"""Shards of whole tensors by rank, and the arithmetic of their bounds; no processes, no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

Bounds = tuple[tuple[int, int], ...]  # (start, stop) in each dimension of a whole tensor


def full_bounds(shape: tuple[int, ...]) -> Bounds:
    """Bounds of all of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(bounds: Bounds) -> tuple[int, ...]:
    """Shape of the part that bounds select."""
    return tuple(stop - start for start, stop in bounds)


def num_elements(bounds: Bounds) -> int:
    """Number of elements of the part that bounds select."""
    return prod(stop - start for start, stop in bounds)


def intersection(one: Bounds, other: Bounds) -> Bounds | None:
    """Common part of two bounds of the same tensor; None if it is empty."""
    common = []
    for (a, b), (c, d) in zip(one, other, strict=True):
        start, stop = max(a, c), min(b, d)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def contains(outer: Bounds, inner: Bounds) -> bool:
    """True if `inner` lies inside `outer`."""
    return all(
        first <= start and stop <= last for (first, last), (start, stop) in zip(outer, inner, strict=True)
    )


def difference(outer: Bounds, inner: Bounds) -> list[Bounds]:
    """Disjoint bounds that cover `outer` without `inner`, which must lie inside of it."""
    rest = []
    for dim, ((start, stop), (first, last)) in enumerate(zip(outer, inner, strict=True)):
        sides = ((start, first), (last, stop))
        # Dimensions before this one are already cut to `inner`, so no element is counted twice.
        rest += [(*inner[:dim], side, *outer[dim + 1 :]) for side in sides if side[0] < side[1]]
    return rest


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A part of a whole tensor that is stored on a rank.

    Attributes:
        name: of the whole tensor, as in a Hugging Face folder.
        bounds: of the part in the whole tensor.
        local_name: name of the local tensor that stores the part.
        offset: start of the part in the local tensor, one number for each dimension of the local tensor. The
            last dimensions of both tensors correspond. If the local tensor has fewer dimensions, the part has
            size 1 in the leading ones that are missing (one expert of a stacked weight). If the local tensor
            has more, the part has size 1 in its leading ones (a local tensor that stacks experts).
    """

    name: str
    bounds: Bounds
    local_name: str
    offset: tuple[int, ...]


@dataclass(frozen=True)
class ShardLayout:
    """Shards of each tensor on each rank.

    Attributes:
        shapes: of the whole tensors by name, in the order in which they are transferred.
        shards: of each rank. Replicas are equal bounds on several ranks; a rank may have no shard. Padding of
            a local tensor belongs to no shard.

    Raises:
        ValueError: a shard of an unknown tensor, or outside its tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    shards: tuple[tuple[TensorShard, ...], ...]

    def __post_init__(self) -> None:
        # Replicas often share one tuple of shards: each tuple is checked once, on its first rank.
        distinct = {id(shards): rank for rank, shards in reversed(list(enumerate(self.shards)))}
        for rank in sorted(distinct.values()):
            for shard in self.shards[rank]:
                problem = self._problem(shard)
                if problem:
                    raise ValueError(
                        f"need shards of known tensors that lie inside them, got on rank {rank} {shard}: "
                        f"{problem}"
                    )

    @property
    def num_ranks(self) -> int:
        """Number of ranks, including those without shards."""
        return len(self.shards)

    def num_elements(self, rank: int) -> int:
        """Number of elements that a rank stores."""
        return sum(num_elements(shard.bounds) for shard in self.shards[rank])

    def _problem(self, shard: TensorShard) -> str | None:
        shape = self.shapes.get(shard.name)
        if shape is None:
            return "there is no such tensor"
        is_inside = len(shape) == len(shard.bounds) and all(
            0 <= a <= b <= size for (a, b), size in zip(shard.bounds, shape, strict=True)
        )
        if not is_inside:
            return f"the tensor is {shape}"
        num_missing = max(0, len(shard.bounds) - len(shard.offset))
        if min(shard.offset, default=0) < 0 or any(b - a > 1 for a, b in shard.bounds[:num_missing]):
            return "need an offset from 0 for each dimension of size above 1"
        return None


def local_offset(bounds: Bounds, shard: TensorShard) -> tuple[int, ...]:
    """Start of a part of a shard in the shard's local tensor."""
    steps = tuple(start - first for (start, _), (first, _) in zip(bounds, shard.bounds, strict=True))
    steps = _fit_dims(steps, len(shard.offset), fill=0)
    return tuple(begin + step for begin, step in zip(shard.offset, steps, strict=True))


def local_slices(bounds: Bounds, offset: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of the part that begins at an offset of a local tensor; elements keep their number and order."""
    shape = _fit_dims(shape_of(bounds), len(offset), fill=1)
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


def _fit_dims(values: tuple[int, ...], num_dims: int, *, fill: int) -> tuple[int, ...]:
    """Values of the last `num_dims` dimensions, with `fill` in front if there are fewer."""
    num_missing = num_dims - len(values)
    return (fill,) * num_missing + values if num_missing > 0 else values[-num_missing:]
