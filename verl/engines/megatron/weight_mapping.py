"""Which slices of the tensors of a Hugging Face folder make up Megatron-Core's local parameters; pure, it
needs no Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from verl.weight_sync.layout import Bounds, TensorShard, full_bounds

# Families whose weights this module can place, and what their folders call the parts of a mixture of experts:
# router, gate, up, down.
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
# And what Transformers calls them once they are loaded: stacked.
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ROPE = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Share:
    """What of a model one rank holds.

    Attributes:
        tensor_rank: which slice of every matrix.
        tensor_size: of how many.
        chunks: first layer and one past the last of each of its model chunks (several, if stages are
            interleaved).
        is_first: its first chunk has the embedding.
        is_last: its last chunk has the final norm and the head.
        experts: the first of its experts and one past the last; they are whole.
    """

    tensor_rank: int
    tensor_size: int
    chunks: tuple[tuple[int, int], ...]
    is_first: bool
    is_last: bool
    experts: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class MegatronModelSpec:
    """A model as its Hugging Face configuration describes it.

    Attributes:
        config: of Transformers.
        kind: a policy has a head over the vocabulary, a value model one of size 1.
        padded_vocab: rows of Megatron's embedding and head; those past the vocabulary are no part of the
            model.

    Raises:
        ValueError: a family, or an option of it, that is not known here.
    """

    config: PretrainedConfig
    kind: Literal["policy", "value"]
    padded_vocab: int

    def __post_init__(self) -> None:
        config = self.config
        if config.model_type not in _FAMILIES:
            raise ValueError(
                f"need a family of {', '.join(_FAMILIES)} for engine megatron, got {config.model_type!r}; take another, or engine fsdp"
            )
        has = config.to_dict()
        windows = has.get("use_sliding_window", True) and has.get("sliding_window")
        windows = windows or any(kind != "full_attention" for kind in has.get("layer_types") or ())
        # Qwen2 has no such option: its queries, keys and values have biases, its outputs none.
        biases = [name for name in ("attention_bias", "mlp_bias") if has.get(name)]
        other = [f"{name}={has[name]}" for name in biases] + (
            [f"sliding_window={has.get('sliding_window')}"] if windows else []
        )
        if has["hidden_act"] != "silu":
            other.append(f"hidden_act={has['hidden_act']}")
        if self.is_mixture and (has.get("mlp_only_layers") or has.get("decoder_sparse_step", 1) != 1):
            other.append("layers without experts")
        if self._rope["rope_type"] not in _ROPE or self._rope.get("partial_rotary_factor", 1.0) != 1.0:
            other.append(f"rope_parameters={self._rope}")
        if other:
            raise ValueError(
                f"engine megatron does not know {', '.join(other)} of this {config.model_type} model; use engine fsdp"
            )

    @property
    def is_mixture(self) -> bool:
        """Whether its layers have experts."""
        return bool(_FAMILIES[self.config.model_type])

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.kind == "policy" and bool(self.config.tie_word_embeddings)

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.config.model_type == "qwen2"

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys are normalized head by head."""
        return self.config.model_type.startswith("qwen3")

    @property
    def head_dim(self) -> int:
        """Size of a head of attention."""
        size = self.config.to_dict().get("head_dim")
        return size or self.config.hidden_size // self.config.num_attention_heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.config.num_key_value_heads or self.config.num_attention_heads

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0: it has none."""
        if not self.is_mixture:
            return 0
        return int(
            self.config.num_experts
            if self.config.model_type == "qwen3_moe"
            else self.config.num_local_experts
        )

    @property
    def mlp_width(self) -> int:
        """Inner size of an MLP, or of an expert."""
        return int(
            self.config.moe_intermediate_size
            if self.config.model_type == "qwen3_moe"
            else self.config.intermediate_size
        )

    @property
    def _rope(self) -> dict[str, Any]:
        return dict(self.config.rope_parameters)

    def inverse_frequencies(self) -> Tensor:
        """[head_dim / 2] fp32, by which positions turn queries and keys."""
        kind = self._rope["rope_type"]
        if kind == "llama3":
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
            return frequencies
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return 1.0 / (self._rope["rope_theta"] ** steps) / self._rope.get("factor", 1.0)

    @property
    def prefix(self) -> str:
        """What the names of the layers begin with: those of a value model are of a bare transformer."""
        return "model." if self.kind == "policy" else ""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors, by the names of the parameters of Transformers."""
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        shapes: dict[str, tuple[int, ...]] = {f"{self.prefix}embed_tokens.weight": (vocab, hidden)}
        for layer in range(self.config.num_hidden_layers):
            shapes |= {
                f"{self.prefix}layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()
            }
        shapes[f"{self.prefix}norm.weight"] = (hidden,)
        if self.kind == "policy" and not self.is_tied:
            shapes["lm_head.weight"] = (vocab, hidden)
        return shapes

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the head of a value model."""
        return (
            {"value_head.weight": (1, self.config.hidden_size), "value_head.bias": (1,)}
            if self.kind == "value"
            else {}
        )

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.config.hidden_size, self.config.num_attention_heads * self.head_dim
        keys, width = self.groups * self.head_dim, self.mlp_width
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for part, size in (("q", inner), ("k", keys), ("v", keys)):
            shapes[f"self_attn.{part}_proj.weight"] = (size, hidden)
            if self.has_qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (size,)
        if self.has_head_norms:
            shapes |= {
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
            }
        shapes |= {"self_attn.o_proj.weight": (hidden, inner), "post_attention_layernorm.weight": (hidden,)}
        if not self.is_mixture:
            mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
            return shapes | {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes["mlp.gate.weight"] = (self.num_experts, hidden)
        shapes[_GATE_UP] = (self.num_experts, 2 * width, hidden)
        return shapes | {_DOWN: (self.num_experts, hidden, width)}

    def in_folder(self, name: str, experts: tuple[int, int] | None = None) -> list[tuple[str, Bounds]]:
        """The tensors that a folder has for a whole one, each with the part that it is: experts are single
        ones there.

        Args:
            name: of the whole tensor.
            experts: the first that are wanted and one past the last; none: all.
        """
        stem = next(
            (
                part
                for part in (_GATE_UP, _DOWN, "mlp.gate.weight")
                if self.is_mixture and name.endswith(part)
            ),
            None,
        )
        if stem is None:
            return [(name, full_bounds(self.shapes[name]))]
        router, gate, up, down = (
            name.removesuffix(stem) + part + ".weight" for part in _FAMILIES[self.config.model_type]
        )
        if stem == "mlp.gate.weight":
            return [(router, full_bounds(self.shapes[name]))]
        _, rows, columns = self.shapes[name]
        halves = [(gate, 0, rows // 2), (up, rows // 2, rows)] if stem == _GATE_UP else [(down, 0, rows)]
        wanted = range(*(experts or (0, self.num_experts)))
        return [
            (part.format(e), ((e, e + 1), (start, stop), (0, columns)))
            for e in wanted
            for part, start, stop in halves
        ]

    def pieces(self, share: Share) -> list[TensorShard]:
        """What of the whole tensors a rank holds; the homes are parameters of its chunks, as `CHUNK.NAME`."""
        pieces: list[TensorShard] = []
        last = len(share.chunks) - 1
        if share.is_first:
            pieces += self._vocabulary("embed_tokens.weight", "0.embedding.word_embeddings.weight", share)
        for chunk, (start, stop) in enumerate(share.chunks):
            for layer in range(start, stop):
                own = f"{self.prefix}layers.{layer}."
                home = f"{chunk}.decoder.layers.{layer - start}."
                pieces += [
                    TensorShard(own + p.name, p.bounds, home + p.local_name, p.offset)
                    for p in self._layer_pieces(share)
                ]
        if share.is_last:
            norm = f"{self.prefix}norm.weight"
            pieces.append(
                TensorShard(
                    norm, full_bounds(self.shapes[norm]), f"{last}.decoder.final_layernorm.weight", (0,)
                )
            )
        if share.is_last and self.kind == "policy" and not (self.is_tied and share.is_first):
            name = "embed_tokens.weight" if self.is_tied else "lm_head.weight"
            pieces += self._vocabulary(name, f"{last}.output_layer.weight", share)
        return pieces

    def head_pieces(self, share: Share) -> list[TensorShard]:
        """The same of the head of a value model."""
        last = len(share.chunks) - 1
        shapes = self.head_shapes if share.is_last else {}
        return [
            TensorShard(name, full_bounds(shape), f"{last}.{name}", (0,) * len(shape))
            for name, shape in shapes.items()
        ]

    def _vocabulary(self, name: str, home: str, share: Share) -> list[TensorShard]:
        """A slice of the rows of a tensor over the vocabulary; none, if it has padding only."""
        name = name if name.startswith("lm_head") else self.prefix + name
        rows = self.padded_vocab // share.tensor_size
        vocab, hidden = self.shapes[name]
        start, stop = share.tensor_rank * rows, min(vocab, (share.tensor_rank + 1) * rows)
        return [TensorShard(name, ((start, stop), (0, hidden)), home, (0, 0))] if start < stop else []

    def _layer_pieces(self, share: Share) -> Iterator[TensorShard]:
        shapes = self._layer_shapes()
        homes = {
            "input_layernorm.weight": "input_layernorm.weight",
            "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
        }
        if self.has_head_norms:
            homes |= {
                f"self_attn.{part}_norm.weight": f"self_attention.{part}_layernorm.weight" for part in "qk"
            }
        for name, home in homes.items():
            yield TensorShard(name, full_bounds(shapes[name]), home, (0,))
        yield from self._attention(share, "weight", shapes)
        if self.has_qkv_bias:
            yield from self._attention(share, "bias", shapes)
        yield _columns("self_attn.o_proj.weight", "self_attention.linear_proj.weight", shapes, share)
        if not self.is_mixture:
            yield from _mlp(shapes, share)
            return
        yield TensorShard(
            "mlp.gate.weight", full_bounds(shapes["mlp.gate.weight"]), "mlp.router.weight", (0, 0)
        )
        for number, expert in enumerate(range(*share.experts)):
            for name, home in ((_GATE_UP, "linear_fc1"), (_DOWN, "linear_fc2")):
                bounds = ((expert, expert + 1), *full_bounds(shapes[name][1:]))
                yield TensorShard(name, bounds, f"mlp.experts.local_experts.{number}.{home}.weight", (0, 0))

    def _attention(
        self, share: Share, what: str, shapes: dict[str, tuple[int, ...]]
    ) -> Iterator[TensorShard]:
        """Megatron keeps the queries of a group of heads, its key and its value one after the other."""
        own = self.groups // share.tensor_size
        queries = self.config.num_attention_heads // self.groups * self.head_dim
        rest = full_bounds(shapes[f"self_attn.q_proj.{what}"][1:])
        for number in range(own):
            group = share.tensor_rank * own + number
            row = number * (queries + 2 * self.head_dim)
            for part, size, begin in (
                ("q", queries, 0),
                ("k", self.head_dim, queries),
                ("v", self.head_dim, queries + self.head_dim),
            ):
                bounds = ((group * size, (group + 1) * size), *rest)
                offset = (row + begin, *(0 for _ in rest))
                yield TensorShard(
                    f"self_attn.{part}_proj.{what}", bounds, f"self_attention.linear_qkv.{what}", offset
                )


def _columns(name: str, home: str, shapes: dict[str, tuple[int, ...]], share: Share) -> TensorShard:
    """A slice of the inputs of a matrix."""
    rows, columns = shapes[name]
    width = columns // share.tensor_size
    return TensorShard(
        name, ((0, rows), (share.tensor_rank * width, (share.tensor_rank + 1) * width)), home, (0, 0)
    )


def _mlp(shapes: dict[str, tuple[int, ...]], share: Share) -> Iterator[TensorShard]:
    """Slices of gate and up, one after the other in one matrix, and of down."""
    rows, columns = shapes["mlp.gate_proj.weight"]
    height = rows // share.tensor_size
    bounds = ((share.tensor_rank * height, (share.tensor_rank + 1) * height), (0, columns))
    yield TensorShard("mlp.gate_proj.weight", bounds, "mlp.linear_fc1.weight", (0, 0))
    yield TensorShard("mlp.up_proj.weight", bounds, "mlp.linear_fc1.weight", (height, 0))
    yield _columns("mlp.down_proj.weight", "mlp.linear_fc2.weight", shapes, share)


def check_divisible(
    anatomy: MegatronModelSpec, *, tensor: int, context: int, expert: int, chunks: int, packing: bool
) -> None:
    """Refuses sizes that a model cannot be spread over.

    Args:
        anatomy: of the model.
        tensor: ranks that share every matrix.
        context: ranks that share every line.
        expert: ranks that share the experts.
        chunks: of equally many layers that it is divided into; 1, if they are not equal.
        packing: as set.

    Raises:
        ValueError: see above.
    """
    config = anatomy.config
    if config.num_hidden_layers % chunks:
        raise ValueError(
            f"need layers that pipeline * virtual_pipeline divides, got {config.num_hidden_layers} for {chunks}; take a divisor, or say "
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    if not packing:
        raise ValueError("need packing true for engine megatron: it reads rows end to end in one line")
    sizes = {"heads": config.num_attention_heads, "key-value heads": anatomy.groups}
    sizes |= {} if anatomy.is_mixture else {"MLP width": anatomy.mlp_width}
    if unfit := [f"{size} {name}" for name, size in sizes.items() if size % tensor]:
        raise ValueError(
            f"need sizes of the model that tensor={tensor} divides, got {', '.join(unfit)}; take a divisor"
        )
    kv_heads = anatomy.groups // tensor
    if (config.num_attention_heads // tensor) % context or (kv_heads % context and context % kv_heads):
        raise ValueError(
            f"need heads that sequence divides, got {config.num_attention_heads} heads and {anatomy.groups} key-value heads over "
            f"tensor={tensor} for sequence={context}; take a divisor"
        )
    if expert > 1 and (not anatomy.is_mixture or anatomy.num_experts % expert):
        raise ValueError(
            f"need experts that expert={expert} divides, got {anatomy.num_experts}; take a divisor, or 1"
        )
