"""Layouts of a language model's tensors on the ranks of training and of generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from verl.planner.architectures import Architecture
from verl.weight_sync.layout import Bounds, ShardLayout, TensorShard, full_bounds, local_slices
from verl.weight_sync.meshes import Mesh, generation_coordinates, stage_layers

# How tensor parallelism splits a tensor, by the end of its name; the first pattern that matches counts.
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
# Modules whose weights a fused local tensor has one after the other: module -> all modules of that tensor.
_FUSED = {
    name: modules
    for modules in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
    for name in modules
}
_LAYER = re.compile(r"(?P<prefix>.*layers\.)(?P<layer>\d+)\.(?P<rest>.*)")
_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True, slots=True)
class AxisRank:
    """Rank on one axis of a mesh.

    Attributes:
        rank: from 0.
        size: number of ranks of the axis.
    """

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class ModelParallelRank:
    """Ranks that decide a rank's part of the model, before FSDP shards that part.

    Attributes:
        tensor: in tensor parallelism.
        stage: in the pipeline.
        experts: in expert parallelism; size 1: experts are split by tensor parallelism, as other matrices.
    """

    tensor: AxisRank = AxisRank()
    stage: AxisRank = AxisRank()
    experts: AxisRank = AxisRank()


@dataclass(frozen=True)
class WeightFormat:
    """Names and contents of an engine's local tensors.

    Attributes:
        vocabulary_multiple: tensor parallel size -> multiple to which the rows of embedding and head are
            padded before they are split.
        is_fused: query, key and value share a local tensor; so do gate and up.
        is_interleaved: in the fused tensor of attention each key-value head comes after its queries, as in
            Megatron.
        has_stacked_experts: the experts of a layer share a local tensor with one more dimension; else each
            has its own.
    """

    vocabulary_multiple: Callable[[int], int] = lambda tensor: 1
    is_fused: bool = False
    is_interleaved: bool = False
    has_stacked_experts: bool = True


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    # Modules of Transformers, sharded by FSDP2 and split by DTensor.
    "transformers": WeightFormat(),
    "vllm": WeightFormat(lambda tensor: 64, is_fused=True),
    # Megatron's default of make_vocab_size_divisible_by is 128.
    "megatron": WeightFormat(
        lambda tensor: 128 * tensor, is_fused=True, is_interleaved=True, has_stacked_experts=False
    ),
}


def training_layout(model: Architecture, mesh: Mesh, *, weight_format: str = "transformers") -> ShardLayout:
    """Layout of training: pipeline stages, in these tensor or expert parallel parts, in these FSDP shards.

    Args:
        model: its shapes.
        mesh: sizes of training.
        weight_format: a key of `WEIGHT_FORMATS`.

    Raises:
        ValueError: sizes that do not fit the model, or a tensor whose split is not known.
    """
    # Cached: replicas share one tuple of shards, which later steps recognize by its identity.
    unsharded = cache(lambda rank: model_shards(model, rank, weight_format=weight_format))
    sharded = cache(lambda rank, shard: fsdp_shards(unsharded(rank), shard))
    shards = []
    for rank in range(mesh.num_ranks):
        own = mesh.coordinates(rank)
        model_rank = ModelParallelRank(
            AxisRank(own.tensor, mesh.tensor),
            AxisRank(own.stage, mesh.pipeline),
            AxisRank(mesh.expert_rank(rank), mesh.experts),
        )
        shards.append(sharded(model_rank, AxisRank(own.shard, mesh.shards)))
    return ShardLayout(model.shapes, tuple(shards))


def generation_layout(
    model: Architecture,
    mesh: Mesh,
    *,
    tensor: int,
    pipeline: int = 1,
    weight_format: str = "vllm",
    grouping: str = "zero-redundancy",
    has_split_experts: bool = True,
) -> ShardLayout:
    """Layout in which the ranks of training generate.

    Args:
        model: its shapes.
        mesh: sizes of training.
        tensor: tensor parallel size of generation.
        pipeline: stages of generation.
        weight_format: a key of `WEIGHT_FORMATS`.
        grouping: a key of `verl.weight_sync.meshes.GROUPINGS`.
        has_split_experts: experts are split as other matrices; else each tensor rank has whole experts
            (expert parallelism).

    Raises:
        ValueError: sizes that do not fit the model or the ranks, or a tensor whose split is not known.
    """
    unsharded = cache(lambda rank: model_shards(model, rank, weight_format=weight_format))
    shards = []
    for rank in range(mesh.num_ranks):
        own = generation_coordinates(rank, mesh, tensor=tensor, pipeline=pipeline, grouping=grouping)
        tensor_rank = AxisRank(own.tensor, tensor)
        expert_rank = AxisRank() if has_split_experts else tensor_rank
        shards.append(unsharded(ModelParallelRank(tensor_rank, AxisRank(own.stage, pipeline), expert_rank)))
    return ShardLayout(model.shapes, tuple(shards))


def model_shards(
    model: Architecture, rank: ModelParallelRank, *, weight_format: str
) -> tuple[TensorShard, ...]:
    """Shards of one rank, without FSDP.

    Args:
        model: its shapes.
        rank: whose part.
        weight_format: a key of `WEIGHT_FORMATS`.

    Raises:
        ValueError: sizes that do not fit the model, or a tensor whose split is not known.
    """
    return tuple(_ModelSharding(model, rank, WEIGHT_FORMATS[weight_format]).shards())


def fsdp_shards(shards: tuple[TensorShard, ...], rank: AxisRank) -> tuple[TensorShard, ...]:
    """Shards that FSDP2 leaves on a rank: of each local tensor, chunk `rank` of ceil(rows / size) rows."""
    if rank.size == 1:
        return shards
    num_rows: dict[str, int] = {}
    for shard in shards:
        stop = local_slices(shard.bounds, shard.offset)[0].stop
        num_rows[shard.local_name] = max(num_rows.get(shard.local_name, 0), stop)
    kept = []
    for shard in shards:
        width = -(-num_rows[shard.local_name] // rank.size)
        rows = local_slices(shard.bounds, shard.offset)[0]
        start, stop = max(rows.start, rank.rank * width), min(rows.stop, (rank.rank + 1) * width)
        if start >= stop:
            continue
        # Dimension of the whole tensor that matches the local rows. If the local tensor stacks experts, its
        # rows are experts: a shard is kept as it is.
        dim = len(shard.bounds) - len(shard.offset)
        bounds = list(shard.bounds)
        if dim >= 0:
            begin = bounds[dim][0] + start - rows.start
            bounds[dim] = (begin, begin + stop - start)
        offset = (start - rank.rank * width, *shard.offset[1:])
        kept.append(TensorShard(shard.name, tuple(bounds), shard.local_name, offset))
    return tuple(kept)


class _ModelSharding:
    """Shards of one rank of a model in a format, without FSDP.

    Raises:
        ValueError: more stages than layers, or more expert parallel ranks than experts.
    """

    def __init__(self, model: Architecture, rank: ModelParallelRank, weight_format: WeightFormat) -> None:
        self._model, self._rank, self._format = model, rank, weight_format
        self._layers = stage_layers(model.num_layers, rank.stage.size)[rank.stage.rank]

    def shards(self) -> Iterator[TensorShard]:
        """Shards in the order of the model's tensors."""
        stage = self._rank.stage
        for name in self._model.shapes:
            if self._is_on_stage(name):
                yield from self._shards_of(name)
        if self._model.is_tied and 0 < stage.rank == stage.size - 1:
            # The last stage has a copy of the embedding, as its head.
            name = next(name for name in self._model.shapes if name.endswith("embed_tokens.weight"))
            yield TensorShard(name, self._bounds(name), "lm_head.weight", (0, 0))

    def _is_on_stage(self, name: str) -> bool:
        match = _LAYER.match(name)
        if match:
            return int(match["layer"]) in self._layers
        is_first = name.endswith("embed_tokens.weight")
        return self._layers.start == 0 if is_first else self._layers.stop == self._model.num_layers

    def _shards_of(self, name: str) -> Iterator[TensorShard]:
        expert = _EXPERT.fullmatch(name)
        if expert and int(expert["expert"]) not in self._experts():
            return
        bounds = self._bounds(name)
        if any(start >= stop for start, stop in bounds):
            return
        module, parameter = _module_and_parameter(name)
        is_fused = self._format.is_fused and module in _FUSED
        if expert:
            yield self._expert_shard(name, expert, bounds)
        elif is_fused and self._format.is_interleaved and "self_attn" in name:
            yield from self._interleaved_shards(name, bounds)
        else:
            fused = "qkv_proj" if module in ("q_proj", "k_proj", "v_proj") else "gate_up_proj"
            local_name = name.replace(f"{module}.{parameter}", f"{fused}.{parameter}") if is_fused else name
            row = self._rows_before(name) if is_fused else 0
            yield TensorShard(name, bounds, local_name, (row, *(0 for _ in bounds[1:])))

    def _experts(self) -> range:
        """Experts of the rank; if they do not divide evenly, the first ranks have one more."""
        experts = self._rank.experts
        return stage_layers(self._model.num_experts, experts.size)[experts.rank]

    def _bounds(self, name: str) -> Bounds:
        """Tensor parallel part of a tensor.

        Raises:
            ValueError: a tensor whose split is not known, or ranks that do not divide it.
        """
        shape = self._model.shapes[name]
        has_whole_experts = self._rank.experts.size > 1 and _EXPERT.fullmatch(name)
        tensor = AxisRank() if has_whole_experts else self._rank.tensor
        kind = next((kind for pattern, kind in SPLITS.items() if re.search(rf"{pattern}$", name)), None)
        if kind is None:
            raise ValueError(
                f"need a tensor whose split is known, got {name}; "
                "verl.planner.model_layouts.SPLITS has no pattern for it"
            )
        if kind == "whole" or tensor.size == 1:
            return full_bounds(shape)
        if kind == "vocabulary":
            multiple = self._format.vocabulary_multiple(tensor.size)
            width = -(-(-(-shape[0] // multiple) * multiple) // tensor.size)
            rows = (min(shape[0], tensor.rank * width), min(shape[0], (tensor.rank + 1) * width))
            return (rows, *full_bounds(shape[1:]))
        dim = 1 if kind == "rows" else 0
        units = {"queries": self._model.num_heads, "keys": self._model.num_kv_heads}.get(kind, shape[dim])
        rank, parts = tensor.rank, tensor.size
        if kind == "keys" and parts > units and parts % units == 0:
            # Fewer key-value heads than ranks: several ranks have the same head.
            rank, parts = rank // (parts // units), units
        if units % parts:
            raise ValueError(
                f"need tensor parallel sizes that divide {name}, got {units} {kind} for "
                f"tensor={tensor.size}; take a divisor"
            )
        width = shape[dim] // parts
        bounds = list(full_bounds(shape))
        bounds[dim] = (rank * width, (rank + 1) * width)
        return tuple(bounds)

    def _rows_before(self, name: str) -> int:
        """Rows of a fused local tensor in front of those of a tensor."""
        module, parameter = _module_and_parameter(name)
        prefix = name.removesuffix(f"{module}.{parameter}")
        modules = _FUSED[module]
        before = (f"{prefix}{other}.{parameter}" for other in modules[: modules.index(module)])
        return sum(stop - start for start, stop in (self._bounds(other)[0] for other in before))

    def _expert_shard(self, name: str, expert: re.Match[str], bounds: Bounds) -> TensorShard:
        """Shard of an expert's matrix; gate and up share a local tensor."""
        is_fused = expert["part"] in _FUSED
        row = self._rows_before(name) if is_fused else 0
        part = "gate_up_proj" if is_fused else "down_proj"
        if self._format.has_stacked_experts:
            index = int(expert["expert"]) - self._experts().start
            return TensorShard(name, bounds, f"{expert['module']}.{part}", (index, row, 0))
        return TensorShard(name, bounds, f"{expert['module']}.{expert['expert']}.{part}.weight", (row, 0))

    def _interleaved_shards(self, name: str, bounds: Bounds) -> Iterator[TensorShard]:
        """Shards of query, key or value, one for each key-value head: its queries, its key, its value."""
        num_kv_heads, tensor = self._model.num_kv_heads, self._rank.tensor
        if num_kv_heads % tensor.size:
            raise ValueError(
                f"need key-value heads that tensor={tensor.size} divides, got {num_kv_heads}; "
                "Megatron repeats none"
            )
        module, parameter = _module_and_parameter(name)
        queries = self._model.num_heads // num_kv_heads
        heads = queries if module == "q_proj" else 1
        num_heads = self._model.num_heads if module == "q_proj" else num_kv_heads
        width = self._model.shapes[name][0] // num_heads
        local_name = name.replace(f"{module}.{parameter}", f"qkv_proj.{parameter}")
        first_head = {"q_proj": 0, "k_proj": queries, "v_proj": queries + 1}[module]
        for group in range(num_kv_heads // tensor.size):
            first = bounds[0][0] + group * heads * width
            row = (group * (queries + 2) + first_head) * width
            rows = (first, first + heads * width)
            yield TensorShard(name, (rows, *bounds[1:]), local_name, (row, *(0 for _ in bounds[1:])))


def _module_and_parameter(name: str) -> tuple[str, str]:
    """Last module and parameter of a name, such as ("q_proj", "weight")."""
    module, _, parameter = name.rpartition(".")
    return module.rpartition(".")[2], parameter
