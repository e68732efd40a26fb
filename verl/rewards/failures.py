"""Failures of reward functions, and calls that turn whatever user code raises into one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from verl.utils.user_code import exception_text


@dataclass(frozen=True)
class RewardFailure:
    """Reason why a call gave no value.

    Attributes:
        outcome: as on a trajectory, such as "reward_error".
        detail: the cause in words.
        exit_code: of the worker process that ended in the call, negative for a signal; None: it did not end.
    """

    outcome: str
    detail: str
    exit_code: int | None = None

    @classmethod
    def from_exception(cls, error: BaseException) -> RewardFailure:
        """The error in words, with the last line reached in the user's own file."""
        return cls("reward_error", exception_text(error))

    @classmethod
    def timeout(cls, limit_s: float, hint: str = "") -> RewardFailure:
        """A call that gave no value within its limit."""
        return cls("reward_timeout", f"no answer within {limit_s:g} s{hint}")


class FatalRewardError(RuntimeError):
    """A failure that ends the run: no later call of the function could succeed."""


def attempt(function: Callable[[], Any]) -> Any:
    """Value of the function, or a `RewardFailure`; no exception gets out, not even of `sys.exit`."""
    try:
        return function()
    except BaseException as error:
        return RewardFailure.from_exception(error)


async def attempt_async(function: Callable[[], Awaitable[Any]]) -> Any:
    """Value of the coroutine that the function returns, or a `RewardFailure`."""
    try:
        return await function()
    except BaseException as error:
        return RewardFailure.from_exception(error)
