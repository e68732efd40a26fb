"""One process of a pool: the workers of its roles, its place in the world of the pool, and what it tells
about itself.
"""

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
    """What a call raised: kept as data, so that it reaches the controller whatever its class."""

    kind: str
    message: str
    stack: str
    is_mistake: bool


@dataclass(frozen=True)
class CallResult:
    """What a call returned or raised, and when it ran, in seconds since the epoch."""

    result: Any
    failure: CallError | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class WorkerStatus:
    """What a process is doing.

    Attributes:
        call: role and method that it is in; none: it waits for one.
        num_calls: begun so far.
        collectives: number of the last collective of each process group that it belongs to, by the group's
            ranks and name.
        stack: lines "file:line in function" of the thread that computes, the innermost first.
    """

    call: str | None
    num_calls: int
    collectives: Mapping[str, int]
    stack: tuple[str, ...]


class WorkerProcess:
    """The workers of one rank of a pool, by role; calls run one at a time, in the order in which they come."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._call: str | None = None
        self._num_calls = 0
        self._thread = 0

    def open_store(self, address: str, num_ranks: int) -> int:
        """Listens for the ranks of the pool on a free port of that address alone, and returns the port."""
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
        """Becomes a rank of the world of the pool; from here on its output goes into the file `log`."""
        _write_output_to(Path(log))
        torch.set_num_threads(num_threads)
        address, port = store
        if address == _LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        own = rank == 0
        shared = (
            self._store
            if own
            else dist.TCPStore(address, port, num_ranks, is_master=False, wait_for_workers=False)
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # The controller names a hang before PyTorch gives up on it.
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("pool", shared),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=2 * limit_s + 60),
        )

    def start(self, role: str, factory: WorkerFactory, *args: Any) -> dict[str, DispatchRank]:
        """Makes the worker of a role; returns where it stands."""
        self._workers[role] = factory(*args)
        return dict(self._workers[role].dispatch_ranks)

    def run(self, role: str, method: str, args: Sequence[Any]) -> CallResult:
        """Calls a method of a role's worker, or `start` with the role, the factory and its arguments."""
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
        """What it is doing now; asked from another thread than the one that computes."""
        frame = sys._current_frames().get(self._thread)
        stack = traceback.extract_stack(frame)[::-1] if frame and self._call else []
        lines = tuple(f"{_short(line.filename)}:{line.lineno} in {line.name}" for line in stack)
        return WorkerStatus(self._call, self._num_calls, _collectives(), lines)


def _collectives() -> dict[str, int]:
    """The number of the last collective of each group."""
    counts: dict[str, int] = {}
    groups: Any = distributed_c10d._world.pg_group_ranks
    for group, ranks in list(groups.items()):
        if group is not None and len(ranks) > 1:
            counts[f"{sorted(ranks)} {group.group_name}"] = group._get_sequence_number_for_group()
    return counts


def _short(path: str) -> str:
    """A path from the package on."""
    for package in ("/verl/", "/torch/", "/tests/"):
        if package in path:
            return package[1:] + path.rpartition(package)[2]
    return path


def _write_output_to(path: Path) -> None:
    """Sends everything that this process prints, native code included, into a file; a crash leaves its stack
    there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file
    faulthandler.enable(file)


def tail(path: Path, num_lines: int = 20) -> list[str]:
    """The last lines of a log; none if there is no such file."""
    if not path.exists():
        return []
    with closing(path.open(errors="replace")) as file:
        return file.read().splitlines()[-num_lines:]
