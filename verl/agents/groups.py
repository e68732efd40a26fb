"""The answers to one prompt on their way from admission to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import stdev

from verl.config.pipeline import FailureClass
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Prompt


class GroupError(Exception):
    """A group could not be answered.

    Args:
        failure: class of the failure, which decides on another attempt.
        cause: human-readable.
    """

    def __init__(self, failure: FailureClass, cause: str) -> None:
        super().__init__(cause)
        self.failure: FailureClass = failure
        self.cause = cause


@dataclass
class Group:
    """The answers to a prompt, from admission to training.

    Attributes:
        number: of the group over the whole run; the random numbers of its answers depend on it.
        prompt: the question.
        oldest: version of the policy that sampled its oldest token, or may sample it.
        attempt: number of times that its answers were discarded.
        tries: further attempts after a failure of each class.
        answers: its trajectories so far, with or without a reward.
        baseline: greedy answer, if its reward is read.
        arrival: its place among the groups that are complete; None: it is in flight.
        has_no_signal: its advantages are zero, and no other prompt was found in its place.
        has_low_deviation: its rewards deviate less than those of the groups that the step learns from.
        pause_s: seconds before its next attempt.
        repeated: numbers of the answers to sample again in its next attempt, as their environment failed.
    """

    number: int
    prompt: Prompt
    oldest: int
    attempt: int = 0
    tries: dict[FailureClass, int] = field(default_factory=dict)
    answers: list[Trajectory] = field(default_factory=list)
    baseline: Trajectory | None = None
    arrival: int | None = None
    has_no_signal: bool = False
    has_low_deviation: bool = False
    pause_s: float = 0.0
    repeated: list[int] = field(default_factory=list)

    @property
    def drop_reason(self) -> str:
        """Reason why the step does not learn from it, for the ledger; "": it does."""
        return "dead" if self.has_no_signal else "low_deviation" if self.has_low_deviation else ""

    @property
    def all_trajectories(self) -> list[Trajectory]:
        """Its answers and the greedy one."""
        return [*self.answers, *([self.baseline] if self.baseline is not None else [])]


def mark_low_deviation(groups: Sequence[Group], kept_share: float) -> None:
    """Mark the groups of a step that it does not learn from, those whose rewards deviate least.

    The deviation is that of the sample (n - 1). StarPO-S, https://arxiv.org/abs/2504.20073, section 3.2.

    Args:
        groups: of the step; of equal deviations the first ones are kept.
        kept_share: share of the groups that it learns from, rounded down, at least one group.
    """
    by_deviation = sorted(groups, key=lambda group: reward_deviation(group.answers), reverse=True)
    for place, group in enumerate(by_deviation):
        group.has_low_deviation = place >= max(1, int(kept_share * len(groups)))


def reward_deviation(group: Sequence[Trajectory]) -> float:
    """Sample standard deviation of the rewards of a group; 0 for fewer than two."""
    rewards = [t.reward for t in group if t.outcome == "ok" and t.reward is not None]
    return stdev(rewards) if len(rewards) > 1 else 0.0


def has_no_signal(group: Sequence[Trajectory], *, by_parts: bool = False) -> bool:
    """True if a group has fewer than two rewards, or equal ones; with `by_parts` equal in every part."""
    return len({(t.reward, *t.parts) if by_parts else t.reward for t in group if t.outcome == "ok"}) < 2


def is_environment_failure(outcome: str) -> bool:
    """True for the outcome of an episode whose environment, tools or program failed."""
    return outcome.startswith("environment")
