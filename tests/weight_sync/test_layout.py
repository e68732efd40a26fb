"""Bounds of parts, and shards in local tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.weight_sync.layout import (
    ShardLayout,
    TensorShard,
    difference,
    full_bounds,
    intersection,
    local_offset,
    local_slices,
    num_elements,
    shape_of,
)

PAIR = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda pair: tuple(sorted(pair)))
BOXES = st.integers(0, 3).flatmap(lambda ndim: st.tuples(*[st.tuples(*[PAIR] * ndim)] * 2))


def mask(bounds) -> np.ndarray:
    """Which elements of a tensor of size 5 in each dimension are inside."""
    inside = np.zeros((5,) * len(bounds), dtype=bool)
    inside[tuple(slice(*bound) for bound in bounds)] = True
    return inside


@given(BOXES)
def test_parts_meet_in_the_elements_that_both_have(boxes):
    one, other = boxes
    both = mask(one) & mask(other)
    common = intersection(one, other)
    assert (common is None) == (not both.any())
    assert num_elements(one) == mask(one).sum()
    if common is not None:
        assert (mask(common) == both).all()
        rest = [mask(part) for part in difference(one, common)]
        assert (
            (sum(part.astype(int) for part in rest) == (mask(one) & ~both)).all() if rest else common == one
        )


def test_a_scalar_is_a_part_of_one_element():
    assert num_elements(()) == 1 and intersection((), ()) == () and shape_of(full_bounds(())) == ()


@pytest.mark.parametrize(
    ("bounds", "offset", "part", "begin", "slices"),
    [
        pytest.param(
            ((4, 8), (0, 3)), (10, 0), ((5, 7), (1, 3)), (11, 1), (slice(11, 13), slice(1, 3)), id="fused"
        ),
        pytest.param(
            ((2, 3), (0, 4), (0, 3)),
            (4, 0),
            ((2, 3), (1, 4), (0, 3)),
            (5, 0),
            (slice(5, 8), slice(0, 3)),
            id="one expert",
        ),
        pytest.param(
            ((0, 4), (0, 3)),
            (2, 4, 0),
            ((1, 4), (0, 3)),
            (2, 5, 0),
            (slice(2, 3), slice(5, 8), slice(0, 3)),
            id="stacked",
        ),
        pytest.param(((3, 4), (2, 3)), (), ((3, 4), (2, 3)), (), (), id="all dropped"),
    ],
)
def test_a_part_is_found_in_a_local_tensor_of_the_same_fewer_or_more_dimensions(
    bounds, offset, part, begin, slices
):
    shard = TensorShard("w", bounds, "local", offset)
    assert local_offset(part, shard) == begin
    assert local_slices(part, begin) == slices


def test_ranks_may_have_no_shards():
    layout = ShardLayout({"w": (4, 2)}, ((TensorShard("w", ((1, 4), (0, 2)), "w", (0, 0)),), ()))
    assert layout.num_ranks == 2 and [layout.num_elements(rank) for rank in (0, 1)] == [6, 0]


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (TensorShard("v", ((0, 4), (0, 2)), "w", (0, 0)), "there is no such tensor"),
        (TensorShard("w", ((0, 5), (0, 2)), "w", (0, 0)), r"the tensor is \(4, 2\)"),
        (TensorShard("w", ((3, 2), (0, 2)), "w", (0, 0)), r"the tensor is \(4, 2\)"),
        (TensorShard("w", ((0, 4),), "w", (0,)), r"the tensor is \(4, 2\)"),
        (TensorShard("w", ((0, 4), (0, 2)), "w", (0, -1)), "need an offset from 0"),
        (
            TensorShard("w", ((0, 4), (0, 2)), "w", (0,)),
            "need an offset from 0 for each dimension of size above 1",
        ),
    ],
)
def test_a_piece_that_cannot_be_is_refused(shard, message):
    with pytest.raises(ValueError, match=f"on rank 1 .*{message}"):
        ShardLayout({"w": (4, 2)}, ((), (shard,)))
