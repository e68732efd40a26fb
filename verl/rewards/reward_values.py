"""Values that reward functions return, checked and brought into one form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, SupportsFloat

from verl.rewards.failures import RewardFailure

_wrong_type = partial(RewardFailure, "reward_wrong_type")
_not_finite = partial(RewardFailure, "reward_not_finite")
_PLAIN = (str, int, float, bool, type(None))


@dataclass
class Score:
    """The value of a function for one row.

    Attributes:
        reward: finite.
        named: further finite numbers by name.
        turn_rewards: one for each turn; None: the function gives none.
        extras: other values by name, for the table of samples.
        logged: metrics that the function logged for the rows of its call.
    """

    reward: float
    named: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


def score_of(value: Any) -> Score | RewardFailure:
    """The value for one row: a number, or a mapping with `reward`, or with `score` as in verl.

    Further entries of a mapping with `reward` must be numbers. With `score` they may be anything: those that
    are no numbers go to the table of samples, and `acc` is the accuracy.
    """
    if isinstance(value, RewardFailure):
        return value
    named = value if isinstance(value, Mapping) else {"reward": value}
    key = "reward" if "reward" in named or "score" not in named else "score"
    if key not in named:
        found = sorted(map(str, named))
        return _wrong_type(f"need a number or a mapping with 'reward' or 'score', got a mapping with {found}")
    score = Score(0.0)
    for name, entry in named.items():
        number = number_of(entry)
        if name == "turn_rewards":
            numbers = [number_of(value) for value in entry] if isinstance(entry, list | tuple) else [None]
            if any(number is None or not math.isfinite(number) for number in numbers):
                return _wrong_type(f"need a list of finite numbers for 'turn_rewards', got {entry}")
            score.turn_rewards = [number for number in numbers if number is not None]
        elif number is None and key == "score" != name:
            score.extras[str(name)] = plain(entry)
        elif number is None:
            hint = "; it did not return a value" if entry is None else ""
            return _wrong_type(f"need a number for {name!r}, got {type(entry).__name__}{hint}")
        elif not math.isfinite(number):
            return _not_finite(f"need a finite number for {name!r}, got {number}")
        elif name == key:
            score.reward = number
        else:
            is_accuracy = name == "acc" and key == "score" and "accuracy" not in named
            score.named["accuracy" if is_accuracy else str(name)] = number
    return score


def row_values(values: Any, num_rows: int) -> list[Any] | RewardFailure:
    """The value of a function over all rows as one value per row.

    It is a list, tensor or array of them, or the mapping of OpenRLHF: `rewards`, `scores`, and `extra_logs`
    with more of such lists by name.
    """
    if isinstance(values, RewardFailure):
        return values
    if isinstance(values, Mapping) and "rewards" in values:
        return _rows_of_openrlhf(values, num_rows)
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not (
        isinstance(values, Iterable) and isinstance(values, Sized)
    ):
        return _wrong_type(f"need a list of numbers, got {type(values).__name__}")
    try:
        rows = list(values)
    except Exception as error:  # A tensor without dimensions has a length by its type only.
        return _wrong_type(f"need a list of numbers, got {type(values).__name__}: {error}")
    if len(rows) != num_rows:
        return RewardFailure("reward_wrong_count", f"need one value per row, got {len(rows)} for {num_rows}")
    return rows


def named_scores(scored: Mapping[str, Score]) -> dict[str, float]:
    """Values by function, and further scores by their own name, or as function/name if that is taken."""
    named = {name: score.reward for name, score in scored.items()}
    for name, score in scored.items():
        for key, value in score.named.items():
            named[key if key not in named else f"{name}/{key}"] = value
    return named


def number_of(value: Any) -> float | None:
    """A number of any library; None if it is none. An array or tensor of one number is that number."""
    if type(value) is float:
        return value
    if isinstance(value, (str, bytes, complex)) or not isinstance(value, SupportsFloat):
        return None
    try:
        # NumPy's texts and complex numbers can become floats too: `item` gives what they are in Python.
        single = value.item() if hasattr(value, "item") else value
        return None if isinstance(single, (str, bytes, complex)) else float(single)
    except Exception:  # User code or a tensor of several numbers: the caller records it as a wrong type.
        return None


def plain(value: Any) -> Any:
    """A value that a checkpoint and a table can hold: a number or text as it is, else its text."""
    return value if type(value) in _PLAIN else str(value)


def _rows_of_openrlhf(values: Mapping[str, Any], num_rows: int) -> list[Any] | RewardFailure:
    logs = values.get("extra_logs") or {}
    lists = {name: each for name, each in values.items() if name not in ("rewards", "extra_logs")}
    lists = {"reward": values["rewards"], **lists, **(logs if isinstance(logs, Mapping) else {"logs": logs})}
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    for name, each in lists.items():
        column = row_values(each, num_rows)
        if isinstance(column, RewardFailure):
            return RewardFailure(column.outcome, f"{name}: {column.detail}")
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    return rows
