"""Losses per token of the critic; masking and summing are left to the learner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape
from verl.algorithms.preference_losses import outcome_cross_entropy


def value_clip(
    new_values: Tensor, values: Tensor, returns: Tensor, *, clip: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    https://arxiv.org/abs/2005.12729, section 3; from the PPO code of https://github.com/openai/baselines.

    Args:
        new_values: [B, T] float with gradient, unit of the rewards.
        values: [B, T] float, the same before the update.
        returns: [B, T] float.
        clip: how far the value may move, unit of the rewards, above 0.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `value_clip_share`, 1 where the
        clip removed the gradient.

    Raises:
        ValueError: shapes differ or clip is not above 0.
    """
    check_same_shape(new_values=new_values, values=values, returns=returns)
    if clip <= 0:
        raise ValueError(f"need clip > 0, got {clip}; for an unclipped value loss choose value_mse")
    error = (new_values - returns).square()
    clipped_error = (new_values.clamp(values - clip, values + clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), {
        "value_clip_share": (clipped_error > error).to(error.dtype)
    }


def value_mse(new_values: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """1/2 (V - R)^2.

    PPO, https://arxiv.org/abs/1707.06347, equation 9; the half makes it equal to value_clip inside the clip.

    Args:
        new_values: [B, T] float with gradient, unit of the rewards.
        returns: [B, T] float.

    Returns:
        loss [B, T], masked positions included, and no monitors.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(new_values=new_values, returns=returns)
    return 0.5 * (new_values - returns).square(), {}


# A loss [B] is one of whole rows, and is averaged over them; outcome_cross_entropy is that of an implicit
# process reward model.
VALUE_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "value_clip": value_clip,
    "value_mse": value_mse,
    "outcome_cross_entropy": outcome_cross_entropy,
}
