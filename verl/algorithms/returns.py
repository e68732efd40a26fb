"""Checks of what chosen functions return: form, shapes, types and devices, in a dry run and in the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verl.algorithms.registry import BoundFunction, Check, Columns, ReturnedError, bind
from verl.config.fields import Choice
from verl.data.columns import Reader, readable_by

# Axes, such as "B, T" -> lengths.
Shapes = dict[str, tuple[int, ...]]
_MAX_ROWS = 8


def bind_as(reader: Reader, choice: Choice, table: Mapping[str, Callable[..., Any]]) -> BoundFunction:
    """The function of a choice, with the columns that its kind may read and the check of what it returns.

    Values of a user's function must also be finite, in every call: a NaN would be taken for one of the model.

    Raises:
        ValueError: as `bind`.
    """
    function = bind(choice, table, columns=readable_by(reader), returns=RETURNS[reader])
    return replace(function, returns=_finite_too(function)) if function.is_users else function


def _finite_too(function: BoundFunction) -> Check:
    """The check of what a function returns, and of its values where its columns are finite."""
    form = function.returns
    assert form is not None

    def check(result: Any, columns: Columns) -> str | None:
        problem = form(result, columns)
        if not problem:
            values = result if isinstance(result, tuple) else (result,)
            check_finite(function, columns, [value for value in values if isinstance(value, Tensor)])
        return problem

    return check


def check_finite(function: BoundFunction, columns: Columns, results: Sequence[Tensor | None]) -> None:
    """Check that a function makes finite values of finite columns, at sampled positions if there is a mask.

    Raises:
        ReturnedError: it does not. Where a column that it reads is not finite either, the cause is elsewhere.
    """
    has_mask = "mask" in columns  # pairs have none
    mask = columns["mask"] if has_mask else None
    found = [_not_finite_rows(result, mask) for result in results if result is not None]
    bad = torch.stack(found).any(0) if found else torch.zeros(0, dtype=torch.bool)
    if not bad.any() or any(_not_finite_rows(columns[name], mask).any() for name in function.columns):
        return
    rows = bad.nonzero().squeeze(1).tolist()
    shown = ", ".join(map(str, rows[:_MAX_ROWS])) + ", ..." * (len(rows) > _MAX_ROWS)
    read = ", ".join(function.columns)
    raise ReturnedError(
        f"{function.name}: need finite values, got NaN or infinity in {len(rows)} of {len(bad)} rows (number "
        f"{shown}), although the columns that it reads ({read}) are finite; look for a division by 0, or a "
        "logarithm or root out of its bounds"
    )


def _not_finite_rows(column: Tensor, mask: Tensor | None) -> Tensor:
    """[B] bool, rows of a column [B, ...] that are not finite at a sampled position."""
    bad = ~torch.isfinite(column)
    if column.ndim == 1:
        return bad if mask is None else bad & mask.any(1)
    if mask is None or column.shape[:2] != mask.shape:
        return bad.flatten(1).any(1)
    return (bad.flatten(2).any(2) if bad.ndim > 2 else bad).logical_and(mask).any(1)


def _advantage(result: Any, columns: Columns) -> str | None:
    mask = columns["mask"]
    values, *returns = result if isinstance(result, tuple) else (result,)
    if len(returns) > 1:
        return f"need advantages, or a pair of advantages and returns, got {_described(result)}"
    return _problem("advantages", values, mask, _rows(mask) | _tokens(mask)) or (
        _problem("returns", returns[0], mask, _tokens(mask)) if returns and returns[0] is not None else None
    )


def _policy_loss(result: Any, columns: Columns) -> str | None:
    return _losses("per-token losses", result, columns["mask"], _tokens(columns["mask"]))


def _value_loss(result: Any, columns: Columns) -> str | None:
    mask = columns["mask"]
    return _losses("losses per token or per row", result, mask, _tokens(mask) | _rows(mask))


def _pair_loss(result: Any, columns: Columns) -> str | None:
    first = columns["chosen_logprobs" if "chosen_logprobs" in columns else "chosen_rewards"]
    return _losses("losses per pair", result, first, {"P": tuple(first.shape)})


def _correction(result: Any, columns: Columns) -> str | None:
    mask = columns["mask"]
    if not isinstance(result, tuple) or len(result) != 2:
        return f"need a pair (old_logprobs, weights), got {_described(result)}; weights may be None"
    old_logprobs, weights = result
    return _problem("old_logprobs", old_logprobs, mask, _tokens(mask)) or (
        _problem("weights", weights, mask, _tokens(mask)) if weights is not None else None
    )


def _kl(result: Any, columns: Columns) -> str | None:
    return _problem("the KL of each token", result, columns["mask"], _tokens(columns["mask"]))


def _aggregation(result: Any, columns: Columns) -> str | None:
    return _problem("the weight of each token", result, columns["mask"], _tokens(columns["mask"]))


def _length_penalty(result: Any, columns: Columns) -> str | None:
    rewards = columns["rewards"]
    return _problem("what is added to each reward", result, rewards, {"n": tuple(rewards.shape)})


def _losses(name: str, result: Any, like: Tensor, shapes: Shapes) -> str | None:
    """The problem with a pair of losses and monitors."""
    if not isinstance(result, tuple) or len(result) != 2:
        return f"need a pair of {name} {_listed(shapes)} and a dict of monitors, got {_described(result)}"
    losses, monitors = result
    if problem := _problem(name, losses, like, shapes):
        is_mean = isinstance(losses, Tensor) and losses.ndim == 0
        return problem + "; do not average: the mean of a part of the rows depends on the split" * is_mean
    if not isinstance(monitors, Mapping):
        return f"need a dict of monitors beside the losses, got {_described(monitors)}"
    shape = {axes: lengths for axes, lengths in shapes.items() if lengths == tuple(losses.shape)}
    if unnamed := [name for name in monitors if not isinstance(name, str)]:
        return f"need texts as names of monitors, got {unnamed[0]!r}"
    for monitor, values in monitors.items():
        if not isinstance(values, Tensor) or tuple(values.shape) not in shape.values():
            found = _described(values)
            return (
                f"need the monitor {monitor!r} as a tensor {_listed(shape)}, got {found}; its mean is logged"
            )
    return None


def _problem(name: str, value: Any, like: Tensor, shapes: Shapes) -> str | None:
    """The problem with a tensor that must have one of these shapes and the device of another."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in shapes.values():
        return f"need {name} as a tensor {_listed(shapes)}, got {_described(value)}"
    if not value.is_floating_point():
        return f"need {name} of a floating-point type, got {value.dtype}; convert with .float()"
    if value.device != like.device:
        return f"need {name} on {like.device}, where the columns are, got {value.device}"
    return None


def _tokens(mask: Tensor) -> Shapes:
    return {"B, T": tuple(mask.shape)}


def _rows(mask: Tensor) -> Shapes:
    return {"B": tuple(mask.shape[:1])}


def _listed(shapes: Shapes) -> str:
    return " or ".join(f"[{axes}] = {list(lengths)}" for axes, lengths in shapes.items())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(map(_described, value))}"
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


# Kind of a function -> the check of what it returns.
RETURNS: dict[Reader, Check] = {
    "advantage": _advantage,
    "policy_loss": _policy_loss,
    "value_loss": _value_loss,
    "correction": _correction,
    "kl": _kl,
    "aggregation": _aggregation,
    "length_penalty": _length_penalty,
    "preference_loss": _pair_loss,
    "reward_loss": _pair_loss,
}
