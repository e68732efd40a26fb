"""Layouts with numbers in them: homes of every rank as arrays, a plan carried out on them, and what it should
have cost.
"""

from __future__ import annotations

import numpy as np

from verl.weight_sync.layout import (
    ShardLayout,
    TensorShard,
    full_bounds,
    local_slices,
    num_elements,
    shape_of,
)
from verl.weight_sync.reshard_plan import Copy, ReshardPlan


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Whole tensors of which every element differs from every other one."""
    first, made = 1, {}
    for name, shape in shapes.items():
        made[name] = np.arange(first, first + num_elements(full_bounds(shape)), dtype=np.int64).reshape(shape)
        first += made[name].size
    return made


def window(array: np.ndarray, bounds) -> np.ndarray:
    return array[tuple(slice(*bound) for bound in bounds)]


def empty_homes(pieces: tuple[TensorShard, ...]) -> dict[str, np.ndarray]:
    """Homes just large enough for their pieces, with a row of padding behind, all -1."""
    ends: dict[str, np.ndarray] = {}
    for piece in pieces:
        stops = np.array([part.stop for part in local_slices(piece.bounds, piece.offset)], dtype=int)
        ends[piece.local_name] = np.maximum(ends.get(piece.local_name, stops), stops)
    return {home: np.full(tuple(end + 1), -1) for home, end in ends.items()}


def filled(layout: ShardLayout, wholes: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Homes of every rank with the values that the layout says."""
    ranks = [empty_homes(pieces) for pieces in layout.shards]
    for homes, pieces in zip(ranks, layout.shards, strict=True):
        for piece in pieces:
            view = homes[piece.local_name][(..., *local_slices(piece.bounds, piece.offset))]
            view[...] = window(wholes[piece.name], piece.bounds).reshape(view.shape)
    return ranks


def carried_out(
    plan: ReshardPlan, source: list[dict[str, np.ndarray]], target: ShardLayout
) -> list[dict[str, np.ndarray]]:
    """Homes of every rank of the target after all copies; an element that is written twice is a fault."""
    ranks = [empty_homes(pieces) for pieces in target.shards]

    def carry(copy: Copy) -> None:
        values = source[copy.sender][copy.sender_tensor][
            (..., *local_slices(copy.bounds, copy.sender_offset))
        ].reshape(shape_of(copy.bounds))
        view = ranks[copy.receiver][copy.receiver_tensor][
            (..., *local_slices(copy.bounds, copy.receiver_offset))
        ]
        assert (view == -1).all()
        view[...] = values.reshape(view.shape)

    for copies in (plan.local, *plan.buckets):
        for copy in copies:
            carry(copy)
    return ranks


def assert_equal(got: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for rank, (homes, others) in enumerate(zip(got, expected, strict=True)):
        assert homes.keys() == others.keys()
        assert [(rank, home) for home in homes if not np.array_equal(homes[home], others[home])] == []


def held(layout: ShardLayout, rank: int, wholes: dict[str, np.ndarray]) -> set[int]:
    """Elements that a rank has, one by one."""
    return {int(x) for piece in layout.shards[rank] for x in window(wholes[piece.name], piece.bounds).ravel()}


def lacking(source: ShardLayout, target: ShardLayout, rank: int, wholes: dict[str, np.ndarray]) -> int:
    """Elements that a rank has to get from others, whatever the plan."""
    return len(held(target, rank, wholes) - held(source, rank, wholes))
