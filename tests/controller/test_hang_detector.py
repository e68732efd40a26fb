"""Hangs are told from long work by the statuses of the ranks."""

from __future__ import annotations

from verl.controller.hang_detector import HangDetector
from verl.controller.worker_process import WorkerStatus

WAITS = (
    "torch/distributed/distributed_c10d.py:9 in all_reduce",
    "torch/distributed/c10d_logger.py:1 in wrapper",
    "verl/engines/fsdp.py:3 in f",
)
WORKS = ("verl/engines/hf/models.py:5 in hidden", "verl/engines/local.py:8 in _forward")


def status(count: int, stack: tuple[str, ...] = WORKS, call: str | None = "policy.update") -> WorkerStatus:
    return WorkerStatus(call, 1, {"[0, 1] world": count}, stack)


def checked(*checks, limit_s: float = 10.0, every_s: float = 5.0):
    """Result of the last check."""
    detector, found = HangDetector(limit_s), None
    for i, statuses in enumerate(checks):
        found = detector.check(statuses, i * every_s)
    return found


def test_ranks_that_wait_and_ranks_that_are_late_are_named_after_the_limit():
    stuck = [status(8, WAITS), status(7), status(8, WAITS)]
    assert checked(stuck, stuck) is None
    hang = checked(stuck, stuck, stuck)
    assert hang.rank == 1
    assert (
        "ranks 0, 2 waited 10 s in all_reduce (called at verl/engines/fsdp.py:3 in f) for rank 1"
        in hang.description
    )
    assert "rank 1 is at verl/engines/hf/models.py:5 in hidden < verl/engines/local.py:8" in hang.description


def test_long_work_of_all_is_no_hang():
    busy = [status(8), status(8)]
    assert checked(*[busy] * 20) is None


def test_any_progress_restarts_the_clock():
    checks = [
        [status(8, WAITS), status(7)],
        [status(8, WAITS), status(7)],
        [status(9, WAITS), status(8)],
        [status(9, WAITS), status(8)],
    ]
    assert checked(*checks) is None
    assert checked(*checks, checks[-1]).rank == 1


def test_a_rank_that_does_not_answer_is_named_whether_others_wait_or_not():
    hang = checked([status(8), status(8)], [status(8), None], [status(8), None])
    assert hang.rank == 1 and "rank 1 does not answer" in hang.description
    assert checked([None], [None], [None]).rank == 0


def test_a_rank_that_has_ended_without_the_collective_is_named():
    stuck = [status(8, WAITS), status(7, (), None)]
    assert "rank 1 has ended its call without it" in checked(stuck, stuck, stuck).description


def test_checks_are_a_second_apart_or_a_quarter_of_the_limit():
    detector = HangDetector(40.0)
    assert detector.is_due(0.0)
    detector.check([status(1)], 0.0)
    assert not detector.is_due(9.9) and detector.is_due(10.0)
