"""Plans by tensor: layers share their patterns."""

from __future__ import annotations

from tests.weight_sync.arrays import replicated, sharded
from verl.weight_sync.layout import ShardLayout, TensorShard
from verl.weight_sync.reshard_planner import ReshardPlanner


def test_layers_that_are_sharded_alike_share_one_pattern():
    num_layers = 40
    source = [sharded((8, 4), 4).shards[rank][0] for rank in range(4)]
    shapes = {f"layer{i}.w": (8, 4) for i in range(num_layers)}
    ranks = tuple(
        tuple(TensorShard(name, shard.bounds, name, shard.offset) for name in shapes) for shard in source
    )
    planner = ReshardPlanner(
        ShardLayout(shapes, ranks), replicated(shapes, 4), itemsize=2, bucket_bytes=100, ranks_per_node=8
    )
    tensors = list(planner.tensors())
    assert len(tensors) == num_layers and len({id(tensor.pattern) for tensor in tensors}) == 1
