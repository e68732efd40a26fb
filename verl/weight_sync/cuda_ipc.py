"""Memory of a GPU that two processes see: a handle as plain data, and the bytes behind it in place. PyTorch
alone.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

# Those of PyTorch's own description of a tensor that are bytes, by their place in it.
_BYTES = {"handle": 7, "references": 11, "event": 13}
_NUMBERS = {"offset": 3, "storage_bytes": 8, "storage_offset": 9, "reference_number": 12, "waits": 14}


def export_handle(content: Tensor) -> dict[str, Any]:
    """What another process on this machine needs to see the same bytes, as JSON can hold it; they stay as
    long as either side has them.

    Args:
        content: [n] uint8 on a GPU, contiguous.
    """
    _, described = reduce_tensor(content)
    handle: dict[str, Any] = {
        name: base64.b64encode(described[place]).decode() for name, place in _BYTES.items()
    }
    handle |= {name: int(described[place]) for name, place in _NUMBERS.items()}
    return handle | {"num_bytes": content.numel(), "device": _name_of(content.get_device())}


def open_handle(handle: Mapping[str, Any]) -> Tensor:
    """[n] uint8, the bytes of another process in place; to be read, and let go soon.

    Raises:
        RuntimeError: this process does not see that GPU.
    """
    devices = {_name_of(index): index for index in range(torch.cuda.device_count())}
    if handle["device"] not in devices:
        raise RuntimeError(
            f"need the GPU {handle['device']} for weights in its memory, this process sees {', '.join(devices) or 'none'}"
        )
    raw = {name: base64.b64decode(handle[name]) for name in _BYTES}
    size = (handle["num_bytes"],)
    content: Tensor = rebuild_cuda_tensor(
        Tensor,
        size,
        (1,),
        handle["offset"],
        torch.UntypedStorage,
        torch.uint8,
        devices[handle["device"]],
        raw["handle"],
        handle["storage_bytes"],
        handle["storage_offset"],
        False,
        raw["references"],
        handle["reference_number"],
        raw["event"],
        bool(handle["waits"]),
    )
    return content


def _name_of(index: int) -> str:
    """Of a GPU, whatever number it has in a process."""
    return str(torch.cuda.get_device_properties(index).uuid)
