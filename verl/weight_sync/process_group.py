"""Process group between the processes of a policy and of its inference engines.

The engines import this module in their own environments: it needs PyTorch alone.
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
    """Open a process group beside the default one; return when all of its ranks have joined.

    Args:
        address: of rank 0, which listens there.
        port: a free port of rank 0.
        rank: of this process.
        num_ranks: of the group.
        backend: gloo or nccl.
        timeout_s: of opening the group, and of every collective.

    Raises:
        ValueError: another backend.
        RuntimeError: a rank did not join in time.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"need gloo or nccl for a process group of weights, got {backend!r}")
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(_PREFIX, _store(address, port, timeout, num_ranks=num_ranks, listens=rank == 0))
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, num_ranks, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, num_ranks, options)


def _store(address: str, port: int, timeout: timedelta, *, num_ranks: int, listens: bool) -> dist.TCPStore:
    """Key-value store through which the ranks find each other."""
    if not listens:
        return dist.TCPStore(address, port, num_ranks, False, timeout)
    # A listener that PyTorch opens itself accepts connections on all interfaces.
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    return dist.TCPStore(
        address, port, num_ranks, True, timeout, master_listen_fd=listener.detach(), use_libuv=True
    )


def broadcast(group: Any, tensor: Tensor) -> None:
    """Fill the tensor of every rank with that of rank 0."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def send(group: Any, tensors: Mapping[int, Tensor]) -> None:
    """Send one tensor to each of some ranks; each must call `receive` at the same time."""
    works = [group.send([tensor], rank, 0) for rank, tensor in tensors.items() if tensor.numel()]
    for work in works:
        work.wait()


def receive(group: Any, tensor: Tensor, *, sender: int) -> None:
    """Fill a tensor with the one that `sender` sends."""
    if tensor.numel():
        group.recv([tensor], sender, 0).wait()


def shared_memory_id() -> str:
    """Identity of this process's shared memory, equal in processes that see the same; empty without one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return (
        f"{boot.read_text().strip()} {os.stat('/dev/shm').st_dev}"
        if boot.exists() and Path("/dev/shm").exists()
        else ""
    )
