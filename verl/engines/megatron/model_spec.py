"""Description of a model for Megatron-Core, read from its Hugging Face configuration; needs no Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from verl.weight_sync.layout import Bounds, full_bounds

# Supported families, and the names in their folders of the router and of an expert's gate, up and down
# projections.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "qwen2": (),
    "qwen3": (),
    "llama": (),
    "qwen3_moe": (
        "mlp.gate",
        "mlp.experts.{}.gate_proj",
        "mlp.experts.{}.up_proj",
        "mlp.experts.{}.down_proj",
    ),
    "mixtral": (
        "block_sparse_moe.gate",
        "block_sparse_moe.experts.{}.w1",
        "block_sparse_moe.experts.{}.w3",
        "block_sparse_moe.experts.{}.w2",
    ),
}
# In a loaded Transformers model the experts of a layer are stacked under these names.
ROUTER, GATE_UP, DOWN = "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class MegatronModelSpec:
    """A model as its Hugging Face configuration describes it.

    Attributes:
        config: of Transformers.
        kind: a policy has a head over the vocabulary, a value model one of size 1.
        padded_vocab: rows of Megatron's embedding and head; rows past the vocabulary are padding.

    Raises:
        ValueError: an unsupported family, or an unsupported option of it.
    """

    config: PretrainedConfig
    kind: Literal["policy", "value"]
    padded_vocab: int

    def __post_init__(self) -> None:
        config = self.config
        if config.model_type not in _FAMILIES:
            raise ValueError(
                f"need a family of {', '.join(_FAMILIES)} for engine megatron, got {config.model_type!r}; "
                "take another, or engine fsdp"
            )
        options = config.to_dict()
        has_windows = bool(options.get("use_sliding_window", True) and options.get("sliding_window"))
        has_windows |= any(kind != "full_attention" for kind in options.get("layer_types") or ())
        # Qwen2 has no such option: its queries, keys and values have biases, its outputs none.
        biases = [name for name in ("attention_bias", "mlp_bias") if options.get(name)]
        unsupported = [f"{name}={options[name]}" for name in biases]
        if has_windows:
            unsupported.append(f"sliding_window={options.get('sliding_window')}")
        if options["hidden_act"] != "silu":
            unsupported.append(f"hidden_act={options['hidden_act']}")
        is_mixed = options.get("mlp_only_layers") or options.get("decoder_sparse_step", 1) != 1
        if self.is_moe and is_mixed:
            unsupported.append("layers without experts")
        rope = self.rope
        if rope["rope_type"] not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
            unsupported.append(f"rope_parameters={rope}")
        if unsupported:
            raise ValueError(
                f"engine megatron does not support {', '.join(unsupported)} of this {config.model_type} "
                "model; use engine fsdp"
            )

    @property
    def is_moe(self) -> bool:
        """True if its layers have experts."""
        return bool(_FAMILIES[self.config.model_type])

    @property
    def is_tied(self) -> bool:
        """True if the head's weight is the embedding."""
        return self.kind == "policy" and bool(self.config.tie_word_embeddings)

    @property
    def has_qkv_bias(self) -> bool:
        """True if the projections of queries, keys and values have biases."""
        return self.config.model_type == "qwen2"

    @property
    def has_head_norms(self) -> bool:
        """True if queries and keys are normalized per head."""
        return self.config.model_type.startswith("qwen3")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        size = self.config.to_dict().get("head_dim")
        return size or self.config.hidden_size // self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.config.num_key_value_heads or self.config.num_attention_heads

    @property
    def num_experts(self) -> int:
        """Number of experts of a layer; 0 without experts."""
        if not self.is_moe:
            return 0
        is_qwen = self.config.model_type == "qwen3_moe"
        return int(self.config.num_experts if is_qwen else self.config.num_local_experts)

    @property
    def mlp_size(self) -> int:
        """Inner size of an MLP, or of an expert."""
        is_qwen = self.config.model_type == "qwen3_moe"
        return int(self.config.moe_intermediate_size if is_qwen else self.config.intermediate_size)

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of the rotary position embedding, as Transformers names them."""
        return dict(self.config.rope_parameters)

    def inverse_frequencies(self) -> Tensor:
        """[head_dim / 2] fp32, the inverse frequencies of the rotary position embedding."""
        kind = self.rope["rope_type"]
        if kind == "llama3":
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
            return frequencies
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return 1.0 / (self.rope["rope_theta"] ** exponents) / self.rope.get("factor", 1.0)

    @property
    def prefix(self) -> str:
        """Prefix of the names of layers; a value model is a bare transformer, without one."""
        return "model." if self.kind == "policy" else ""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors, by the names of Transformers' parameters; without a value head."""
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        shapes: dict[str, tuple[int, ...]] = {f"{self.prefix}embed_tokens.weight": (vocab, hidden)}
        for layer in range(self.config.num_hidden_layers):
            shapes |= {f"{self.prefix}layers.{layer}.{name}": s for name, s in self.layer_shapes().items()}
        shapes[f"{self.prefix}norm.weight"] = (hidden,)
        if self.kind == "policy" and not self.is_tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        return shapes

    @property
    def value_head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the value head's tensors; none for a policy."""
        if self.kind == "policy":
            return {}
        return {"value_head.weight": (1, self.config.hidden_size), "value_head.bias": (1,)}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of one layer, by their names in it."""
        hidden, inner = self.config.hidden_size, self.config.num_attention_heads * self.head_dim
        kv_size, mlp_size = self.num_kv_heads * self.head_dim, self.mlp_size
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for part, size in (("q", inner), ("k", kv_size), ("v", kv_size)):
            shapes[f"self_attn.{part}_proj.weight"] = (size, hidden)
            if self.has_qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (size,)
        if self.has_head_norms:
            shapes |= {f"self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        shapes |= {"self_attn.o_proj.weight": (hidden, inner), "post_attention_layernorm.weight": (hidden,)}
        if not self.is_moe:
            return shapes | {
                "mlp.gate_proj.weight": (mlp_size, hidden),
                "mlp.up_proj.weight": (mlp_size, hidden),
                "mlp.down_proj.weight": (hidden, mlp_size),
            }
        return shapes | {
            ROUTER: (self.num_experts, hidden),
            GATE_UP: (self.num_experts, 2 * mlp_size, hidden),
            DOWN: (self.num_experts, hidden, mlp_size),
        }

    def tensors_in_folder(
        self, name: str, experts: tuple[int, int] | None = None
    ) -> list[tuple[str, Bounds]]:
        """The tensors of a Hugging Face folder that make up a whole tensor, with their bounds in it.

        A folder has each expert on its own, while a whole tensor stacks the experts of a layer.

        Args:
            name: of the whole tensor.
            experts: start and stop of the experts that are needed; None: all.
        """
        stems = (GATE_UP, DOWN, ROUTER) if self.is_moe else ()
        stem = next((stem for stem in stems if name.endswith(stem)), None)
        if stem is None:
            return [(name, full_bounds(self.shapes[name]))]
        router, gate, up, down = (
            name.removesuffix(stem) + part + ".weight" for part in _FAMILIES[self.config.model_type]
        )
        if stem == ROUTER:
            return [(router, full_bounds(self.shapes[name]))]
        _, rows, columns = self.shapes[name]
        parts = [(gate, 0, rows // 2), (up, rows // 2, rows)] if stem == GATE_UP else [(down, 0, rows)]
        return [
            (part.format(expert), ((expert, expert + 1), (start, stop), (0, columns)))
            for expert in range(*(experts or (0, self.num_experts)))
            for part, start, stop in parts
        ]

    def check_divisible(self, *, tensor: int, context: int, expert: int, num_chunks: int) -> None:
        """Check that parallel sizes divide the model.

        Args:
            tensor: size of tensor parallelism.
            context: size of context parallelism.
            expert: size of expert parallelism.
            num_chunks: equal parts into which the layers are divided; 1 if they are unequal.

        Raises:
            ValueError: a size does not divide what it has to.
        """
        num_layers, num_heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if num_layers % num_chunks:
            raise ValueError(
                f"need layers that pipeline * virtual_pipeline divides, got {num_layers} for {num_chunks}; "
                "take a divisor, or set num_layers_in_first_pipeline_stage or "
                "num_layers_in_last_pipeline_stage"
            )
        sizes = {"heads": num_heads, "key-value heads": self.num_kv_heads}
        sizes |= {} if self.is_moe else {"MLP width": self.mlp_size}
        if unfit := [f"{size} {name}" for name, size in sizes.items() if size % tensor]:
            raise ValueError(
                f"need sizes of the model that tensor={tensor} divides, got {', '.join(unfit)}; "
                "take a divisor"
            )
        # Ulysses gives each context rank a share of the heads; fewer key-value heads than ranks are repeated.
        kv_heads = self.num_kv_heads // tensor
        if (num_heads // tensor) % context or (kv_heads % context and context % kv_heads):
            raise ValueError(
                f"need heads that sequence divides, got {num_heads} heads and {self.num_kv_heads} key-value "
                f"heads over tensor={tensor} for sequence={context}; take a divisor"
            )
        if expert > 1 and (not self.is_moe or self.num_experts % expert):
            raise ValueError(
                f"need experts that expert={expert} divides, got {self.num_experts}; take a divisor, or 1"
            )
