"""Groups of workers on pools of devices, and the pool of one device, which runs in this process."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from typing_extensions import override

from verl.controller.dispatch import DispatchLayout, DispatchRank, Layouts, dispatch_mode

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One rank of a role; its methods with `@register` are called on all ranks of the group at once.

    Attributes:
        dispatch_ranks: of this rank in each layout of its group, by the layout's name.
    """

    dispatch_ranks: Mapping[str, DispatchRank] = {
        "ranks": DispatchRank(0, True),
        "train": DispatchRank(0, True),
        "generate": DispatchRank(0, True),
        "stages": DispatchRank(0, True),
    }


WorkerFactory = Callable[..., Worker]


class Future(ABC, Generic[T]):
    """The result of a call that may still be running."""

    @abstractmethod
    def result(self) -> T:
        """Wait for the result.

        Raises:
            WorkerError: a rank in another process failed. A call in this process raises its own error.
        """


class WorkerError(RuntimeError):
    """A rank failed, died or hung; the message has role, rank, node, cause and the last lines of its log."""


class WorkerGroup(ABC):
    """The ranks of one role.

    Attributes:
        role: its name.
        layouts: of the ranks, by name.
    """

    role: str
    layouts: Layouts

    @abstractmethod
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a method of the worker's class on every rank, by the method's dispatch mode.

        Calls run in the order in which they are made. Only positional arguments are allowed. `T` is the type
        of the joined results.
        """


class Pool(ABC):
    """Devices, and the roles that share them by turns.

    Attributes:
        name: for messages.
        num_devices: each has one rank of every role.
        timeline: takes the spans of all calls.
    """

    name: str
    num_devices: int
    timeline: Timeline

    @abstractmethod
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> WorkerGroup:
        """Start a worker of the role on every device, made by `factory(*args)`.

        Raises:
            ValueError: the factory cannot use its arguments.
            WorkerError: a rank failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers and free the devices."""


@dataclass(frozen=True)
class Span:
    """One call on one rank, in seconds since the epoch."""

    pool: str
    rank: int
    role: str
    method: str
    start_s: float
    end_s: float


@dataclass
class Timeline:
    """Spans of calls."""

    spans: list[Span] = field(default_factory=list)

    def take(self) -> list[Span]:
        """Spans since the last call; they are removed."""
        taken, self.spans = self.spans, []
        return taken


def append_trace(path: Path, spans: list[Span]) -> None:
    """Append spans to a file in Chrome's trace format, for chrome://tracing or https://ui.perfetto.dev.

    The trace has one line per rank; times are in us.
    """
    is_new = not path.exists()
    with path.open("a") as file:
        if is_new:
            file.write("[\n")  # The format allows the closing bracket to be absent.
        for span in spans:
            event = {
                "name": f"{span.role}.{span.method}",
                "cat": span.role,
                "ph": "X",
                "ts": round(span.start_s * 1e6),
                "dur": round((span.end_s - span.start_s) * 1e6),
                "pid": span.pool,
                "tid": span.rank,
            }
            file.write(json.dumps(event) + ",\n")


@dataclass(frozen=True)
class CompletedFuture(Future[T]):
    """A future whose result is already known."""

    value: T

    @override
    def result(self) -> T:
        return self.value


@dataclass(frozen=True)
class MergedMetrics(Future[dict[str, float]]):
    """Metrics of a call, joined with further ones."""

    future: Future[dict[str, float]]
    more: dict[str, float]

    @override
    def result(self) -> dict[str, float]:
        return self.future.result() | self.more


class LocalGroup(WorkerGroup):
    """One worker in this process; a call runs as soon as it is made.

    Attributes:
        worker: of the only rank.
    """

    def __init__(self, pool: LocalPool, role: str, worker: Worker) -> None:
        self.role = role
        self.worker = worker
        self._pool = pool
        self.layouts: Layouts = {
            name: DispatchLayout((rank,)) for name, rank in worker.dispatch_ranks.items()
        }

    @override
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        mode = dispatch_mode(method)
        (own,) = mode.split(args, self.layouts[mode.layout].num_parts)
        start_s = time.time()
        # By name: the worker may be of a subclass that overrides the method.
        result = getattr(self.worker, method.__name__)(*own)
        self._pool.timeline.spans.append(
            Span(self._pool.name, 0, self.role, method.__name__, start_s, time.time())
        )
        return CompletedFuture(mode.join([result], args))


class LocalPool(Pool):
    """One device, on which any number of roles in this process take turns."""

    def __init__(self, name: str = "local", timeline: Timeline | None = None) -> None:
        self.name = name
        self.num_devices = 1
        self.timeline = timeline or Timeline()

    @override
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> LocalGroup:
        return LocalGroup(self, role, factory(*args))

    @override
    def close(self) -> None:
        pass
