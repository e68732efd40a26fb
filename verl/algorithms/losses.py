"""Losses of the policy per token; the learner masks and sums them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape, log_ratio, row_mean
from verl.algorithms.importance_ratio import check_clip, clipped_loss, policy_ratio
from verl.algorithms.minibatch_losses import clip_cov, kl_cov, online_dpo

Loss = tuple[Tensor, dict[str, Tensor]]


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Loss:
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


def importance(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Loss:
    """-r A with r = exp(logprobs - old_logprobs), without a clip: the exact off-policy gradient.

    The surrogate of https://arxiv.org/abs/1502.05477, equation 14; as the loss of on-policy distillation in
    https://thinkingmachines.ai/blog/on-policy-distillation/.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `approx_kl`, see
        `ppo_clip`.

    Raises:
        ValueError: shapes differ.
    """
    ratio, monitors = _ratio(logprobs, old_logprobs, advantages)
    return -ratio * advantages, monitors


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Loss:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs).

    Where A < 0 the loss is at most -dual_clip A. PPO, https://arxiv.org/abs/1707.06347, equation 7; two
    bounds: DAPO, https://arxiv.org/abs/2503.14476, section 3.1; dual clip: https://arxiv.org/abs/1912.09729.
    The two-sided clip of INTELLECT-2, https://arxiv.org/abs/2505.07291, which bounds the ratio by delta > 1 +
    clip_high where A < 0, is the same function with dual_clip = delta.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far the ratio may rise above 1, at least 0.
        dual_clip: bound of the ratio where the advantage is negative, above 1; None: no bound.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `clip_share` and
        `dual_clip_share`, 1 where that clip removed the gradient; `approx_kl`, the k3 estimate of KL(old ||
        current) in nats.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    ratio, monitors = _ratio(logprobs, old_logprobs, advantages)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(
            f"need dual_clip > 1, got {dual_clip}; a smaller one would cut the unchanged policy; "
            "the paper takes 3"
        )
    loss, monitors["clip_share"] = clipped_loss(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        monitors["dual_clip_share"] = (loss > bound).to(loss.dtype)
        loss = torch.minimum(loss, bound)
    return loss, monitors


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Loss:
    """max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A) with the sequence's ratio s = exp(mean_t log r_t).

    The loss is the same at each token of the sequence. GSPO, https://arxiv.org/abs/2507.18071, equations 5
    and 7; clip ranges of section 5.1. A row has one advantage, the mean over its sampled tokens. Under
    `seq_mean_token_mean` the whole is the paper's mean over sequences.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        mask: [B, T] bool.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far the ratio may rise above 1, at least 0.

    Returns:
        loss [B, T], equal for the tokens of a row, and detached monitors [B, T]: `ratio` of the sequence;
        `clip_share`, 1 where the clip removed the gradient; `approx_kl`, of the tokens.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    _, monitors = _ratio(logprobs, old_logprobs, advantages, mask=mask)
    advantages = row_mean(advantages, mask)[:, None].expand(mask.shape)
    ratio = row_mean(log_ratio(logprobs, old_logprobs), mask).exp()[:, None].expand(mask.shape)
    loss, clip_share = clipped_loss(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return loss, monitors | {"ratio": ratio.detach(), "clip_share": clip_share}


def gspo_token(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Loss:
    """`gspo` with the ratio sg(s) p / sg(p), sg: stop-gradient; each token may have its own advantage.

    GSPO-token, https://arxiv.org/abs/2507.18071, equations 13 and 14. With one advantage for all tokens of a
    row the value and, under `seq_mean_token_mean`, the gradient are those of `gspo`.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        mask: [B, T] bool.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far the ratio may rise above 1, at least 0.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T] as of `gspo`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    _, monitors = _ratio(logprobs, old_logprobs, advantages, mask=mask)
    of_row = row_mean(log_ratio(logprobs, old_logprobs), mask).detach()[:, None]
    # The difference first: it is exactly 0. A sum with a logprob of -20 would round off differences that the
    # clip of 3e-4 depends on.
    ratio = (of_row + (logprobs - logprobs.detach())).exp()
    loss, clip_share = clipped_loss(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return loss, monitors | {"ratio": ratio.detach(), "clip_share": clip_share}


def gmpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.4
) -> Loss:
    """-A exp(mean_t sign(A) min(sign(A) log r_t, sign(A) clip(log r_t, -clip, clip))).

    The loss is the same at each token of the sequence. GMPO, https://arxiv.org/abs/2507.20673, equation 4 and
    algorithm 1: the geometric mean of the token ratios, each clipped. A row has one advantage, the mean over
    its sampled tokens. Under `seq_mean_token_mean` the whole is the mean over sequences.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        mask: [B, T] bool.
        clip: bound of the log-ratio of a token, nats, above 0.

    Returns:
        loss [B, T], equal for the tokens of a row, and detached monitors [B, T]: `ratio` and `approx_kl` of
        the tokens; `clip_share`, 1 where the clip removed the token's gradient.

    Raises:
        ValueError: shapes differ or clip is not above 0.
    """
    _, monitors = _ratio(logprobs, old_logprobs, advantages, mask=mask)
    if not clip > 0:
        raise ValueError(f"need clip > 0, got {clip}; the paper takes 0.4")
    advantages = row_mean(advantages, mask)[:, None].expand(mask.shape)
    sign, difference = advantages.sign(), log_ratio(logprobs, old_logprobs)
    signed = torch.minimum(sign * difference, sign * difference.clamp(-clip, clip))
    monitors["clip_share"] = (sign * difference > signed).to(logprobs.dtype)
    ratio = row_mean(sign * signed, mask).exp()[:, None]
    return -(ratio * advantages), monitors


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_high: float = 4.0,
    clip_low: float | None = None,
) -> Loss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p, sg: stop-gradient; no token loses its gradient.

    CISPO, https://arxiv.org/abs/2506.13585, equations 4 and 5. The paper has no lower bound and does not say
    its upper one; a weight of at most 5 = 1 + clip_high is ScaleRL's, https://arxiv.org/abs/2510.13786.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        clip_high: how far the weight may rise above 1, at least 0.
        clip_low: how far the weight may fall below 1, in [0, 1]; None: no bound.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `clip_share`, 1 where
        the weight was cut; `approx_kl`, see `ppo_clip`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    ratio, monitors = _ratio(logprobs, old_logprobs, advantages)
    check_clip(1.0 if clip_low is None else clip_low, clip_high)
    weight = ratio.detach().clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    monitors["clip_share"] = (weight != ratio.detach()).to(weight.dtype)
    return -weight * advantages * logprobs, monitors


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Loss:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a soft gate in place of the clip, tau by the sign of the advantage.

    SAPO, https://arxiv.org/abs/2511.20347, equations 5 and 6. Its gradient is that of `importance` times a
    gate, 4 s (1 - s) with s the sigmoid, which is 1 at r = 1.

    Args:
        logprobs: [B, T] float with gradient, nats.
        old_logprobs: [B, T] float, nats.
        advantages: [B, T] float.
        tau_positive: steepness where A > 0, above 0.
        tau_negative: steepness elsewhere, above 0; the larger, the sooner a token loses its gradient.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `gate`, in [0, 1];
        `approx_kl`, see `ppo_clip`.

    Raises:
        ValueError: shapes differ or an option is not above 0.
    """
    ratio, monitors = _ratio(logprobs, old_logprobs, advantages)
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(
            f"need tau_positive and tau_negative above 0, got {tau_positive} and {tau_negative}; "
            "the paper takes 1 and 1.05"
        )
    tau = torch.where(advantages > 0, tau_positive, tau_negative).to(ratio.dtype)
    gate = torch.sigmoid(tau * (ratio - 1))
    monitors["gate"] = (4 * gate * (1 - gate)).detach()
    return -(4 / tau) * gate * advantages, monitors


def dppo(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    divergence: str = "tv",
    threshold_low: float = 0.2,
    threshold_high: float = 0.2,
) -> Loss:
    """-M r A; M = 0 where an update would move a token further away that is already beyond the threshold.

    DPPO, https://arxiv.org/abs/2602.04879, equations 11 and 12, with the divergence between the two outcomes
    "this token" and "another one": total variation |p - q|, or KL(q || p) = q log(q / p) + (1 - q) log((1 -
    q) / (1 - p)), p of the policy and q of the sampler. M is 0 where A > 0, r > 1 and the divergence exceeds
    threshold_high, or A < 0, r < 1 and it exceeds threshold_low. The thresholds are those of prime-rl for
    total variation; the authors' script takes 0.15, and 0.05 for KL.

    Args:
        logprobs: [B, T] float with gradient, nats.
        rollout_logprobs: [B, T] float, nats, from the sampler, the center of the trust region.
        advantages: [B, T] float.
        divergence: tv or kl.
        threshold_low: for tokens that become less likely, above 0; a share for tv, nats for kl.
        threshold_high: for tokens that become more likely, above 0; a share for tv, nats for kl.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `ratio`; `clip_share`, 1 where M
        is 0; `divergence`; `approx_kl`, see `ppo_clip`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    ratio, monitors = _ratio(logprobs, rollout_logprobs, advantages, name="rollout_logprobs")
    if divergence not in ("tv", "kl"):
        raise ValueError(f"need divergence tv or kl, got {divergence!r}; tv is a share, kl in nats")
    if not (threshold_low > 0 and threshold_high > 0):
        bounds = f"threshold_low={threshold_low} and threshold_high={threshold_high}"
        raise ValueError(f"need thresholds above 0, got {bounds}; 0.2 is in use for tv, 0.05 for kl")
    p, q = logprobs.detach().exp(), rollout_logprobs.exp()
    distance = (p - q).abs() if divergence == "tv" else _binary_kl(rollout_logprobs, logprobs.detach())
    rises, falls = (advantages > 0) & (ratio > 1), (advantages < 0) & (ratio < 1)
    masked = (rises & (distance > threshold_high)) | (falls & (distance > threshold_low))
    monitors |= {"clip_share": masked.to(ratio.dtype), "divergence": distance}
    return torch.where(masked, 0.0, -ratio * advantages), monitors


def forward_kl_topk(top_logprobs: Tensor, teacher_top_logprobs: Tensor) -> Loss:
    """sum_k q_k (log q_k - log p_k) over the teacher's k most likely tokens, q: teacher, p: policy.

    The forward KL of generalized knowledge distillation, https://arxiv.org/abs/2306.13649, section 3, cut to
    those tokens and not normalized: the teacher's probability of other tokens is left out, so the sum may be
    below 0.

    Args:
        top_logprobs: [B, T, k] float with gradient, nats, of the policy.
        teacher_top_logprobs: [B, T, k] float, nats.

    Returns:
        loss [B, T], masked positions included, and detached monitors [B, T]: `teacher_mass`, the probability
        that the teacher puts on its k tokens, in [0, 1]; `policy_mass`, that of the policy on them.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(top_logprobs=top_logprobs, teacher_top_logprobs=teacher_top_logprobs)
    probs = teacher_top_logprobs.exp()
    loss = (probs * (teacher_top_logprobs - top_logprobs)).sum(-1)
    return loss, {"teacher_mass": probs.sum(-1), "policy_mass": top_logprobs.detach().exp().sum(-1)}


def _ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    name: str = "old_logprobs",
) -> tuple[Tensor, dict[str, Tensor]]:
    """r = exp(logprobs - old_logprobs) after a check of the shapes, and the monitors of a ratio."""
    columns = {"logprobs": logprobs, name: old_logprobs, "advantages": advantages}
    check_same_shape(**columns, **({} if mask is None else {"mask": mask}))
    return policy_ratio(logprobs, old_logprobs)


def _binary_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) in nats between two coins, by the log-probabilities of their heads."""
    # expm1: most tokens are nearly certain, where 1 - exp(log p) has few digits left; and a tail of 0 has no
    # logarithm.
    tail_q, tail_p = (-torch.expm1(x.clamp(max=-1e-7)) for x in (log_q, log_p))
    return (log_q.exp() * log_ratio(log_q, log_p) + tail_q * (tail_q / tail_p).log()).clamp(min=0)


POLICY_LOSSES: dict[str, Callable[..., Loss]] = {
    "ppo_clip": ppo_clip,
    "policy_gradient": policy_gradient,
    "importance": importance,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "online_dpo": online_dpo,
    "forward_kl_topk": forward_kl_topk,
}
