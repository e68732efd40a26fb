"""Layouts for tests, local tensors of every rank as arrays, and a plan executed on them."""

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


def sharded(shape, parts: int, dim: int = 0) -> ShardLayout:
    """Layout of a tensor `w` in equal parts, one on each rank."""
    width = shape[dim] // parts
    ranks = []
    for rank in range(parts):
        bounds = list(full_bounds(shape))
        bounds[dim] = (rank * width, (rank + 1) * width)
        ranks.append((TensorShard("w", tuple(bounds), "w", (0,) * len(shape)),))
    return ShardLayout({"w": shape}, tuple(ranks))


def replicated(shapes, num_ranks: int) -> ShardLayout:
    shards = tuple(
        TensorShard(name, full_bounds(shape), name, (0,) * len(shape)) for name, shape in shapes.items()
    )
    return ShardLayout(shapes, (shards,) * num_ranks)


def only_on(rank: int, shapes, num_ranks: int) -> ShardLayout:
    full = replicated(shapes, num_ranks)
    return ShardLayout(shapes, tuple(shards if r == rank else () for r, shards in enumerate(full.shards)))


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Whole tensors whose elements are all different."""
    first, made = 1, {}
    for name, shape in shapes.items():
        made[name] = np.arange(first, first + num_elements(full_bounds(shape)), dtype=np.int64).reshape(shape)
        first += made[name].size
    return made


def window(array: np.ndarray, bounds) -> np.ndarray:
    return array[tuple(slice(*bound) for bound in bounds)]


def empty_tensors(shards: tuple[TensorShard, ...]) -> dict[str, np.ndarray]:
    """Local tensors just large enough for their shards, with one more row of padding, filled with -1."""
    ends: dict[str, np.ndarray] = {}
    for shard in shards:
        stops = np.array([part.stop for part in local_slices(shard.bounds, shard.offset)], dtype=int)
        ends[shard.local_name] = np.maximum(ends.get(shard.local_name, stops), stops)
    return {name: np.full(tuple(end + 1), -1) for name, end in ends.items()}


def filled(layout: ShardLayout, wholes: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Local tensors of every rank, with the values of their shards."""
    ranks = [empty_tensors(shards) for shards in layout.shards]
    for local_tensors, shards in zip(ranks, layout.shards, strict=True):
        for shard in shards:
            view = local_tensors[shard.local_name][(..., *local_slices(shard.bounds, shard.offset))]
            view[...] = window(wholes[shard.name], shard.bounds).reshape(view.shape)
    return ranks


def executed(
    plan: ReshardPlan, source: list[dict[str, np.ndarray]], target: ShardLayout
) -> list[dict[str, np.ndarray]]:
    """Local tensors of every rank of the target after all copies; no element may be written twice."""
    ranks = [empty_tensors(shards) for shards in target.shards]

    def run(copy: Copy) -> None:
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
            run(copy)
    return ranks


def assert_equal(got: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for rank, (own, others) in enumerate(zip(got, expected, strict=True)):
        assert own.keys() == others.keys()
        assert [(rank, name) for name in own if not np.array_equal(own[name], others[name])] == []


def held(layout: ShardLayout, rank: int, wholes: dict[str, np.ndarray]) -> set[int]:
    """Values of all elements that a rank has."""
    return {int(x) for shard in layout.shards[rank] for x in window(wholes[shard.name], shard.bounds).ravel()}


def lacking(source: ShardLayout, target: ShardLayout, rank: int, wholes: dict[str, np.ndarray]) -> int:
    """Number of elements that a rank must get from others, with any plan."""
    return len(held(target, rank, wholes) - held(source, rank, wholes))
