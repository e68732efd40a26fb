"""What joins the processes of a policy and of its engines: a process group of their own, and memory of one GPU seen by both.

Both sides import it, in environments of their own: PyTorch alone.
"""

from __future__ import annotations

import base64
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PREFIX = "verl-weights"


def open_group(address: str, port: int, *, rank: int, num_ranks: int, backend: str, timeout_s: float) -> Any:
    """A process group beside the default one; rank 0 listens at the address, the others join. Returns when all have come.

    Args:
        address: of rank 0.
        port: free at rank 0.
        rank: of this process.
        num_ranks: of the group.
        backend: gloo or nccl.
        timeout_s: of the joining and of every collective.

    Raises:
        ValueError: another backend.
        RuntimeError: the others did not come.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"need gloo or nccl for a group that takes weights, got {backend!r}")
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(_PREFIX, dist.TCPStore(address, port, num_ranks, rank == 0, timeout))
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, num_ranks, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)


def broadcast(group: Any, tensor: Tensor) -> None:
    """Fills the tensor of every rank with that of rank 0."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def shared_memory() -> str:
    """Equal in processes that see the same shared memory; a container has its own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.stat('/dev/shm').st_dev}" if boot.exists() and Path("/dev/shm").exists() else ""


def gpu_of(device: torch.device) -> str:
    """The name of a GPU that is the same in every process, whatever number it has there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def memory_handle(content: Tensor) -> list[Any]:
    """What another process needs to see the memory of a CUDA tensor, uint8 and contiguous; it must outlive the other's use.

    JSON can carry it: nothing is pickled, so nothing that is read can run code.
    """
    _, memory, size, offset, counter, counter_offset, event, needs_event = content.untyped_storage()._share_cuda_()
    return [_text(memory), size, offset, _text(counter), counter_offset, _text(event), needs_event, content.storage_offset()]


def seen_memory(handle: list[Any], num_bytes: int, device: torch.device) -> Tensor:
    """[num_bytes] uint8 on a GPU of this process: memory of the process that made the handle, in place."""
    memory, size, offset, counter, counter_offset, event, needs_event, start = handle
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index, _bytes(memory), size, offset, _bytes(counter), counter_offset, _bytes(event), needs_event
    )
    if start + num_bytes > storage.nbytes():
        raise RuntimeError(f"need {num_bytes} bytes of weights behind a memory handle, got {storage.nbytes() - start}")
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, start, (num_bytes,), (1,))


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
