"""Pools and groups on a Ray cluster: one process per device, and errors that name the rank that failed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from torch import Tensor
from typing_extensions import override

from verl.controller.dispatch import DispatchLayout, dispatch_mode
from verl.controller.hang_detector import HangDetector
from verl.controller.ray_cluster import RayCluster
from verl.controller.ray_columns import keep_columns, rows_of
from verl.controller.worker_group import Future, Pool, Span, Timeline, WorkerError, WorkerFactory, WorkerGroup
from verl.controller.worker_process import CallResult, WorkerProcess, WorkerStatus, tail

P = ParamSpec("P")
T = TypeVar("T")
_CONTROL = "control"
_LOOPBACK = "127.0.0.1"
# Shorter calls only ask for a state; in a timeline they would hide the others.
_SHORTEST_SPAN_S = 1e-3
# A process that does not report its status within the limit counts as stopped.
_STATUS_LIMIT_S, _POLL_S, _START_LIMIT_S = 3.0, 1.0, 600.0
# Words in the error of a collective when another rank is gone, and the time until Ray knows of its end.
_LOST = re.compile(r"[Cc]onnection|[Pp]eer|NCCL")
_DEATH_S = 3.0


class _RayProcess(WorkerProcess):
    """A worker process as a Ray actor: calls run in one thread, questions about its state in others."""

    def run_and_keep(self, role: str, method: str, args: Sequence[Any]) -> CallResult:
        """Same as `run`, but ragged columns of the result stay in the object store of this node."""
        answer = self.run(role, method, args)
        own = ray.get_runtime_context().current_actor
        return CallResult(keep_columns(answer.result, own), answer.failure, answer.start_s, answer.end_s)

    @ray.method(concurrency_group=_CONTROL)
    def location(self) -> tuple[str, str, int]:
        """Id and address of the node, and the process id."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid()

    @ray.method(concurrency_group=_CONTROL)
    def current_status(self) -> WorkerStatus:
        return self.status()

    @ray.method(concurrency_group=_CONTROL)
    def read_rows(self, columns: list[ray.ObjectRef], name: str, rows: list[int]) -> Tensor:
        # The reference comes in a list, since Ray would replace an argument by what it refers to.
        return rows_of(ray.get(columns[0]), name, rows)


# Ray's type hints do not know the options of actor classes.
_remote: Any = ray.remote
_RAY_PROCESS = _remote(concurrency_groups={_CONTROL: 4}, max_restarts=0)(_RayProcess)


@ray.remote(num_cpus=0)
def _remote_tail(path: str) -> list[str]:
    return tail(Path(path))


@dataclass(frozen=True)
class RankProcess:
    """The process of one rank of a pool.

    Attributes:
        actor: handle of the process in Ray.
        log: file with its output, on its node.
        node: id of its node.
        address: of its node.
        pid: process id on its node.
    """

    actor: Any
    log: Path
    node: str
    address: str
    pid: int

    def tail(self) -> list[str]:
        """Last lines of the log, read on the rank's node if it is not this one."""
        if self.log.exists():
            return tail(self.log)
        on_node = NodeAffinitySchedulingStrategy(self.node, soft=False)
        try:
            lines: Any = _remote_tail.options(scheduling_strategy=on_node).remote(str(self.log))
            return list(ray.get(lines, timeout=_STATUS_LIMIT_S))
        except RayError:
            return ["(its node does not answer)"]


class RayPool(Pool):
    """Devices of a cluster with a process on each, which form one world of `torch.distributed`.

    Args:
        cluster: that has the devices.
        name: for messages and logs.
        num_devices: ranks of the pool.
        hang_limit_s: `placement.hang_limit_s`.
        log_folder: takes the output of each rank.
        timeline: takes the spans of all calls.

    Raises:
        ValueError: the cluster has fewer devices.
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
        self.ranks: list[RankProcess] = []
        self._cluster = cluster
        self._group: PlacementGroup | None = None
        cluster.pools.append(self)
        kind, group = self._reserve()
        options: dict[str, Any] = {
            "num_cpus": 1 if kind == "CPU" else 0,
            "num_gpus": 1 if kind == "GPU" else 0,
        }
        strategies = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(num_devices)]
        actors = [
            _RAY_PROCESS.options(scheduling_strategy=strategy, **options).remote() for strategy in strategies
        ]
        locations = self._get([actor.location.remote() for actor in actors], "its processes to start")
        # Ranks of a node get consecutive numbers, so that tensor-parallel ranks share a node where possible.
        order = sorted(range(num_devices), key=lambda bundle: (locations[bundle][0], bundle))
        self.ranks = [
            RankProcess(actors[i], log_folder / f"{name}-{rank}.log", *locations[i])
            for rank, i in enumerate(order)
        ]
        self._join()

    @override
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> RayGroup:
        shared = ray.put((factory, *args))
        sent = [self.send(rank, role, "start", shared) for rank in range(self.num_devices)]
        answers = RayFuture(self, role, "start", sent).answers()
        return RayGroup(self, role, [answer.result for answer in answers])

    def send(self, rank: int, role: str, method: str, args: Any) -> ray.ObjectRef:
        """Call a method on one rank."""
        return self.ranks[rank].actor.run_and_keep.remote(role, method, args)

    def statuses(self) -> list[WorkerStatus | None]:
        """Status of every rank; None for one that does not answer."""
        references = [rank.actor.current_status.remote() for rank in self.ranks]
        ray.wait(references, num_returns=len(references), timeout=_STATUS_LIMIT_S)
        return [_status(reference) for reference in references]

    def fail(self, rank: int, cause: str) -> WorkerError:
        """Close all pools; return the error that names the rank, or the first error if there was one."""
        if self._cluster.failure is not None:
            return self._cluster.failure
        failed = self.ranks[rank]
        log = "\n".join(f"    {line}" for line in failed.tail()) or "    (nothing)"
        self._cluster.failure = WorkerError(
            f"rank {rank} of pool {self.name} on node {failed.address} (process {failed.pid}) {cause}\n"
            f"  the last lines of its log, {failed.log}:\n{log}"
        )
        for pool in list(self._cluster.pools):
            pool.close()
        return self._cluster.failure

    def raise_failure(self) -> None:
        """Refuse work after a failure of any pool.

        Raises:
            WorkerError: the first one.
        """
        if self._cluster.failure is not None:
            raise self._cluster.failure

    @override
    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank.actor, no_restart=True)
        self.ranks = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _reserve(self) -> tuple[str, PlacementGroup]:
        """Reserve a device for each rank; return their kind, GPU or CPU, and the reservation."""
        kind, available = self._cluster.devices
        needed = sum(pool.num_devices for pool in self._cluster.pools)
        if needed > available:
            raise ValueError(
                f"need {needed} devices for {', '.join(pool.name for pool in self._cluster.pools)}, "
                f"but the cluster has {available} ({kind}s on {len(ray.nodes())} nodes); "
                "lower placement.devices, or add nodes with `ray start`"
            )
        bundle = {"GPU": 1.0, "CPU": 1.0} if kind == "GPU" else {"CPU": 1.0}
        self._group = group = placement_group([bundle] * self.num_devices, strategy="PACK")
        self._get([group.ready()], f"{self.num_devices} free {kind}s")
        return kind, group

    def _join(self) -> None:
        """Join the ranks to one world of `torch.distributed`."""
        first = self.ranks[0]
        one_node = len({rank.node for rank in self.ranks}) == 1
        address = _LOOPBACK if one_node else first.address
        (port,) = self._get([first.actor.open_store.remote(address, self.num_devices)], "rank 0 to listen")
        joined = [
            rank.actor.join_world.remote(
                (address, port),
                number,
                self.num_devices,
                limit_s=self.hang_limit_s,
                log=str(rank.log),
                num_threads=torch.get_num_threads(),
            )
            for number, rank in enumerate(self.ranks)
        ]
        self._get(joined, "its ranks to find each other")

    def _get(self, references: list[Any], awaited: str) -> list[Any]:
        try:
            return list(ray.get(references, timeout=_START_LIMIT_S))
        except GetTimeoutError as error:
            raise WorkerError(
                f"pool {self.name} waited {_START_LIMIT_S:.0f} s for {awaited}; see `ray status`"
            ) from error
        except RayError as error:
            raise WorkerError(f"pool {self.name} waited for {awaited}, but: {error}") from error


def _status(reference: ray.ObjectRef) -> WorkerStatus | None:
    try:
        status: WorkerStatus = ray.get(reference, timeout=0)
        return status
    except RayError:
        return None


class RayGroup(WorkerGroup):
    """The ranks of a role, in the processes of a pool."""

    def __init__(self, pool: RayPool, role: str, dispatch_ranks: Sequence[dict[str, Any]]) -> None:
        self.role = role
        self.layouts = {
            name: DispatchLayout(tuple(ranks[name] for ranks in dispatch_ranks)) for name in dispatch_ranks[0]
        }
        self._pool = pool

    @override
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self._pool.raise_failure()
        mode, name = dispatch_mode(method), method.__name__
        layout = self.layouts[mode.layout]
        # Each part is put into the object store once, for all ranks that take it together.
        parts = [ray.put(part) for part in mode.split(args, layout.num_parts)]
        sent = [
            self._pool.send(rank, self.role, name, parts[own.data_rank])
            for rank, own in enumerate(layout.ranks)
        ]
        return RayFuture(
            self._pool,
            self.role,
            name,
            sent,
            join=lambda results: mode.join([results[r] for r in layout.collectors], args),
        )


class RayFuture(Future[T]):
    """A call that runs in other processes."""

    def __init__(
        self,
        pool: RayPool,
        role: str,
        method: str,
        sent: Sequence[ray.ObjectRef],
        *,
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
        """Answers of all ranks, in their order.

        Raises:
            ValueError: the arguments of `start` cannot be used.
            WorkerError: a rank failed, died, or does not reach a collective in which others wait.
        """
        answers: dict[int, CallResult] = {}
        detector = HangDetector(self._pool.hang_limit_s)
        pending = {reference: rank for rank, reference in enumerate(self._sent)}
        while pending:
            # Not all ranks may ever be ready: those that wait for a failed one hang. After a moment the ready
            # ones are looked at, so that the failed one is found.
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            for reference in ready:
                rank = pending.pop(reference)
                answers[rank] = self._answer(rank, reference, pending)
            if not ready and detector.is_due(time.monotonic()):
                hang = detector.check(self._pool.statuses(), time.monotonic())
                if hang:
                    raise self._pool.fail(
                        hang.rank, f"hangs in {self._role}.{self._method}: {hang.description}"
                    )
        spans = [
            Span(self._pool.name, rank, self._role, self._method, answer.start_s, answer.end_s)
            for rank, answer in sorted(answers.items())
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
            raise self._failure(rank, "died", _cause(error)) from None
        except RayError as error:
            raise self._failure(rank, "failed", _cause(error)) from error
        if answer.failure is None:
            return answer
        failure = answer.failure
        if failure.is_user_error and self._method == "start":
            raise ValueError(failure.message)
        if _LOST.search(failure.message) and pending:
            self._raise_death(pending)
        raise self._failure(rank, "failed", f"{failure.kind}: {failure.message}")

    def _raise_death(self, pending: Mapping[ray.ObjectRef, int]) -> None:
        """Raise the error of a pending rank that died: the rank that lost the connection is not the cause."""
        for reference in ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_S)[0]:
            try:
                ray.get(reference)
            except RayError as error:
                raise self._failure(pending[reference], "died", _cause(error)) from None

    def _failure(self, rank: int, verb: str, cause: str) -> WorkerError:
        return self._pool.fail(rank, f"{verb} in {self._role}.{self._method}: {cause}")


def _cause(error: Exception) -> str:
    """The line of a Ray error that says what happened: the rest is long advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "process" in line or "died" in line),
        lines[0] if lines else type(error).__name__,
    )
