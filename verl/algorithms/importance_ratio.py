"""The ratio of the policy to the policy that sampled, its clip, and the monitors of losses with a ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.functional import log_ratio


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """r = exp(logprobs - old_logprobs) [B, T], and its monitors.

    The monitors are detached: `ratio`, and `approx_kl`, the k3 estimate of KL(old || current).
    """
    difference = log_ratio(logprobs, old_logprobs)
    ratio = difference.exp()
    return ratio, {"ratio": ratio.detach(), "approx_kl": (torch.expm1(difference) - difference).detach()}


def clipped_loss(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), and 1 where the clip removed the gradient."""
    check_clip(clip_low, clip_high)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(unclipped, clipped), (clipped > unclipped).to(ratio.dtype)


def check_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError unless clip_low is in [0, 1] and clip_high at least 0."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"need 0 <= clip_low <= 1 and clip_high >= 0, got clip_low={clip_low} and clip_high={clip_high}; "
            "they are distances from a ratio of 1"
        )
