"""Calls of chosen functions on small example columns, to find a wrong option before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from verl.algorithms.registry import BoundFunction, ReturnedError, UserFunctionError
from verl.algorithms.returns import check_finite
from verl.data.columns import CHOSEN, COLUMNS, LOGPROB, ColumnSpec, readable_by
from verl.utils.user_code import exception_text

# Length of each axis of `ColumnSpec.shape`.
SIZES = {"B": 4, "S": 2, "T": 3, "K": 2, "k": 2, "P": 3}
# Columns that come from the model that is trained, with gradient.
_TRAINED = (
    "logprobs", "top_logprobs", "new_values", "prm_logprobs", "chosen_logprobs", "rejected_logprobs",
    "chosen_rewards", "rejected_rewards",
)  # fmt: skip


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


def try_out(function: BoundFunction, names: Collection[str] | None = None, *, learns: bool = False) -> Any:
    """Result of one call on the example columns of these names.

    Args:
        function: is called with copies of the columns.
        names: of the columns; None: all that a chosen function may read.
        learns: it is a loss: a backward pass must work too.

    Raises:
        ValueError: the function refuses its options, cannot be called on such columns, changes them, or
            returns something else than it must, such as a loss without gradient.
    """
    columns = example_columns(names)
    trained = [n for n in _TRAINED if n in function.columns and n in columns] if learns else []
    leaves = {name: columns[name].clone().requires_grad_() for name in trained}
    # Copies of the leaves, since PyTorch itself refuses to change a leaf.
    given = {name: leaves.get(name, column).clone() for name, column in columns.items()}
    num_rows = len(next(iter(columns.values())))
    try:
        result = function(given)
        _check_unchanged(function, columns, given)
        _check_result(function, given, result)
        if learns:
            _check_gradient(function, result, leaves)
    except ReturnedError:
        raise
    except ValueError as error:
        raise ValueError(f"{function.name}: {error}") from error
    # A border to a user's function: it fails here, before the run, and not in its first step.
    except Exception as error:
        cause = error.__cause__ if isinstance(error, UserFunctionError) and error.__cause__ else error
        raise ValueError(
            f"{function.name} fails on {num_rows} rows of small columns: {exception_text(cause)}; correct it"
        ) from error
    return result


def _check_unchanged(
    function: BoundFunction, columns: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> None:
    changed = [name for name in function.columns if not torch.equal(given[name].detach(), columns[name])]
    if changed:
        raise ReturnedError(
            f"{function.name}: need columns left as they are, got changes in {', '.join(changed)}, which "
            "others read too; work on a copy, such as column.clone()"
        )


def _check_result(function: BoundFunction, given: Mapping[str, Tensor], result: Any) -> None:
    if "mask" in given:
        results = result if isinstance(result, tuple) else (result,)
        check_finite(function, given, [each for each in results if isinstance(each, Tensor)])


def _check_gradient(function: BoundFunction, result: Any, leaves: Mapping[str, Tensor]) -> None:
    loss = result[0] if isinstance(result, tuple) else result
    if not loss.requires_grad:
        read = ", ".join(leaves) or f"a column of the model, but it reads only {', '.join(function.columns)}"
        raise ReturnedError(
            f"{function.name}: need a loss with a gradient with respect to {read}, got one without; do not "
            "detach it, and compute it with PyTorch alone"
        )
    torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)


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
