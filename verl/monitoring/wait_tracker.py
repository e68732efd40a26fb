"""Who waits for what, since when, and when something moved last; the clock is given, so that it may be a
virtual one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

What = str | Callable[[], str]
# Waits of a stage that are told in words; there may be one for each group in flight.
_NUM_TOLD = 3
# What is told may change at that moment in another thread, such as a dict that is walked through.
_NUM_TRIES = 3


@dataclass(frozen=True)
class Wait:
    """One wait that goes on.

    Attributes:
        what: it is for, in words.
        for_s: how long it has lasted.
        limit_s: how long it may last; None: as long as something else moves.
    """

    what: str
    for_s: float
    limit_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has lasted longer than it may."""
        return self.limit_s is not None and self.for_s > self.limit_s


@dataclass(frozen=True)
class StageWaits:
    """A stage at one moment.

    Attributes:
        stage: its name.
        moved_s: seconds since it last moved, or since it was first heard of.
        num_waits: that go on.
        waits: those that say most, at most three: first one that is over its limit, then the oldest.
    """

    stage: str
    moved_s: float
    num_waits: int = 0
    waits: tuple[Wait, ...] = ()

    def __str__(self) -> str:
        moved = f"moved {span(self.moved_s)} ago"
        if not self.waits:
            return f"{self.stage} waits for nothing, {moved}"
        more = f", the first of {self.num_waits} waits" if self.num_waits > 1 else ""
        return f"{self.stage} has waited {span(self.waits[0].for_s)} for {self.waits[0].what}{more}, {moved}"


@dataclass(frozen=True)
class Snapshot:
    """All stages at one moment.

    Attributes:
        still_s: seconds since anything moved in any of them.
        allowed_s: the longest own limit of the waits that go on.
        stages: in the order in which they were first heard of.
    """

    still_s: float
    allowed_s: float = 0.0
    stages: tuple[StageWaits, ...] = ()


@dataclass
class _Going:
    """A wait that goes on."""

    what: What
    since_s: float
    limit_s: float | None

    def is_over(self, now_s: float) -> bool:
        return self.limit_s is not None and now_s - self.since_s > self.limit_s


@dataclass
class _Stage:
    """A stage: its waits, oldest first, and the time spent in them that was not asked for yet."""

    moved_at_s: float
    going: dict[int, _Going] = field(default_factory=dict)
    waited_s: float = 0.0
    counted_to_s: float = 0.0  # while it waits: up to where `waited_s` counts

    def count(self, now_s: float) -> None:
        if self.going:
            self.waited_s += now_s - self.counted_to_s
        self.counted_to_s = now_s

    def telling(self, now_s: float) -> list[_Going]:
        first = next((going for going in self.going.values() if going.is_over(now_s)), None)
        oldest = (going for going in self.going.values() if going is not first)
        return [*([first] if first else []), *islice(oldest, _NUM_TOLD - (first is not None))]


class WaitTracker:
    """The waits of a run, by stage; for threads and coroutines alike.

    Args:
        clock: seconds; for coroutines on a virtual clock `loop.time`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._moved_at_s = clock()

    @contextmanager
    def track(self, stage: str, what: What, *, limit_s: float | None = None) -> Iterator[None]:
        """Inside, a stage waits for something.

        A wait that ends as it should has got what it was for, so the stage has moved; one that ends with an
        exception has not. So put it around the whole wait, not around each look at whether it is over.

        Args:
            stage: which part of the run waits; several of its waits may go on at once.
            what: it is for; a function is asked each time someone wants to know, from another thread.
            limit_s: how long it may last at most.
        """
        going = _Going(what, self._clock(), limit_s)
        with self._lock:
            found = self._stage(stage, going.since_s)
            found.count(going.since_s)
            found.going[id(going)] = going
        has_come = False
        try:
            yield
            has_come = True
        finally:
            with self._lock:
                now_s = self._clock()
                found.count(now_s)
                del found.going[id(going)]
                if has_come:
                    found.moved_at_s = self._moved_at_s = now_s

    def mark_progress(self, stage: str) -> None:
        """Something went on in a stage."""
        with self._lock:
            now_s = self._clock()
            self._stage(stage, now_s).moved_at_s = self._moved_at_s = now_s

    def take_seconds(self) -> dict[str, float]:
        """How long each stage has waited since the last call, by its name; several waits at once count once."""
        with self._lock:
            now_s = self._clock()
            taken = {}
            for name, stage in self._stages.items():
                stage.count(now_s)
                taken[name], stage.waited_s = stage.waited_s, 0.0
            return taken

    def snapshot(self) -> Snapshot:
        """What each stage waits for at the moment."""
        with self._lock:
            now_s = self._clock()
            still_s = now_s - self._moved_at_s
            allowed_s = max(
                (going.limit_s or 0.0 for stage in self._stages.values() for going in stage.going.values()),
                default=0.0,
            )
            found = [
                (name, now_s - stage.moved_at_s, len(stage.going), stage.telling(now_s))
                for name, stage in self._stages.items()
            ]
        # Asked without the lock: what answers may have locks of its own.
        stages = (
            StageWaits(name, moved_s, num, _told(telling, now_s)) for name, moved_s, num, telling in found
        )
        return Snapshot(still_s, allowed_s, tuple(stages))

    def exclude(self, seconds: float) -> None:
        """Takes time out of all that goes on, in which nothing could move: the process was stopped, or
        another one had its turn.
        """
        with self._lock:
            now_s = self._clock()
            self._moved_at_s = min(self._moved_at_s + seconds, now_s)
            for stage in self._stages.values():
                stage.moved_at_s = min(stage.moved_at_s + seconds, now_s)
                for going in stage.going.values():
                    going.since_s = min(going.since_s + seconds, now_s)

    def _stage(self, name: str, now_s: float) -> _Stage:
        return self._stages.setdefault(name, _Stage(now_s))


def stall_reason(snapshot: Snapshot, limit_s: float) -> str | None:
    """Why a run counts as stalled, in words with all stages, or None.

    A wait is over its own limit, or nothing has moved for `limit_s`; for the longest own limit of the waits
    that go on, if that is longer.
    """
    limit_s = max(limit_s, snapshot.allowed_s)
    over = next(
        ((stage.stage, wait) for stage in snapshot.stages for wait in stage.waits[:1] if wait.is_over), None
    )
    if over:
        name, wait = over
        begin = (
            f"{name} has waited {span(wait.for_s)} for {wait.what}, and may for {span(wait.limit_s or 0.0)}"
        )
    elif snapshot.still_s >= limit_s:
        begin = f"nothing has moved for {span(snapshot.still_s)}, and may stand still for {span(limit_s)}"
    else:
        return None
    return (
        "; ".join([begin, *map(str, snapshot.stages)]) if snapshot.stages else f"{begin}; no stage has begun"
    )


def span(seconds: float) -> str:
    """A length of time for people: 0.4 s, 45 s, 31 min, 2 h 05 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _told(waits: Sequence[_Going], now_s: float) -> tuple[Wait, ...]:
    return tuple(Wait(_words(going.what), now_s - going.since_s, going.limit_s) for going in waits)


def _words(what: What) -> str:
    if isinstance(what, str):
        return what
    for _ in range(_NUM_TRIES):
        try:
            return what()
        except Exception as error:  # the words must not cost the run what they are about
            failed = f"{type(error).__name__}: {error}"
    return f"something that cannot be told ({failed})"
