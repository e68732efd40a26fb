"""Hugging Face folders in and out of models that are spread over ranks, one tensor at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from verl.config.roles import LoraConfig
from verl.engines.hf.adapters import adapter_at, check_complete, find_saved, read_adapter
from verl.engines.hf.lora import POLICY, adapter_of, base_name, has_lora, initial_lora_weight, row_norms
from verl.engines.hf.models import Backbone, ValueModel
from verl.engines.hf.pretrained import (
    MAX_FILE_BYTES,
    VALUE_HEAD,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_exists,
    load_language_model,
    remove_other_weights,
    save_model,
)
from verl.engines.hf.weights import (
    embedding_names,
    full_tensors,
    merged_config,
    shard_slices,
    to_full,
    to_local,
)
from verl.utils.files import write_safetensors


def model_folder(source: str) -> Path:
    """Folder of a model, which is downloaded first if `source` is a name on the hub.

    Raises:
        ValueError: there is no such folder and no such model on the hub.
    """
    check_exists(source, "a model")
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot load a model from {source!r}: there is no such folder, and the hub gives none"
        ) from error


@torch.no_grad()
def load_sharded(model: Backbone, source: str, lora: LoraConfig | None = None) -> None:
    """Fill the parameters of a model from a Hugging Face folder; each rank reads its own slices only.

    Some families (with experts) name the tensors in their files differently than the parameters of the model:
    each rank then loads the whole model and slices it.

    Args:
        model: sharded, with its storage.
        source: folder or hub name.
        lora: of its LoRA adapter; None: it has none, or one that starts anew.

    Raises:
        ValueError: tensors are missing or have other shapes.
    """
    folder = model_folder(source)
    parameters = dict(model.transformer.named_parameters())
    for name in [name for name in parameters if ".lora_" in name]:
        del parameters[name]
    files = tensor_files(folder)
    prefix = model.transformer.base_model_prefix
    head, embedding = embedding_names(model.transformer)
    names = {name: name_in_files(base_name(name), files, prefix) for name in parameters}
    for name in [name for name, found in names.items() if found is None and base_name(name) == head]:
        # An adapter has a copy of its own of a head that the files hold as the embedding.
        names[name] = name_in_files(embedding, files, prefix)
    if all(names.values()):
        _fill_from_files(parameters, files, {name: found for name, found in names.items() if found})
    else:
        _fill_from_model(parameters, load_language_model(str(folder)))
    if has_lora(model.transformer):
        _load_lora(model.transformer, lora.path if lora else None)
    if isinstance(model, ValueModel):
        saved = load_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).exists() else {}
        for name, parameter in model.head.named_parameters():
            _fill(parameter, saved.get(name, torch.zeros(parameter.shape))[shard_slices(parameter)])


def _load_lora(transformer: PreTrainedModel, source: str | None) -> None:
    """Fill the adapter of a sharded model from a PEFT folder, or with its initial values; a collective."""
    parameters = dict(transformer.named_parameters())
    own = [name for name in parameters if adapter_of(name) == POLICY]
    if source is None:
        for name in (name for name in own if ".modules_to_save." not in name):
            values = _initial(name, parameters)
            _fill(parameters[name], values[shard_slices(parameters[name])])
        return
    adapter = adapter_at(source)
    tensors, prefix = read_adapter(adapter), transformer.base_model_prefix
    names = {name: find_saved(name, tensors, prefix) for name in own}
    placed = {name: tensors[found] for name, found in names.items() if found}
    unfit = [name for name, saved in placed.items() if saved.shape != parameters[name].shape]
    left_over = sorted(tensors.keys() - {*names.values()})
    check_complete(adapter, [name for name in own if name not in placed], left_over, unfit)
    for name, saved in placed.items():
        _fill(parameters[name], saved[shard_slices(parameters[name])])


def _initial(name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """Initial value of a parameter of an adapter; of a magnitude it takes a collective."""
    layer, is_magnitude, _ = name.partition(".lora_magnitude_vector.")
    if is_magnitude:
        return row_norms(to_full(parameters[f"{layer}.base_layer.weight"]))
    return initial_lora_weight(name, parameters[name].shape)


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a Hugging Face folder.

    Raises:
        ValueError: the folder has no safetensors files.
    """
    if (folder / WEIGHTS_INDEX).exists():
        weight_map = json.loads((folder / WEIGHTS_INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"need {WEIGHTS} or {WEIGHTS_INDEX} in {folder} to load a model onto several ranks; "
            "save it with save_pretrained"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


def name_in_files(name: str, files: Mapping[str, object], prefix: str) -> str | None:
    """The name of a parameter in the files, with or without the prefix that a model with a head has."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in files), None)


def _fill_from_files(
    parameters: Mapping[str, Tensor], files: Mapping[str, Path], names: Mapping[str, str]
) -> None:
    """Read this rank's slice of each parameter; `names` are the names of the parameters in the files."""
    for path in sorted({files[found] for found in names.values()}):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, found in names.items() if files[found] == path):
                saved, parameter = file.get_slice(names[name]), parameters[name]
                _check_shape(name, parameter, tuple(saved.get_shape()), path)
                _fill(parameter, saved[shard_slices(parameter)])


def _check_shape(name: str, parameter: Tensor, shape: tuple[int, ...], path: Path) -> None:
    if shape != tuple(parameter.shape):
        raise ValueError(
            f"need {name} of shape {tuple(parameter.shape)}, got {shape} in {path}; "
            "the folder's config.json is of another model"
        )


def _fill_from_model(parameters: Mapping[str, Tensor], full: PreTrainedModel) -> None:
    """Copy this rank's slice of each parameter from a model that is whole in memory."""
    saved = dict(full.named_parameters())
    for name, parameter in parameters.items():
        found = name_in_files(base_name(name), saved, full.base_model_prefix)
        if found is None or saved[found].shape != parameter.shape:
            raise ValueError(
                f"need {name} of shape {tuple(parameter.shape)} in the model's files, got none; "
                "they are of another model"
            )
        _fill(parameter, saved[found].detach()[shard_slices(parameter)])


def _fill(parameter: Tensor, values: Tensor) -> None:
    to_local(parameter).copy_(values)


@torch.no_grad()
def export_model(
    model: Backbone,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model in Hugging Face format with LoRA weights merged; on all ranks together if it is sharded.

    One tensor at a time is gathered, and rank 0 writes it; see `SafetensorsWriter`.

    Args:
        model: sharded or not.
        folder: made if absent.
        dtype: of the written weights.
        max_file_bytes: size of a file.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(merged_config(model.transformer))
        config.architectures = [type(model.transformer).__name__.removeprefix("FSDP")]
        config.dtype = dtype
        config.save_pretrained(folder)
    writer = SafetensorsWriter(folder, max_file_bytes=max_file_bytes)
    for name, tensor in chain(full_tensors(model.transformer), saved_buffers(model.transformer)):
        if is_writer:
            writer.add(name, tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype))
    # Gathering is a collective: the ranks that don't write take part, too.
    head = model.head.named_parameters() if isinstance(model, ValueModel) else ()
    head_tensors = {name: to_full(parameter).cpu() for name, parameter in head}
    if not is_writer:
        return
    writer.finish()
    if head_tensors:
        write_safetensors(head_tensors, folder / VALUE_HEAD)


def saved_buffers(transformer: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the buffers that belong to the weights, such as the routing biases of experts."""
    parameters = {name for name, _ in transformer.named_parameters(remove_duplicate=False)}
    for name, tensor in transformer.state_dict().items():
        if name not in parameters:
            yield base_name(name), to_full(tensor)


def write_model(
    model: Backbone,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model that is whole in the memory of this process, with LoRA weights merged.

    Without LoRA, Transformers writes it, with the names of tensors that the family has in its files; the
    model is then cast to `dtype` in place.
    """
    if has_lora(model.transformer):
        export_model(model, folder, dtype=dtype, max_file_bytes=max_file_bytes)
    else:
        save_model(model.to(dtype), folder, max_file_bytes=max_file_bytes)


class SafetensorsWriter:
    """Writer of the safetensors files and the index of a Hugging Face folder, one tensor after the other.

    Args:
        folder: exists when the first tensor is added.
        max_file_bytes: size of a file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._pending: dict[str, Tensor] = {}
        self._num_files = 0
        self._file_numbers: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in the memory of the CPU; it is written when the file is full."""
        num_bytes = tensor.nbytes + sum(pending.nbytes for pending in self._pending.values())
        if self._pending and num_bytes > self._max_file_bytes:
            self._write_file()
        self._pending[name] = tensor
        self._file_numbers[name] = self._num_files

    def finish(self) -> None:
        """Write the last file, the index, and give the files the names that Transformers looks for."""
        self._write_file()
        count = self._num_files
        (self._folder / WEIGHTS_INDEX).unlink(missing_ok=True)
        if count == 1:
            (self._folder / ".part-0").rename(self._folder / WEIGHTS)
            remove_other_weights(self._folder)
            return
        # The number of files is a part of their names, and is not known earlier.
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            (self._folder / f".part-{number}").rename(self._folder / name)
        total = sum((self._folder / name).stat().st_size for name in names)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[number] for name, number in self._file_numbers.items()},
        }
        (self._folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1))
        remove_other_weights(self._folder)

    def _write_file(self) -> None:
        write_safetensors(self._pending, self._folder / f".part-{self._num_files}", metadata={"format": "pt"})
        self._num_files += 1
        self._pending = {}
