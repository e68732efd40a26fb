"""Detector of hangs: tells them from long work by the collectives that each rank has entered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.controller.worker_process import WorkerStatus


@dataclass(frozen=True)
class Hang:
    """A hang that was found.

    Attributes:
        rank: for which others wait.
        description: human-readable: ranks that wait, the collective, and the state of each late rank.
    """

    rank: int
    description: str


class HangDetector:
    """Compares the statuses of the ranks of a pool over time.

    In long work all ranks have entered the same collectives. In a hang no status changes, and some ranks are
    in a collective that others have not entered, or a rank does not answer.

    Args:
        limit_s: time without any change after which there is a hang.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._checked_s: float | None = None
        self._changed_s = 0.0
        self._seen: list[tuple[object, ...]] = []

    def is_due(self, now_s: float) -> bool:
        """True if it is time for the next check: four times within the limit, at most once a second."""
        return self._checked_s is None or now_s - self._checked_s >= max(1.0, self._limit_s / 4)

    def check(self, statuses: Sequence[WorkerStatus | None], now_s: float) -> Hang | None:
        """Compare with the last check; return a hang once nothing has changed for the limit.

        Args:
            statuses: of all ranks; None: the rank does not answer.
            now_s: monotonic time.
        """
        self._checked_s = now_s
        seen: list[tuple[object, ...]] = [
            (s.num_calls, s.call, *sorted(s.collectives.items())) if s else () for s in statuses
        ]
        # A rank that no longer answers counts as unchanged.
        if len(seen) != len(self._seen) or any(
            new and new != old for new, old in zip(seen, self._seen, strict=True)
        ):
            self._seen, self._changed_s = seen, now_s
            return None
        return self._hang(statuses) if now_s - self._changed_s >= self._limit_s else None

    def _hang(self, statuses: Sequence[WorkerStatus | None]) -> Hang | None:
        late = sorted(late_ranks(statuses) | {rank for rank, status in enumerate(statuses) if status is None})
        if not late:
            return None
        waiting = [(rank, status) for rank, status in enumerate(statuses) if status and rank not in late]
        parts = []
        if waiting:
            ranks = [rank for rank, _ in waiting]
            parts.append(
                f"{_list_ranks(ranks)} waited {self._limit_s:g} s in {_collective(waiting[0][1])} "
                f"for {_list_ranks(late)}"
            )
        parts += [f"rank {rank} {_state(statuses[rank])}" for rank in late]
        return Hang(late[0], "; ".join(parts))


def late_ranks(statuses: Sequence[WorkerStatus | None]) -> set[int]:
    """Ranks that have entered fewer collectives of a process group than another rank of the group."""
    groups = {group for status in statuses if status for group in status.collectives}
    late: set[int] = set()
    for group in groups:
        counts = {
            rank: s.collectives[group] for rank, s in enumerate(statuses) if s and group in s.collectives
        }
        late |= {rank for rank, count in counts.items() if count < max(counts.values())}
    return late


def _list_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _collective(status: WorkerStatus) -> str:
    """Name of the collective that a rank is in, and the line that called it."""
    caller = next((line for line in status.stack if not line.startswith("torch/")), "an unknown place")
    names = [
        line.rpartition(" in ")[2]
        for line in status.stack
        if line.startswith("torch/distributed/distributed_c10d")
    ]
    collectives = [name for name in names if name not in ("wrapper", "_wait")]
    return f"{collectives[-1] if collectives else 'a collective'} (called at {caller})"


def _state(status: WorkerStatus | None) -> str:
    """State of a late rank, as the end of a sentence."""
    if status is None:
        return "does not answer (stopped, or its node is gone)"
    if status.call is None:
        return "has ended its call without it"
    return f"is at {' < '.join(status.stack[:3]) or 'an unknown place'}"
