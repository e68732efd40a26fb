"""Failure of a call of user code in a process of its own."""

from __future__ import annotations

from typing import Literal

Outcome = Literal["error", "timeout", "crash"]


class ProcessFailure(Exception):
    """A call of user code that gave no value.

    Args:
        outcome: it raised (the object lives on), it was over its time limit, or its process has ended.
        detail: the cause, with the line of the user's file where it is known.

    Attributes:
        is_lost: the process has ended, and the object with it.
    """

    def __init__(self, outcome: Outcome, detail: str, *, is_lost: bool = False) -> None:
        super().__init__(detail)
        self.outcome: Outcome = outcome
        self.detail, self.is_lost = detail, is_lost
