"""Tells a hang from long work: who waits in which collective, and who has not arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.controller.worker_process import WorkerStatus


@dataclass(frozen=True)
class Hang:
    """A rank for whom others wait, and the story in words."""

    rank: int
    story: str


class HangDetector:
    """Compares what the ranks of a pool say of themselves over time.

    Ranks that compute for long have all done the same collectives. In a hang nothing moves, and some ranks
    are in a collective that others have not entered, or a rank does not answer at all.

    Args:
        limit_s: how long nothing may move.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._looked_s: float | None = None
        self._moved_s = 0.0
        self._seen: list[tuple[object, ...]] = []

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look again: four times within the limit, and no more often than each second."""
        return self._looked_s is None or now_s - self._looked_s >= max(1.0, self._limit_s / 4)

    def look(self, statuses: Sequence[WorkerStatus | None], now_s: float) -> Hang | None:
        """Notes what each rank does (None: it does not answer); returns a hang once it has lasted the limit."""
        self._looked_s = now_s
        seen = [(s.num_calls, s.call, *sorted(s.collectives.items())) if s else () for s in statuses]
        # A rank that has stopped to answer has not moved by that.
        if len(seen) != len(self._seen) or any(
            new and new != old for new, old in zip(seen, self._seen, strict=True)
        ):
            self._seen, self._moved_s = [new or () for new in seen], now_s
            return None
        return self._hang(statuses) if now_s - self._moved_s >= self._limit_s else None

    def _hang(self, statuses: Sequence[WorkerStatus | None]) -> Hang | None:
        silent = [rank for rank, status in enumerate(statuses) if status is None]
        behind = sorted(_behind(statuses) | set(silent))
        waiting = [rank for rank, status in enumerate(statuses) if status and rank not in behind]
        if not behind:
            return None
        parts = []
        if waiting:
            status = statuses[waiting[0]]
            assert status is not None
            parts.append(
                f"{_ranks(waiting)} waited {self._limit_s:g} s in {_collective(status)} for {_ranks(behind)}"
            )
        for rank in behind:
            status = statuses[rank]
            parts.append(
                f"rank {rank} does not answer (stopped, or its node is gone)"
                if status is None
                else f"rank {rank} {_where(status)}"
            )
        return Hang(behind[0], "; ".join(parts))


def _behind(statuses: Sequence[WorkerStatus | None]) -> set[int]:
    """Ranks that have entered fewer collectives of a group than another rank of it."""
    groups = {group for status in statuses if status for group in status.collectives}
    late: set[int] = set()
    for group in groups:
        counts = {
            rank: s.collectives[group] for rank, s in enumerate(statuses) if s and group in s.collectives
        }
        late |= {rank for rank, count in counts.items() if count < max(counts.values())}
    return late


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _collective(status: WorkerStatus) -> str:
    """The collective that a rank is in, and who called it."""
    own = next((line for line in status.stack if not line.startswith("torch/")), "an unknown place")
    names = [
        line.rpartition(" in ")[2]
        for line in status.stack
        if line.startswith("torch/distributed/distributed_c10d")
    ]
    called = [name for name in names if name not in ("wrapper", "_wait")]
    return f"{called[-1] if called else 'a collective'} (called at {own})"


def _where(status: WorkerStatus | None) -> str:
    if status is None:
        return "does not answer (stopped, or its node is gone)"
    if status.call is None:
        return "has ended its call without it"
    return f"is at {' < '.join(status.stack[:3]) or 'an unknown place'}"
