"""Mapping of Hugging Face tensors to the local parameters of Megatron-Core; pure, it needs no Megatron."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from verl.engines.megatron.model_spec import DOWN, GATE_UP, ROUTER, MegatronModelSpec
from verl.weight_sync.layout import TensorShard, full_bounds

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelShard:
    """The part of a model that a rank holds.

    Attributes:
        tensor_rank: rank in tensor parallelism.
        tensor_size: size of tensor parallelism.
        layer_ranges: start and stop layer of each of its model chunks; there are several if pipeline stages
            are interleaved.
        is_first: True if its first chunk has the embedding.
        is_last: True if its last chunk has the final norm and the head.
        experts: start and stop of its experts, which are not divided.
    """

    tensor_rank: int
    tensor_size: int
    layer_ranges: tuple[tuple[int, int], ...]
    is_first: bool
    is_last: bool
    experts: tuple[int, int] = (0, 0)

    @property
    def last_chunk(self) -> int:
        """Number of its last model chunk."""
        return len(self.layer_ranges) - 1


def map_shards(spec: MegatronModelSpec, shard: ModelShard) -> list[TensorShard]:
    """The tensor shards of a rank, without a value head; local names are `CHUNK.PARAMETER`."""
    shards: list[TensorShard] = []
    if shard.is_first:
        shards += _vocabulary_rows(spec, shard, "embed_tokens.weight", "0.embedding.word_embeddings.weight")
    for chunk, (start, stop) in enumerate(shard.layer_ranges):
        for layer in range(start, stop):
            prefix = f"{spec.prefix}layers.{layer}."
            local_prefix = f"{chunk}.decoder.layers.{layer - start}."
            shards += [
                TensorShard(prefix + part.name, part.bounds, local_prefix + part.local_name, part.offset)
                for part in _layer_shards(spec, shard)
            ]
    if shard.is_last:
        norm = f"{spec.prefix}norm.weight"
        local_norm = f"{shard.last_chunk}.decoder.final_layernorm.weight"
        shards.append(TensorShard(norm, full_bounds(spec.shapes[norm]), local_norm, (0,)))
    # A tied head is the embedding itself where both are on one rank, and a copy of it elsewhere.
    if shard.is_last and spec.kind == "policy" and not (spec.is_tied and shard.is_first):
        name = "embed_tokens.weight" if spec.is_tied else "lm_head.weight"
        shards += _vocabulary_rows(spec, shard, name, f"{shard.last_chunk}.output_layer.weight")
    return shards


def map_value_head(spec: MegatronModelSpec, shard: ModelShard) -> list[TensorShard]:
    """The tensor shards of a rank that belong to the value head; each has it whole."""
    return [
        TensorShard(name, full_bounds(shape), f"{shard.last_chunk}.{name}", (0,) * len(shape))
        for name, shape in (spec.value_head_shapes.items() if shard.is_last else ())
    ]


def _vocabulary_rows(
    spec: MegatronModelSpec, shard: ModelShard, name: str, local_name: str
) -> list[TensorShard]:
    """The tensor rank's rows of an embedding or head; none if they are all padding."""
    name = name if name.startswith("lm_head") else spec.prefix + name
    rows = spec.padded_vocab // shard.tensor_size
    vocab, hidden = spec.shapes[name]
    start, stop = shard.tensor_rank * rows, min(vocab, (shard.tensor_rank + 1) * rows)
    return [TensorShard(name, ((start, stop), (0, hidden)), local_name, (0, 0))] if start < stop else []


def _layer_shards(spec: MegatronModelSpec, shard: ModelShard) -> Iterator[TensorShard]:
    """The tensor shards of one layer, with names relative to it."""
    shapes = spec.layer_shapes()
    norms = {
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    }
    if spec.has_head_norms:
        norms |= {f"self_attn.{part}_norm.weight": f"self_attention.{part}_layernorm.weight" for part in "qk"}
    for name, local_name in norms.items():
        yield TensorShard(name, full_bounds(shapes[name]), local_name, (0,))
    for kind in ("weight", "bias") if spec.has_qkv_bias else ("weight",):
        yield from _qkv_shards(spec, shard, kind, shapes)
    yield _columns(shard, shapes, "self_attn.o_proj.weight", "self_attention.linear_proj.weight")
    if not spec.is_moe:
        yield from _mlp_shards(shard, shapes)
        return
    yield TensorShard(ROUTER, full_bounds(shapes[ROUTER]), "mlp.router.weight", (0, 0))
    for number, expert in enumerate(range(*shard.experts)):
        for name, linear in ((GATE_UP, "linear_fc1"), (DOWN, "linear_fc2")):
            bounds = ((expert, expert + 1), *full_bounds(shapes[name][1:]))
            yield TensorShard(name, bounds, f"mlp.experts.local_experts.{number}.{linear}.weight", (0, 0))


def _qkv_shards(
    spec: MegatronModelSpec, shard: ModelShard, kind: str, shapes: Shapes
) -> Iterator[TensorShard]:
    """Shards of queries, keys and values.

    Megatron stores them by group: the queries that share a key-value head, then their key, then their value.
    """
    num_groups = spec.num_kv_heads // shard.tensor_size
    query_size = spec.config.num_attention_heads // spec.num_kv_heads * spec.head_dim
    rest = full_bounds(shapes[f"self_attn.q_proj.{kind}"][1:])
    for number in range(num_groups):
        group = shard.tensor_rank * num_groups + number
        row = number * (query_size + 2 * spec.head_dim)
        for part, size, begin in (
            ("q", query_size, 0),
            ("k", spec.head_dim, query_size),
            ("v", spec.head_dim, query_size + spec.head_dim),
        ):
            bounds = ((group * size, (group + 1) * size), *rest)
            offset = (row + begin, *(0 for _ in rest))
            local_name = f"self_attention.linear_qkv.{kind}"
            yield TensorShard(f"self_attn.{part}_proj.{kind}", bounds, local_name, offset)


def _mlp_shards(shard: ModelShard, shapes: Shapes) -> Iterator[TensorShard]:
    """Shards of gate and up, which one local matrix has one after the other, and of down."""
    rows, columns = shapes["mlp.gate_proj.weight"]
    height = rows // shard.tensor_size
    bounds = ((shard.tensor_rank * height, (shard.tensor_rank + 1) * height), (0, columns))
    yield TensorShard("mlp.gate_proj.weight", bounds, "mlp.linear_fc1.weight", (0, 0))
    yield TensorShard("mlp.up_proj.weight", bounds, "mlp.linear_fc1.weight", (height, 0))
    yield _columns(shard, shapes, "mlp.down_proj.weight", "mlp.linear_fc2.weight")


def _columns(shard: ModelShard, shapes: Shapes, name: str, local_name: str) -> TensorShard:
    """The tensor rank's columns of a row-parallel matrix."""
    rows, columns = shapes[name]
    width = columns // shard.tensor_size
    bounds = ((0, rows), (shard.tensor_rank * width, (shard.tensor_rank + 1) * width))
    return TensorShard(name, bounds, local_name, (0, 0))
