"""Weights and optimizer on disk, whatever they are sharded over: PyTorch's distributed checkpoints, written
beside the training.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from typing_extensions import override

REMEDY = "start with `checkpoint.resume=never` or another output_dir"
_METADATA, PROGRESS = ".metadata", "progress.json"
# What the metadata of a checkpoint is made of; anything else in its pickle could run code.
_PLAIN_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch._utils", "_rebuild_device"),
}
_PLAIN_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the classes of checkpoint metadata, dtypes and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        is_own_class = (
            module in _PLAIN_MODULES
            and name[:1] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            and name.strip("_")[:1].isupper()
        )
        is_dtype = (
            module == "torch"
            and "." not in name
            and isinstance(vars(torch).get(name), torch.dtype | torch.memory_format)
        )
        if "." not in name and (is_own_class or is_dtype or (module, name) in _PLAIN_CLASSES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")


class _SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint from outside: its metadata makes no objects but those it needs, its tensors are read
    as weights only.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata = _read_metadata(file)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_metadata(file: BinaryIO) -> Metadata:
    metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"need the metadata of a checkpoint, got {type(metadata).__name__}")
    return metadata


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What training changes, by name: trained parameters as `model.NAME`, what the optimizer has for one as
    `optimizer.NAME.KEY`.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state[f"model.{name}"] = parameter.detach()
        state |= {
            f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()
        }
    return state


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def begin_save(
    folder: Path,
    state: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Begins to write tensors and plain numbers; returns as soon as the tensors have been copied aside.

    Args:
        folder: where to, the same on all ranks.
        state: tensors by name, sharded or not.
        progress: what goes into a small JSON file beside them.
        group: of the ranks that save together, of a backend for the CPU and used for nothing else; None: this
            process alone.

    Returns:
        What waits until everything is on the disk.
    """
    writer = dcp.FileSystemWriter(folder)
    if group is None or dist.get_rank(group) == 0:
        (folder / PROGRESS).write_text(json.dumps(progress))
    if group is not None:
        saved = dcp.async_save(dict(state), storage_writer=writer, process_group=group)
        assert isinstance(saved, Future)
        return lambda: _waited(saved)
    copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    thread = ThreadPoolExecutor(1, thread_name_prefix="save")
    alone = thread.submit(_save_alone, copied, writer)
    thread.shutdown(wait=False)
    return lambda: _waited(alone)


def _save_alone(state: dict[str, Tensor], writer: dcp.FileSystemWriter) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, storage_writer=writer, no_dist=True)


def _waited(saved: Future[Any]) -> None:
    try:
        saved.result()
    except CheckpointException as error:
        raise RuntimeError(_causes(error)) from error


def _causes(error: BaseException) -> str:
    """One line; what a rank says goes before the stacks that it says it with."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = sorted(error.failures.items())
    return "; ".join(
        f"rank {rank}: {type(cause[0]).__name__}: {str(cause[0]).splitlines()[0]}" for rank, cause in failures
    )


@torch.no_grad()
def load_trained(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, kind: str, is_alone: bool
) -> dict[str, Any]:
    """Reads what `begin_save` wrote of `trained_state`, on any number of ranks, into the storage in use.

    Args:
        folder: of the model in a checkpoint.
        model: whose parameters are filled.
        optimizer: whose state is filled, made or emptied, as it was; its rates and decays stay.
        kind: what the progress must name as `kind`: another family may have tensors of the same names and
            sizes.
        is_alone: whether this process loads without others.

    Returns:
        The progress that was saved with it.

    Raises:
        ValueError: the folder is not of this model, or broken.
    """
    saved, progress = _described(folder)
    if progress["kind"] != kind:
        raise ValueError(
            f"the checkpoint in {folder} is of another model ({progress['kind']}, need {kind}); {REMEDY}"
        )
    state: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state[f"model.{name}"] = parameter.detach()
        prefix = f"optimizer.{name}."
        keys = [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]
        if not keys:
            optimizer.state.pop(parameter, None)
            continue
        own = optimizer.state[parameter]
        for key in keys:
            if key not in own:
                own[key] = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        state |= {prefix + key: own[key] for key in keys}
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if unfit := sorted({*sizes} ^ {*saved}) or [
        name for name, size in sizes.items() if tuple(saved[name].size) != size
    ]:
        raise ValueError(
            f"the checkpoint in {folder} is of another model (first difference: {unfit[0]}); {REMEDY}"
        )
    _fill(state, folder, is_alone=is_alone)
    return progress


def read_saved(folder: Path) -> dict[str, Tensor]:
    """Every tensor that `begin_save` wrote, whole, into this process.

    Raises:
        ValueError: the folder cannot be read.
    """
    saved, _ = _described(folder)
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in saved.items()}
    _fill(state, folder, is_alone=True)
    return state


def _described(folder: Path) -> tuple[dict[str, TensorStorageMetadata], dict[str, Any]]:
    """What is said of each tensor of a checkpoint, and its progress."""
    try:
        with (folder / _METADATA).open("rb") as file:
            entries = _read_metadata(file).state_dict_metadata
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint in {folder} cannot be read ({error}); {REMEDY}") from error
    return {
        name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
    }, progress


def _fill(state: Mapping[str, Tensor], folder: Path, *, is_alone: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(dict(state), storage_reader=_SafeReader(folder), no_dist=is_alone)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is broken: {_causes(error)}; {REMEDY}, or give an older one as checkpoint.resume"
        ) from error
