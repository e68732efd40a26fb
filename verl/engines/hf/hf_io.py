"""Hugging Face folders in and out of models that are spread over ranks: slice by slice in, tensor by tensor
out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from verl.engines.hf.lora import base_name, initial_lora_weight, is_lora_parameter, scaling_of
from verl.engines.hf.models import VALUE_HEAD, Backbone, ValueModel, load_language_model
from verl.weight_sync.layout import TensorShard

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30


def model_folder(source: str) -> Path:
    """The folder of a model; one that is named as on the hub is fetched first.

    Raises:
        ValueError: there is none.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot load a model from {source!r}: there is no such folder, and the hub gives none"
        ) from error


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor is on this rank.

    Where several mesh dimensions shard one dimension of the tensor, tensor parallelism comes first and FSDP
    shards what is left: the strided placements of FSDP come last.
    """
    bounds = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(slice(*bound) for bound in bounds)
    coordinates = parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    # By name: the strided placement is no public class, and no subclass of Shard in every version.
    shards = [
        (dim, placement)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard() or _is_strided(placement)
    ]
    for dim, placement in sorted(shards, key=lambda shard: _is_strided(shard[1])):
        assert isinstance(placement, Shard) or _is_strided(placement)
        start, stop = bounds[placement.dim]  # type: ignore[attr-defined]
        width = -(-(stop - start) // parameter.device_mesh.size(dim))
        first = min(stop, start + coordinates[dim] * width)
        bounds[placement.dim] = (first, min(stop, first + width))  # type: ignore[attr-defined]
    return tuple(slice(*bound) for bound in bounds)


def _is_strided(placement: object) -> bool:
    return type(placement).__name__ == "_StridedShard"


@torch.no_grad()
def load_sharded(model: Backbone, source: str) -> None:
    """Fills the parameters of a model from a Hugging Face folder, each rank only its own slices.

    Low-rank additions get their first values. A family whose files name their tensors otherwise than the
    model does (some with experts) is read whole on each rank and sliced there.

    Raises:
        ValueError: tensors are missing or have other shapes.
    """
    folder = model_folder(source)
    own = dict(model.transformer.named_parameters())
    for name in [name for name in own if is_lora_parameter(name)]:
        parameter = own.pop(name)
        _fill(parameter, initial_lora_weight(name, parameter.shape)[local_slices(parameter)])
    files = files_of(folder)
    names = {name: name_in_files(base_name(name), files, model.transformer.base_model_prefix) for name in own}
    if all(file_name is not None for file_name in names.values()):
        _fill_from_files(
            own, {name: files[file_name] for name, file_name in names.items() if file_name}, names
        )
    else:
        _fill_from_model(own, load_language_model(str(folder)))
    if isinstance(model, ValueModel):
        saved = load_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).exists() else {}
        for name, parameter in model.head.named_parameters():
            _fill(parameter, saved.get(name, torch.zeros(parameter.shape))[local_slices(parameter)])


def files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (folder / _INDEX).exists():
        return {
            name: folder / file
            for name, file in json.loads((folder / _INDEX).read_text())["weight_map"].items()
        }
    if not (folder / _WEIGHTS).exists():
        raise ValueError(
            f"need {_WEIGHTS} or {_INDEX} in {folder} to load a model onto several ranks; save it with save_pretrained"
        )
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _WEIGHTS)


def name_in_files(name: str, files: Mapping[str, Path], prefix: str) -> str | None:
    """The name that a parameter has in the files: a bare transformer has no prefix, one with a head has."""
    return next(
        (known for known in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if known in files),
        None,
    )


def _fill_from_files(
    parameters: Mapping[str, Tensor], files: Mapping[str, Path], names: Mapping[str, str | None]
) -> None:
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, of in files.items() if of == path):
                saved, parameter = file.get_slice(names[name]), parameters[name]
                _check_shape(name, parameter, tuple(saved.get_shape()), path)
                _fill(parameter, saved[local_slices(parameter)])


def _check_shape(name: str, parameter: Tensor, shape: tuple[int, ...], path: Path) -> None:
    if shape != tuple(parameter.shape):
        raise ValueError(
            f"need {name} of shape {tuple(parameter.shape)}, got {shape} in {path}; the folder's config.json is of another model"
        )


def _fill_from_model(parameters: Mapping[str, Tensor], whole: PreTrainedModel) -> None:
    saved = dict(whole.named_parameters())
    for name, parameter in parameters.items():
        found = name_in_files(base_name(name), dict.fromkeys(saved, Path()), whole.base_model_prefix)
        if found is None or saved[found].shape != parameter.shape:
            raise ValueError(
                f"need {name} of shape {tuple(parameter.shape)} in the model's files, got none; they are of another model"
            )
        _fill(parameter, saved[found].detach()[local_slices(parameter)])


def _fill(parameter: Tensor, values: Tensor) -> None:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(values)


@torch.no_grad()
def export_model(model: Backbone, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model in Hugging Face format, low-rank additions merged; on all ranks together, if it is
    spread over several.

    One tensor at a time is gathered, and rank 0 writes files of at most `shard_bytes` (a larger tensor has
    one of its own).
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(model.transformer.config)
        config.architectures = [type(model.transformer).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
    pending: dict[str, Tensor] = {}
    parts: list[dict[str, Tensor]] = []
    files: dict[str, int] = {}
    for name, tensor in whole_tensors(model.transformer):
        tensor = tensor.cpu()
        if writes and pending and bytes_of(pending) + tensor.nbytes > shard_bytes:
            write_part(folder, len(parts), pending)
            parts.append({})
            pending = {}
        if writes:
            pending[name] = tensor
            files[name] = len(parts)
    head = (
        {name: _whole(parameter).cpu() for name, parameter in model.head.named_parameters()}
        if isinstance(model, ValueModel)
        else {}
    )
    if not writes:
        return
    write_part(folder, len(parts), pending)
    name_parts(folder, len(parts) + 1, files)
    if head:
        save_file(head, folder / VALUE_HEAD)


def whole_tensors(
    transformer: nn.Module, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of a model, its additions merged into them; a collective for each.

    Args:
        transformer: sharded or not.
        wanted: names of those to yield, the same on all ranks; none: all.
    """
    additions = _with_additions(transformer)
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name) or (wanted is not None and base_name(name) not in wanted):
            continue
        whole = _whole(parameter)
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and owner in additions:
            whole = whole + _addition(additions[owner])
        yield base_name(name), whole


def own_pieces(transformer: nn.Module) -> list[TensorShard]:
    """What of the whole tensors lies on this rank, by the names of `whole_tensors`; the homes are those of
    `own_homes`.
    """
    pieces = []
    for name, parameter in transformer.named_parameters():
        bounds = tuple((part.start, part.stop) for part in local_slices(parameter))
        if not is_lora_parameter(name) and all(start < stop for start, stop in bounds):
            pieces.append(TensorShard(base_name(name), bounds, base_name(name), (0,) * len(bounds)))
    return pieces


@torch.no_grad()
def own_homes(transformer: nn.Module) -> dict[str, Tensor]:
    """Local tensors of this rank; those of matrices with additions are made, with the additions merged: a
    collective for each.
    """
    additions = _with_additions(transformer)
    homes = {}
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name):
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        owner = name.removesuffix(".base_layer.weight")
        if owner != name and owner in additions:
            local = local + _addition(additions[owner])[local_slices(parameter)].to(local.device)
        homes[base_name(name)] = local.detach()
    return homes


def weight_shapes(transformer: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what `whole_tensors` yields."""
    return [
        (base_name(name), tuple(p.shape))
        for name, p in transformer.named_parameters()
        if not is_lora_parameter(name)
    ]


@torch.no_grad()
def lora_adapter_files(transformer: nn.Module) -> dict[str, bytes]:
    """The low-rank additions as the two files of a PEFT folder, name -> content; a collective for each
    tensor.
    """
    tuned = _with_additions(transformer)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": _whole(
            module.get_parameter(f"lora_{part}.default.weight")
        ).cpu()
        for name, module in tuned.items()
        for part in "AB"
    }
    first = next(iter(tuned.values()))
    rank = first.get_parameter("lora_A.default.weight").shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": scaling_of(first) * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in tuned}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def _with_additions(transformer: nn.Module) -> dict[str, nn.Module]:
    """The matrices that have low-rank additions, by name."""
    names = {name for name, _ in transformer.named_parameters()}
    return {
        name: module
        for name, module in transformer.named_modules()
        if f"{name}.lora_A.default.weight" in names
    }


def _addition(module: nn.Module) -> Tensor:
    """What the additions of a matrix add to it, whole."""
    a, b = (_whole(module.get_parameter(f"lora_{part}.default.weight")) for part in "AB")
    return scaling_of(module) * (b @ a)


def _whole(parameter: Tensor) -> Tensor:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().contiguous()


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Of all of them."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_part(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """A file of a Hugging Face folder, which gets its name from `name_parts`."""
    save_file(tensors, folder / f".part-{number}", metadata={"format": "pt"})


def name_parts(folder: Path, count: int, files: Mapping[str, int]) -> None:
    """Gives the files the names that Transformers looks for, now that their number is known."""
    if count == 1:
        (folder / ".part-0").rename(folder / _WEIGHTS)
        return
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, name in enumerate(names):
        (folder / f".part-{number}").rename(folder / name)
    total = sum((folder / name).stat().st_size for name in names)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in files.items()},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=1))
