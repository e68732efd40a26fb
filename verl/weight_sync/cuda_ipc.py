"""GPU memory shared by two processes over CUDA IPC: its handle as JSON values, and the bytes behind a handle.

The engines import this module in their own environments: it needs PyTorch alone.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

# Positions of fields in the tuple with which PyTorch describes a CUDA tensor to another process.
_BYTES = {"handle": 7, "references": 11, "event": 13}
_NUMBERS = {"offset": 3, "storage_bytes": 8, "storage_offset": 9, "reference_number": 12, "waits": 14}


def export_handle(content: Tensor) -> dict[str, Any]:
    """Handle, of JSON values, with which another process of this machine opens the same bytes.

    The memory is freed when neither side uses it any more.

    Args:
        content: [n] uint8 on a GPU, contiguous.
    """
    _, described = reduce_tensor(content)
    handle: dict[str, Any] = {
        name: base64.b64encode(described[position]).decode() for name, position in _BYTES.items()
    }
    handle |= {name: int(described[position]) for name, position in _NUMBERS.items()}
    return handle | {"num_bytes": content.numel(), "device": _gpu_uuid(content.get_device())}


def open_handle(handle: Mapping[str, Any]) -> Tensor:
    """Open the memory of another process as [n] uint8, in place: read it, and drop it soon.

    Raises:
        RuntimeError: the GPU is not visible to this process.
    """
    devices = {_gpu_uuid(index): index for index in range(torch.cuda.device_count())}
    if handle["device"] not in devices:
        raise RuntimeError(
            f"need the GPU {handle['device']} for weights in its memory, "
            f"this process sees {', '.join(devices) or 'none'}"
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


def _gpu_uuid(index: int) -> str:
    """Identity of a GPU: its index differs between processes."""
    return str(torch.cuda.get_device_properties(index).uuid)
