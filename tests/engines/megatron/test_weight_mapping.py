"""The places of Hugging Face tensors in Megatron-Core's parameters."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import PretrainedConfig

from tests.tiny import tiny_transformer
from verl.engines.megatron.model_spec import MegatronModelSpec
from verl.engines.megatron.weight_mapping import ModelShard, map_shards
from verl.weight_sync.layout import ShardLayout, intersection, num_elements


def config_of(family: str, **changes: object) -> PretrainedConfig:
    return tiny_transformer(family, num_hidden_layers=4, **changes).config


def model_shards(tensor: int, pipeline: int, virtual: int, experts: int, parts: int) -> list[ModelShard]:
    """The model shard of every rank, for 4 layers."""
    layers = 4 // (pipeline * virtual)
    found = []
    for stage, rank, part in product(range(pipeline), range(tensor), range(parts)):
        starts = [(chunk * pipeline + stage) * layers for chunk in range(virtual)]
        ranges = tuple((start, start + layers) for start in starts)
        width = experts // parts
        found.append(
            ModelShard(
                rank, tensor, ranges, stage == 0, stage == pipeline - 1, (part * width, (part + 1) * width)
            )
        )
    return found


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_untied_mha", "qwen3", "llama", "mixtral"])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "parts"), [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (1, 2, 2, 4)]
)
def test_the_shards_of_all_ranks_cover_each_tensor_once(family, kind, tensor, pipeline, virtual, parts):
    config = config_of(family)
    spec = MegatronModelSpec(config, kind, padded_vocab=-(-config.vocab_size // 16) * 16)
    ranks = model_shards(tensor, pipeline, virtual, spec.num_experts, parts)
    layout = ShardLayout(spec.shapes, tuple(tuple(map_shards(spec, rank)) for rank in ranks))
    held = {
        name: {shard.bounds for rank in layout.shards for shard in rank if shard.name == name}
        for name in spec.shapes
    }
    for name, shape in spec.shapes.items():
        assert sum(map(num_elements, held[name])) == torch.Size(shape).numel()
        assert not any(
            intersection(one, other) for one, other in product(held[name], repeat=2) if one != other
        )


def test_queries_keys_and_values_of_a_group_of_heads_lie_together():
    spec = MegatronModelSpec(config_of("llama"), "policy", padded_vocab=128)  # 4 heads of 8, in 2 groups
    shards = map_shards(
        spec, ModelShard(tensor_rank=1, tensor_size=2, layer_ranges=((0, 4),), is_first=True, is_last=True)
    )
    own = [s for s in shards if s.local_name == "0.decoder.layers.2.self_attention.linear_qkv.weight"]
    assert [(s.name.split(".")[-2], s.bounds[0], s.offset) for s in own] == [
        ("q_proj", (16, 32), (0, 0)),
        ("k_proj", (8, 16), (16, 0)),
        ("v_proj", (8, 16), (24, 0)),
    ]
