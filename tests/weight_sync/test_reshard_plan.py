"""Plans: every element arrives, no byte travels in vain, senders share the work, all ranks have one plan."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weight_sync.arrays import (
    assert_equal,
    executed,
    filled,
    lacking,
    only_on,
    replicated,
    sharded,
    tensors,
)
from verl.weight_sync.layout import ShardLayout, TensorShard, full_bounds, num_elements, shape_of
from verl.weight_sync.reshard_plan import ReshardPlan, make_plan


def assert_exact(source: ShardLayout, target: ShardLayout, **options) -> ReshardPlan:
    """Make a plan; check that each rank gets what it lacks, no more, in buckets of the limit."""
    plan = make_plan(source, target, itemsize=2, **options)
    wholes = tensors(source.shapes)
    assert_equal(executed(plan, filled(source, wholes), target), filled(target, wholes))
    for rank in range(source.num_ranks):
        assert plan.received_bytes(rank) == 2 * lacking(source, target, rank, wholes)
        assert plan.received_bytes(rank) + plan.local_bytes(rank) == 2 * target.num_elements(rank)
    assert sum(map(plan.sent_bytes, range(plan.num_ranks))) == sum(
        map(plan.received_bytes, range(plan.num_ranks))
    )
    limit = options.get("bucket_bytes", 2**28)
    for bucket in plan.buckets:
        assert max(received_in(bucket).values()) <= max(limit, 2)
    return plan


def received_in(bucket) -> Counter[int]:
    received = Counter()
    for copy in bucket:
        received[copy.receiver] += 2 * num_elements(copy.bounds)
    return received


@st.composite
def scattered(draw, shapes: dict[str, tuple[int, ...]], num_ranks: int, complete: bool) -> ShardLayout:
    """Any shards on any rank: overlapping between ranks, empty, or fused into one local tensor."""
    ranks: list[list[TensorShard]] = [[] for _ in range(num_ranks)]
    for rank in range(num_ranks):
        end = 0
        for name, shape in shapes.items():
            if draw(st.booleans()):
                cuts = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
                bounds = tuple((a, b) for a, b in cuts)
                fused = draw(st.booleans())
                offset = (end, *(0 for _ in shape)) if fused else (0,) * len(shape)
                ranks[rank].append(TensorShard(name, bounds, f"fused{len(shape)}" if fused else name, offset))
                end += 1
    if complete:
        for name, shape in shapes.items():
            ranks[draw(st.integers(0, num_ranks - 1))].append(
                TensorShard(name, full_bounds(shape), f"whole {name}", (0,) * len(shape))
            )
    return ShardLayout(shapes, tuple(map(tuple, ranks)))


@st.composite
def cases(draw):
    num_tensors = draw(st.integers(1, 3))
    shapes = {f"t{i}": tuple(draw(st.lists(st.integers(0, 5), max_size=3))) for i in range(num_tensors)}
    num_ranks = draw(st.integers(1, 5))
    source = draw(scattered(shapes, num_ranks, complete=True))
    target = draw(scattered(shapes, num_ranks, complete=False))
    return (
        source,
        target,
        {"bucket_bytes": draw(st.integers(1, 40)), "ranks_per_node": draw(st.integers(1, 5))},
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_between_any_two_layouts_everything_arrives_and_nothing_travels_in_vain(case):
    source, target, options = case
    assert_exact(source, target, **options)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_a_rank_that_lists_only_its_own_copies_has_those_of_the_whole_plan(case):
    source, target, options = case
    whole_plan = make_plan(source, target, itemsize=2, **options)
    for rank in range(source.num_ranks):
        own = make_plan(source, target, itemsize=2, rank=rank, **options)
        assert own.local == tuple(copy for copy in whole_plan.local if copy.receiver == rank)
        mine = tuple(
            tuple(c for c in bucket if rank in (c.sender, c.receiver)) for bucket in whole_plan.buckets
        )
        assert own.buckets == mine
        for count in ("sent_bytes", "received_bytes", "local_bytes", "num_messages"):
            assert getattr(own, count)(rank) == getattr(whole_plan, count)(rank)


def test_a_slice_that_grows_in_place_receives_only_the_rest():
    # Four shards of 2 rows become two of 4 rows: each rank lacks one shard and has the other.
    source = sharded((8, 3), 4)
    halves = sharded((8, 3), 2).shards
    plan = assert_exact(source, ShardLayout(source.shapes, (halves[0], halves[0], halves[1], halves[1])))
    (bucket,) = plan.buckets
    assert [(c.sender, c.receiver, c.bounds[0], c.receiver_offset) for c in bucket] == [
        (1, 0, (2, 4), (2, 0)),
        (0, 1, (0, 2), (0, 0)),
        (3, 2, (6, 8), (2, 0)),
        (2, 3, (4, 6), (0, 0)),
    ]
    assert [(c.receiver, c.receiver_offset) for c in plan.local] == [
        (0, (0, 0)),
        (1, (2, 0)),
        (2, (0, 0)),
        (3, (2, 0)),
    ]
    assert [plan.num_messages(rank) for rank in range(4)] == [1, 1, 1, 1]


def test_what_lies_where_it_is_wanted_does_not_travel():
    layout = sharded((8, 3), 4)
    plan = assert_exact(layout, layout)
    assert plan.buckets == () and [plan.local_bytes(rank) for rank in range(4)] == [12] * 4


def test_a_sender_on_the_same_node_comes_before_one_that_has_less_to_send():
    shapes = {f"w{i}": (4,) for i in range(6)}
    full = replicated(shapes, 4).shards[0]
    plan = assert_exact(ShardLayout(shapes, (full, full, full, ())), replicated(shapes, 4), ranks_per_node=2)
    assert [plan.sent_bytes(rank) for rank in range(4)] == [0, 0, 48, 0]
    plan = assert_exact(ShardLayout(shapes, (full, full, full, ())), replicated(shapes, 4), ranks_per_node=1)
    assert [plan.sent_bytes(rank) for rank in range(4)] == [16, 16, 16, 0]


def test_senders_share_what_several_of_them_have():
    shapes = {f"w{i}": (4 + i % 3, 2) for i in range(40)}
    holders = [0, 3, 5]
    full = replicated(shapes, 8).shards[0]
    source = ShardLayout(shapes, tuple(full if rank in holders else () for rank in range(8)))
    plan = assert_exact(source, replicated(shapes, 8))
    sent = [plan.sent_bytes(rank) for rank in holders]
    assert max(sent) - min(sent) <= 2 * num_elements(full_bounds((6, 2)))


def test_tensors_arrive_in_the_order_of_the_target_and_each_in_one_bucket():
    shapes = {f"layer{i}": (4, 2) for i in (3, 1, 2, 0)}
    plan = assert_exact(only_on(1, shapes, 3), replicated(shapes, 3), bucket_bytes=33)
    by_bucket = [[copy.name for copy in bucket if copy.receiver == 2] for bucket in plan.buckets]
    assert by_bucket == [["layer3", "layer1"], ["layer2", "layer0"]]


def test_a_tensor_that_is_larger_than_a_bucket_comes_in_several():
    shapes = {"w": (3, 5), "v": (2,)}
    plan = assert_exact(only_on(0, shapes, 2), replicated(shapes, 2), bucket_bytes=12)
    assert [[(copy.name, shape_of(copy.bounds)) for copy in bucket] for bucket in plan.buckets] == [
        [("w", (1, 5))],
        [("w", (1, 5))],
        [("w", (1, 5))],
        [("v", (2,))],
    ]
    plan = assert_exact(only_on(0, shapes, 2), replicated(shapes, 2), bucket_bytes=4)
    assert Counter(shape_of(copy.bounds) for bucket in plan.buckets for copy in bucket) == {
        (1, 2): 6,
        (1, 1): 3,
        (2,): 1,
    }


def test_a_part_that_two_local_tensors_of_a_rank_want_comes_to_both():
    source = only_on(0, {"w": (4,)}, 2)
    twice = ShardLayout(
        source.shapes,
        ((), (TensorShard("w", ((0, 4),), "embedding", (0,)), TensorShard("w", ((0, 4),), "head", (1,)))),
    )
    plan = make_plan(source, twice, itemsize=2)
    assert {copy.receiver_tensor for copy in plan.buckets[0]} == {"embedding", "head"}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (sharded((8,), 2), sharded((8,), 4), "need layouts of the same ranks, got 2 and 4"),
        (
            replicated({"v": (8,)}, 2),
            sharded((8,), 2),
            r"need w with \(8,\) in the source, it has no such tensor",
        ),
        (replicated({"w": (4,)}, 2), sharded((8,), 2), r"need w with \(8,\) in the source, it has \(4,\)"),
        (
            ShardLayout({"w": (8,)}, (sharded((8,), 2).shards[0], ())),
            replicated({"w": (8,)}, 2),
            r"need all of w in the source, it lacks some of \(\(0, 8\),\), which rank 0 wants",
        ),
        (ShardLayout({"w": (8,)}, ((), ())), replicated({"w": (8,)}, 2), "need all of w in the source"),
    ],
)
def test_layouts_that_do_not_belong_together_are_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        make_plan(source, target, itemsize=2)


def test_sizes_and_ranks_that_cannot_be_are_refused():
    layout = sharded((8,), 2)
    for options in (
        {"itemsize": 0},
        {"itemsize": 2, "bucket_bytes": 0},
        {"itemsize": 2, "ranks_per_node": 0},
    ):
        with pytest.raises(ValueError, match="need sizes from 1"):
            make_plan(layout, layout, **options)
    with pytest.raises(ValueError, match="need a rank from 0 to 1, got 2"):
        make_plan(layout, layout, itemsize=2, rank=2)
    for plan in (make_plan(layout, layout, itemsize=2), make_plan(layout, layout, itemsize=2, rank=0)):
        with pytest.raises(ValueError, match="need a rank of this plan"):
            plan.sent_bytes(-1 if plan.rank is None else 1)
