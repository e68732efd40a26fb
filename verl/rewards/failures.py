"""Failures of reward functions, and calls that turn whatever user code raises into one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_MAX_DETAIL_CHARS = 300


@dataclass(frozen=True)
class RewardFailure:
    """Reason why a call gave no value.

    Attributes:
        outcome: as on a trajectory, such as "reward_error".
        detail: the cause in words.
    """

    outcome: str
    detail: str

    @classmethod
    def from_exception(cls, error: BaseException) -> RewardFailure:
        """The last line of the traceback, and the last line reached in the user's own file."""
        cause = " ".join("".join(traceback.format_exception_only(error)).split())[:_MAX_DETAIL_CHARS]
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        outside = [(file, line) for file, line in frames if not file.startswith(_OWN_FOLDER)]
        # A line inside a library says little to the author of the function that called the library.
        lines = [line for file, line in outside if file == outside[0][0]]
        place = f" ({outside[0][0]}:{lines[-1]})" if outside else ""
        return cls("reward_error", cause + place)

    @classmethod
    def timeout(cls, limit_s: float, hint: str = "") -> RewardFailure:
        """A call that gave no value within its limit."""
        return cls("reward_timeout", f"no answer within {limit_s:g} s{hint}")


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
