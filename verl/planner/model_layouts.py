"""How the tensors of a language model lie on the ranks of training and of generation; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from verl.planner.architectures import Architecture
from verl.weight_sync.layout import Bounds, ShardLayout, TensorShard, full_bounds, local_slices
from verl.weight_sync.meshes import Mesh, generation_coordinates, stage_layers

# How tensor parallelism splits each kind of weight, by the end of its name. The first that fits counts.
SPLITS: dict[str, str] = {
    r"(embed_tokens|lm_head)\.weight": "vocabulary",
    r"\.experts\.\d+\.(gate_proj|up_proj|w1|w3)\.weight": "columns",
    r"\.experts\.\d+\.(down_proj|w2)\.weight": "rows",
    r"self_attn\.q_proj\.(weight|bias)": "queries",
    r"self_attn\.[kv]_proj\.(weight|bias)": "keys",
    r"mlp\.(gate|up)_proj\.(weight|bias)": "columns",
    r"(self_attn\.o|mlp\.down)_proj\.weight": "rows",
    r"(self_attn\.o|mlp\.down)_proj\.bias": "whole",
    r"(norm|layernorm)\.weight": "whole",
    r"(mlp|block_sparse_moe)\.gate\.weight": "whole",
}
# Tensors that lie in one home, in their order there.
_FUSED = {
    name: members
    for members in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
    for name in members
}
_LAYER = re.compile(r"(?P<prefix>.*layers\.)(?P<layer>\d+)\.(?P<rest>.*)")
_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True, slots=True)
class AxisRank:
    """The part of something that a rank has, of how many.

    Attributes:
        rank: from 0.
        size: ranks that share it.
    """

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class ModelParallelRank:
    """What a rank has of a model, before FSDP shards it.

    Attributes:
        tensor: of every matrix.
        stage: of the layers.
        experts: of the experts of a layer; size 1: experts are split as other matrices.
    """

    tensor: AxisRank = AxisRank()
    stage: AxisRank = AxisRank()
    experts: AxisRank = AxisRank()


@dataclass(frozen=True)
class WeightFormat:
    """How local tensors are named and what lies in them.

    Attributes:
        vocabulary_multiple: what the rows of embedding and head are padded to before they are split.
        is_fused: query, key and value lie in one home, gate and up in another.
        is_interleaved: in a fused home of attention, each key-value head comes behind its queries, Megatron's
            way.
        has_stacked_experts: the experts of a layer lie in one home with a dimension more; else each has homes
            of its own.
    """

    vocabulary_multiple: Callable[[int], int] = lambda tensor: 1
    is_fused: bool = False
    is_interleaved: bool = False
    has_stacked_experts: bool = True


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    # Modules of Transformers, sharded by FSDP2 and split by DTensor.
    "transformers": WeightFormat(),
    "vllm": WeightFormat(lambda tensor: 64, is_fused=True),
    # Its default of make_vocab_size_divisible_by.
    "megatron": WeightFormat(
        lambda tensor: 128 * tensor, is_fused=True, is_interleaved=True, has_stacked_experts=False
    ),
}


def replicated_layout(shapes: Mapping[str, tuple[int, ...]], num_ranks: int) -> ShardLayout:
    """Every rank has everything, under the names of the tensors."""
    pieces = tuple(
        TensorShard(name, full_bounds(shape), name, (0,) * len(shape)) for name, shape in shapes.items()
    )
    return ShardLayout(shapes, (pieces,) * num_ranks)


def fsdp_layout(shapes: Mapping[str, tuple[int, ...]], shards: int, *, replicas: int = 1) -> ShardLayout:
    """Every tensor in chunks of ceil(rows / shards) rows, the last ones smaller or empty, as FSDP2 has them;
    replicas have equal shards.
    """
    pieces = replicated_layout(shapes, 1).shards[0]
    return ShardLayout(
        shapes, tuple(fsdp_shards(pieces, AxisRank(shard, shards)) for shard in range(shards)) * replicas
    )


def training_layout(model: Architecture, mesh: Mesh, *, homes: str = "transformers") -> ShardLayout:
    """The model as it is trained: stages, then parts of matrices, then shards of these.

    Args:
        model: its shapes.
        mesh: sizes of training.
        homes: a key of `WEIGHT_FORMATS`.

    Raises:
        ValueError: sizes that do not fit the model, or a tensor that is not known.
    """
    whole_homes = cache(lambda where: tuple(_pieces(model, where, WEIGHT_FORMATS[homes])))
    made = cache(lambda where, shard: fsdp_shards(whole_homes(where), shard))
    ranks = []
    for rank in range(mesh.num_ranks):
        place = mesh.coordinates(rank)
        where = ModelParallelRank(
            AxisRank(place.tensor, mesh.tensor),
            AxisRank(place.stage, mesh.pipeline),
            AxisRank(mesh.expert_rank(rank), mesh.experts),
        )
        ranks.append(made(where, AxisRank(place.shard, mesh.shards)))
    return ShardLayout(model.shapes, tuple(ranks))


def generation_layout(
    model: Architecture,
    mesh: Mesh,
    *,
    tensor: int,
    pipeline: int = 1,
    homes: str = "vllm",
    grouping: str = "zero-redundancy",
    has_split_experts: bool = True,
) -> ShardLayout:
    """The model as the same ranks generate with it.

    Args:
        model: its shapes.
        mesh: sizes of training.
        tensor: ranks of generation that share every matrix.
        pipeline: stages of generation.
        homes: a key of `WEIGHT_FORMATS`.
        grouping: a key of `verl.weight_sync.meshes.GROUPINGS`.
        has_split_experts: experts are split as other matrices; else each tensor rank has whole ones (expert
            parallel).

    Raises:
        ValueError: sizes that do not fit the model or the ranks, or a tensor that is not known.
    """
    made = cache(lambda where: tuple(_pieces(model, where, WEIGHT_FORMATS[homes])))
    ranks = []
    for rank in range(mesh.num_ranks):
        place = generation_coordinates(rank, mesh, tensor=tensor, pipeline=pipeline, grouping=grouping)
        part = AxisRank(place.tensor, tensor)
        ranks.append(
            made(
                ModelParallelRank(
                    part, AxisRank(place.stage, pipeline), AxisRank() if has_split_experts else part
                )
            )
        )
    return ShardLayout(model.shapes, tuple(ranks))


def model_shards(model: Architecture, where: ModelParallelRank, *, homes: str) -> tuple[TensorShard, ...]:
    """The pieces of one rank.

    Args:
        model: its shapes.
        where: its part.
        homes: a key of `WEIGHT_FORMATS`.

    Raises:
        ValueError: sizes that do not fit the model, or a tensor that is not known.
    """
    return tuple(_pieces(model, where, WEIGHT_FORMATS[homes]))


def fsdp_shards(pieces: tuple[TensorShard, ...], shard: AxisRank) -> tuple[TensorShard, ...]:
    """What FSDP2 leaves of the homes of a rank: of each, the rows of one of `size` chunks of ceil(rows /
    size).
    """
    if shard.size == 1:
        return pieces
    rows: dict[str, int] = {}
    for piece in pieces:
        rows[piece.local_name] = max(
            rows.get(piece.local_name, 0), local_slices(piece.bounds, piece.offset)[0].stop
        )
    kept = (
        _in_rows(piece, shard.rank * width, width)
        for piece in pieces
        for width in [-(-rows[piece.local_name] // shard.size)]
    )
    return tuple(piece for piece in kept if piece is not None)


def _in_rows(piece: TensorShard, first: int, width: int) -> TensorShard | None:
    """What of a piece lies in some rows of its home."""
    at_home = local_slices(piece.bounds, piece.offset)[0]
    start, stop = max(at_home.start, first), min(at_home.stop, first + width)
    if start >= stop:
        return None
    dim = len(piece.bounds) - len(piece.offset)
    bounds = list(piece.bounds)
    if dim >= 0:
        begin = bounds[dim][0] + start - at_home.start
        bounds[dim] = (begin, begin + stop - start)
    return TensorShard(piece.name, tuple(bounds), piece.local_name, (start - first, *piece.offset[1:]))


def _pieces(model: Architecture, where: ModelParallelRank, homes: WeightFormat) -> Iterator[TensorShard]:
    layers = stage_layers(model.num_layers, where.stage.size)[where.stage.rank]
    for name, shape in model.shapes.items():
        expert = _EXPERT.fullmatch(name)
        experts = _experts(model, where) if expert else range(0)
        if not _is_in_stage(name, layers, model.num_layers) or (
            expert and int(expert["expert"]) not in experts
        ):
            continue
        tensor = AxisRank() if expert and where.experts.size > 1 else where.tensor
        bounds = tensor_parallel_bounds(name, shape, tensor, model, homes)
        if any(start >= stop for start, stop in bounds):
            continue
        if expert:
            yield _expert_piece(name, expert, bounds, experts, model, homes, tensor)
        elif homes.is_interleaved and "self_attn" in name and _last(name)[0] in _FUSED:
            yield from _interleaved(name, bounds, model, tensor)
        else:
            home, offset = _home(name, model, homes, tensor)
            yield TensorShard(name, bounds, home, (offset, *(0 for _ in shape[1:])))
    is_last = where.stage.rank == where.stage.size - 1
    if model.is_tied and is_last and where.stage.rank > 0:
        # The last stage has a copy of the embedding, as its head.
        name = next(name for name in model.shapes if name.endswith("embed_tokens.weight"))
        yield TensorShard(
            name,
            tensor_parallel_bounds(name, model.shapes[name], where.tensor, model, homes),
            "lm_head.weight",
            (0, 0),
        )


def tensor_parallel_bounds(
    name: str, shape: tuple[int, ...], tensor: AxisRank, model: Architecture, homes: WeightFormat
) -> Bounds:
    """The part of a tensor that a tensor rank has.

    Args:
        name: of the tensor, see `SPLITS`.
        shape: of the whole tensor.
        tensor: the rank, of how many.
        model: its numbers of heads.
        homes: padding of the vocabulary.

    Raises:
        ValueError: a tensor that is not known, or ranks that do not divide it.
    """
    kind = next((kind for pattern, kind in SPLITS.items() if re.search(rf"{pattern}$", name)), None)
    if kind is None:
        raise ValueError(
            f"need a tensor whose split is known, got {name}; verl.planner.model_layouts.SPLITS has no pattern for it"
        )
    if kind == "whole" or tensor.size == 1:
        return full_bounds(shape)
    if kind == "vocabulary":
        multiple = homes.vocabulary_multiple(tensor.size)
        width = -(-(-(-shape[0] // multiple) * multiple) // tensor.size)
        rows = (min(shape[0], tensor.rank * width), min(shape[0], (tensor.rank + 1) * width))
        return (rows, *full_bounds(shape[1:]))
    dim = 1 if kind == "rows" else 0
    units = {"queries": model.num_heads, "keys": model.num_kv_heads}.get(kind, shape[dim])
    rank, parts = tensor.rank, tensor.size
    if kind == "keys" and parts > units and parts % units == 0:
        # Fewer heads than ranks: several ranks have the same one.
        rank, parts = rank // (parts // units), units
    if units % parts:
        raise ValueError(
            f"need tensor parallel sizes that divide {name}, got {units} {kind} for tensor={tensor.size}; take a divisor"
        )
    width = shape[dim] // parts
    bounds = list(full_bounds(shape))
    bounds[dim] = (rank * width, (rank + 1) * width)
    return tuple(bounds)


def _is_in_stage(name: str, layers: range, num_layers: int) -> bool:
    match = _LAYER.match(name)
    if match:
        return int(match["layer"]) in layers
    return layers.start == 0 if name.endswith("embed_tokens.weight") else layers.stop == num_layers


def _experts(model: Architecture, where: ModelParallelRank) -> range:
    """Experts of a rank: as many on each, the first ranks one more if that does not work out."""
    return stage_layers(model.num_experts, where.experts.size)[where.experts.rank]


def _last(name: str) -> tuple[str, str]:
    """The module and the parameter at the end of a name."""
    module, _, parameter = name.rpartition(".")
    return module.rpartition(".")[2], parameter


def _home(name: str, model: Architecture, homes: WeightFormat, tensor: AxisRank) -> tuple[str, int]:
    """Home of a tensor, and the row where it begins there."""
    module, parameter = _last(name)
    if not homes.is_fused or module not in _FUSED:
        return name, 0
    prefix = name.removesuffix(f"{module}.{parameter}")
    fused = "qkv_proj" if module in ("q_proj", "k_proj", "v_proj") else "gate_up_proj"
    return f"{prefix}{fused}.{parameter}", sum(
        _rows(before, model, homes, tensor) for before in _before(name)
    )


def _before(name: str) -> list[str]:
    """Tensors that lie in the same fused home in front of this one."""
    module, parameter = _last(name)
    prefix = name.removesuffix(f"{module}.{parameter}")
    members = _FUSED[module]
    return [f"{prefix}{member}.{parameter}" for member in members[: members.index(module)]]


def _rows(name: str, model: Architecture, homes: WeightFormat, tensor: AxisRank) -> int:
    start, stop = tensor_parallel_bounds(name, model.shapes[name], tensor, model, homes)[0]
    return stop - start


def _interleaved(name: str, bounds: Bounds, model: Architecture, tensor: AxisRank) -> Iterator[TensorShard]:
    """Pieces of query, key or value, one for each key-value head: its queries, the key, the value, then the
    next head.
    """
    if model.num_kv_heads % tensor.size:
        raise ValueError(
            f"need key-value heads that tensor={tensor.size} divides, got {model.num_kv_heads}; Megatron repeats none"
        )
    module, parameter = _last(name)
    queries = model.num_heads // model.num_kv_heads
    heads = queries if module == "q_proj" else 1
    width = model.shapes[name][0] // (model.num_heads if module == "q_proj" else model.num_kv_heads)
    home = name.replace(f"{module}.{parameter}", f"qkv_proj.{parameter}")
    start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + 1}[module]
    for group in range(model.num_kv_heads // tensor.size):
        first = bounds[0][0] + group * heads * width
        offset = (group * (queries + 2) + start) * width
        yield TensorShard(
            name, ((first, first + heads * width), *bounds[1:]), home, (offset, *(0 for _ in bounds[1:]))
        )


def _expert_piece(
    name: str,
    expert: re.Match[str],
    bounds: Bounds,
    experts: range,
    model: Architecture,
    homes: WeightFormat,
    tensor: AxisRank,
) -> TensorShard:
    """A matrix of an expert: gate and up share a home."""
    is_fused = expert["part"] in _FUSED
    row = sum(_rows(before, model, homes, tensor) for before in _before(name)) if is_fused else 0
    fused = "gate_up_proj" if is_fused else "down_proj"
    if homes.has_stacked_experts:
        return TensorShard(
            name, bounds, f"{expert['module']}.{fused}", (int(expert["expert"]) - experts.start, row, 0)
        )
    return TensorShard(name, bounds, f"{expert['module']}.{expert['expert']}.{fused}.weight", (row, 0))
