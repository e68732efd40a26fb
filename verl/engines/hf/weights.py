"""Weights of a model by their names in a Hugging Face folder: whole tensors, and the shards on this rank."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from verl.engines.hf.lora import base_name, is_lora_parameter, lora_scaling
from verl.weight_sync.layout import TensorShard


def shard_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Part of the whole tensor that is on this rank.

    Where several mesh dimensions shard one dimension of the tensor, tensor parallelism comes first and FSDP
    shards what is left: the strided placements of FSDP come last.
    """
    bounds = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(slice(*bound) for bound in bounds)
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None

    def is_strided(placement: object) -> bool:
        # By name: the strided placement is no public class, and no subclass of Shard in every version.
        return type(placement).__name__ == "_StridedShard"

    shards = [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(parameter.placements)
        if placement.is_shard() or is_strided(placement)
    ]
    for mesh_dim, placement in sorted(shards, key=lambda shard: is_strided(shard[1])):
        assert isinstance(placement, Shard) or is_strided(placement)
        dim: int = placement.dim  # type: ignore[attr-defined]
        start, stop = bounds[dim]
        # Shards are of equal size, rounded up; the last ones may be smaller or empty.
        width = -(-(stop - start) // parameter.device_mesh.size(mesh_dim))
        first = min(stop, start + coordinates[mesh_dim] * width)
        bounds[dim] = (first, min(stop, first + width))
    return tuple(slice(*bound) for bound in bounds)


def to_local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached and contiguous; a collective if it is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().contiguous()


def full_shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that `full_tensors` yields, by name."""
    return {
        base_name(name): tuple(parameter.shape)
        for name, parameter in transformer.named_parameters()
        if not is_lora_parameter(name)
    }


def full_tensors(
    transformer: nn.Module, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a model, with the LoRA weights merged; a collective for each.

    Args:
        transformer: sharded or not.
        wanted: names of the tensors to yield, the same on all ranks; None: all.
    """
    adapted = lora_modules(transformer)
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name) or (wanted is not None and base_name(name) not in wanted):
            continue
        full = to_full(parameter)
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and owner in adapted:
            full = full + lora_delta(adapted[owner])
        yield base_name(name), full


def local_shards(transformer: nn.Module) -> list[TensorShard]:
    """Shards of the whole tensors on this rank, by the names of `full_tensors` and `local_tensors`."""
    shards = []
    for name, parameter in transformer.named_parameters():
        bounds = tuple((part.start, part.stop) for part in shard_slices(parameter))
        if not is_lora_parameter(name) and all(start < stop for start, stop in bounds):
            shards.append(TensorShard(base_name(name), bounds, base_name(name), (0,) * len(bounds)))
    return shards


@torch.no_grad()
def local_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Local tensors of this rank, by name.

    They are the storage of the parameters. Only a matrix with a LoRA adapter is a new tensor, with the
    adapter merged, which takes a collective.
    """
    adapted = lora_modules(transformer)
    tensors = {}
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name):
            continue
        local = to_local(parameter)
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and owner in adapted:
            local = local + lora_delta(adapted[owner])[shard_slices(parameter)].to(local.device)
        tensors[base_name(name)] = local.detach()
    return tensors


def lora_modules(transformer: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that have a LoRA adapter, by name."""
    names = {name for name, _ in transformer.named_parameters()}
    return {
        name: module
        for name, module in transformer.named_modules()
        if f"{name}.lora_A.default.weight" in names
    }


def lora_delta(module: nn.Module) -> Tensor:
    """The matrix that the LoRA adapter of a layer adds to its weight, B A alpha / rank, whole."""
    a, b = (to_full(module.get_parameter(f"lora_{part}.default.weight")) for part in "AB")
    return lora_scaling(module) * (b @ a)


@torch.no_grad()
def lora_adapter_files(transformer: nn.Module) -> dict[str, bytes]:
    """The two files of a PEFT folder with the LoRA adapter, name -> content; a collective for each tensor."""
    adapted = lora_modules(transformer)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": to_full(
            module.get_parameter(f"lora_{part}.default.weight")
        ).cpu()
        for name, module in adapted.items()
        for part in "AB"
    }
    first = next(iter(adapted.values()))
    rank = first.get_parameter("lora_A.default.weight").shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": lora_scaling(first) * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
