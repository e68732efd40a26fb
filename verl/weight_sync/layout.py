"""Which part of which whole tensor lies on which rank; pure, it knows neither processes nor models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

Bounds = tuple[tuple[int, int], ...]  # (start, stop) in each dimension of a whole tensor


def full_bounds(shape: tuple[int, ...]) -> Bounds:
    """The bounds of all of a tensor."""
    return tuple((0, size) for size in shape)


def shape_of(bounds: Bounds) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(stop - start for start, stop in bounds)


def num_elements(bounds: Bounds) -> int:
    """Number of elements of a part."""
    return prod(stop - start for start, stop in bounds)


def intersection(one: Bounds, other: Bounds) -> Bounds | None:
    """What two parts of a tensor have in common; None: nothing."""
    common = []
    for (a, b), (c, d) in zip(one, other, strict=True):
        start, stop = max(a, c), min(b, d)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def difference(one: Bounds, inner: Bounds) -> list[Bounds]:
    """A part without another one that lies inside it, as disjoint parts."""
    rest = []
    for dim, ((start, stop), (first, last)) in enumerate(zip(one, inner, strict=True)):
        sides = ((start, first), (last, stop))
        rest += [(*inner[:dim], side, *one[dim + 1 :]) for side in sides if side[0] < side[1]]
    return rest


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A part of a whole tensor that lies on a rank.

    Attributes:
        name: of the whole tensor, as in a Hugging Face folder.
        bounds: which part of the whole tensor.
        local_name: name of the local tensor that holds it.
        offset: where it begins in the home, one number for each dimension of the home. The last dimensions of
            the home are the last ones of the whole tensor. A home with fewer dimensions lacks leading ones,
            in which the part has size 1 (an expert of a stacked weight); in leading dimensions that only the
            home has, the part has size 1 there (stacked experts at home).
    """

    name: str
    bounds: Bounds
    local_name: str
    offset: tuple[int, ...]


@dataclass(frozen=True)
class ShardLayout:
    """Which parts of which tensors lie on which rank.

    Attributes:
        shapes: of the whole tensors by name, in the order in which they are wanted.
        shards: shards of each rank. Replicas are equal bounds on several ranks; a rank may have none. Padding
            of a local tensor is part of no piece.

    Raises:
        ValueError: a piece of an unknown tensor, or outside its tensor.
    """

    shapes: Mapping[str, tuple[int, ...]]
    shards: tuple[tuple[TensorShard, ...], ...]

    def __post_init__(self) -> None:
        # Replicas that share their tuple are looked at once.
        distinct = {id(pieces): rank for rank, pieces in reversed(list(enumerate(self.shards)))}
        for rank in sorted(distinct.values()):
            for piece in self.shards[rank]:
                fault = self._fault(piece)
                if fault:
                    raise ValueError(
                        f"need pieces of known tensors that lie inside them, got on rank {rank} {piece}: {fault}"
                    )

    @property
    def num_ranks(self) -> int:
        """Ranks, with those that hold nothing."""
        return len(self.shards)

    def num_elements(self, rank: int) -> int:
        """Elements that a rank holds."""
        return sum(num_elements(piece.bounds) for piece in self.shards[rank])

    def _fault(self, piece: TensorShard) -> str | None:
        shape = self.shapes.get(piece.name)
        if shape is None:
            return "there is no such tensor"
        inside = len(shape) == len(piece.bounds) and all(
            0 <= a <= b <= size for (a, b), size in zip(piece.bounds, shape, strict=True)
        )
        if not inside:
            return f"the tensor is {shape}"
        dropped = len(piece.bounds) - len(piece.offset)
        if min(piece.offset, default=0) < 0 or any(b - a > 1 for a, b in piece.bounds[: max(0, dropped)]):
            return "need an offset from 0 for each dimension of size above 1"
        return None


def local_offset(part: Bounds, piece: TensorShard) -> tuple[int, ...]:
    """Where a part of a piece begins in the piece's home."""
    steps = tuple(start - first for (start, _), (first, _) in zip(part, piece.bounds, strict=True))
    extra = len(piece.offset) - len(steps)
    steps = (0,) * extra + steps if extra > 0 else steps[-extra:]
    return tuple(begin + step for begin, step in zip(piece.offset, steps, strict=True))


def local_slices(part: Bounds, offset: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a part that begins at an offset lies in its home; what they give has as many elements as the
    part, in the same order.
    """
    shape = shape_of(part)
    extra = len(offset) - len(shape)
    shape = (1,) * extra + shape if extra > 0 else shape[-extra:]
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
