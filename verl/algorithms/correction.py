"""Corrections for the difference between the sampler's and the trainer's logprobs.

A correction returns the denominator of the ratio, old_logprobs [B, T], unchanged at masked positions, and the
weights of the tokens [B, T] or None, both without gradient: a gradient through a weight would train the
policy to change the weight. The policy loss of a token is multiplied by its weight, which is 0 for a rejected
token and at masked positions. A correction that reads `logprobs` is called in every update on the rows of a
micro-batch, and so has no statistics over the batch. The others are called once per step on the whole batch.

rho is exp(trainer - sampler) of a token. Its logarithm is clamped at +-20, and so is the sum of the
logarithms over a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape, masked_mean, row_mean
from verl.algorithms.mismatch import row_sum, sampled_log_ratio


def bypass(rollout_logprobs: Tensor) -> tuple[Tensor, None]:
    """The sampler's logprobs as the denominator: no forward pass of the trainer before the update.

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, bypass mode.

    Args:
        rollout_logprobs: [B, T] float, nats, from the sampler.

    Returns:
        old_logprobs [B, T] and no weights.
    """
    return rollout_logprobs.detach(), None


def recompute(trainer_logprobs: Tensor) -> tuple[Tensor, None]:
    """The trainer's own logprobs before the first update; differences of the sampler are ignored.

    PPO, https://arxiv.org/abs/1707.06347, section 3.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.

    Returns:
        old_logprobs [B, T] and no weights.
    """
    return trainer_logprobs.detach(), None


def token_tis(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float | None = 2.0,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs, and truncated importance weights w = min(rho, cap) for each token.

    Truncated importance sampling, https://fengyao.notion.site/off-policy-rl; cap and normalization:
    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, token level. With cap None it is
    decoupled PPO, https://arxiv.org/abs/2110.00641 and for stale samples AReaL,
    https://arxiv.org/abs/2505.24298, section 5.2.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        cap: largest weight, above 0; values from 1.5 to 5 are in use; None: no cap below exp(20).
        normalize: divide the truncated weights by their mean over the sampled tokens of the batch.

    Returns:
        old_logprobs [B, T] and weights [B, T], in (0, cap] before they are normalized.

    Raises:
        ValueError: shapes differ or cap is not above 0.
    """
    log_rho = sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask)
    weights = torch.where(mask, _truncated(log_rho, cap), 0.0)
    return trainer_logprobs.detach(), _over_mean(weights, mask) if normalize else weights


def seq_tis(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float | None = 2.0,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs, and w = min(prod_t rho_t, cap), the same for all tokens of a row.

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, sequence level: without a cap free of
    bias, of high variance.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        cap: largest weight, above 0; values from 2 to 10 are in use; None: no cap below exp(20).
        normalize: divide the truncated weights by their mean over the rows of the batch that have a sampled
            token.

    Returns:
        old_logprobs [B, T] and weights [B, T], in (0, cap] before they are normalized.

    Raises:
        ValueError: shapes differ or cap is not above 0.
    """
    weights = _truncated(row_sum(sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask)), cap)
    if normalize:
        sampled = mask.any(1)
        weights = _over_mean(torch.where(sampled, weights, 0.0), sampled)
    return trainer_logprobs.detach(), torch.where(mask, weights[:, None], 0.0)


def token_mis(
    trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs, and w = rho where low <= rho <= high, else 0, for each token.

    IcePop, https://ringtech.notion.site/icepop, which takes 0.5 and 5; the bounds here are the ones of
    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, rejection at the token level.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        low: smallest accepted ratio, above 0, at most 1.
        high: largest accepted ratio, at least 1.

    Returns:
        old_logprobs [B, T] and weights [B, T], in [low, high] or 0.

    Raises:
        ValueError: shapes differ or a bound is on the wrong side of 1.
    """
    log_rho = sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask)
    return trainer_logprobs.detach(), torch.where(mask & _within(log_rho, low, high), log_rho.exp(), 0.0)


def seq_mis(
    trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs, and w = prod_t rho_t for rows where it lies in [low, high], else 0.

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, rejection at the sequence level. The
    product grows with the length, so long rows are rejected first; geometric_rs does not depend on it.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        low: smallest accepted product, above 0, at most 1.
        high: largest accepted product, at least 1.

    Returns:
        old_logprobs [B, T] and weights [B, T], in [low, high] or 0.

    Raises:
        ValueError: shapes differ or a bound is on the wrong side of 1.
    """
    log_product = row_sum(sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask))
    weights = torch.where(_within(log_product, low, high), log_product.exp(), 0.0)
    return trainer_logprobs.detach(), torch.where(mask, weights[:, None], 0.0)


def geometric_rs(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    low: float = 0.999,
    high: float = 1.001,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs; rejects rows whose geometric mean of rho is not in [low, high].

    The mean is (prod_t rho_t)^(1/T) over the T sampled tokens of the row.

    https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html, geometric level. Differences of both
    signs cancel in the mean; k3_rs counts them all.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        low: smallest accepted geometric mean, above 0, at most 1.
        high: largest accepted geometric mean, at least 1.
        cap: weights of the accepted rows, min(rho, cap) for each token, above 0; None: 1 for all of them.

    Returns:
        old_logprobs [B, T] and weights [B, T].

    Raises:
        ValueError: shapes differ, a bound is on the wrong side of 1, or cap is not above 0.
    """
    log_rho = sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask)
    return trainer_logprobs.detach(), _accepted(
        log_rho, mask, _within(row_mean(log_rho, mask), low, high), cap
    )


def k3_rs(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    threshold: float = 0.01,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The trainer's logprobs; rejects rows with mean_t(rho - log rho - 1) above the threshold.

    That mean estimates KL(sampler || trainer) of a token, http://joschu.net/blog/kl-approx.html; rejection by
    it: https://verl.readthedocs.io/en/latest/algo/rollout_corr_math.html.

    Args:
        trainer_logprobs: [B, T] float, nats, recomputed by the trainer.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        mask: [B, T] bool.
        threshold: largest accepted mean, nats, at least 0; values from 0.001 to 0.01 are in use.
        cap: weights of the accepted rows, min(rho, cap) for each token, above 0; None: 1 for all of them.

    Returns:
        old_logprobs [B, T] and weights [B, T].

    Raises:
        ValueError: shapes differ, the threshold is below 0, or cap is not above 0.
    """
    _check_threshold(threshold)
    log_rho = sampled_log_ratio(trainer_logprobs, rollout_logprobs, mask)
    # expm1: at the usual differences of 1e-4 the estimate is 5e-9, which fp32 loses when it subtracts 1 from
    # rho.
    kept = row_mean(torch.expm1(log_rho) - log_rho, mask) <= threshold
    return trainer_logprobs.detach(), _accepted(log_rho, mask, kept, cap)


def loglinear(
    logprobs: Tensor, rollout_logprobs: Tensor, staleness: Tensor, mask: Tensor, *, cap: float | None = 5.0
) -> tuple[Tensor, Tensor]:
    """Decoupled PPO without a forward pass: log p_old = log p_roll + s / (s + 1) log(p / p_roll).

    The weights are min(p_old / p_roll, cap). https://inclusionai.github.io/AReaL/algorithms/prox_approx.html,
    with the versions v - s of the sampler, v of the trainer before the step and v + 1 of the policy in the
    update. In the first update of a step the policy is still version v, so the estimate is a little
    behind it there. Without staleness it is `bypass`.

    Args:
        logprobs: [B, T] float, nats, of the policy in the update.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        staleness: [B, T] int64, s, steps between the versions of sampler and trainer, at least 0.
        mask: [B, T] bool.
        cap: largest weight, above 0; the default is that of AReaL's recipes, which reject tokens above it;
            None: no cap below exp(20).

    Returns:
        old_logprobs [B, T] and weights [B, T] in (0, cap].

    Raises:
        ValueError: shapes differ or cap is not above 0.
    """
    check_same_shape(rollout_logprobs=rollout_logprobs, staleness=staleness)
    log_rho = sampled_log_ratio(logprobs, rollout_logprobs, mask)
    steps = staleness.to(log_rho.dtype)
    log_weights = steps / (steps + 1) * log_rho
    return rollout_logprobs.detach() + log_weights, torch.where(mask, _truncated(log_weights, cap), 0.0)


def off_policy_mask(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The sampler's logprobs; rejects tokens with A < 0 in rows whose mean_t log(p_roll / p) is too large.

    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 3.1, off-policy sequence masking: whole rows if
    all tokens of a row have the same advantage. The paper gives no threshold; the default is that of
    https://huggingface.co/docs/trl/paper_index.

    Args:
        logprobs: [B, T] float, nats, of the policy in the update.
        rollout_logprobs: [B, T] float, nats, from the sampler.
        advantages: [B, T] float.
        mask: [B, T] bool.
        threshold: largest mean difference that is accepted, nats per token, at least 0.

    Returns:
        old_logprobs [B, T] and weights [B, T], 0 or 1.

    Raises:
        ValueError: shapes differ or the threshold is below 0.
    """
    _check_threshold(threshold)
    check_same_shape(rollout_logprobs=rollout_logprobs, advantages=advantages)
    log_rho = sampled_log_ratio(logprobs, rollout_logprobs, mask)
    far = -row_mean(log_rho, mask) > threshold
    rejected = far[:, None] & (advantages < 0)
    return rollout_logprobs.detach(), (mask & ~rejected).to(log_rho.dtype)


def _truncated(log_weights: Tensor, cap: float | None) -> Tensor:
    """min(exp(log_weights), cap)."""
    if cap is not None and not cap > 0:
        raise ValueError(f"need cap > 0, got {cap}; values from 1.5 to 5 are in use, None for no cap")
    weights = log_weights.exp()
    return weights if cap is None else weights.clamp(max=cap)


def _within(log_values: Tensor, low: float, high: float) -> Tensor:
    """True where exp(log_values) lies in [low, high].

    Logarithms are compared, since fp32 keeps more digits of them near 1.
    """
    if not 0 < low <= 1 <= high:
        raise ValueError(
            f"need 0 < low <= 1 <= high, got low={low} and high={high}; other bounds reject a sampler "
            "that is equal to the trainer"
        )
    return (log_values >= math.log(low)) & (log_values <= math.log(high))


def _accepted(log_rho: Tensor, mask: Tensor, kept: Tensor, cap: float | None) -> Tensor:
    """[B, T] weights of the tokens in the accepted rows [B], 0 elsewhere; without a cap they are 1."""
    weights = torch.ones_like(log_rho) if cap is None else _truncated(log_rho, cap)
    return torch.where(mask & kept[:, None], weights, 0.0)


def _over_mean(weights: Tensor, sampled: Tensor) -> Tensor:
    """Weights over their mean where something was sampled; they are 0 elsewhere."""
    mean = masked_mean(weights, sampled)
    return weights / torch.where(mean > 0, mean, 1.0)


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(
            f"need threshold >= 0, got {threshold}; below 0 a sampler equal to the trainer is rejected"
        )


CORRECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "bypass": bypass,
    "recompute": recompute,
    "token_tis": token_tis,
    "seq_tis": seq_tis,
    "token_mis": token_mis,
    "seq_mis": seq_mis,
    "geometric_rs": geometric_rs,
    "k3_rs": k3_rs,
    "loglinear": loglinear,
    "off_policy_mask": off_policy_mask,
}
