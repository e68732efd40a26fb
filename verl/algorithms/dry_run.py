"""Chosen functions tried on small columns before anything is loaded, so that a wrong option is found at the
start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl.algorithms.registry import Bound

_ROWS, _WIDTH, _TOP = 4, 3, 2


def probe_columns() -> dict[str, Tensor]:
    """Every column of `COLUMNS` for two groups of two rows with rewards of 0 and 1, the same ones at every
    call.
    """
    g = torch.Generator().manual_seed(0)
    shape = (_ROWS, _WIDTH)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, True], [True, True, False]])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    logprobs = -torch.rand(shape, generator=g) - 0.1

    def near(column: Tensor) -> Tensor:
        return (column + 0.1 * torch.randn(column.shape, generator=g)).clamp(max=-0.01)

    columns = {
        name: near(logprobs)
        for name in ("old_logprobs", "rollout_logprobs", "trainer_logprobs", "ref_logprobs")
    }
    columns |= {name: near(logprobs) for name in ("prm_logprobs", "teacher_logprobs")}
    columns |= {
        name: torch.rand(shape, generator=g)
        for name in ("values", "new_values", "returns", "token_rewards", "noise")
    }
    top = torch.log_softmax(torch.randn(*shape, 5, generator=g), -1)[..., :_TOP]
    return columns | {
        "logprobs": logprobs,
        "advantages": (rewards - 0.5)[:, None].expand(shape).clone(),
        "mask": mask,
        "minibatch_mask": mask,
        "rewards": rewards,
        "reward_parts": torch.stack([rewards, 1 - rewards], 1),
        "reward_weights": torch.ones(_ROWS, 2),
        "greedy_rewards": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "truncated": torch.tensor([False, False, True, False]),
        "versions": torch.ones(shape, dtype=torch.int64),
        "staleness": torch.tensor([[0, 1, 2]]).expand(shape).clone(),
        "sum_squared_probs": logprobs.exp().square() + 0.01,
        "teacher_top_logprobs": top,
        "top_logprobs": top - 0.1,
    }


def try_out(functions: Sequence[Bound]) -> None:
    """Calls each function once.

    Raises:
        ValueError: one refuses its options, or cannot be called on such columns.
    """
    for bound in functions:
        try:
            bound(probe_columns())
        except ValueError as error:
            raise ValueError(f"{bound.name}: {error}") from error
        except Exception as error:  # the process border to a user's function, told before the run instead of in its first step
            raise ValueError(
                f"{bound.name} fails on {_ROWS} rows of small columns: {type(error).__name__}: {error}; correct it"
            ) from error


def learns_from_zero_advantages(loss: Bound) -> bool:
    """Whether a policy loss has a gradient where all advantages of a row are 0."""
    columns = probe_columns()
    columns["advantages"][:2] = 0
    columns["logprobs"].requires_grad_()
    columns["top_logprobs"].requires_grad_()
    values, _ = loss(columns)
    if not values.requires_grad:
        return False
    grads = torch.autograd.grad(
        values.sum(), [columns["logprobs"], columns["top_logprobs"]], allow_unused=True
    )
    return any(grad is not None and bool(grad[:2].any()) for grad in grads)
