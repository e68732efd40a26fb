"""Weights and optimizer in PyTorch's distributed checkpoints, for any sharding, saved in the background."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from typing_extensions import override

from verl.engines.hf.models import Backbone

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
    """Unpickler of checkpoint metadata, which refuses all other classes."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        is_metadata_class = (
            module in _PLAIN_MODULES
            and name[:1] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            and name.strip("_")[:1].isupper()
        )
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype | torch.memory_format)
        if "." not in name and (is_metadata_class or is_dtype or (module, name) in _PLAIN_CLASSES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into the metadata of a checkpoint")


class _SafeReader(dcp.FileSystemReader):
    """Reader of a checkpoint that may come from elsewhere: unpickling its metadata can run no code.

    The tensors themselves are read by PyTorch with `weights_only`.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """Metadata of a checkpoint.

    Raises:
        pickle.UnpicklingError: the file has something else in it.
    """
    with (folder / _METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"need the metadata of a checkpoint, got {type(metadata).__name__}")
    return metadata


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors that training changes: parameters as `model.NAME`, optimizer states as `optimizer.NAME.KEY`."""
    state: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        state[f"model.{name}"] = parameter.detach()
        state |= {
            f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()
        }
    return state


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not frozen, by name; of a model with several adapters those of its own."""
    if isinstance(model, Backbone):
        return model.trained_parameters()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def begin_save(
    folder: Path,
    state: Mapping[str, Tensor],
    progress: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Callable[[], None]:
    """Begin to write tensors and plain numbers; return as soon as training may change the tensors.

    Tensors on devices and on several ranks are copied first, and written while training goes on. A process
    alone on a CPU writes them as they are, since a copy would double its memory.

    Args:
        folder: the folder to write, the same on all ranks.
        state: tensors by name, sharded or not.
        progress: plain numbers for a JSON file beside the tensors.
        group: the ranks that save together, with a backend for the CPU and used for nothing else; None: this
            process saves alone.

    Returns:
        A function that waits until everything is on the disk, and raises the error that prevented it.
    """
    writer = dcp.FileSystemWriter(folder)
    saved: Future[Any]
    if group is None or dist.get_rank(group) == 0:
        (folder / PROGRESS).write_text(json.dumps(progress))
    if group is not None:
        response = dcp.async_save(dict(state), storage_writer=writer, process_group=group)
        assert isinstance(response, Future)
        saved = response
    elif all(tensor.device.type == "cpu" for tensor in state.values()):
        saved = Future()
        try:
            _save_alone(dict(state), writer)
            saved.set_result(None)
        except CheckpointException as error:
            saved.set_exception(error)
    else:
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        saved = thread.submit(_save_alone, copied, writer)
        thread.shutdown(wait=False)

    def wait() -> None:
        try:
            saved.result()
        except CheckpointException as error:
            raise RuntimeError(failure_text(error)) from error

    return wait


def _save_alone(state: dict[str, Tensor], writer: dcp.FileSystemWriter) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, storage_writer=writer, no_dist=True)


def failure_text(error: BaseException) -> str:
    """The failure of each rank in one line, without the stack traces that PyTorch adds."""
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
    """Read a saved `trained_state`, written on any number of ranks, into the storage in use.

    Args:
        folder: folder of the model in a checkpoint.
        model: its trained parameters are filled.
        optimizer: its state becomes the saved one, including an empty one; rates and decays stay.
        kind: must equal `kind` of the saved progress: another family may have tensors of the same names and
            sizes.
        is_alone: True if this process loads without others.

    Returns:
        The saved progress.

    Raises:
        ValueError: the folder is not of this model, or broken.
    """
    saved, progress = describe_checkpoint(folder)
    if progress["kind"] != kind:
        raise ValueError(
            f"the checkpoint in {folder} is of another model ({progress['kind']}, need {kind}); {REMEDY}"
        )
    # One kernel for all weights reads the counts of steps on the device.
    counted_on_device = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    # The storage into which every saved tensor is read.
    state: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        state[f"model.{name}"] = parameter.detach()
        prefix = f"optimizer.{name}."
        keys = [key.removeprefix(prefix) for key in saved if key.startswith(prefix)]
        if not keys:
            optimizer.state.pop(parameter, None)
            continue
        own = optimizer.state[parameter]
        for key in keys:
            if key not in own:
                is_on_device = key != "step" or id(parameter) in counted_on_device
                device = parameter.device if is_on_device else torch.device("cpu")
                own[key] = _state_like(parameter, saved[prefix + key], device)
        state |= {prefix + key: own[key] for key in keys}
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    unfit = sorted({*sizes} ^ {*saved})
    unfit = unfit or [name for name, size in sizes.items() if tuple(saved[name].size) != size]
    if unfit:
        raise ValueError(
            f"the checkpoint in {folder} is of another model (first difference: {unfit[0]}); {REMEDY}"
        )
    _fill(state, folder, is_alone=is_alone)
    return progress


def _state_like(parameter: Tensor, entry: TensorStorageMetadata, device: torch.device) -> Tensor:
    """Storage for a saved state of a parameter: sharded as it is, or a number or factors on a device."""
    if tuple(entry.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=entry.properties.dtype)
    return torch.zeros(entry.size, dtype=entry.properties.dtype, device=device)


def read_saved(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, in the memory of this process.

    Raises:
        ValueError: the folder cannot be read.
    """
    saved, _ = describe_checkpoint(folder)
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in saved.items()}
    _fill(state, folder, is_alone=True)
    return state


def describe_checkpoint(folder: Path) -> tuple[dict[str, TensorStorageMetadata], dict[str, Any]]:
    """Metadata of each tensor of a checkpoint by name, and the saved progress.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        entries = read_metadata(folder).state_dict_metadata
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint in {folder} cannot be read ({error}); {REMEDY}") from error
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return tensors, progress


def _fill(state: Mapping[str, Tensor], folder: Path, *, is_alone: bool) -> None:
    """Read the tensors of a checkpoint into the storage of `state`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(dict(state), storage_reader=_SafeReader(folder), no_dist=is_alone)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the checkpoint in {folder} is broken: {failure_text(error)}; {REMEDY}, or give an older one as "
            "checkpoint.resume"
        ) from error
