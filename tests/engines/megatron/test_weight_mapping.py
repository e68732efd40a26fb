"""Where the tensors of a Hugging Face folder lie in Megatron-Core's parameters."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.tiny import tiny_transformer
from verl.engines.megatron.weight_mapping import MegatronModelSpec, Share
from verl.weight_sync.layout import ShardLayout, intersection, num_elements


def config_of(family: str, **changes: object) -> PretrainedConfig:
    return tiny_transformer(family, num_hidden_layers=4, **changes).config


def shares(tensor: int, pipeline: int, virtual: int, experts: int, parts: int) -> list[Share]:
    """Of every rank of a grid, for 4 layers."""
    layers = 4 // (pipeline * virtual)
    found = []
    for stage, rank, part in product(range(pipeline), range(tensor), range(parts)):
        starts = [(chunk * pipeline + stage) * layers for chunk in range(virtual)]
        chunks = tuple((start, start + layers) for start in starts)
        width = experts // parts
        found.append(
            Share(rank, tensor, chunks, stage == 0, stage == pipeline - 1, (part * width, (part + 1) * width))
        )
    return found


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_untied_mha", "qwen3", "llama", "mixtral"])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual", "parts"), [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (1, 2, 2, 4)]
)
def test_the_pieces_of_all_ranks_are_the_whole_tensors(family, kind, tensor, pipeline, virtual, parts):
    config = config_of(family)
    anatomy = MegatronModelSpec(config, kind, padded_vocab=-(-config.vocab_size // 16) * 16)
    everyones = [
        anatomy.pieces(share) for share in shares(tensor, pipeline, virtual, anatomy.num_experts, parts)
    ]
    layout = ShardLayout(anatomy.shapes, tuple(map(tuple, everyones)))
    held = {
        name: {piece.bounds for rank in layout.shards for piece in rank if piece.name == name}
        for name in anatomy.shapes
    }
    for name, shape in anatomy.shapes.items():
        assert sum(map(num_elements, held[name])) == torch.Size(shape).numel()
        assert not any(
            intersection(one, other) for one, other in product(held[name], repeat=2) if one != other
        )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"])
def test_the_tensors_are_those_of_transformers_and_of_what_it_saves(family, tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    model = tiny_transformer(family, **options)
    anatomy = MegatronModelSpec(model.config, "policy", model.config.vocab_size)
    parameters = dict(model.named_parameters())
    assert anatomy.shapes == {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    in_folder = {
        name: (whole, bounds) for whole in anatomy.shapes for name, bounds in anatomy.in_folder(whole)
    }
    assert in_folder.keys() == saved.keys()
    for name, (whole, bounds) in in_folder.items():
        assert torch.equal(
            parameters[whole][tuple(slice(*bound) for bound in bounds)].reshape(saved[name].shape),
            saved[name],
        )


def test_queries_keys_and_values_of_a_group_of_heads_lie_together():
    anatomy = MegatronModelSpec(config_of("llama"), "policy", padded_vocab=128)  # 4 heads of 8, in 2 groups
    pieces = anatomy.pieces(
        Share(tensor_rank=1, tensor_size=2, chunks=((0, 4),), is_first=True, is_last=True)
    )
    own = [p for p in pieces if p.local_name == "0.decoder.layers.2.self_attention.linear_qkv.weight"]
    assert [(p.name.split(".")[-2], p.bounds[0], p.offset) for p in own] == [
        ("q_proj", (16, 32), (0, 0)),
        ("k_proj", (8, 16), (16, 0)),
        ("v_proj", (8, 16), (24, 0)),
    ]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {}, "need a family of qwen2"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding_window=4",
        ),
        ("mixtral", {"sliding_window": 4}, "sliding_window=4"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters",
        ),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        MegatronModelSpec(AutoConfig.for_model(family, **changes), "policy", padded_vocab=256)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_turn_as_transformers_turns_them(rope):
    config = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(
        MegatronModelSpec(config, "policy", padded_vocab=32000).inverse_frequencies(),
        expected,
        rtol=1e-6,
        atol=0,
    )
