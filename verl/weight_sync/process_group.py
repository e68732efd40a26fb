"""What joins the processes of a policy and of its engines: a process group of their own.

Both sides import it, in environments of their own: PyTorch alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

_PREFIX = "verl-weights"


def open_group(address: str, port: int, *, rank: int, num_ranks: int, backend: str, timeout_s: float) -> Any:
    """A process group beside the default one; rank 0 listens at the address, the others join. Returns when
    all have come.

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
    store = dist.PrefixStore(_PREFIX, _store(address, port, timeout, num_ranks=num_ranks, listens=rank == 0))
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, num_ranks, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)


def _store(address: str, port: int, timeout: timedelta, *, num_ranks: int, listens: bool) -> dist.TCPStore:
    """Where ranks find each other; it listens at that address alone, as by itself it would on all interfaces."""
    if not listens:
        return dist.TCPStore(address, port, num_ranks, False, timeout)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    return dist.TCPStore(
        address, port, num_ranks, True, timeout, master_listen_fd=listener.detach(), use_libuv=True
    )


def broadcast(group: Any, tensor: Tensor) -> None:
    """Fills the tensor of every rank with that of rank 0."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def send(group: Any, tensors: Mapping[int, Tensor]) -> None:
    """Sends a tensor to each of some ranks, which receive it meanwhile."""
    works = [group.send([tensor], rank, 0) for rank, tensor in tensors.items() if tensor.numel()]
    for work in works:
        work.wait()


def receive(group: Any, tensor: Tensor, *, sender: int) -> None:
    """Fills a tensor with what a rank sends."""
    if tensor.numel():
        group.recv([tensor], sender, 0).wait()


def shared_memory_id() -> str:
    """Equal in processes that see the same shared memory; a container has its own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return (
        f"{boot.read_text().strip()} {os.stat('/dev/shm').st_dev}"
        if boot.exists() and Path("/dev/shm").exists()
        else ""
    )
