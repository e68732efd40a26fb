"""Losses with statistics over all rows of an optimizer update.

They read `minibatch_mask` and are called once per update.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from verl.algorithms.functional import check_same_rows, check_same_shape, log_ratio, masked_mean
from verl.algorithms.importance_ratio import clipped_loss, policy_ratio


def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    minibatch_mask: Tensor,
    noise: Tensor,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss without gradient for a random share of the tokens of high covariance.

    The covariance of such a token lies between the two bounds. Clip-Cov, https://arxiv.org/abs/2505.22617,
    equations 10 and 11, cov = (A - mean A)(log p - mean log p) over the sampled tokens of the minibatch.
    Bounds and the wide PPO clip are those of the authors' recipes. At least one eligible token is chosen, as
    in their code (the paper rounds down); as in the paper, a token that PPO clips may be chosen.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        minibatch_mask: [B, T] bool, of all rows of the update.
        noise: [B, T] float in [0, 1); the eligible tokens with the smallest are chosen.
        share: of the sampled tokens, above 0 and at most 1.
        cov_low: lower bound of the covariance, unit of the advantages times nats.
        cov_high: upper bound, above the lower one.
        clip_low: distance of the lower clip from 1, in [0, 1].
        clip_high: distance of the upper clip from 1, at least 0.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `clip_share`, 1 where
        the PPO clip removed the gradient; `cov_share`, 1 for a chosen token; `approx_kl`, the k3 estimate of
        KL(old || current) in nats.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        minibatch_mask=minibatch_mask,
        noise=noise,
    )
    _check_share(share)
    if not cov_low < cov_high:
        raise ValueError(
            f"need cov_low < cov_high, got cov_low={cov_low} and cov_high={cov_high}; "
            "the authors' recipes take 1 and 5"
        )
    covariance = _covariance(logprobs, advantages, minibatch_mask)
    eligible = minibatch_mask & (covariance > cov_low) & (covariance < cov_high)
    chosen = _first(noise, eligible, _count(share, minibatch_mask))
    ratio, monitors = policy_ratio(logprobs, old_logprobs)
    loss, clip_share = clipped_loss(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    monitors |= {"clip_share": clip_share, "cov_share": chosen.to(loss.dtype)}
    return torch.where(chosen, loss.detach(), loss), monitors


def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    minibatch_mask: Tensor,
    *,
    share: float = 2e-3,
    kl_coef: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-r A, plus kl_coef |log r| for the share of tokens with the largest covariance.

    KL-Cov, https://arxiv.org/abs/2505.22617, equations 12 and 13, with the covariance of `clip_cov`; |log r|
    stands for the KL in the authors' code. Share and coefficient are those of the 7B model in section 4.3. At
    least one token is chosen, as in the authors' code.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        minibatch_mask: [B, T] bool, of all rows of the update.
        share: of the sampled tokens, above 0 and at most 1.
        kl_coef: weight of the distance, at least 0.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `cov_share`, 1 for a
        chosen token; `approx_kl`, the k3 estimate of KL(old || current) in nats.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, minibatch_mask=minibatch_mask
    )
    _check_share(share)
    if not kl_coef >= 0:
        raise ValueError(f"need kl_coef >= 0, got {kl_coef}; the paper takes 1")
    covariance = _covariance(logprobs, advantages, minibatch_mask)
    chosen = _first(-covariance, minibatch_mask, _count(share, minibatch_mask))
    ratio, monitors = policy_ratio(logprobs, old_logprobs)
    penalty = torch.where(chosen, kl_coef * log_ratio(logprobs, old_logprobs).abs(), 0.0)
    return -ratio * advantages + penalty, monitors | {"cov_share": chosen.to(ratio.dtype)}


def online_dpo(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    minibatch_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta (h_best - h_worst)) for the best and the worst row of each group.

    h is the sum of log p/p_ref over the sampled tokens of a row. Online DPO,
    https://arxiv.org/abs/2402.04792, with the loss of DPO, https://arxiv.org/abs/2305.18290, equation 7. Both
    rows have the loss of their pair at each of their tokens, and other rows 0, so under
    `seq_mean_token_mean` the total is twice the sum over the pairs, divided by the number of rows: with n
    answers to each prompt, 2 / n times the mean over the prompts. A group whose rewards are all equal is no
    pair and counts 0. Of equal rewards the first row is taken.

    Args:
        logprobs: [B, T] float with gradient, nats.
        ref_logprobs: [B, T] float, nats.
        rewards: [B] float.
        group_ids: [B] int.
        minibatch_mask: [B, T] bool, of all rows of the update; a row without sampled tokens is in no pair.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: assumed share of wrong preferences, from 0 to below 0.5.

    Returns:
        loss [B, T], equal for the tokens of a pair, and detached monitors [B, T]: `pair_share`, 1 for rows of
        a pair; `pair_margin`, beta (h_best - h_worst), 0 elsewhere.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, minibatch_mask=minibatch_mask)
    check_same_rows(rewards=rewards, group_ids=group_ids, minibatch_mask=minibatch_mask)
    if not (beta > 0 and 0 <= label_smoothing < 0.5):
        bounds = f"beta={beta} and label_smoothing={label_smoothing}"
        raise ValueError(
            f"need beta > 0 and 0 <= label_smoothing < 0.5, got {bounds}; the paper of DPO takes 0.1 and 0"
        )
    best, worst = _pairs(rewards, group_ids, minibatch_mask.any(1))
    distance = torch.where(minibatch_mask, logprobs - ref_logprobs, 0).sum(1)
    margin = beta * (distance[best] - distance[worst])
    pair_loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    rows, of_pair = torch.cat([best, worst]), torch.arange(len(best), device=best.device).repeat(2)
    loss = torch.zeros_like(distance).index_add(0, rows, pair_loss[of_pair])
    monitors = torch.zeros_like(distance).index_add(0, rows, margin.detach()[of_pair])
    paired = torch.zeros_like(distance).index_fill(0, rows, 1.0)
    shape = minibatch_mask.shape
    return loss[:, None].expand(shape), {
        "pair_share": paired[:, None].expand(shape),
        "pair_margin": monitors[:, None].expand(shape),
    }


def _pairs(rewards: Tensor, group_ids: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [P] of the best and of the worst usable answer of each group whose rewards differ."""
    best, worst = [], []
    for group in group_ids.unique().tolist():
        rows = ((group_ids == group) & usable).nonzero().squeeze(1)
        if len(rows) and rewards[rows].min() < rewards[rows].max():
            best.append(rows[rewards[rows].argmax()])
            worst.append(rows[rewards[rows].argmin()])
    none = group_ids.new_empty(0, dtype=torch.int64)
    return (torch.stack(best), torch.stack(worst)) if best else (none, none)


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T], (A - mean A)(log p - mean log p), with means over the sampled tokens.

    In fp64, since the order of rows must not change the rank of a token.
    """
    a, p = advantages.double(), logprobs.detach().double()
    return (a - masked_mean(a, mask)) * (p - masked_mean(p, mask))


def _count(share: float, mask: Tensor) -> int:
    """Number of chosen tokens: at least one, as in the authors' code."""
    return max(1, int(share * int(mask.sum())))


def _first(keys: Tensor, eligible: Tensor, count: int) -> Tensor:
    """[B, T] bool, the `count` eligible places with the smallest keys, or all of them if there are fewer."""
    chosen = torch.zeros_like(eligible).flatten()
    places = eligible.flatten().nonzero().squeeze(1)
    order = keys.flatten()[places].argsort(stable=True)[:count]
    chosen[places[order]] = True
    return chosen.view_as(eligible)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(
            f"need 0 < share <= 1, got {share}; the paper takes 2e-4 to 2e-3; ppo_clip has no share"
        )
