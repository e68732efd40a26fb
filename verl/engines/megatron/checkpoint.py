"""Checkpoints of Megatron-Core models: each rank writes what it updates, and any parallel layout reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from verl.engines.dcp_checkpoint import PROGRESS, REMEDY
from verl.utils.files import write_safetensors
from verl.weight_sync.layout import Bounds, TensorShard, difference, intersection, num_elements, shape_of

# Tensors that are saved for each part of a weight: the weight in fp32, and AdamW's states.
WEIGHT, STATES = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FlatSlice:
    """A part of a whole tensor that is contiguous in a flattened local tensor.

    Attributes:
        name: of the whole tensor.
        bounds: of the part in it.
        local_name: name of the local tensor.
        start: of the part in the flattened local tensor; it is as long as the part.
    """

    name: str
    bounds: Bounds
    local_name: str
    start: int


# A part of a weight with the flat tensors that are saved of it, by WEIGHT and STATES.
OptimizerPart = tuple[FlatSlice, Mapping[str, Tensor]]


def flat_slices(
    shards: Sequence[TensorShard],
    local_shapes: Mapping[str, tuple[int, ...]],
    ranges: Mapping[str, tuple[int, int]],
) -> list[FlatSlice]:
    """The parts of whole tensors that lie in ranges of flattened local tensors.

    Megatron-Core's distributed optimizer divides flattened weights at any element, so a range may begin and
    end inside a row.

    Args:
        shards: of this rank; each as wide as its local tensor.
        local_shapes: of the local tensors.
        ranges: start and stop in the flattened local tensor, by its name.
    """
    found = []
    for shard in shards:
        start, stop = ranges.get(shard.local_name, (0, 0))
        width = prod(local_shapes[shard.local_name][1:])
        first = shard.offset[0]
        # A local tensor may lack leading dimensions, in which the shard has size 1.
        num_leading = len(shard.bounds) - len(shard.offset)
        leading, (top_of_whole, bottom_of_whole) = shard.bounds[:num_leading], shard.bounds[num_leading]
        for row, num_rows, column, num_columns in _rectangles(start, stop, width):
            top, bottom = max(row, first), min(row + num_rows, first + bottom_of_whole - top_of_whole)
            if top >= bottom:
                continue
            shift = top_of_whole - first
            columns = [
                (begin + column, begin + column + num_columns) for begin, _ in shard.bounds[num_leading + 1 :]
            ]
            bounds = (*leading, (top + shift, bottom + shift), *columns)
            found.append(FlatSlice(shard.name, bounds, shard.local_name, top * width + column))
    return found


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A range of a flattened matrix as rectangles: the end of a row, whole rows, the beginning of a row.

    Yields:
        First row, number of rows, first column, number of columns.
    """
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            columns = min(width - column, stop - start)
            yield row, 1, column, columns
            start += columns
        else:
            rows = (stop - start) // width
            yield row, rows, 0, width
            start += rows * width


def shapes_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A hash of names and shapes, equal for models of the same tensors."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def begin_save(
    folder: Path, parts: Sequence[OptimizerPart], progress: Mapping[str, Any]
) -> Callable[[], None]:
    """Begin to write the parts of this rank; returns once they are copied, so that training may go on.

    Args:
        folder: the same on all ranks.
        parts: of this rank.
        progress: content of a small JSON file beside the tensors, the same on all ranks.

    Returns:
        A function that waits until the parts are on the disk.
    """
    rank = dist.get_rank()
    copied = {
        _key(kind, part): values.detach().to("cpu", copy=True).view(shape_of(part.bounds))
        for part, tensors in parts
        for kind, values in tensors.items()
    }
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps({**progress, "num_files": dist.get_world_size()}))
    thread = ThreadPoolExecutor(1, thread_name_prefix="save")
    saved = thread.submit(write_safetensors, copied, _file(folder, rank))
    thread.shutdown(wait=False)
    return lambda: saved.result() and None


def read_progress(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The progress that was saved with a checkpoint.

    Raises:
        ValueError: it cannot be read, or differs from what is expected.
    """
    try:
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
        found = {name: progress[name] for name in (*expected, "num_files")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is none of engine megatron, or broken ({error!r}); {REMEDY}"
        ) from error
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(
                f"the checkpoint in {folder} is of another model ({name} {found[name]}, need {value}); "
                f"{REMEDY}"
            )
    return progress


def read_parts(folder: Path, num_files: int, parts: Sequence[OptimizerPart]) -> None:
    """Fill the tensors of parts from the files of any number of ranks.

    Raises:
        ValueError: a file is missing or broken.
    """
    try:
        index = _index(folder, num_files)
        for part, tensors in parts:
            for kind, values in tensors.items():
                _read(index.get((kind, part.name), []), part, values.view(shape_of(part.bounds)))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is broken: {error}; {REMEDY}, "
            "or give an older one as checkpoint.resume"
        ) from error


def _read(saved: Sequence[tuple[Bounds, str, Any]], part: FlatSlice, values: Tensor) -> None:
    """Fill the values of a part from the saved parts of its tensor, given as bounds, key and open file."""
    missing = [part.bounds]
    for bounds, key, file in saved:
        common = [(hole, found) for hole in missing if (found := intersection(hole, bounds))]
        for hole, found in common:
            source = tuple(
                slice(a - first, b - first) for (a, b), (first, _) in zip(found, bounds, strict=True)
            )
            target = tuple(
                slice(a - first, b - first) for (a, b), (first, _) in zip(found, part.bounds, strict=True)
            )
            values[target].copy_(file.get_slice(key)[source])
            missing.remove(hole)
            missing += difference(hole, found)
        if not missing:
            return
    raise ValueError(f"{sum(map(num_elements, missing))} values of {part.name} are in none of its files")


def _index(folder: Path, num_files: int) -> dict[tuple[str, str], list[tuple[Bounds, str, Any]]]:
    """Saved parts by kind and tensor name, as bounds, key and open file."""
    index: dict[tuple[str, str], list[tuple[Bounds, str, Any]]] = {}
    for rank in range(num_files):
        file: Any = safe_open(_file(folder, rank), framework="pt")
        keys: list[str] = file.keys()
        for key in keys:
            kind, name, text = key.split("|")
            bounds = tuple(
                (int(start), int(stop))
                for start, _, stop in (bound.partition(":") for bound in text.split(","))
            )
            index.setdefault((kind, name), []).append((bounds, key, file))
    return index


def _key(kind: str, part: FlatSlice) -> str:
    return f"{kind}|{part.name}|{','.join(f'{start}:{stop}' for start, stop in part.bounds)}"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def raise_on_all_ranks(error: ValueError | None) -> None:
    """Raise the error of one rank on all ranks, so that none waits for it; a collective call.

    Raises:
        ValueError: this rank's error, or else the first one of another rank.
    """
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, str(error) if error else None)
    if error:
        raise error
    first = next((message for message in errors if message), None)
    if first:
        raise ValueError(first)


@torch.no_grad()
def optimizer_parts(
    optimizer: Any, parameters: Mapping[str, Tensor], shards: Sequence[TensorShard], *, with_states: bool
) -> Iterator[OptimizerPart]:
    """The parts of weights that this rank updates, with the flat weight in fp32 and AdamW's states as views.

    Args:
        optimizer: Megatron-Core's distributed one.
        parameters: of this rank, by the local names of its shards.
        shards: of this rank.
        with_states: True if the optimizer has states.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    for local in _local_optimizers(optimizer):
        weights, ranges = {}, {}
        for parameter, (group, number) in local.model_param_group_index_map.items():
            name = names[parameter]
            owned = local._get_model_param_range_map(parameter)["param"]
            ranges[name] = (owned.start, owned.end)
            weights[name] = local.optimizer.param_groups[group]["params"][number]
        shapes = {name: tuple(parameters[name].shape) for name in ranges}
        for part in flat_slices([shard for shard in shards if shard.local_name in ranges], shapes, ranges):
            weight = weights[part.local_name]
            tensors = {WEIGHT: weight}
            if with_states:
                tensors |= {name: local.optimizer.state[weight][name] for name in STATES}
            begin = part.start - ranges[part.local_name][0]
            end = begin + num_elements(part.bounds)
            yield part, {name: values.detach()[begin:end] for name, values in tensors.items()}


@torch.no_grad()
def set_steps(optimizer: Any, steps: int) -> None:
    """Set the step count of an optimizer and allocate its states; before the first step it has none."""
    for local in _local_optimizers(optimizer):
        local.optimizer.state.clear()
        for group in local.optimizer.param_groups if steps else ():
            # The padding of the vocabulary has states too, which are always 0.
            for weight in group["params"]:
                local.optimizer.state[weight] = {name: torch.zeros_like(weight) for name in STATES}
            # PyTorch counts the steps of each weight; Apex and TransformerEngine those of a group.
            if not isinstance(local.optimizer, torch.optim.AdamW):
                group["step"] = steps
                continue
            for weight in group["params"]:
                local.optimizer.state[weight]["step"] = torch.tensor(float(steps))


@torch.no_grad()
def sync_model_weights(optimizer: Any, chunks: Sequence[Any]) -> None:
    """Copy the optimizer's fp32 weights into the model, on all data ranks; a collective call."""
    for local in _local_optimizers(optimizer):
        local._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _local_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers with weights on this rank; experts have one of their own."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
