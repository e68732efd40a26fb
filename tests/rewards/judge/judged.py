"""Judges over a played endpoint, and what they give for some answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.rewards.judge.chat_endpoint import ChatEndpoint
from verl.data.trajectory import Trajectory
from verl.rewards.functions import RewardFunctions
from verl.rewards.judge.absolute import ScoreJudge
from verl.rewards.judge.judging import Judge
from verl.rewards.reward_function import RewardFunction


@contextmanager
def judging(
    endpoint: ChatEndpoint, folder: Path, kind: type[Judge] = ScoreJudge, **options: Any
) -> Iterator[tuple[RewardFunctions, Judge, list[float]]]:
    """The rewards of a judge, the judge, and the seconds that it would have slept."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    given = {"address": endpoint.address, "model": "m", "timeout_s": 30.0, **options}
    notes: list[str] = []
    judge = kind(given, folder=folder, note=notes.append, sleep=sleep)
    # The first question is not counted by the tests.
    endpoint.bodies.clear()
    endpoint.keys.clear()
    wrapped = RewardFunction(judge, name=judge.name, place="inline", check=judge.check, close=judge.close)
    rewards = RewardFunctions([wrapped], timeout_s=5.0, max_failed_share=1.0)
    try:
        yield rewards, judge, pauses
    finally:
        rewards.close()


def rewarded(rewards: RewardFunctions, trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """The answers with their rewards."""
    rewards.attempt(trajectories)
    return trajectories
