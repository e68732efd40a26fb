"""Costs of a change of layout and of other methods, by hand on small layouts."""

from __future__ import annotations

import pytest

from tests.weight_sync.arrays import replicated, sharded
from verl.planner.traffic import ReshardCost, gather_costs, plan_cost, received_share, traffic
from verl.weight_sync.layout import ShardLayout
from verl.weight_sync.meshes import Mesh

SHAPES = {"w": (8, 3)}
SHARDS = sharded((8, 3), 4)
HALVES = ShardLayout(SHAPES, tuple(sharded((8, 3), 2).shards[rank // 2] for rank in range(4)))
M = 48  # bytes in bf16


def test_a_plan_costs_what_travels_and_the_weights_that_it_fills():
    moved = traffic(SHARDS, HALVES, itemsize=2, ranks_per_node=1)
    cost = plan_cost("this plan", moved, HALVES, itemsize=2)
    # Every rank has 2 of its 4 rows of 6 bytes; beside the 4 rows, 2 come and 2 go.
    assert cost == ReshardCost("this plan", 12, 12, node_bytes=12, peak_bytes=24 + 24, num_messages=1)
    assert moved.between.tolist() == [[0, 12, 0, 0], [12, 0, 0, 0], [0, 0, 0, 12], [0, 0, 12, 0]]
    assert moved.critical_bytes == 12 and moved.in_flight_bytes == 24
    assert traffic(SHARDS, HALVES, itemsize=2, ranks_per_node=2).node_bytes == 0


def test_buckets_one_after_the_other_take_as_long_as_the_busiest_rank_of_each():
    everywhere = replicated(SHAPES, 4)
    first = ShardLayout(SHAPES, (everywhere.shards[0], (), (), ()))
    moved = traffic(first, everywhere, itemsize=2, bucket_bytes=24)
    # One rank sends all of it to three others, half in each bucket.
    assert moved.critical_bytes == 3 * M and moved.in_flight_bytes == 72 and len(moved.buckets) == 2
    assert moved.messages.tolist() == [0, 2, 2, 2] and moved.received.tolist() == [0, M, M, M]


def test_gathering_costs_whole_tensors_in_a_replica_or_over_all_ranks():
    training = ShardLayout(SHAPES, SHARDS.shards * 2)
    target = ShardLayout(SHAPES, HALVES.shards * 2)
    by_bucket, vanilla, all_ranks = gather_costs(
        training, target, Mesh(shards=4, replicas=2), itemsize=2, bucket_bytes=30, ranks_per_node=2
    )
    assert by_bucket == ReshardCost(
        "by bucket", 36, 36, node_bytes=24, peak_bytes=24 + 48, num_messages=3, formula=0.75
    )
    assert vanilla == ReshardCost(
        "HybridFlow-V", 36, 36, node_bytes=24, peak_bytes=M, num_messages=3, formula=0.75
    )
    assert all_ranks == ReshardCost(
        "DS-Chat", 42, 42, node_bytes=36, peak_bytes=M, num_messages=7, formula=0.875
    )


@pytest.mark.parametrize(
    ("mesh", "tensor", "share"),
    [
        (Mesh(tensor=8), 2, 0.375),
        (Mesh(tensor=8, replicas=3), 4, 0.125),
        (Mesh(tensor=8, pipeline=4), 8, 0.09375),
        (Mesh(tensor=8, pipeline=8), 8, 0.109375),
        (Mesh(shards=8, tensor=2), 16, 0),
    ],
)
def test_the_formula_gives_the_shares_of_the_paper(mesh, tensor, share):
    assert received_share(mesh, tensor=tensor, pipeline=1) == share


def test_the_slower_of_both_networks_decides_the_seconds():
    assert ReshardCost("", 600 * 10**9, 0, node_bytes=0, peak_bytes=0, num_messages=0).seconds == 1
    assert ReshardCost("", 10**9, 0, node_bytes=50 * 10**9, peak_bytes=0, num_messages=0).seconds == 2
