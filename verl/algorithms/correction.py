"""Difference between the sampler's and the trainer's logprobs: what the ratio divides by, token weights, and monitors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import LOG_RATIO_LIMIT, check_same_shape, log_ratio, masked_mean


def bypass(rollout_logprobs: Tensor) -> tuple[Tensor, None]:
    """The ratio divides by the sampler's probabilities: no forward pass of the trainer before the update.

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, bypass mode.

    Args:
        rollout_logprobs: [B, T] float, nats, from the sampler.

    Returns:
        old_logprobs [B, T] and no weights.
    """
    return rollout_logprobs.detach(), None


def recompute(trainer_logprobs: Tensor) -> tuple[Tensor, None]:
    """The ratio divides by the trainer's own probabilities before the first update; the sampler's differences are ignored.

    PPO, https://arxiv.org/abs/1707.06347, section 3.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.

    Returns:
        old_logprobs [B, T] and no weights.
    """
    return trainer_logprobs.detach(), None


def token_tis(trainer_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float = 2.0) -> tuple[Tensor, Tensor]:
    """The trainer's probabilities, and truncated importance weights w = min(exp(trainer - rollout), cap) for each token.

    Truncated importance sampling, https://neurips.cc/virtual/2025/124259; cap and decoupled form:
    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        cap: largest weight, above 0.

    Returns:
        old_logprobs [B, T] and weights [B, T] in (0, cap], constants without gradient; masked positions included.

    Raises:
        ValueError: shapes differ or cap is not above 0.
    """
    check_same_shape(trainer_logprobs=trainer_logprobs, rollout_logprobs=rollout_logprobs)
    if cap <= 0:
        raise ValueError(f"need cap > 0, got {cap}; values from 1.5 to 5 are in use")
    # Detached: the weight is a change of measure, and a gradient through it would train the policy to change the weight.
    old_logprobs = trainer_logprobs.detach()
    return old_logprobs, log_ratio(old_logprobs, rollout_logprobs.detach()).exp().clamp(max=cap)


def mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the trainer is from the sampler over the sampled tokens, with rho = exp(logprobs - rollout_logprobs).

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, diagnostics.

    Args:
        logprobs: [B, T] float, nats, of the trainer, for the weights that sampled.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.

    Returns:
        Scalars [], detached: `kl_k1` mean(-log rho) and `kl_k3` mean(rho - 1 - log rho), estimates of KL(sampler || trainer) in
        nats; `chi2_token` mean(rho^2) - 1; `max_abs_difference` of the logprobs in nats; `ess_share`, the effective sample
        size (sum rho)^2 / sum rho^2 as a share of the tokens. With nothing sampled: no difference and a share of 1.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    difference = torch.where(mask, rollout_logprobs - logprobs, 0.0).detach()
    log_rho = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # expm1 throughout: the differences are about 1e-4, and rho^2 - 1 in fp32 would keep three digits of them.
    rho_minus_1, chi2 = torch.expm1(log_rho), masked_mean(torch.expm1(2 * log_rho), mask)
    return {
        "kl_k1": masked_mean(difference, mask),
        "kl_k3": masked_mean(rho_minus_1 - log_rho, mask),
        "chi2_token": chi2,
        "max_abs_difference": difference.abs().max() if difference.numel() else difference.new_zeros(()),
        "ess_share": (1 + masked_mean(rho_minus_1, mask)).square() / (1 + chi2),
    }


CORRECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"bypass": bypass, "recompute": recompute, "token_tis": token_tis}
