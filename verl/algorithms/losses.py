"""Losses per token of the policy; masking and summing are left to the learner."""

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


POLICY_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"ppo_clip": ppo_clip, "policy_gradient": policy_gradient}
