"""The waits of each pipeline stage and the time of its last progress, from which a stall is recognized."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from verl.monitoring.formatting import format_duration

# A text, or a function that returns the current one.
Description = str | Callable[[], str]
# Waits of a stage in a snapshot; there may be one for each group in flight.
_MAX_LISTED = 3
# A description may read what another thread changes meanwhile, such as a dict.
_NUM_TRIES = 3


@dataclass(frozen=True)
class Wait:
    """A wait in progress.

    Attributes:
        what: what is waited for.
        for_s: seconds since the wait began.
        limit_s: longest time that the wait may take; None: no limit of its own.
    """

    what: str
    for_s: float
    limit_s: float | None = None

    @property
    def is_over(self) -> bool:
        """True if the wait has exceeded its limit."""
        return self.limit_s is not None and self.for_s > self.limit_s


@dataclass(frozen=True)
class StageWaits:
    """State of a stage at one moment.

    Attributes:
        stage: name of the stage.
        moved_s: seconds since its last progress, or since it was first named.
        num_waits: number of waits in progress.
        waits: at most three of them: first one over its limit, if any, then the oldest.
    """

    stage: str
    moved_s: float
    num_waits: int = 0
    waits: tuple[Wait, ...] = ()

    def __str__(self) -> str:
        moved = f"moved {format_duration(self.moved_s)} ago"
        if not self.waits:
            return f"{self.stage} waits for nothing, {moved}"
        wait = self.waits[0]
        more = f", the first of {self.num_waits} waits" if self.num_waits > 1 else ""
        return f"{self.stage} has waited {format_duration(wait.for_s)} for {wait.what}{more}, {moved}"


@dataclass(frozen=True)
class Snapshot:
    """State of all stages at one moment.

    Attributes:
        still_s: seconds since the last progress of any stage.
        allowed_s: the longest limit among the waits in progress; 0 without one.
        stages: in the order in which they were first named.
    """

    still_s: float
    allowed_s: float = 0.0
    stages: tuple[StageWaits, ...] = ()


@dataclass
class _ActiveWait:
    """A wait in progress, as it is stored."""

    description: Description
    since_s: float
    limit_s: float | None

    def is_over(self, now_s: float) -> bool:
        return self.limit_s is not None and now_s - self.since_s > self.limit_s

    def at(self, now_s: float) -> Wait:
        return Wait(evaluate_description(self.description), now_s - self.since_s, self.limit_s)


@dataclass
class _Stage:
    """Waits of a stage, oldest first, and the time spent in them since `take_seconds` was last called."""

    moved_at_s: float
    active: dict[int, _ActiveWait] = field(default_factory=dict)
    waited_s: float = 0.0
    counted_to_s: float = 0.0  # while it waits: the time up to which `waited_s` counts

    def count(self, now_s: float) -> None:
        if self.active:
            self.waited_s += now_s - self.counted_to_s
        self.counted_to_s = now_s

    def listed(self, now_s: float) -> list[_ActiveWait]:
        first = next((wait for wait in self.active.values() if wait.is_over(now_s)), None)
        oldest = (wait for wait in self.active.values() if wait is not first)
        return [*([first] if first else []), *islice(oldest, _MAX_LISTED - (first is not None))]


class WaitTracker:
    """The waits of a run, by stage; used from threads and coroutines alike.

    Args:
        clock: returns seconds; `loop.time` for coroutines on virtual time.

    Attributes:
        listener: called with stage and description when a wait begins, in the thread that waits.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.listener: Callable[[str, Description], None] | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._moved_at_s = clock()

    @contextmanager
    def track(self, stage: str, what: Description, *, limit_s: float | None = None) -> Iterator[None]:
        """Context of one wait of a stage.

        Leaving it normally means that the wait got what it was for, which is progress of the stage; leaving
        it with an exception is none. So put it around a whole wait, not around each poll.

        Args:
            stage: the waiting part of the run; several of its waits may be in progress at once.
            what: what is waited for; a function is called for each snapshot, in the thread that takes it.
            limit_s: longest time that the wait may take.
        """
        wait = _ActiveWait(what, self._clock(), limit_s)
        with self._lock:
            found = self._stages.setdefault(stage, _Stage(wait.since_s))
            found.count(wait.since_s)
            found.active[id(wait)] = wait
        if self.listener:
            self.listener(stage, what)
        has_succeeded = False
        try:
            yield
            has_succeeded = True
        finally:
            with self._lock:
                now_s = self._clock()
                found.count(now_s)
                del found.active[id(wait)]
                if has_succeeded:
                    found.moved_at_s = self._moved_at_s = now_s

    def mark_progress(self, stage: str) -> None:
        """Record progress of a stage."""
        with self._lock:
            now_s = self._clock()
            self._stages.setdefault(stage, _Stage(now_s)).moved_at_s = self._moved_at_s = now_s

    def take_seconds(self) -> dict[str, float]:
        """Seconds that each stage has waited since the last call; concurrent waits count once."""
        with self._lock:
            now_s = self._clock()
            taken = {}
            for name, stage in self._stages.items():
                stage.count(now_s)
                taken[name], stage.waited_s = stage.waited_s, 0.0
            return taken

    def snapshot(self) -> Snapshot:
        """The current state of all stages."""
        with self._lock:
            now_s = self._clock()
            still_s = now_s - self._moved_at_s
            limits = [
                wait.limit_s or 0.0 for stage in self._stages.values() for wait in stage.active.values()
            ]
            found = [
                (name, now_s - stage.moved_at_s, len(stage.active), stage.listed(now_s))
                for name, stage in self._stages.items()
            ]
        # Descriptions are evaluated outside the lock: their functions may take locks of their own.
        stages = tuple(
            StageWaits(name, moved_s, num_waits, tuple(wait.at(now_s) for wait in listed))
            for name, moved_s, num_waits, listed in found
        )
        return Snapshot(still_s, max(limits, default=0.0), stages)

    def exclude(self, seconds: float) -> None:
        """Discount time without possible progress: the process was stopped, or an inner run was active."""
        with self._lock:
            now_s = self._clock()
            self._moved_at_s = min(self._moved_at_s + seconds, now_s)
            for stage in self._stages.values():
                stage.moved_at_s = min(stage.moved_at_s + seconds, now_s)
                for wait in stage.active.values():
                    wait.since_s = min(wait.since_s + seconds, now_s)


def evaluate_description(description: Description) -> str:
    """The current text of a description; an error of its function becomes part of the text."""
    if isinstance(description, str):
        return description
    for _ in range(_NUM_TRIES):
        try:
            return description()
        except Exception as error:  # a failed description must not end the run that it describes
            failure = f"{type(error).__name__}: {error}"
    return f"something that cannot be described ({failure})"


def stall_reason(snapshot: Snapshot, limit_s: float) -> str | None:
    """The reason why a run counts as stalled, with the state of all stages, or None if it does not.

    A run is stalled if a wait exceeds its own limit, or if no stage has progressed for `limit_s`, or for the
    longest limit of a wait in progress where that is longer.
    """
    limit_s = max(limit_s, snapshot.allowed_s)
    over = next(
        ((stage.stage, wait) for stage in snapshot.stages for wait in stage.waits[:1] if wait.is_over), None
    )
    if over:
        name, wait = over
        begin = (
            f"{name} has waited {format_duration(wait.for_s)} for {wait.what}, "
            f"and may for {format_duration(wait.limit_s or 0.0)}"
        )
    elif snapshot.still_s >= limit_s:
        begin = (
            f"nothing has moved for {format_duration(snapshot.still_s)}, "
            f"and may stand still for {format_duration(limit_s)}"
        )
    else:
        return None
    return "; ".join([begin, *(map(str, snapshot.stages) if snapshot.stages else ["no stage has begun"])])
