"""Models as Megatron-Core computes them: their tensors, rotary positions, and options that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.tiny import tiny_transformer
from verl.engines.megatron.model_spec import MegatronModelSpec


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"])
def test_the_tensors_are_those_of_transformers_and_of_what_it_saves(family, tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    model = tiny_transformer(family, **options)
    spec = MegatronModelSpec(model.config, "policy", model.config.vocab_size)
    parameters = dict(model.named_parameters())
    assert spec.shapes == {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    in_folder = {
        name: (whole, bounds) for whole in spec.shapes for name, bounds in spec.tensors_in_folder(whole)
    }
    assert in_folder.keys() == saved.keys()
    for name, (whole, bounds) in in_folder.items():
        assert torch.equal(
            parameters[whole][tuple(slice(*bound) for bound in bounds)].reshape(saved[name].shape),
            saved[name],
        )


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
