"""Decision on a group that came back: complete, another attempt, dropped, or failed."""

from __future__ import annotations

import asyncio
from typing import Literal

from verl.agents.group_source import Source
from verl.agents.groups import Group, GroupError, is_environment_failure
from verl.config.pipeline import FailureClass, PipelineConfig
from verl.monitoring.ledger import Ledger

Decision = Literal["complete", "retry", "gone"]
# Outcomes of a reward that another attempt may mend.
_TRANSIENT = ("reward_error", "reward_timeout", "reward_crash", "judge_timeout", "judge_unavailable")
# Seconds before the first retry beside training, and their growth: a service needs time to come back.
_FIRST_PAUSE_S, _PAUSE_GROWTH = 2.0, 3.0


class RetryPolicy:
    """Applies the settings `pipeline.retries`, `survivors` and dynamic sampling to groups; writes the ledger.

    Args:
        config: retries, survivors and the limit of failures.
        source: completes the rewards of a group.
        ledger: takes attempts and ends of groups.
        in_order: groups come back in rounds, all that are in flight at once.
        prompts_per_step: groups of a batch.
        max_resamples: rounds in which groups without signal are replaced by other prompts; 0: they stay.

    """

    def __init__(
        self,
        config: PipelineConfig,
        source: Source,
        ledger: Ledger,
        *,
        in_order: bool,
        prompts_per_step: int,
        max_resamples: int,
    ) -> None:
        self._config, self._source, self._ledger = config, source, ledger
        self._in_order, self._prompts_per_step = in_order, prompts_per_step
        self._max_resamples = max_resamples
        self._num_replaced = self._num_rounds = self._failures_in_a_row = 0
        self._replaced_in_round = False
        self._last_cause = ""

    def begin_step(self) -> None:
        """Reset the counts of replaced groups."""
        self._num_replaced = self._num_rounds = 0

    def end_round(self) -> bool:
        """True if a group was replaced since the last call."""
        was_replaced, self._replaced_in_round = self._replaced_in_round, False
        self._num_rounds += was_replaced
        return was_replaced

    def decide(self, group: Group, future: asyncio.Future[None]) -> Decision:
        """Decision on a group whose future is done.

        Raises:
            Exception: an error that is not of the group.
        """
        error = future.exception()
        if isinstance(error, GroupError):
            return self._retry_or_fail(group, error.failure, error.cause)
        if error is not None:
            raise error
        broken = [i for i, t in enumerate(group.answers) if is_environment_failure(t.outcome)]
        if broken and self._has_try(group, "environment"):
            first = group.answers[broken[0]]
            self._note_try(group, "environment", f"{first.outcome}: {first.detail}")
            group.repeated = broken
            return "retry"
        transient = [t for t in group.all_trajectories if t.outcome in _TRANSIENT]
        if transient and self._has_try(group, "reward"):
            self._note_try(group, "reward", transient[0].detail)
            for trajectory in transient:
                trajectory.outcome, trajectory.detail = "ok", ""
            return "retry"
        has_signal = self._source.finish(group)
        failed = [t for t in group.answers if t.outcome != "ok"]
        if len(group.answers) - len(failed) < self._config.survivors.options.get("least", 1):
            return self._too_few(group, failed[0].outcome, failed[0].detail)
        self._failures_in_a_row = 0
        if not has_signal and self._max_resamples:
            # In rounds, one counts once, however many of its groups are replaced.
            spent = self._num_rounds if self._in_order else self._num_replaced / self._prompts_per_step
            if spent < self._max_resamples:
                self._num_replaced += 1
                self._replaced_in_round = True
                self._ledger.drop(group.number, "dead")
                return "gone"
            group.has_no_signal = True
        return "complete"

    def check_failures(self) -> None:
        """Check the number of groups that failed one after the other.

        Raises:
            RuntimeError: it is too large.
        """
        if self._failures_in_a_row >= self._config.max_failures_in_a_row:
            raise RuntimeError(
                f"{self._failures_in_a_row} groups failed one after the other, the last with "
                f"{self._last_cause}; mend the cause, or raise pipeline.max_failures_in_a_row"
            )

    def _too_few(self, group: Group, outcome: str, detail: str) -> Decision:
        """Answer a group with too few rewards again, or give its place to another prompt."""
        failure: FailureClass = "environment" if is_environment_failure(outcome) else "reward"
        cause = f"{outcome}: {detail}"
        if self._config.survivors.name == "refill":
            group.attempt += 1
            return self._retry_or_fail(group, failure, cause)
        self._ledger.drop(group.number, "too_few")
        return self._gone(cause)

    def _retry_or_fail(self, group: Group, failure: FailureClass, cause: str) -> Decision:
        if self._has_try(group, failure):
            self._note_try(group, failure, cause)
            group.answers, group.baseline = [], None
            return "retry"
        self._ledger.fail(group.number, failure, cause)
        return self._gone(f"{failure}: {cause}")

    def _has_try(self, group: Group, failure: FailureClass) -> bool:
        return group.tries.get(failure, 0) < self._config.retries[failure]

    def _note_try(self, group: Group, failure: FailureClass, cause: str) -> None:
        group.tries[failure] = group.tries.get(failure, 0) + 1
        group.pause_s = _FIRST_PAUSE_S * _PAUSE_GROWTH ** (group.tries[failure] - 1)
        self._ledger.retry(group.number, failure, cause)

    def _gone(self, cause: str) -> Decision:
        self._failures_in_a_row += 1
        self._last_cause = cause
        return "gone"
