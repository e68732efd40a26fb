"""One process of a pool: the workers of its roles, its rank in the pool's world, and its status."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from verl.controller.dispatch import DispatchRank
from verl.controller.worker_group import Worker, WorkerFactory

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class CallError:
    """An error of a call, as plain values: the controller may not be able to unpickle its class.

    Attributes:
        kind: name of its class.
        message: of the error.
        stack: human-readable.
        is_user_error: a ValueError, which refuses what the user gave.
    """

    kind: str
    message: str
    stack: str
    is_user_error: bool


@dataclass(frozen=True)
class CallResult:
    """Result or error of a call, with its start and end in seconds since the epoch."""

    result: Any
    failure: CallError | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class WorkerStatus:
    """Status of a process.

    Attributes:
        call: role and method of the running call; None: the process is idle.
        num_calls: number of calls that have begun.
        collectives: number of the last collective in each process group of this process, by the group's ranks
            and name.
        stack: lines "file:line in function" of the thread that computes, the innermost first.
    """

    call: str | None
    num_calls: int
    collectives: Mapping[str, int]
    stack: tuple[str, ...]


class WorkerProcess:
    """Workers of one rank of a pool, one for each role; calls run one after the other."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._call: str | None = None
        self._num_calls = 0
        self._thread = 0

    def open_store(self, address: str, num_ranks: int) -> int:
        """Open the key-value store of the pool on a free port of an address; return the port."""
        # A listener that PyTorch opens itself accepts connections on all interfaces.
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.bind((address, 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            address,
            port,
            num_ranks,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )
        return port

    def join_world(
        self, store: tuple[str, int], rank: int, num_ranks: int, *, limit_s: float, log: str, num_threads: int
    ) -> None:
        """Join the pool's world of `torch.distributed`; from here on output goes to the file `log`.

        Args:
            store: address and port of the key-value store.
            rank: of this process.
            num_ranks: of the pool.
            limit_s: time after which the controller reports a hang.
            log: path of the file.
            num_threads: of PyTorch on a CPU.
        """
        _write_output_to(Path(log))
        torch.set_num_threads(num_threads)
        address, port = store
        if address == _LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        shared = (
            self._store
            if rank == 0
            else dist.TCPStore(address, port, num_ranks, is_master=False, wait_for_workers=False)
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # Longer than the limit: the controller shall report a hang before PyTorch ends the collective.
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("pool", shared),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=2 * limit_s + 60),
        )

    def start(self, role: str, factory: WorkerFactory, *args: Any) -> dict[str, DispatchRank]:
        """Make the worker of a role; return its ranks in the layouts of its group."""
        self._workers[role] = factory(*args)
        return dict(self._workers[role].dispatch_ranks)

    def run(self, role: str, method: str, args: Sequence[Any]) -> CallResult:
        """Call a method of a role's worker; "start" makes the worker from a factory and its arguments."""
        self._thread, self._call, start_s = threading.get_ident(), f"{role}.{method}", time.time()
        self._num_calls += 1
        result, failure = None, None
        try:
            result = (
                self.start(role, *args) if method == "start" else getattr(self._workers[role], method)(*args)
            )
        except Exception as error:  # the process border
            stack = traceback.format_exc()
            sys.stderr.write(stack)  # into the log of the rank
            failure = CallError(type(error).__name__, str(error), stack, isinstance(error, ValueError))
        self._call = None
        return CallResult(result, failure, start_s, time.time())

    def status(self) -> WorkerStatus:
        """Current status; called from another thread than the one that computes."""
        frame = sys._current_frames().get(self._thread)
        stack = traceback.extract_stack(frame)[::-1] if frame and self._call else []
        lines = tuple(f"{_short_path(line.filename)}:{line.lineno} in {line.name}" for line in stack)
        return WorkerStatus(self._call, self._num_calls, _collectives(), lines)


def _collectives() -> dict[str, int]:
    """Number of the last collective of each process group."""
    counts: dict[str, int] = {}
    groups: Any = distributed_c10d._world.pg_group_ranks
    for group, ranks in list(groups.items()):
        if group is not None and len(ranks) > 1:
            counts[f"{sorted(ranks)} {group.group_name}"] = group._get_sequence_number_for_group()
    return counts


def _short_path(path: str) -> str:
    """Path from the package's folder on."""
    for package in ("/verl/", "/torch/", "/tests/"):
        if package in path:
            return package[1:] + path.rpartition(package)[2]
    return path


def _write_output_to(path: Path) -> None:
    """Redirect all output to a file, with that of native code and the stack of a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file
    faulthandler.enable(file)


def tail(path: Path, num_lines: int = 20) -> list[str]:
    """Last lines of a log; empty if there is no such file."""
    if not path.exists():
        return []
    with closing(path.open(errors="replace")) as file:
        return file.read().splitlines()[-num_lines:]
