"""Losses per token of the policy and the critic, and the weights that sum them; masking and summing are left to the learner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape, log_ratio


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs); with A < 0 at most -dual_clip A.

    PPO, https://arxiv.org/abs/1707.06347, equation 7; two bounds: DAPO, https://arxiv.org/abs/2503.14476, section 3.1;
    dual clip: https://arxiv.org/abs/1912.09729.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far the ratio may rise above 1, at least 0.
        dual_clip: bound of the ratio where the advantage is negative, above 1; None: no bound.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `clip_share` and `dual_clip_share`, 1 where
        that clip removed the gradient; `approx_kl`, the k3 estimate of KL(old || current) in nats.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got clip_low={clip_low} and clip_high={clip_high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"need dual_clip > 1, got {dual_clip}; a lower bound would cut the unchanged policy; the paper takes 3")
    difference = log_ratio(logprobs, old_logprobs)
    ratio = difference.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    monitors = {"ratio": ratio.detach(), "clip_share": (clipped > unclipped).to(loss.dtype)}
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        monitors["dual_clip_share"] = (loss > bound).to(loss.dtype)
        loss = torch.minimum(loss, bound)
    monitors["approx_kl"] = (torch.expm1(difference) - difference).detach()
    return loss, monitors


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log p, whose gradient is REINFORCE's as long as the policy is the one that sampled.

    As in https://arxiv.org/abs/2402.14740.

    Args:
        logprobs: [B, T] float with gradient, nats.
        advantages: [B, T] float.

    Returns:
        loss [B, T], masked positions included, and no monitors.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, advantages=advantages)
    return -advantages * logprobs, {}


def value_clip(new_values: Tensor, values: Tensor, returns: Tensor, *, clip: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2).

    https://arxiv.org/abs/2005.12729, section 3; from the PPO code of https://github.com/openai/baselines.

    Args:
        new_values: [B, T] float with gradient, unit of the rewards.
        values: [B, T] float, the same before the update.
        returns: [B, T] float.
        clip: how far the value may move, unit of the rewards, above 0.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `value_clip_share`, 1 where the clip removed the
        gradient.

    Raises:
        ValueError: shapes differ or clip is not above 0.
    """
    check_same_shape(new_values=new_values, values=values, returns=returns)
    if clip <= 0:
        raise ValueError(f"need clip > 0, got {clip}; for an unclipped value loss choose value_mse")
    error = (new_values - returns).square()
    clipped_error = (new_values.clamp(values - clip, values + clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), {"value_clip_share": (clipped_error > error).to(error.dtype)}


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


def token_mean(mask: Tensor) -> Tensor:
    """1 / (sampled tokens of the optimizer batch): each token counts the same.

    DAPO, https://arxiv.org/abs/2503.14476, section 3.3.

    Args:
        mask: [B, T] bool of the whole optimizer batch, not of a micro-batch.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / mask.sum().clamp(min=1)


def seq_mean_token_mean(mask: Tensor) -> Tensor:
    """1 / (rows x sampled tokens of the row): each row counts the same, however long it is.

    GRPO, https://arxiv.org/abs/2402.03300, equation 3.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1) / _num_rows(mask)


def seq_mean_token_sum(mask: Tensor) -> Tensor:
    """1 / rows: the tokens of a row are summed, as in the logprob of the whole answer.

    RLOO, https://arxiv.org/abs/2402.14740.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / _num_rows(mask)


def seq_mean_token_sum_norm(mask: Tensor, *, length: int) -> Tensor:
    """1 / (rows x length) with a constant length: unlike 1 / tokens it does not favour short wins and long losses.

    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.
        length: tokens, at least 1; the longest answer that sampling allows, so that the weight is the same in every step.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"need length >= 1 token, got {length}; set it to the longest answer")
    return mask.float() / _num_rows(mask) / length


def _num_rows(mask: Tensor) -> Tensor:
    """[] int64, rows with at least one sampled token, or 1 if there are none, so that no weight is NaN."""
    return mask.any(dim=1).sum().clamp(min=1)


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"ppo_clip": ppo_clip, "policy_gradient": policy_gradient}
VALUE_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"value_clip": value_clip, "value_mse": value_mse}
AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
