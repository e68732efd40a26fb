"""Checkpoints of models of Megatron-Core: each rank writes what it updates as parts of the whole tensors,
which any grid can read.
"""

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
from safetensors.torch import save_file
from torch import Tensor

from verl.engines.dcp_checkpoint import PROGRESS, REMEDY
from verl.weight_sync.layout import Bounds, TensorShard, difference, intersection, num_elements, shape_of

# What is saved for each part of a weight: itself in fp32, and what AdamW has for it.
WEIGHT, STATES = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Strip:
    """A part of a whole tensor that lies in one stretch of a local one.

    Attributes:
        name: of the whole tensor.
        bounds: of the part.
        local_name: name of the local tensor.
        start: of the stretch in the local tensor, flattened; it is as long as the part.
    """

    name: str
    bounds: Bounds
    local_name: str
    start: int


def strips(
    pieces: Sequence[TensorShard], shapes: Mapping[str, tuple[int, ...]], owned: Mapping[str, tuple[int, int]]
) -> list[Strip]:
    """What of the whole tensors lies in stretches of local tensors.

    Args:
        pieces: of this rank; each as wide as its home.
        shapes: of the homes.
        owned: homes of which a stretch is meant, its start and stop in the flattened home.
    """
    found = []
    for piece in pieces:
        start, stop = owned.get(piece.local_name, (0, 0))
        width = prod(shapes[piece.local_name][1:])
        first = piece.offset[0]
        # A home may lack leading dimensions, in which the piece has size 1.
        num_leading = len(piece.bounds) - len(piece.offset)
        leading, (top_of_whole, bottom_of_whole) = piece.bounds[:num_leading], piece.bounds[num_leading]
        for row, num_rows, column, num_columns in _rectangles(start, stop, width):
            top, bottom = max(row, first), min(row + num_rows, first + bottom_of_whole - top_of_whole)
            if top >= bottom:
                continue
            shift = top_of_whole - first
            columns = [
                (begin + column, begin + column + num_columns) for begin, _ in piece.bounds[num_leading + 1 :]
            ]
            bounds = (*leading, (top + shift, bottom + shift), *columns)
            found.append(Strip(piece.name, bounds, piece.local_name, top * width + column))
    return found


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A stretch of a flattened matrix as the end of a row, whole rows and the beginning of a row: row, rows,
    column, columns.
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


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The same for models of the same tensors."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def begin_save(
    folder: Path, parts: Sequence[tuple[Strip, Mapping[str, Tensor]]], progress: Mapping[str, Any]
) -> Callable[[], None]:
    """Begins to write the parts of this rank; returns as soon as they have been copied aside.

    Args:
        folder: where to, the same on all ranks.
        parts: of this rank, with what is saved of each, flat.
        progress: what goes into a small JSON file beside them, the same on all ranks.

    Returns:
        What waits until they are on the disk.
    """
    rank = dist.get_rank()
    copied = {
        _key(what, strip): values.detach().to("cpu", copy=True).view(shape_of(strip.bounds))
        for strip, kept in parts
        for what, values in kept.items()
    }
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps({**progress, "num_files": dist.get_world_size()}))
    thread = ThreadPoolExecutor(1, thread_name_prefix="save")
    saved = thread.submit(save_file, copied, _file(folder, rank))
    thread.shutdown(wait=False)
    return lambda: saved.result() and None


def read_progress(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved as progress.

    Raises:
        ValueError: it cannot be read, or is not what is expected.
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
                f"the checkpoint in {folder} is of another model ({name} {found[name]}, need {value}); {REMEDY}"
            )
    return progress


def read_parts(folder: Path, num_files: int, parts: Sequence[tuple[Strip, Mapping[str, Tensor]]]) -> None:
    """Fills flat tensors from what any number of ranks wrote.

    Raises:
        ValueError: something is missing or broken.
    """
    try:
        by_name = _index(folder, num_files)
        for strip, kept in parts:
            for what, values in kept.items():
                _read(by_name.get((what, strip.name), []), strip, values.view(shape_of(strip.bounds)))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is broken: {error}; {REMEDY}, or give an older one as checkpoint.resume"
        ) from error


def _read(saved: Sequence[tuple[Bounds, str, Any]], strip: Strip, values: Tensor) -> None:
    """Fills the values of a strip from the parts that were saved of its tensor."""
    missing = [strip.bounds]
    for bounds, key, file in saved:
        common = [(part, found) for part in missing if (found := intersection(part, bounds))]
        for part, found in common:
            there = tuple(
                slice(a - first, b - first) for (a, b), (first, _) in zip(found, bounds, strict=True)
            )
            here = tuple(
                slice(a - first, b - first) for (a, b), (first, _) in zip(found, strip.bounds, strict=True)
            )
            values[here].copy_(file.get_slice(key)[there])
            missing.remove(part)
            missing += difference(part, found)
        if not missing:
            return
    raise ValueError(f"{sum(map(num_elements, missing))} values of {strip.name} are in none of its files")


def _index(folder: Path, num_files: int) -> dict[tuple[str, str], list[tuple[Bounds, str, Any]]]:
    """What was saved, and the tensor it is of, to the parts that there are: their bounds, keys and open
    files.
    """
    by_name: dict[tuple[str, str], list[tuple[Bounds, str, Any]]] = {}
    for rank in range(num_files):
        file: Any = safe_open(_file(folder, rank), framework="pt")
        keys: list[str] = file.keys()
        for key in keys:
            what, name, text = key.split("|")
            bounds = tuple(
                (int(start), int(stop))
                for start, _, stop in (part.partition(":") for part in text.split(","))
            )
            by_name.setdefault((what, name), []).append((bounds, key, file))
    return by_name


def _key(what: str, strip: Strip) -> str:
    return f"{what}|{strip.name}|{','.join(f'{start}:{stop}' for start, stop in strip.bounds)}"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def agreed(error: ValueError | None) -> None:
    """Raises on all ranks what went wrong on one, so that none waits for it.

    Raises:
        ValueError: see above.
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
    optimizer: Any, parameters: Mapping[str, Tensor], pieces: Sequence[TensorShard], *, with_states: bool
) -> Iterator[tuple[Strip, dict[str, Tensor]]]:
    """The parts of weights that this rank updates, each with its flat weight in fp32 and AdamW's states, as
    views.

    Args:
        optimizer: of Megatron-Core, which data ranks share.
        parameters: of this rank, by the names of the homes of its pieces.
        pieces: of this rank.
        with_states: whether the optimizer has states.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    for part in _own(optimizer):
        main = {}
        owned = {}
        for parameter, (group, place) in part.model_param_group_index_map.items():
            name = names[parameter]
            stretch = part._get_model_param_range_map(parameter)["param"]
            owned[name] = (stretch.start, stretch.end)
            main[name] = part.optimizer.param_groups[group]["params"][place]
        shapes = {name: tuple(parameters[name].shape) for name in owned}
        for strip in strips([piece for piece in pieces if piece.local_name in owned], shapes, owned):
            weight = main[strip.local_name]
            begin = strip.start - owned[strip.local_name][0]
            kept = {WEIGHT: weight}
            if with_states:
                kept |= {name: part.optimizer.state[weight][name] for name in STATES}
            yield (
                strip,
                {
                    name: values.detach()[begin : begin + num_elements(strip.bounds)]
                    for name, values in kept.items()
                },
            )


@torch.no_grad()
def set_steps(optimizer: Any, steps: int) -> None:
    """Makes room for an optimizer's states after so many steps; before the first there are none."""
    for part in _own(optimizer):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups if steps else ():
            # Padding of the vocabulary has states, too, and they are always 0.
            for weight in group["params"]:
                part.optimizer.state[weight] = {name: torch.zeros_like(weight) for name in STATES}
            _count(part.optimizer, group, steps)


def _count(optimizer: torch.optim.Optimizer, group: dict[str, Any], steps: int) -> None:
    """PyTorch counts the steps of each weight; Apex and TransformerEngine those of a group."""
    if not isinstance(optimizer, torch.optim.AdamW):
        group["step"] = steps
        return
    for weight in group["params"]:
        optimizer.state[weight]["step"] = torch.tensor(float(steps))


@torch.no_grad()
def publish_weights(optimizer: Any, chunks: Sequence[Any]) -> None:
    """Brings the weights that each rank updates into the model, on all data ranks."""
    for part in _own(optimizer):
        part._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _own(optimizer: Any) -> list[Any]:
    """The parts of an optimizer (of experts and of all else) that have weights on this rank."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
