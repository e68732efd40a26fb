"""Answers of an environment that are more than a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class EnvironmentLost(Exception):
    """Raised by a tool of an environment that cannot go on: the episode fails, and nothing is told."""


@dataclass(frozen=True)
class Observation:
    """One answer of an environment: returned by its `reset`, its `step` and its tools in place of a text.

    Attributes:
        text: read by the policy; a list holds parts of a message, such as images; None: nothing.
        reward: of the turn before it; None: none.
        is_over: the episode ends here; its text is not read any more.
        metrics: numbers by name, averaged over episodes.
        messages: chat messages in place of `text`, from `reset` and `step`.
        replaces_prompt: the messages are the whole prompt, from `reset`; else they follow it.
    """

    text: str | list[dict[str, Any]] | None = None
    reward: float | None = None
    is_over: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()
    replaces_prompt: bool = False


def observed(value: Any, place: str) -> Observation:
    """The answer that a method of an environment returned.

    Args:
        value: None, a text, (text, reward), an `Observation`, or another value, which is told as its text.
        place: method that returned it, for messages.

    Raises:
        TypeError: a pair without a number, or a reward that is no number.
    """
    if value is None:
        return Observation()
    if isinstance(value, tuple) and len(value) == 2:
        value = Observation(value[0] if value[0] is None else str(value[0]), value[1])
    if not isinstance(value, Observation):
        is_parts = isinstance(value, list) and all(isinstance(p, dict) and "type" in p for p in value)
        return Observation(value if is_parts else str(value))
    if value.reward is not None and (isinstance(value.reward, bool) or not is_number(value.reward)):
        raise TypeError(
            f"need a number as the reward of {place}, got {value.reward!r}; return (text, reward)"
        )
    return value


def is_number(value: Any) -> bool:
    """True for a value that is a finite number, of Python or of NumPy."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return number - number == 0
