"""Names and shapes of a model's tensors, derived from its Hugging Face configuration."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.weight_sync.layout import full_bounds, num_elements

Config = Mapping[str, Any]  # of Hugging Face, config.json

_LLAMA = {"model_type": "llama", "vocab_size": 32000}
# The models of HybridFlow's experiments: Llama 2, https://arxiv.org/abs/2307.09288, and for 34B Code Llama,
# https://arxiv.org/abs/2308.12950, with the numbers of their published configurations.
SIZES: dict[str, Config] = {
    "llama-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-34b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-70b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")


@dataclass(frozen=True)
class Architecture:
    """Shapes and sizes of a model that decide its layouts.

    Attributes:
        shapes: of its tensors by name, in the order of the layers.
        num_layers: of the transformer.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        num_experts: of a layer with experts; 0: the model is dense.
        is_tied: embedding and output head share their weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    is_tied: bool

    @property
    def num_elements(self) -> int:
        """Number of weights of the model."""
        return sum(num_elements(full_bounds(shape)) for shape in self.shapes.values())


def architecture(config: Config, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Architecture:
    """Architecture of a configuration.

    Args:
        config: content of config.json.
        shapes: of the tensors, if the model itself is known; None: derive them from the configuration.

    Raises:
        ValueError: a family whose tensors are not known, or a configuration that lacks a size.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"need a model of {', '.join(FAMILIES)}, got model_type {kind!r}")
    try:
        is_tied = bool(config.get("tie_word_embeddings", False))
        found = dict(shapes) if shapes is not None else dict(_shapes(config, is_tied))
        heads = config["num_attention_heads"]
        return Architecture(
            found, config["num_hidden_layers"], heads, _kv_heads(config), _num_experts(config), is_tied
        )
    except KeyError as error:
        raise ValueError(f"need {error.args[0]} in the configuration of a model of family {kind}") from error


def named_architecture(model: str) -> Architecture:
    """Architecture of a model folder, of a config.json, or of a name in `SIZES`.

    Raises:
        ValueError: it is none of these, or no configuration.
    """
    if model in SIZES:
        return architecture(SIZES[model])
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        near = difflib.get_close_matches(model, SIZES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"need a folder with a config.json, such a file, or one of {', '.join(SIZES)}, "
            f"got {model!r}{hint}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"need a configuration in JSON, got {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"need a configuration as a JSON object, got {type(config).__name__} in {path}")
    return architecture(config)


def _kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _num_experts(config: Config) -> int:
    """Number of experts of a layer; configurations of Transformers have it under one of two names."""
    return config.get("num_experts") or config.get("num_local_experts") or 0


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _shapes(config: Config, is_tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        parts = [
            *_attention(config),
            *(
                _experts(config)
                if _is_sparse(config, layer)
                else _mlp(config, "mlp", config["intermediate_size"])
            ),
        ]
        for name, shape in parts:
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not is_tied:
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    kind, hidden, head_dim = config["model_type"], config["hidden_size"], _head_dim(config)
    widths = {
        "q": config["num_attention_heads"] * head_dim,
        "k": _kv_heads(config) * head_dim,
        "v": _kv_heads(config) * head_dim,
    }
    yield "input_layernorm.weight", (hidden,)
    has_bias = kind == "qwen2" or bool(config.get("attention_bias", False))
    for letter, width in widths.items():
        yield f"self_attn.{letter}_proj.weight", (width, hidden)
        if has_bias:
            yield f"self_attn.{letter}_proj.bias", (width,)
    yield "self_attn.o_proj.weight", (hidden, widths["q"])
    if has_bias and kind != "qwen2":
        yield "self_attn.o_proj.bias", (hidden,)
    if kind in ("qwen3", "qwen3_moe"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)


def _mlp(config: Config, prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, has_bias = config["hidden_size"], bool(config.get("mlp_bias", False))
    for name, shape in {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }.items():
        yield f"{prefix}.{name}.weight", shape
        if has_bias:
            yield f"{prefix}.{name}.bias", shape[:1]


def _experts(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, num_experts = config["hidden_size"], _num_experts(config)
    if config["model_type"] == "mixtral":
        width = config["intermediate_size"]
        yield "block_sparse_moe.gate.weight", (num_experts, hidden)
        for expert in range(num_experts):
            for name, shape in {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}.items():
                yield f"block_sparse_moe.experts.{expert}.{name}.weight", shape
        return
    yield "mlp.gate.weight", (num_experts, hidden)
    for expert in range(num_experts):
        yield from _mlp(config, f"mlp.experts.{expert}", config["moe_intermediate_size"])


def _is_sparse(config: Config, layer: int) -> bool:
    if config["model_type"] == "mixtral":
        return True
    is_turn = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    return bool(_num_experts(config)) and is_turn and layer not in config.get("mlp_only_layers", ())
