"""Calls of chosen functions on small example columns, to find a wrong option before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from verl.algorithms.registry import BoundFunction
from verl.data.columns import CHOSEN, COLUMNS, LOGPROB, ColumnSpec, readable_by

# Length of each axis of `ColumnSpec.shape`.
SIZES = {"B": 4, "S": 2, "T": 3, "K": 2, "k": 2, "P": 3}


def example_columns(names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Small columns of the shape, type and bounds that the table of columns gives, equal at every call.

    The rows are two groups of two, with rewards of 0 and 1; all logprobs of a token are near each other.

    Args:
        names: of the columns; None: all that a chosen function may read.
    """
    generator = torch.Generator().manual_seed(0)
    names = readable_by(*CHOSEN) if names is None else names
    columns = {name: _example(COLUMNS[name], generator) for name in names}
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, True], [True, True, False]])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    # Columns that depend on each other, or that a function compares.
    related = {
        "mask": mask,
        "minibatch_mask": mask,
        "rewards": rewards,
        "reward_parts": torch.stack([rewards, 1 - rewards], 1),
        "reward_weights": torch.ones(4, 2),
        "greedy_rewards": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "num_tokens": torch.tensor([2, 3, 5, 3]),
        "advantages": (rewards - 0.5)[:, None].expand(mask.shape).clone(),
    }
    if "sum_squared_probs" in columns:
        related["sum_squared_probs"] = columns["trainer_logprobs"].exp().square() + 0.01
    return columns | {name: column for name, column in related.items() if name in columns}


def _example(spec: ColumnSpec, generator: torch.Generator) -> Tensor:
    shape, values = [SIZES[axis] for axis in spec.axes], spec.values
    if values.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if values.dtype == torch.int64:
        return torch.randint(1, 3, shape, generator=generator)
    if values != LOGPROB:
        return torch.rand(shape, generator=generator)
    # The same logprobs for every model, up to a small difference, so that no ratio is far from 1.
    common = -torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return common + 0.1 * torch.rand(shape, generator=generator)


def try_out(function: BoundFunction, names: Collection[str] | None = None) -> Any:
    """Result of one call on the example columns of these names.

    Raises:
        ValueError: the function refuses its options, or cannot be called on such columns.
    """
    columns = example_columns(names)
    try:
        return function(columns)
    except ValueError as error:
        raise ValueError(f"{function.name}: {error}") from error
    # A border to a user's function: it fails here, before the run, and not in its first step.
    except Exception as error:
        num_rows = len(next(iter(columns.values())))
        raise ValueError(
            f"{function.name} fails on {num_rows} rows of small columns: {type(error).__name__}: {error}; "
            "correct it"
        ) from error


def learns_from_zero_advantages(loss: BoundFunction) -> bool:
    """True if a policy loss has a gradient where all advantages of a row are 0."""
    columns = example_columns()
    columns["advantages"][:2] = 0
    leaves = [columns[name].requires_grad_() for name in ("logprobs", "top_logprobs")]
    values, _ = loss(columns)
    if not values.requires_grad:
        return False
    grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    return any(grad is not None and bool(grad[:2].any()) for grad in grads)
