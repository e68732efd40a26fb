"""Losses per pair of answers, the loss of an implicit process reward model, and calibration.

The caller averages over the pairs of an optimizer batch. Monitors have the same names in every loss: the
reward of both answers, explicit or implied by the policy, their difference as `margin`, and `accuracy`, 1
where the chosen answer has the higher reward; a tie counts as wrong, since a model without a preference is
not right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from verl.algorithms.functional import check_same_shape, log_ratio


def dpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_ref_logprobs: Tensor,
    rejected_ref_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m) with the margin m of the implied rewards.

    m = beta (log p/p_ref(chosen) - log p/p_ref(rejected)). https://arxiv.org/abs/2305.18290, equation 7; with
    e > 0, the assumed share of wrong labels, conservative DPO, https://ericmitchell.ai/cdpo.pdf.

    Args:
        chosen_logprobs: [P] float with gradient, nats, sum over the answer.
        rejected_logprobs: [P] float with gradient, nats, sum over the answer.
        chosen_ref_logprobs: [P] float, nats, sum over the answer.
        rejected_ref_logprobs: [P] float, nats, sum over the answer.
        beta: weight of the KL to the reference policy that the reward is measured against, per nat, above 0.
        label_smoothing: e, from 0 to below 0.5.

    Returns:
        loss [P] and detached monitors [P]: `chosen_reward` and `rejected_reward`, beta log p/p_ref; `margin`;
        `accuracy`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_ref_logprobs=chosen_ref_logprobs,
        rejected_ref_logprobs=rejected_ref_logprobs,
    )
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"need 0 <= label_smoothing < 0.5, got {label_smoothing}; from 0.5 on the labels say the opposite"
        )
    chosen = beta * (chosen_logprobs - chosen_ref_logprobs)
    rejected = beta * (rejected_logprobs - rejected_ref_logprobs)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, _monitors(chosen, rejected)


def ipo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_ref_logprobs: Tensor,
    rejected_ref_logprobs: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(h - 1 / (2 beta))^2 with h = log p/p_ref(chosen) - log p/p_ref(rejected).

    Both terms are means over the tokens of the answer. https://arxiv.org/abs/2310.12036, equation 17, where p
    is the probability of an answer and h a difference of sums. Means, as its authors advise,
    https://huggingface.co/blog/pref-tuning: the target of h is a fixed number of nats, which the sum
    over a long answer reaches with a much smaller change of each token, so with sums the regularization
    would depend on the length.

    Args:
        chosen_logprobs: [P] float with gradient, nats, sum over the answer.
        rejected_logprobs: [P] float with gradient, nats, sum over the answer.
        chosen_ref_logprobs: [P] float, nats, sum over the answer.
        rejected_ref_logprobs: [P] float, nats, sum over the answer.
        chosen_tokens: [P] int64, length of the answer.
        rejected_tokens: [P] int64, length of the answer.
        beta: tau of the paper, per nat and token, above 0; the target is h = 1 / (2 beta).

    Returns:
        loss [P], nats squared, and detached monitors [P]: `chosen_reward` and `rejected_reward`, beta times
        the mean of log p/p_ref; `margin`, whose target is 1/2; `accuracy`.

    Raises:
        ValueError: shapes differ or beta is not above 0.
    """
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_ref_logprobs=chosen_ref_logprobs,
        rejected_ref_logprobs=rejected_ref_logprobs,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )
    _check_beta(beta)
    chosen = _token_mean(chosen_logprobs - chosen_ref_logprobs, chosen_tokens)
    rejected = _token_mean(rejected_logprobs - rejected_ref_logprobs, rejected_tokens)
    return (chosen - rejected - 1 / (2 * beta)).square(), _monitors(beta * chosen, beta * rejected)


def simpo(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 2.0,
    margin: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta log p(chosen) / |chosen| - beta log p(rejected) / |rejected| - margin).

    There is no reference policy. https://arxiv.org/abs/2405.14734, equation 6, which searches beta from 2 to
    2.5 and the margin from 0.3 to 1.6.

    Args:
        chosen_logprobs: [P] float with gradient, nats, sum over the answer.
        rejected_logprobs: [P] float with gradient, nats, sum over the answer.
        chosen_tokens: [P] int64, length of the answer.
        rejected_tokens: [P] int64, length of the answer.
        beta: scale of the rewards, per nat and token, above 0.
        margin: gamma, the wanted difference of the rewards, at least 0.

    Returns:
        loss [P] and detached monitors [P]: `chosen_reward` and `rejected_reward`, beta times the mean logprob
        of a token; `margin`, their difference before gamma is taken off; `accuracy`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )
    _check_beta(beta)
    _check_margin(margin)
    chosen, rejected = (
        beta * _token_mean(chosen_logprobs, chosen_tokens),
        beta * _token_mean(rejected_logprobs, rejected_tokens),
    )
    return -logsigmoid(chosen - rejected - margin), _monitors(chosen, rejected)


def bradley_terry(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: float = 0.0, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(r(chosen) - r(rejected) - margin) + center_coef (r(chosen) + r(rejected))^2.

    InstructGPT, https://arxiv.org/abs/2203.02155, equation 1; margin: Llama 2,
    https://arxiv.org/abs/2307.09288, equation 2; centering, without which only differences of rewards are
    learnt: https://arxiv.org/abs/2312.09244.

    Args:
        chosen_rewards: [P] float with gradient.
        rejected_rewards: [P] float with gradient.
        margin: wanted difference of the rewards, in their unit, at least 0.
        center_coef: weight of the centering, at least 0; 0.01 is in use.

    Returns:
        loss [P] and detached monitors [P]: `chosen_reward`, `rejected_reward`, `margin`, `accuracy`.

    Raises:
        ValueError: shapes differ or an option is out of its bounds.
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    _check_margin(margin)
    if not center_coef >= 0:
        raise ValueError(
            f"need center_coef >= 0, got {center_coef}; below 0 the rewards would be driven away from 0"
        )
    loss = (
        -logsigmoid(chosen_rewards - rejected_rewards - margin)
        + center_coef * (chosen_rewards + rejected_rewards).square()
    )
    return loss, _monitors(chosen_rewards, rejected_rewards)


def outcome_cross_entropy(
    prm_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor, *, beta: float = 0.05
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of sigmoid(beta sum_t log p_prm/p_ref) as the probability of a right answer.

    An answer is right if its reward is above 0. PRIME, https://arxiv.org/abs/2502.01456, equation 5.

    Args:
        prm_logprobs: [B, T] float, nats, of the implicit process reward model in its update, here with
            gradient.
        ref_logprobs: [B, T] float, nats, of the reference policy.
        rewards: [B] float; only whether they are above 0 counts.
        mask: [B, T] bool.
        beta: scale of the reward, per nat, above 0.

    Returns:
        loss [B] and detached monitors [B]: `prm_reward`, beta times the sum; `prm_accuracy`, 1 where its sign
        is right. A row without a sampled token has the reward 0, which counts as wrong, and a loss of log 2
        without gradient.

    Raises:
        ValueError: shapes differ or beta is not above 0.
    """
    check_same_shape(prm_logprobs=prm_logprobs, ref_logprobs=ref_logprobs, mask=mask)
    check_same_shape(rewards=rewards, rows=mask.new_empty(mask.shape[0]))
    _check_beta(beta)
    reward = beta * torch.where(mask, log_ratio(prm_logprobs, ref_logprobs), 0.0).sum(1)
    for_label = torch.where(rewards > 0, reward, -reward)
    return -logsigmoid(for_label), {
        "prm_reward": reward.detach(),
        "prm_accuracy": (for_label > 0).to(reward.dtype),
    }


def calibration(probabilities: Tensor, labels: Tensor, *, bins: int = 10) -> dict[str, float]:
    """Expected calibration error, and Brier score, mean (p - label)^2.

    The error is sum_k n_k / N |mean label - mean probability| over bins k. https://arxiv.org/abs/1706.04599,
    equation 3, for the probability of the positive label in ((k - 1) / bins, k / bins], 0 in the first bin;
    Brier 1950, https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2.

    Args:
        probabilities: [N] float in [0, 1] that the label is 1.
        labels: [N] bool, or 0 and 1.
        bins: number of bins of the same width, at least 1.

    Returns:
        `expected_calibration_error` and `brier_score`, both in [0, 1] and 0 at best, 0 for nothing.

    Raises:
        ValueError: shapes differ, bins below 1, or probabilities or labels out of their bounds.
    """
    check_same_shape(probabilities=probabilities, labels=labels)
    if bins < 1:
        raise ValueError(f"need bins >= 1, got {bins}; the paper takes 15")
    probabilities, labels = probabilities.detach().double().flatten(), labels.double().flatten()
    if not bool(((probabilities >= 0) & (probabilities <= 1) & ((labels == 0) | (labels == 1))).all()):
        raise ValueError(
            "need probabilities in [0, 1] and labels 0 or 1, got others; take the sigmoid of rewards"
        )
    index = torch.bucketize(
        probabilities, torch.arange(1, bins, dtype=torch.float64, device=probabilities.device) / bins
    )
    # n_k times the gap of a bin is the sum of its differences: no bin is divided by its count.
    gaps = torch.bincount(index, labels - probabilities, minlength=bins)
    count = max(1, len(labels))
    return {
        "expected_calibration_error": float(gaps.abs().sum()) / count,
        "brier_score": float((probabilities - labels).square().sum()) / count,
    }


def _monitors(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Rewards of both answers, their difference, and 1 where the chosen answer has the higher reward."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": margin,
        "accuracy": (margin > 0).to(margin.dtype),
    }


def _token_mean(sums: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean of a token from the sum over an answer; 0 for an empty one."""
    return sums / num_tokens.clamp(min=1)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"need beta > 0, got {beta}; it scales the rewards of the answers")


def _check_margin(margin: float) -> None:
    if not margin >= 0:
        raise ValueError(
            f"need margin >= 0, got {margin}; below 0 the rejected answer may have the higher reward"
        )


PAIR_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
}
REWARD_LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {"bradley_terry": bradley_terry}
