"""Difference between the trainer's and the sampler's logprobs, and statistics of correction weights."""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.functional import LOG_RATIO_LIMIT, check_same_shape, log_ratio, masked_mean, row_mean
from verl.algorithms.kl import k3

# Monitor that counts the tokens of `fresh_mask`, and those that are sums over these tokens alone.
FRESH_TOKENS, OVER_FRESH_TOKENS = "fresh_tokens", ("kl_sampler", "sampler_gap")


def fresh_mask(mask: Tensor, staleness: Tensor) -> Tensor:
    """[B, T] bool, the sampled tokens of rows that the version now trained has sampled as a whole.

    On other rows sampler and trainer differ by what the policy has learned in between, which is no error. A
    row that was continued with new weights counts among those: the keys and values of its first tokens may
    be those of older weights.

    Args:
        mask: [B, T] bool.
        staleness: [B, T], steps between the version that sampled a token and the one that is trained.
    """
    return mask & ~(mask & (staleness > 0)).any(1, keepdim=True)


def sampler_difference(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums of `kl_sampler` (k3, an estimate of KL(sampler || trainer)) and `sampler_gap`, and its maximum.

    Args:
        logprobs: [B, T] float, nats, of the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool, tokens that count.
    """
    gap = torch.where(mask, (rollout_logprobs - logprobs.detach()).abs(), 0)
    kl = torch.where(mask, k3(rollout_logprobs, logprobs.detach()), 0)
    sums = {"kl_sampler": kl.sum(), "sampler_gap": gap.sum()}
    return sums | ({"sampler_gap_max": gap.max()} if mask.numel() else {})


def mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Difference between trainer and sampler over the sampled tokens, rho = exp(logprobs - rollout_logprobs).

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, diagnostics.

    Args:
        logprobs: [B, T] float, nats, of the trainer, for the weights that sampled.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.

    Returns:
        Scalars [], detached: `kl_k1` mean(-log rho) and `kl_k3` mean(rho - 1 - log rho), estimates of
        KL(sampler || trainer) in nats; `chi2_token` mean(rho^2) - 1; `chi2_seq`, the mean over rows of
        (prod_t rho_t)^2, minus 1; `ppl_ratio`, exp(mean over rows of mean_t(-log rho_t)), the geometric mean
        of perplexity(trainer) / perplexity(sampler) of the rows; `max_abs_difference` of the logprobs in
        nats; `ess_share`, the effective sample size (sum rho)^2 / sum rho^2 as a share of the tokens. Rows
        without a sampled token do not count. With nothing sampled: no difference and shares and ratios of 1.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(logprobs=logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    difference = torch.where(mask, rollout_logprobs - logprobs, 0.0).detach()
    log_rho, rows = sampled_log_ratio(logprobs, rollout_logprobs, mask), mask.any(1)
    # expm1 throughout: the differences are about 1e-4, and rho^2 - 1 in fp32 would keep three digits of them.
    return {
        "kl_k1": masked_mean(difference, mask),
        "kl_k3": masked_mean(torch.expm1(log_rho) - log_rho, mask),
        "chi2_token": masked_mean(torch.expm1(2 * log_rho), mask),
        "chi2_seq": masked_mean(torch.expm1(2 * row_sum(log_rho)), rows),
        "ppl_ratio": masked_mean(-row_mean(log_rho, mask), rows).exp(),
        "max_abs_difference": difference.abs().max() if difference.numel() else difference.new_zeros(()),
        "ess_share": _ess_share(torch.where(mask, log_rho.exp(), 0.0), mask),
    }


def weight_monitors(weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Statistics of the weights of a correction over the sampled tokens.

    Effective sample size of importance weights, https://arxiv.org/abs/1809.04129.

    Args:
        weights: [B, T] float, from a correction.
        mask: [B, T] bool.

    Returns:
        Scalars [], detached, over the sampled tokens: `rejected_share`, with weight 0; `weight_mean`, the
        rejected included; `ess_share`, (sum w)^2 / sum w^2 as a share of the tokens, in (0, 1], and 0 if all
        are rejected. With nothing sampled they are 0, 1 and 1, as without a correction.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(weights=weights, mask=mask)
    weights = torch.where(mask, weights, 0.0).detach()
    return {
        "rejected_share": masked_mean((weights == 0).to(weights.dtype), mask),
        "weight_mean": torch.where(mask.any(), masked_mean(weights, mask), 1.0),
        "ess_share": _ess_share(weights, mask),
    }


def sampled_log_ratio(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] clamped log-ratio without gradient, 0 at masked positions."""
    check_same_shape(logprobs=logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    return torch.where(mask, log_ratio(logprobs.detach(), rollout_logprobs.detach()), 0.0)


def row_sum(log_rho: Tensor) -> Tensor:
    """[B] log of the product of each row, clamped."""
    return log_rho.sum(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _ess_share(weights: Tensor, mask: Tensor) -> Tensor:
    """Effective sample size of weights [B, T] as a share of the sampled tokens; 1 with nothing sampled.

    The weights are 0 at masked positions.
    """
    squares, count = weights.square().sum(), mask.sum()
    # Rounding of the two sums may give more than 1; with all weights 0 the share is undefined.
    share = weights.sum().square() / (count * squares).where(squares > 0, 1.0)
    return torch.where(count > 0, share.clamp(max=1), 1.0)
