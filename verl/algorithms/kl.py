"""Estimators of the KL to the reference policy per token, and schedules of its coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape, log_ratio


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log p_ref: unbiased, of either sign; for the reward.

    In a loss its gradient is zero in expectation. http://joschu.net/blog/kl-approx.html and
    https://arxiv.org/abs/2402.14740.

    Args:
        logprobs: [B, T] float, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """1/2 (log p - log p_ref)^2: biased and never negative, but its on-policy gradient is that of the KL.

    http://joschu.net/blog/kl-approx.html; its gradient: https://arxiv.org/abs/2510.01555.

    Args:
        logprobs: [B, T] float, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats squared, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log p_ref - log p: unbiased and never negative.

    GRPO, https://arxiv.org/abs/2402.03300, equation 4, and http://joschu.net/blog/kl-approx.html. d is
    clamped at +-20, beyond which there is no gradient: exp(d) overflows fp32 at 88, and such a token would
    already outweigh the whole batch.

    Args:
        logprobs: [B, T] float, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = log_ratio(ref_logprobs, logprobs)
    # expm1: near the reference exp(d) - 1 - d is d^2 / 2, which fp32 loses when it subtracts 1 from exp(d).
    return torch.expm1(difference) - difference


def k1_straight_through(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 - sg(k2) + sg(k1), sg: stop-gradient: the value of k1 with the gradient of k2.

    Unbiased in value and, on-policy, in gradient. http://joschu.net/blog/kl-approx.html; the gradient:
    https://arxiv.org/abs/2510.01555.

    Args:
        logprobs: [B, T] float with gradient, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    return _with_gradient_of_k2(k1(logprobs, ref_logprobs), logprobs, ref_logprobs)


def k3_straight_through(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 - sg(k2) + sg(k3), sg: stop-gradient: the value of k3 with the gradient of k2.

    Unbiased like `k1_straight_through`, and never negative. http://joschu.net/blog/kl-approx.html; the
    gradient: https://arxiv.org/abs/2510.01555.

    Args:
        logprobs: [B, T] float with gradient, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    return _with_gradient_of_k2(k3(logprobs, ref_logprobs), logprobs, ref_logprobs)


def k3_importance(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r k3 with r = exp(logprobs - old_logprobs), with the gradient through both.

    Unbiased in value and gradient off-policy. DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1,
    equation 7.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats, of the policy that sampled.
        ref_logprobs: [B, T] float, nats.

    Returns:
        [B, T] nats, masked positions included.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    return log_ratio(logprobs, old_logprobs).exp() * k3(logprobs, ref_logprobs)


def _with_gradient_of_k2(value: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    carrier = k2(logprobs, ref_logprobs)
    return carrier - carrier.detach() + value.detach()


def scheduled_coef(step: int, *, start: float, end: float, steps: int) -> float:
    """start + (end - start) min(step / steps, 1).

    Linear, like the learning rate in PPO, https://arxiv.org/abs/1707.06347, table 5.

    Args:
        step: steps done so far, 0 at the first one.
        start: coefficient at the first step.
        end: coefficient from step number `steps` on.
        steps: number of steps from start to end, at least 1.

    Returns:
        The coefficient of this step.

    Raises:
        ValueError: step below 0 or steps below 1.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"need step >= 0 and steps >= 1, got step={step} and steps={steps}")
    return start + (end - start) * min(step / steps, 1.0)


def adapted_coef(coef: float, kl: float, *, target: float, horizon: int, num_trajectories: int) -> float:
    """coef (1 + clip(kl / target - 1, -0.2, 0.2) num_trajectories / horizon).

    https://arxiv.org/abs/1909.08593, section 2.2.

    Args:
        coef: coefficient of the last step.
        kl: measured in that step, same unit as the target.
        target: wanted KL, above 0.
        horizon: trajectories over which a unit error is corrected, at least 1.
        num_trajectories: trajectories of the step.

    Returns:
        The coefficient of the next step.

    Raises:
        ValueError: target or horizon out of bounds, or a KL that is not finite.
    """
    if target <= 0 or horizon < 1 or not math.isfinite(kl):
        raise ValueError(
            f"need target > 0, horizon >= 1 and a finite kl, got target={target}, horizon={horizon} and "
            f"kl={kl}"
        )
    error = max(-0.2, min(0.2, kl / target - 1))
    return coef * (1 + error * num_trajectories / horizon)


KL_ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k1_straight_through": k1_straight_through,
    "k3_straight_through": k3_straight_through,
    "k3_importance": k3_importance,
}
