"""Hugging Face folders into Megatron-Core models, slice by slice, and out of them, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.engines.hf.hf_io import SafetensorsWriter, name_in_files, tensor_files
from verl.engines.hf.pretrained import VALUE_HEAD
from verl.engines.megatron.model_spec import MegatronModelSpec
from verl.utils.files import write_safetensors
from verl.weight_sync.layout import (
    Bounds,
    TensorShard,
    full_bounds,
    intersection,
    local_offset,
    local_slices,
    num_elements,
    shape_of,
)


@torch.no_grad()
def fill_from_folder(
    shards: Sequence[TensorShard],
    local_tensors: Mapping[str, Tensor],
    folder: Path,
    spec: MegatronModelSpec,
) -> None:
    """Read the shards of this rank, and nothing else, from a Hugging Face folder.

    A value head that the folder lacks becomes 0, so that a new critic's first values are 0.

    Raises:
        ValueError: tensors are missing or have other shapes.
    """
    files = tensor_files(folder)
    head = load_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).exists() else {}
    by_file: dict[Path, list[tuple[str, Bounds, TensorShard]]] = {}
    for shard in shards:
        if (shape := spec.value_head_shapes.get(shard.name)) is not None:
            values = head.get(shard.name.removeprefix("value_head."), torch.zeros(shape))
            _store(shard, local_tensors, values)
            continue
        for name, bounds in _locate(shard, files, spec):
            by_file.setdefault(files[name], []).append((name, bounds, shard))
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name, bounds, shard in wanted:
                common = intersection(shard.bounds, bounds)
                assert common is not None
                part = TensorShard(shard.name, common, shard.local_name, local_offset(common, shard))
                _store(part, local_tensors, _read_slice(file.get_slice(name), part, bounds, path))


def _locate(
    shard: TensorShard, files: Mapping[str, Path], spec: MegatronModelSpec
) -> list[tuple[str, Bounds]]:
    """The tensors in files that overlap a shard, with their bounds in the whole tensor."""
    # Some folders have experts stacked, as a loaded model has them; others each on its own.
    if shard.name in files:
        parts = [(shard.name, full_bounds(spec.shapes[shard.name]))]
    else:
        is_stacked = len(shard.bounds) == 3
        parts = spec.tensors_in_folder(shard.name, shard.bounds[0] if is_stacked else None)
    names = {name: name_in_files(name, files, "model") for name, _ in parts}
    if missing := next((name for name, found in names.items() if found is None), None):
        raise ValueError(
            f"need a tensor {missing} in the model's files, got none; config.json is of another model"
        )
    return [(str(names[name]), bounds) for name, bounds in parts]


def _read_slice(saved: Any, part: TensorShard, bounds: Bounds, path: Path) -> Tensor:
    """The values of a part from a saved tensor, which has these bounds in the whole tensor.

    The saved tensor may lack leading dimensions of size 1, as that of a single expert does.
    """
    shape, expected = tuple(saved.get_shape()), shape_of(bounds)
    if shape != expected[-len(shape) :] or any(size > 1 for size in expected[: -len(shape)]):
        raise ValueError(
            f"need {part.name} of shape {expected}, got {shape} in {path}; config.json is of another model"
        )
    inside = tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(part.bounds, bounds, strict=True)
    )
    values: Tensor = saved[inside[-len(shape) :]]
    return values


def _store(shard: TensorShard, local_tensors: Mapping[str, Tensor], values: Tensor) -> None:
    target = local_tensors[shard.local_name][local_slices(shard.bounds, shard.offset)]
    target.copy_(values.reshape(target.shape))


@torch.no_grad()
def broadcast_full_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    shards_by_rank: Mapping[int, Sequence[TensorShard]],
    local_tensors: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, one after the other; each rank broadcasts its shards of one.

    A collective call.

    Args:
        shapes: of the tensors to yield, the same on all ranks.
        shards_by_rank: shards by global rank; together they cover these tensors.
        local_tensors: of this rank.
    """
    template = next(iter(local_tensors.values()))
    # Equal shards of several ranks (norms, a copied head) are sent by the first of them only.
    senders: dict[str, dict[int, list[TensorShard]]] = {}
    seen: set[tuple[str, Any]] = set()
    for rank, shards in shards_by_rank.items():
        for shard in shards:
            if (shard.name, shard.bounds) not in seen:
                senders.setdefault(shard.name, {}).setdefault(rank, []).append(shard)
                seen.add((shard.name, shard.bounds))
    for name, shape in shapes.items():
        tensor = template.new_empty(shape)
        for rank, shards in senders[name].items():
            _broadcast_shards(rank, shards, local_tensors, tensor)
        yield name, tensor


def _broadcast_shards(
    rank: int, shards: Sequence[TensorShard], local_tensors: Mapping[str, Tensor], tensor: Tensor
) -> None:
    """Copy the shards of a rank into the whole tensor on all ranks, in one message."""
    lengths = [num_elements(shard.bounds) for shard in shards]
    buffer = tensor.new_empty(sum(lengths))
    values = list(zip(shards, buffer.split(lengths), strict=True))
    for shard, flat in values if rank == dist.get_rank() else ():
        local = local_tensors[shard.local_name][local_slices(shard.bounds, shard.offset)]
        flat.copy_(local.reshape(-1))
    dist.broadcast(buffer, src=rank)
    for shard, flat in values:
        tensor[tuple(slice(*bound) for bound in shard.bounds)] = flat.view(shape_of(shard.bounds))


def export_folder(
    folder: Path,
    spec: MegatronModelSpec,
    tensors: Iterator[tuple[str, Tensor]],
    value_head: Iterator[tuple[str, Tensor]],
) -> None:
    """Write a model in Hugging Face format; a collective call, in which rank 0 writes."""
    is_writer = dist.get_rank() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(spec.config)
        config = copy.deepcopy(spec.config)
        config.architectures = [type(model if spec.kind == "policy" else model.base_model).__name__]
        config.dtype = torch.float32
        config.save_pretrained(folder)
    writer = SafetensorsWriter(folder)
    for name, tensor in tensors:
        for saved_name, bounds in spec.tensors_in_folder(name) if is_writer else ():
            part = tensor[tuple(slice(*bound) for bound in bounds)]
            # Stacked experts become one tensor for each expert.
            part = part if saved_name == name or part.ndim < 3 else part.squeeze(0)
            writer.add(saved_name, part.to("cpu", copy=True))
    head_tensors = {name.removeprefix("value_head."): tensor.cpu() for name, tensor in value_head}
    if not is_writer:
        return
    writer.finish()
    if head_tensors:
        write_safetensors(head_tensors, folder / VALUE_HEAD)
