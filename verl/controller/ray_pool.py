"""Pools and groups on a Ray cluster: a process per device, rows that stay with their ranks, and failures that
say whose they are.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
import torch
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch import Tensor
from typing_extensions import override

from verl.controller.dispatch import DispatchLayout, dispatch_mode
from verl.controller.hang_detector import HangDetector
from verl.controller.worker_group import Future, Pool, Span, Timeline, WorkerError, WorkerFactory, WorkerGroup
from verl.controller.worker_process import CallResult, WorkerProcess, WorkerStatus, tail
from verl.data.batch import Batch, Ragged, RemoteColumn, positions_of

P = ParamSpec("P")
T = TypeVar("T")
_CONTROL = "control"
_LOOPBACK = "127.0.0.1"
# Shorter calls ask for a state, and would hide the others in a timeline.
_SHORTEST_SPAN_S = 1e-3
# A process that does not say what it does within this time is taken for stopped.
_STATUS_LIMIT_S, _POLL_S, _START_LIMIT_S = 3.0, 1.0, 600.0
# What a collective says on a rank when another one is gone, and how long it takes until that is known.
_LOST = re.compile(r"[Cc]onnection|[Pp]eer|NCCL")
_DEATH_S = 3.0


# Clusters
# -------------------------------------------------------------------------------------------------------------------


class RayCluster:
    """A connection to a Ray cluster, and the pools on it.

    Args:
        was_connected: this process had the connection before, and keeps it.

    Attributes:
        failure: the first one; whatever is asked after it is answered with it.
    """

    def __init__(self, *, was_connected: bool = False) -> None:
        self.pools: list[RayPool] = []
        self.failure: WorkerError | None = None
        self._was_connected = was_connected

    @property
    def devices(self) -> tuple[str, int]:
        """What a rank takes, GPU or CPU, and how many there are."""
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        return kind, int(resources.get(kind, 0))

    def close(self) -> None:
        """Ends every worker and gives everything back; a cluster that was started here is stopped."""
        for pool in self.pools:
            pool.close()
        self.pools = []
        if not self._was_connected:
            ray.shutdown()


def connect(address: str, *, num_devices: int) -> RayCluster:
    """Joins a Ray cluster, or starts one on this machine that nobody else can reach.

    Args:
        address: auto: the one that `ray start` made here or RAY_ADDRESS names, else a new one; local: a new
            one; or HOST:PORT.
        num_devices: ranks that will be asked for; on a machine without GPUs they share its cores.

    Raises:
        ValueError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return RayCluster(was_connected=True)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address != "local":
        try:
            ray.init(address=address, **quiet)
            return RayCluster()
        except ConnectionError as error:
            if address != "auto":
                raise ValueError(
                    f"need a Ray cluster at placement.address {address}, got none: {error}; start it with `ray start`"
                ) from error
    _use_secret()
    cores = os.cpu_count() or 1
    ray.init(address="local", num_cpus=max(cores, num_devices), include_dashboard=False, **quiet)
    return RayCluster()


def _use_secret() -> None:
    """Lets only those into the cluster who have the token of this run, and tells nobody that it exists."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_AUTH_MODE") is None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray reads these when it is imported, and has no public way to read them again.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


# Rows that stay where they are
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Columns that one rank keeps in the object store of its node: name -> (values, lengths)."""

    columns: ray.ObjectRef
    owner: ActorHandle
    node: str


@dataclass(frozen=True)
class KeptColumn(RemoteColumn):
    """Rows of a column in the chunks of several ranks.

    Attributes:
        name: of the column.
        chunks: that it is in.
        chunk_of: [B] int64, number of the chunk of each row.
        row_of: [B] int64, number of the row in it.
        lengths: [B] int64.
    """

    name: str
    chunks: tuple[_Chunk, ...]
    chunk_of: Tensor
    row_of: Tensor
    lengths: Tensor

    @override
    def select(self, rows: Tensor) -> KeptColumn:
        used, numbers = self.chunk_of[rows].unique(return_inverse=True)
        chunks = tuple(self.chunks[chunk] for chunk in used.tolist())
        return KeptColumn(self.name, chunks, numbers, self.row_of[rows], self.lengths[rows])

    @override
    def join(self, others: Sequence[RemoteColumn]) -> KeptColumn:
        parts = [self, *(other for other in others if isinstance(other, KeptColumn))]
        assert len(parts) == 1 + len(others), "columns of one batch are kept by one backend"
        starts = torch.tensor([0, *(len(part.chunks) for part in parts)]).cumsum(0).tolist()
        return KeptColumn(
            self.name,
            tuple(chunk for part in parts for chunk in part.chunks),
            torch.cat([part.chunk_of + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.row_of for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )

    def fetch(self) -> Ragged:
        """See `RemoteColumn.fetch`; in place from chunks of this node, from others by asking their owners for
        these rows.
        """
        here = ray.get_runtime_context().get_node_id()
        wanted = [self.row_of[self.chunk_of == chunk].tolist() for chunk in range(len(self.chunks))]
        values = [
            _rows_of(ray.get(chunk.columns), self.name, rows)
            if chunk.node == here
            else chunk.owner.take.remote([chunk.columns], self.name, rows)
            for chunk, rows in zip(self.chunks, wanted, strict=True)
        ]
        arrived = [ray.get(part) if isinstance(part, ray.ObjectRef) else part for part in values]
        by_chunk = self.chunk_of.argsort(stable=True)
        return (
            Ragged(torch.cat(arrived), self.lengths[by_chunk]).select(by_chunk.argsort())
            if arrived
            else _no_rows()
        )


def _no_rows() -> Ragged:
    return Ragged(torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def _rows_of(columns: dict[str, tuple[Any, Any]], name: str, rows: list[int]) -> Tensor:
    """Values of the rows, end to end, copied out of the object store."""
    values, lengths = columns[name]
    # The store's memory is not for writing; indexing copies.
    positions = positions_of(torch.from_numpy(lengths.copy()), torch.tensor(rows, dtype=torch.int64))
    return torch.from_numpy(values[positions.numpy()])


def _kept(result: Any, owner: ActorHandle) -> Any:
    """A result whose batches have stayed here: their columns over tokens are references."""
    if isinstance(result, tuple):
        return tuple(_kept(part, owner) for part in result)
    if not isinstance(result, Batch):
        return result
    plain = {name: result[name] for name in result.names if not result.is_ragged(name)}
    ragged = {name: result.ragged(name) for name in result.names if result.is_ragged(name)}
    reference = ray.put(
        {name: (column.values.cpu().numpy(), column.lengths.numpy()) for name, column in ragged.items()}
    )
    chunk = _Chunk(reference, owner, ray.get_runtime_context().get_node_id())
    rows = torch.arange(result.num_rows)
    kept = {
        name: KeptColumn(name, (chunk,), torch.zeros_like(rows), rows, column.lengths)
        for name, column in ragged.items()
    }
    return Batch({**plain, **kept})


# Processes
# --------------------------------------------------------------------------------------------------------------------


class _RayHost(WorkerProcess):
    """A host in a process of Ray's; it computes in one thread and answers for itself in others."""

    def run_and_keep(self, role: str, method: str, args: Sequence[Any]) -> CallResult:
        answer = self.run(role, method, args)
        own = ray.get_runtime_context().current_actor
        return CallResult(_kept(answer.result, own), answer.failure, answer.start_s, answer.end_s)

    @ray.method(concurrency_group=_CONTROL)
    def where(self) -> tuple[str, str, int]:
        """Id and address of the node, and the process."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    @ray.method(concurrency_group=_CONTROL)
    def what(self) -> WorkerStatus:
        return self.status()

    @ray.method(concurrency_group=_CONTROL)
    def take(self, columns: list[ray.ObjectRef], name: str, rows: list[int]) -> Tensor:
        return _rows_of(ray.get(columns[0]), name, rows)


# Ray's types do not know what such a class can do.
_remote: Any = ray.remote
_RAY_HOST = _remote(concurrency_groups={_CONTROL: 4}, max_restarts=0)(_RayHost)


@ray.remote(num_cpus=0)
def _tail_there(path: str) -> list[str]:
    return tail(Path(path))


@dataclass(frozen=True)
class _Rank:
    """A process of a pool."""

    host: Any
    place: tuple[str, str, int]
    log: Path

    @property
    def node(self) -> str:
        return self.place[0]

    @property
    def address(self) -> str:
        return self.place[1]

    @property
    def pid(self) -> int:
        return self.place[2]


class RayPool(Pool):
    """Devices of a cluster, a process on each, which form one world of `torch.distributed`.

    Args:
        cluster: that has the devices.
        name: for messages and logs.
        num_devices: ranks of the pool.
        hang_limit_s: see `placement.hang_limit_s`.
        log_folder: takes the output of each rank.
        timeline: takes the spans of all calls.

    Raises:
        ValueError: the cluster has not so many devices.
        WorkerError: a process does not start.
    """

    def __init__(
        self,
        cluster: RayCluster,
        name: str,
        num_devices: int,
        *,
        hang_limit_s: float,
        log_folder: Path,
        timeline: Timeline,
    ) -> None:
        self.name = name
        self.num_devices = num_devices
        self.timeline = timeline
        self.hang_limit_s = hang_limit_s
        self.ranks: list[_Rank] = []
        self._cluster = cluster
        self._group: PlacementGroup | None = None
        cluster.pools.append(self)
        kind, group = self._reserve()
        options: dict[str, Any] = {
            "num_cpus": 1 if kind == "CPU" else 0,
            "num_gpus": 1 if kind == "GPU" else 0,
        }
        strategies = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(num_devices)]
        hosts = [
            _RAY_HOST.options(scheduling_strategy=strategy, **options).remote() for strategy in strategies
        ]
        places = self._get([host.where.remote() for host in hosts], "its processes to start")
        # Neighbours in number are neighbours in place: tensor-parallel ranks share a node where they can.
        order = sorted(range(num_devices), key=lambda bundle: (places[bundle][0], bundle))
        self.ranks = [
            _Rank(hosts[i], places[i], log_folder / f"{name}-{rank}.log") for rank, i in enumerate(order)
        ]
        self._join()

    @override
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> RayGroup:
        answers = RayFuture(self, role, "start", self._send_all(role, "start", (factory, *args))).answers()
        return RayGroup(self, role, [answer.result for answer in answers])

    def send(self, rank: int, role: str, method: str, args: Any) -> ray.ObjectRef:
        """Calls a method on one rank."""
        return self.ranks[rank].host.run_and_keep.remote(role, method, args)

    def statuses(self) -> list[WorkerStatus | None]:
        """What every rank is doing; None of one that does not answer."""
        asked = [rank.host.what.remote() for rank in self.ranks]
        ray.wait(asked, num_returns=len(asked), timeout=_STATUS_LIMIT_S)
        return [_status(answer) for answer in asked]

    def fail(self, rank: int, cause: str) -> WorkerError:
        """Ends everything, and says whose fault it is; later calls of whatever pool hear of the same."""
        if self._cluster.failure is not None:
            return self._cluster.failure
        failed = self.ranks[rank]
        log = "\n".join(f"    {line}" for line in self._tail(failed)) or "    (nothing)"
        self._cluster.failure = WorkerError(
            f"rank {rank} of pool {self.name} on node {failed.address} (process {failed.pid}) {cause}\n"
            f"  the last lines of its log, {failed.log}:\n{log}"
        )
        for pool in list(self._cluster.pools):
            pool.close()
        return self._cluster.failure

    def check(self) -> None:
        """Refuses work after a failure.

        Raises:
            WorkerError: the first one.
        """
        if self._cluster.failure is not None:
            raise self._cluster.failure

    @override
    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank.host, no_restart=True)
        self.ranks = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _reserve(self) -> tuple[str, PlacementGroup]:
        """A device for each rank, GPU or CPU."""
        kind, there = self._cluster.devices
        taken = sum(pool.num_devices for pool in self._cluster.pools)
        if taken > there:
            raise ValueError(
                f"need {taken} devices for {', '.join(pool.name for pool in self._cluster.pools)}, but the cluster has {there} ({kind}s on "
                f"{len(ray.nodes())} nodes); lower placement.devices, or add nodes with `ray start`"
            )
        bundle = {"GPU": 1.0, "CPU": 1.0} if kind == "GPU" else {"CPU": 1.0}
        self._group = group = placement_group([bundle] * self.num_devices, strategy="PACK")
        self._get([group.ready()], f"{self.num_devices} free {kind}s")
        return kind, group

    def _join(self) -> None:
        """Makes the ranks one world."""
        first = self.ranks[0]
        one_node = len({rank.node for rank in self.ranks}) == 1
        address = _LOOPBACK if one_node else first.address
        (port,) = self._get([first.host.open_store.remote(address, self.num_devices)], "rank 0 to listen")
        told = [
            rank.host.join_world.remote(
                (address, port),
                number,
                self.num_devices,
                limit_s=self.hang_limit_s,
                log=str(rank.log),
                num_threads=torch.get_num_threads(),
            )
            for number, rank in enumerate(self.ranks)
        ]
        self._get(told, "its ranks to find each other")

    def _get(self, references: list[Any], what: str) -> list[Any]:
        try:
            return list(ray.get(references, timeout=_START_LIMIT_S))
        except GetTimeoutError as error:
            raise WorkerError(
                f"pool {self.name} waited {_START_LIMIT_S:.0f} s for {what}; see `ray status`"
            ) from error
        except RayError as error:
            raise WorkerError(f"pool {self.name} waited for {what}, but: {error}") from error

    def _send_all(self, role: str, method: str, args: Any) -> list[ray.ObjectRef]:
        shared = ray.put(args)
        return [
            self.ranks[rank].host.run_and_keep.remote(role, method, shared)
            for rank in range(self.num_devices)
        ]

    def _tail(self, rank: _Rank) -> list[str]:
        if rank.log.exists():
            return tail(rank.log)
        there = NodeAffinitySchedulingStrategy(rank.node, soft=False)
        try:
            asked: Any = _tail_there.options(scheduling_strategy=there).remote(str(rank.log))
            return list(ray.get(asked, timeout=_STATUS_LIMIT_S))
        except RayError:
            return ["(its node does not answer)"]


def _status(answer: ray.ObjectRef) -> WorkerStatus | None:
    try:
        status: WorkerStatus = ray.get(answer, timeout=0)
        return status
    except RayError:
        return None


class RayGroup(WorkerGroup):
    """The ranks of a role in the processes of a pool."""

    def __init__(self, pool: RayPool, role: str, places: Sequence[dict[str, Any]]) -> None:
        self.role = role
        self.layouts = {name: DispatchLayout(tuple(place[name] for place in places)) for name in places[0]}
        self._pool = pool

    @override
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self._pool.check()
        mode, name = dispatch_mode(method), method.__name__
        layout = self.layouts[mode.layout]
        # Each part is put into the object store once, for all ranks that take it together.
        parts = [ray.put(part) for part in mode.split(args, layout.num_parts)]
        sent = [
            self._pool.send(rank, self.role, name, parts[place.data_rank])
            for rank, place in enumerate(layout.ranks)
        ]
        return RayFuture(
            self._pool,
            self.role,
            name,
            sent,
            lambda results: mode.join([results[r] for r in layout.collectors], args),
        )


class RayFuture(Future[T]):
    """A call that runs in other processes."""

    def __init__(
        self,
        pool: RayPool,
        role: str,
        method: str,
        sent: Sequence[ray.ObjectRef],
        join: Callable[[list[Any]], T] | None = None,
    ) -> None:
        self._pool = pool
        self._role = role
        self._method = method
        self._sent = list(sent)
        self._join = join

    @override
    def result(self) -> T:
        return self._result

    @cached_property
    def _result(self) -> T:
        assert self._join is not None
        return self._join([answer.result for answer in self.answers()])

    def answers(self) -> list[CallResult]:
        """What every rank answers.

        Raises:
            ValueError: a rank was given something that cannot be used as it started.
            WorkerError: a rank failed, died, or does not arrive where others wait.
        """
        answers: dict[int, CallResult] = {}
        watch = HangDetector(self._pool.hang_limit_s)
        pending = {reference: rank for rank, reference in enumerate(self._sent)}
        while pending:
            # All at once, or those that are there after a moment: the ranks that wait for a failed one never
            # are.
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            for reference in ready:
                rank = pending.pop(reference)
                answers[rank] = self._answer(rank, reference, pending)
            if (
                not ready
                and watch.is_due(time.monotonic())
                and (hang := watch.look(self._pool.statuses(), time.monotonic()))
            ):
                raise self._pool.fail(hang.rank, f"hangs in {self._role}.{self._method}: {hang.story}")
        spans = [
            Span(self._pool.name, r, self._role, self._method, a.start_s, a.end_s)
            for r, a in sorted(answers.items())
        ]
        self._pool.timeline.spans.extend(
            span for span in spans if span.end_s - span.start_s >= _SHORTEST_SPAN_S
        )
        return [answers[rank] for rank in range(len(self._sent))]

    def _answer(
        self, rank: int, reference: ray.ObjectRef, pending: Mapping[ray.ObjectRef, int]
    ) -> CallResult:
        try:
            answer: CallResult = ray.get(reference)
        except RayActorError as error:
            raise self._pool.fail(
                rank, f"died in {self._role}.{self._method}: {_first_line(error)}"
            ) from None
        except RayError as error:
            raise self._pool.fail(
                rank, f"failed in {self._role}.{self._method}: {_first_line(error)}"
            ) from error
        if answer.failure is None:
            return answer
        failure = answer.failure
        if failure.is_mistake and self._method == "start":
            raise ValueError(failure.message)
        if _LOST.search(failure.message) and pending:
            self._check_others(pending)
        raise self._pool.fail(
            rank, f"failed in {self._role}.{self._method}: {failure.kind}: {failure.message}"
        )

    def _check_others(self, pending: Mapping[ray.ObjectRef, int]) -> None:
        """A rank that lost another one is not the cause; the end of that other one is known in a moment."""
        for reference in ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_S)[0]:
            try:
                ray.get(reference)
            except RayError as error:
                raise self._pool.fail(
                    pending[reference], f"died in {self._role}.{self._method}: {_first_line(error)}"
                ) from None


def _first_line(error: Exception) -> str:
    """Ray's own words end with long advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "process" in line or "died" in line),
        lines[0] if lines else type(error).__name__,
    )
