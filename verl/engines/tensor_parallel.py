"""How one model is spread over ranks: their meshes, and the plans of tensor parallelism."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from verl.config.placement import ParallelConfig
from verl.controller.dispatch import DispatchRank
from verl.engines.sequence_parallel import SequenceGroup
from verl.weight_sync.meshes import Mesh

# Families whose attention and MLP these plans know; others have experts, latent attention or norms over all
# heads.
TENSOR_PARALLEL = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")
# Norms of single heads: each rank sees its own heads only, so their gradients are parts of a sum.
_HEAD_NORMS = re.compile(r"\.(q_norm|k_norm)\.weight$")


@dataclass(frozen=True)
class Meshes:
    """This rank among those of its model: world = replicas x shards x sequence x tensor, tensor innermost.

    Attributes:
        data: mesh of FSDP: shards x sequence, or with replicas x that.
        tensor: group that shares every matrix; None: one rank has it.
        sequence: group that shares every line; None likewise.
        data_ranks: group of the ranks with different rows, of a backend for the CPU.
        data_rank: this one's number in it.
        places: see `Worker`.
        mesh: the sizes.
    """

    data: DeviceMesh
    tensor: DeviceMesh | None
    sequence: SequenceGroup | None
    data_ranks: dist.ProcessGroup
    data_rank: int
    dispatch_ranks: Mapping[str, DispatchRank]
    mesh: Mesh


def make_meshes(parallel: ParallelConfig, device: torch.device) -> Meshes:
    """Meshes over all ranks of the default process group; every rank makes them at once.

    Raises:
        ValueError: the sizes do not divide the number of ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    replicas, sequence, tensor = parallel.replicas, parallel.sequence, parallel.tensor
    if world % (replicas * sequence * tensor):
        raise ValueError(
            f"need replicas * sequence * tensor to divide the {world} ranks of the pool, got {replicas} * {sequence} * {tensor}; "
            "change placement.devices or these sizes"
        )
    shards = world // (replicas * sequence * tensor)
    for_weights = init_device_mesh(
        device.type, (replicas, shards * sequence, tensor), mesh_dim_names=("replicas", "shards", "tensor")
    )
    for_rows = init_device_mesh(
        device.type, (replicas * shards, sequence, tensor), mesh_dim_names=("data", "sequence", "tensor")
    )
    data_rank, sequence_rank, tensor_rank = for_rows.get_coordinate() or (0, 0, 0)
    # On the CPU whatever the device: what travels here are numbers and rows of the host.
    same_place = [list(range(offset, world, sequence * tensor)) for offset in range(sequence * tensor)]
    data_ranks, _ = dist.new_subgroups_by_enumeration(same_place, backend="gloo")
    assert data_ranks is not None
    line = SequenceGroup(for_rows["sequence"].get_group(), sequence_rank, sequence) if sequence > 1 else None
    first = tensor_rank == 0
    places = {
        "ranks": DispatchRank(rank, True),
        "train": DispatchRank(data_rank, first and sequence_rank == 0),
        # With whole weights the ranks of a line need not share one.
        "generate": DispatchRank(data_rank * sequence + sequence_rank, first),
        "stages": DispatchRank(0, rank == 0),
    }
    data = for_weights["replicas", "shards"] if replicas > 1 else for_weights["shards"]
    mesh = Mesh(tensor=tensor, shards=shards * sequence, replicas=replicas)
    return Meshes(
        data, for_weights["tensor"] if tensor > 1 else None, line, data_ranks, data_rank, places, mesh
    )


def check_sizes(transformer: PreTrainedModel, parallel: ParallelConfig, *, packing: bool) -> None:
    """Refuses sizes that a model cannot be spread over.

    Raises:
        ValueError: see above.
    """
    config = transformer.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if parallel.sequence > 1 and not packing:
        raise ValueError(
            f"need packing true for sequence={parallel.sequence}: a line of packed rows is what its ranks share"
        )
    if parallel.sequence > 1 and (
        (heads // parallel.tensor) % parallel.sequence
        or _unfit(kv_heads // parallel.tensor, parallel.sequence)
    ):
        raise ValueError(
            f"need heads that sequence divides, got {heads} heads and {kv_heads} key-value heads over tensor={parallel.tensor} for "
            f"sequence={parallel.sequence}; take a divisor"
        )
    if parallel.tensor == 1:
        return
    if transformer.config.model_type not in TENSOR_PARALLEL:
        raise ValueError(
            f"need a family of {', '.join(TENSOR_PARALLEL)} for tensor={parallel.tensor}, got {transformer.config.model_type!r}; "
            "set tensor=1, its weights are sharded over the data ranks"
        )
    sizes = {
        "heads": heads,
        "key-value heads": kv_heads,
        "hidden size": config.hidden_size,
        "MLP width": config.intermediate_size,
    }
    sizes["vocabulary"] = config.vocab_size
    if unfit := [f"{size} {name}" for name, size in sizes.items() if size % parallel.tensor]:
        raise ValueError(
            f"need sizes of the model that tensor={parallel.tensor} divides, got {', '.join(unfit)}; take a divisor"
        )


def _unfit(kv_heads: int, ranks: int) -> bool:
    """Whether key-value heads can be neither dealt out nor repeated evenly."""
    return bool(kv_heads % ranks and ranks % max(1, kv_heads))


def parallelize(transformer: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Spreads the matrices over the ranks of a mesh, in place, those of low-rank additions too.

    Megatron-LM, https://arxiv.org/abs/1909.08053, section 3: query, key, value, gate and up by columns,
    output and down by rows, embedding and head by the vocabulary; the logits are gathered.
    """
    parallelize_module(
        transformer, mesh, {name: style for name in _linears(transformer) if (style := _style(name))}
    )
    embedding = transformer.get_input_embeddings()
    head = transformer.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        # By itself it would take that row of each shard for the padding.
        embedding.register_forward_hook(partial(_keep_padding, embedding.padding_idx))
        embedding.padding_idx = None
    if head is None:
        return
    if is_tied:
        head.weight = embedding.weight
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if is_tied:
        head.weight = embedding.weight


def _keep_padding(padding_id: int, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    ids = args[0].to_local() if isinstance(args[0], DTensor) else args[0]
    return without_padding_gradient(output, ids, padding_id)


def without_padding_gradient(embedded: Tensor, ids: Tensor, padding_id: int) -> Tensor:
    """Embedded ids [..., hidden], of which those of padding are constant, as PyTorch's own embedding has
    them.
    """
    return torch.where((ids == padding_id)[..., None], embedded.detach(), embedded)


def _linears(transformer: nn.Module) -> list[str]:
    return [
        name
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    ]


def _style(name: str) -> ParallelStyle | None:
    """How a matrix of a layer is split; additions B A as their matrix: B by its columns, or A by its rows."""
    path = name.split(".")
    is_a, is_b = "lora_A" in path, "lora_B" in path
    by_columns, by_rows = (any(part in names for part in path) for names in (_COLUMNS, _ROWS))
    if by_columns and not is_a:
        return ColwiseParallel()
    return RowwiseParallel() if by_rows and not is_b else None


def is_head_norm(name: str) -> bool:
    """Whether a weight is applied to single heads, so that each tensor rank has only a part of its gradient."""
    return _HEAD_NORMS.search(name) is not None
