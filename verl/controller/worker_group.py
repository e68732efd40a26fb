"""Groups of workers on pools of devices, and the backend for one device: everything in this process, a
breakpoint anywhere.
"""

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
    """One rank of a role; its methods with `@register` are called on all ranks at once.

    Attributes:
        places: where this rank stands in each layout of its group, by the layout's name.
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
        """Waits for it.

        Raises:
            WorkerError: a rank of another process failed; in this process, what it raised.
        """


class WorkerError(RuntimeError):
    """A rank failed, died or did not arrive: names role, rank, node and cause, with the last lines of its
    log.
    """


class WorkerGroup(ABC):
    """The ranks of one role.

    Attributes:
        role: its name.
        layouts: which part of the work each rank takes, by the name that a mode has for it.
    """

    role: str
    layouts: Layouts

    @abstractmethod
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Calls a method of the worker's class on every rank, as its mode says; calls run in the order
        that they are made.

        Takes positional arguments only. `T` is what the mode joins the results to.
        """


class Pool(ABC):
    """Devices, and the roles that share them in turn.

    Attributes:
        name: for messages.
        num_devices: one rank each.
        timeline: takes the spans of all calls.
    """

    name: str
    num_devices: int
    timeline: Timeline

    @abstractmethod
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> WorkerGroup:
        """Makes a worker of the role on every device, `factory(*args)`.

        Raises:
            ValueError: what was given cannot be used.
            WorkerError: a rank failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the workers and gives the devices back."""


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
    """What ran where and when."""

    spans: list[Span] = field(default_factory=list)

    def take(self) -> list[Span]:
        """The spans since the last call."""
        taken, self.spans = self.spans, []
        return taken


def append_trace(path: Path, spans: list[Span]) -> None:
    """Adds spans to a file in Chrome's trace format, for chrome://tracing or https://ui.perfetto.dev: a row
    per rank, times in us.
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
    """A result that is there."""

    value: T

    @override
    def result(self) -> T:
        return self.value


@dataclass(frozen=True)
class MergedMetrics(Future[dict[str, float]]):
    """Metrics of a call with further ones beside."""

    future: Future[dict[str, float]]
    more: dict[str, float]

    @override
    def result(self) -> dict[str, float]:
        return self.future.result() | self.more


class LocalGroup(WorkerGroup):
    """One worker in this process; a call runs when it is made.

    Attributes:
        worker: the worker itself.
    """

    def __init__(self, pool: LocalPool, role: str, worker: Worker) -> None:
        self.role = role
        self.worker = worker
        self._pool = pool
        self.layouts: Layouts = {
            name: DispatchLayout((place,)) for name, place in worker.dispatch_ranks.items()
        }

    @override
    def call(self, method: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        mode = dispatch_mode(method)
        (own,) = mode.split(args, self.layouts[mode.layout].num_parts)
        start_s = time.time()
        result = getattr(self.worker, method.__name__)(*own)  # by name: a subclass may have its own
        self._pool.timeline.spans.append(
            Span(self._pool.name, 0, self.role, method.__name__, start_s, time.time())
        )
        return CompletedFuture(mode.join([result], args))


class LocalPool(Pool):
    """One device of this process, on which any number of roles take turns."""

    def __init__(self, name: str = "local", timeline: Timeline | None = None) -> None:
        self.name = name
        self.num_devices = 1
        self.timeline = timeline or Timeline()

    @override
    def start(self, role: str, factory: WorkerFactory, *args: Any) -> LocalGroup:
        return LocalGroup(self, role, factory(*args))

    def close(self) -> None:
        """See `Pool.close`; here there is nothing to end."""
