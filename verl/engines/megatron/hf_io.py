"""Hugging Face folders in and out of models of Megatron-Core: slice by slice in, tensor by tensor out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.engines.hf.hf_io import SafetensorsWriter, name_in_files, tensor_files
from verl.engines.hf.pretrained import VALUE_HEAD
from verl.engines.megatron.weight_mapping import MegatronModelSpec
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
    pieces: Sequence[TensorShard], homes: Mapping[str, Tensor], folder: Path, anatomy: MegatronModelSpec
) -> None:
    """Reads the pieces of this rank, and nothing else, from a Hugging Face folder.

    The head of a value model is 0 where the folder has none, so that the first values are those of a critic
    that knows nothing.

    Raises:
        ValueError: tensors are missing or have other shapes.
    """
    files = tensor_files(folder)
    head = load_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).exists() else {}
    by_file: dict[Path, list[tuple[str, Bounds, TensorShard]]] = {}
    for piece in pieces:
        if piece.name in anatomy.head_shapes:
            _put(
                piece,
                homes,
                head.get(
                    piece.name.removeprefix("value_head."), torch.zeros(anatomy.head_shapes[piece.name])
                ),
            )
            continue
        for name, bounds in _found(piece, files, anatomy):
            by_file.setdefault(files[name], []).append((name, bounds, piece))
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name, bounds, piece in wanted:
                common = intersection(piece.bounds, bounds)
                assert common is not None
                part = TensorShard(piece.name, common, piece.local_name, local_offset(common, piece))
                _put(part, homes, _slice(file.get_slice(name), part, bounds, path))


def _found(
    piece: TensorShard, files: Mapping[str, Path], anatomy: MegatronModelSpec
) -> list[tuple[str, Bounds]]:
    """The tensors of the files that have values of a piece, each with the part of the whole tensor that it
    is.
    """
    stacked = [(piece.name, full_bounds(anatomy.shapes[piece.name]))]
    parts = (
        stacked
        if piece.name in files
        else anatomy.in_folder(piece.name, piece.bounds[0] if len(piece.bounds) == 3 else None)
    )
    names = {name: name_in_files(name, files, "model") for name, _ in parts}
    if missing := next((name for name, found in names.items() if found is None), None):
        raise ValueError(
            f"need a tensor {missing} in the model's files, got none; config.json is of another model"
        )
    return [(str(names[name]), bounds) for name, bounds in parts]


def _slice(saved: Any, part: TensorShard, bounds: Bounds, path: Path) -> Tensor:
    """A part of a whole tensor out of the tensor of a file that has these bounds in it; a file's tensor may
    lack leading dimensions.
    """
    shape = tuple(saved.get_shape())
    if shape != shape_of(bounds)[-len(shape) :] or any(size > 1 for size in shape_of(bounds)[: -len(shape)]):
        raise ValueError(
            f"need {part.name} of shape {shape_of(bounds)}, got {shape} in {path}; config.json is of another model"
        )
    inside = tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(part.bounds, bounds, strict=True)
    )
    values: Tensor = saved[inside[-len(shape) :]]
    return values


def _put(piece: TensorShard, homes: Mapping[str, Tensor], values: Tensor) -> None:
    place = homes[piece.local_name][local_slices(piece.bounds, piece.offset)]
    place.copy_(values.reshape(place.shape))


@torch.no_grad()
def full_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Mapping[int, Sequence[TensorShard]],
    homes: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, one after the other: each rank sends its pieces of one to all others; a
    collective.

    Args:
        shapes: of those to yield, the same on all ranks.
        pieces: of ranks that have all of them together, by global rank.
        homes: of this rank.
    """
    own = next(iter(homes.values()))
    by_name: dict[str, dict[int, list[TensorShard]]] = {}
    seen: set[tuple[str, Any]] = set()
    for rank, some in pieces.items():
        for piece in some:
            if (piece.name, piece.bounds) not in seen:
                by_name.setdefault(piece.name, {}).setdefault(rank, []).append(piece)
                seen.add((piece.name, piece.bounds))
    for name, shape in shapes.items():
        tensor = own.new_empty(shape)
        for rank, parts in by_name[name].items():
            _send(rank, parts, homes, tensor)
        yield name, tensor


def _send(rank: int, parts: Sequence[TensorShard], homes: Mapping[str, Tensor], tensor: Tensor) -> None:
    """Puts what a rank has of a whole tensor into it, on all ranks; in one message."""
    lengths = [num_elements(part.bounds) for part in parts]
    buffer = tensor.new_empty(sum(lengths))
    values = list(zip(parts, buffer.split(lengths), strict=True))
    for part, flat in values if rank == dist.get_rank() else ():
        flat.copy_(homes[part.local_name][local_slices(part.bounds, part.offset)].reshape(-1))
    dist.broadcast(buffer, src=rank)
    for part, flat in values:
        tensor[tuple(slice(*bound) for bound in part.bounds)] = flat.view(shape_of(part.bounds))


def export_folder(
    folder: Path,
    anatomy: MegatronModelSpec,
    tensors: Iterator[tuple[str, Tensor]],
    head: Iterator[tuple[str, Tensor]],
) -> None:
    """Writes a model in Hugging Face format; on all ranks together, of which the first writes."""
    is_writer = dist.get_rank() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(anatomy.config)
        config = copy.deepcopy(anatomy.config)
        config.architectures = [type(model if anatomy.kind == "policy" else model.base_model).__name__]
        config.save_pretrained(folder)
    writer = SafetensorsWriter(folder)
    for name, tensor in _as_saved(tensors, anatomy):
        if is_writer:
            writer.add(name, tensor.to("cpu", copy=True))
    head_tensors = {name.removeprefix("value_head."): tensor.cpu() for name, tensor in head}
    if not is_writer:
        return
    writer.finish()
    if head_tensors:
        save_file(head_tensors, folder / VALUE_HEAD)


def _as_saved(
    tensors: Iterator[tuple[str, Tensor]], anatomy: MegatronModelSpec
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors as a folder has them: stacked experts one by one."""
    for name, tensor in tensors:
        for saved, bounds in anatomy.in_folder(name):
            part = tensor[tuple(slice(*bound) for bound in bounds)]
            yield saved, part if saved == name or part.ndim < 3 else part.squeeze(0)
