"""Advantages of whole answers, compared with their siblings, and the table of all advantages.

Advantages of tokens are in `token_advantages`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import (
    Siblings,
    check_not_negative,
    check_same_rows,
    check_same_shape,
    masked_whiten,
    siblings_of,
)
from verl.algorithms.token_advantages import (
    gae,
    gigpo,
    grpo_turns,
    optimal_token_baseline,
    prime,
    reinforce_pp,
    reverse_kl,
    vapo_gae,
)


def grpo(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage of each trajectory over its siblings, A_i = (r_i - mean(r)) / (std(r) + eps).

    GRPO, https://arxiv.org/abs/2402.03300, section 4.1.2; without the division Dr. GRPO,
    https://arxiv.org/abs/2503.20783. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        normalize_std: divide by the sample standard deviation (n - 1) of the group.
        eps: added to that deviation, same unit as the rewards, at least 0.

    Returns:
        [B], dtype of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, or eps is negative.
    """
    siblings = siblings_of(rewards, group_ids)
    check_not_negative(eps=eps)
    advantages = siblings.deviation(rewards)
    if normalize_std:
        advantages = siblings.over_std(advantages, rewards, eps=eps)
    return advantages.to(rewards.dtype)


def rloo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Distance of a reward to the mean of the other siblings, A_i = r_i - mean_{j != i}(r_j).

    This is n / (n - 1) (r_i - mean(r)) in a group of n. RLOO, https://arxiv.org/abs/2402.14740. A trajectory
    without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.

    Returns:
        [B], dtype and unit of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    return siblings_of(rewards, group_ids).leave_one_out(rewards).to(rewards.dtype)


def opo(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """Distance to the mean reward per token, A_i = r_i - sum_j(l_j r_j) / sum_j(l_j).

    l_j is the number of sampled tokens. OPO, https://arxiv.org/abs/2505.23585: the baseline of least variance
    if the squared norm of an answer's gradient grows with its length. It assumes one update per batch with
    the policy that sampled. A trajectory without siblings gets 0, and so does a group without sampled tokens.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        mask: [B, T] bool, True where the policy sampled the token.

    Returns:
        [B], dtype and unit of the rewards, mean 0 over the sampled tokens of each group.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    siblings = siblings_of(rewards, group_ids)
    check_same_rows(rewards=rewards, mask=mask)
    lengths = mask.sum(1).double()
    tokens = siblings.sum(lengths)
    # From deviations, so that equal rewards give exactly 0.
    deviation = siblings.deviation(rewards)
    baseline = siblings.sum(lengths * deviation) / tokens.clamp(min=1)
    return torch.where(tokens > 0, deviation - baseline, 0.0).to(rewards.dtype)


def gpg(rewards: Tensor, group_ids: Tensor, *, scale: float = 1.0) -> Tensor:
    """Distance to the group mean, scaled by the groups with a gradient, A_i = B / B' (r_i - mean(r)) / scale.

    GPG, https://arxiv.org/abs/2504.02546: B' of the B rows are in groups whose rewards are not all equal, so
    the mean over the batch becomes a mean over the groups with a gradient. https://github.com/volcengine/verl
    counts as B' the rows with a reward other than 0 instead. A trajectory without siblings gets 0 and does
    not count in B'.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        scale: F_norm of the paper, above 0, unit of the rewards.

    Returns:
        [B], dtype of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, or scale is not above 0.
    """
    siblings = siblings_of(rewards, group_ids)
    if not scale > 0:
        raise ValueError(f"need scale above 0, got scale={scale}; 1 leaves the rewards as they are")
    num_useful = (siblings.max(rewards) > -siblings.max(-rewards)).sum()
    return (len(rewards) / num_useful.clamp(min=1) * siblings.deviation(rewards) / scale).to(rewards.dtype)


def grpo_batch_std(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Distance to the group mean over the deviation of the batch, A_i = (r_i - mean(r)) / (s + eps).

    s^2 is the mean square of all these distances. ScaleRL, https://arxiv.org/abs/2510.13786, section 3:
    prompts that are nearly solved or nearly hopeless weigh no more than others, as they do under GRPO's
    deviation of the group. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        eps: added to s, same unit as the rewards, at least 0.

    Returns:
        [B], dtype of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, or eps is negative.
    """
    deviation = siblings_of(rewards, group_ids).deviation(rewards)
    check_not_negative(eps=eps)
    scale = deviation.square().sum().div(max(1, len(rewards))).sqrt() + eps
    return (deviation / scale.clamp(min=torch.finfo(scale.dtype).tiny)).to(rewards.dtype)


def maxrl(rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Distance to the group mean, relative to that mean, A_i = (r_i - mean(r)) / (mean(r) + eps).

    Rare success counts more. MaxRL, https://arxiv.org/abs/2602.02710. It is meant for rewards of 0 or more,
    where the mean is the rate of success: for binary ones its expectation is the gradient of a truncated
    series of the log-likelihood of success. A group whose mean is 0 or below gets 0 as a whole, which is the
    paper's rule for groups without success; take another advantage for rewards that may be negative, a KL
    penalty or a length penalty among them. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        eps: added to the mean, same unit as the rewards, at least 0.

    Returns:
        [B], dtype of the rewards, mean 0 within each group, at most n - 1 for rewards of 0 or more.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, or eps is negative.
    """
    siblings = siblings_of(rewards, group_ids)
    check_not_negative(eps=eps)
    means = siblings.mean(rewards)
    return torch.where(means > 0, siblings.deviation(rewards) / (means + eps), 0.0).to(rewards.dtype)


def grpo_passk(
    rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Advantage of the best answer of a group, A = (r_max - r_second) / (std(r) + eps); 0 for the others.

    Leave-one-out advantage of the best of n, https://arxiv.org/abs/2503.19595: the reward that best-of-n
    loses without that answer. The division is GRPO's. If two answers share the largest reward, all get 0,
    since one of them can replace the other. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        normalize_std: divide by the sample standard deviation (n - 1) of the group.
        eps: added to that deviation, same unit as the rewards, at least 0.

    Returns:
        [B], dtype of the rewards, at least 0, at most one other than 0 in each group: not centered.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, or eps is negative.
    """
    siblings = siblings_of(rewards, group_ids)
    check_not_negative(eps=eps)
    best = rewards == siblings.max(rewards)
    second = siblings.max(torch.where(best, -torch.inf, rewards))
    wins = best & (siblings.sum(best) == 1) & (siblings.sizes > 1)
    advantages = torch.where(wins, rewards - second, 0.0)
    if normalize_std:
        advantages = siblings.over_std(advantages, rewards, eps=eps)
    return advantages.to(rewards.dtype)


def gdpo(reward_parts: Tensor, reward_weights: Tensor, group_ids: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Weighted sum of GRPO's advantages of each reward function, normalized over the batch.

    GDPO, https://arxiv.org/abs/2601.05242: A_ik = (r_ik - mean(r_k)) / (std(r_k) + eps) in the group, S_i =
    sum_k w_ik A_ik, A_i = (S_i - mean(S)) / (std(S) + eps) over all trajectories of the batch, each counted
    once. https://github.com/volcengine/verl counts each sampled token once instead, which makes long answers
    weigh more. A KL penalty in the reward has no effect here. A trajectory without siblings has S = 0.

    Args:
        reward_parts: [B, K] float, value of each reward function before its weight.
        reward_weights: [B, K] float, weight of each reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        eps: added to both deviations (n - 1), at least 0.

    Returns:
        [B], dtype of the parts, mean 0 and deviation 1 over the batch, mean 0 in groups with one weight per
        function.

    Raises:
        ValueError: shapes differ, or eps is negative.
    """
    check_same_shape(reward_parts=reward_parts, reward_weights=reward_weights)
    check_same_rows(reward_parts=reward_parts, group_ids=group_ids)
    check_not_negative(eps=eps)
    siblings, batch = Siblings.of(group_ids), Siblings.of(torch.zeros_like(group_ids))
    sums = (reward_weights * siblings.over_std(siblings.deviation(reward_parts), reward_parts, eps=eps)).sum(
        1
    )
    return batch.over_std(batch.deviation(sums), sums, eps=eps).to(reward_parts.dtype)


def remax(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """Advantage over the most likely answer, A_i = r_i - r(greedy answer to the same prompt).

    ReMax, https://arxiv.org/abs/2310.10505, algorithm 1. One trajectory per prompt is enough: siblings are
    not compared. A KL penalty in the reward changes r_i alone.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        greedy_rewards: [B] float, same unit.

    Returns:
        [B], dtype and unit of the rewards.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(rewards=rewards, greedy_rewards=greedy_rewards)
    return rewards - greedy_rewards


def reinforce_pp_baseline(rewards: Tensor, group_ids: Tensor, mask: Tensor) -> Tensor:
    """Distance to the group mean, A_i = r_i - mean(r), at each sampled token, whitened over the batch.

    REINFORCE++-baseline, https://arxiv.org/abs/2501.03262: the scale comes from the whole batch, not from the
    few siblings. A trajectory without siblings enters with a distance of 0; the whitening moves it like all
    others.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        mask: [B, T] bool, True where the policy sampled the token.

    Returns:
        [B, T], dtype of the rewards, mean 0 and deviation 1 over the sampled tokens, 0 at masked positions.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    siblings = siblings_of(rewards, group_ids)
    check_same_rows(rewards=rewards, mask=mask)
    return masked_whiten(siblings.deviation(rewards)[:, None].expand(mask.shape), mask).to(rewards.dtype)


# Each returns [B], one value for all sampled tokens of a row; or [B, T]; or advantages and returns [B, T].
ADVANTAGES: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "grpo": grpo,
    "rloo": rloo,
    "opo": opo,
    "gpg": gpg,
    "grpo_batch_std": grpo_batch_std,
    "maxrl": maxrl,
    "grpo_passk": grpo_passk,
    "gdpo": gdpo,
    "remax": remax,
    "gae": gae,
    "vapo_gae": vapo_gae,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "optimal_token_baseline": optimal_token_baseline,
    "grpo_turns": grpo_turns,
    "gigpo": gigpo,
    "prime": prime,
    "reverse_kl": reverse_kl,
}
