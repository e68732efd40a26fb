"""Advantages of each token, from rewards of tokens, turns or whole answers.

Advantages of whole answers are in `advantages`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl.algorithms.functional import (
    Siblings,
    check_in_unit_interval,
    check_not_negative,
    check_same_rows,
    check_same_shape,
    log_ratio,
    masked_whiten,
    siblings_of,
)


def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the sampled tokens, delta_t = r_t + gamma V_{t+1} - V_t.

    GAE, https://arxiv.org/abs/1506.02438, equation 16. Tokens of the environment are no actions: they are
    skipped without discount, so t + 1 is the next sampled token. Behind the last one the value is 0.

    Args:
        token_rewards: [B, T] float, not read at masked positions.
        values: [B, T] float, unit of the rewards, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per sampled token, in [0, 1].
        lam: decay of the multi-step errors, in [0, 1]; 1 is the whole return, 0 one step.
        whiten: bring the advantages (never the returns) to mean 0 and deviation 1 over all sampled tokens of
            the batch.

    Returns:
        advantages [B, T] and returns [B, T] (advantages before whitening + values), 0 at masked positions.

    Raises:
        ValueError: shapes differ, or gamma or lam is outside [0, 1].
    """
    check_in_unit_interval(gamma=gamma, lam=lam)
    errors = _one_step_errors(token_rewards, values, mask, gamma)
    advantages = _discounted_sums(errors, mask, gamma * lam)
    returns = torch.where(mask, advantages + values, 0.0)
    return (masked_whiten(advantages, mask) if whiten else advantages), returns


def vapo_gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 0.05,
    critic_lam: float = 1.0,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """GAE with a decay for the critic, and one for the policy, lam = 1 - 1 / (alpha l), in rows of length l.

    VAPO, https://arxiv.org/abs/2504.05118, sections 4.1 (decoupled GAE) and 4.2 (length-adaptive GAE). The
    sum of the weights lam^k of a row is then near alpha l. Below 1 / alpha tokens lam would be negative; it
    is 0 there, one-step errors.

    Args:
        token_rewards: [B, T] float, not read at masked positions.
        values: [B, T] float, unit of the rewards, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per sampled token, in [0, 1].
        alpha: above 0, share of the row's sampled tokens over which errors are summed.
        critic_lam: decay of the errors in the returns, in [0, 1]; 1 makes them free of the critic's own bias.
        whiten: bring the advantages (never the returns) to mean 0 and deviation 1 over all sampled tokens of
            the batch.

    Returns:
        advantages [B, T] and returns [B, T], 0 at masked positions.

    Raises:
        ValueError: shapes differ, gamma or critic_lam is outside [0, 1], or alpha is not above 0.
    """
    check_in_unit_interval(gamma=gamma, critic_lam=critic_lam)
    if not alpha > 0:
        raise ValueError(f"need alpha above 0, got alpha={alpha}; VAPO takes 0.05")
    errors = _one_step_errors(token_rewards, values, mask, gamma)
    returns = torch.where(mask, _discounted_sums(errors, mask, gamma * critic_lam) + values, 0.0)
    lengths = mask.sum(1).clamp(min=1).to(values.dtype)
    advantages = _discounted_sums(errors, mask, gamma * (1 - 1 / (alpha * lengths)).clamp(min=0))
    return (masked_whiten(advantages, mask) if whiten else advantages), returns


def reinforce_pp(token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted return from each sampled token on, sum_{s >= t} gamma^(s-t) r_s, whitened over the batch.

    REINFORCE++, https://arxiv.org/abs/2501.03262. Its KL penalty k1 of each token is part of the token
    rewards. Groups are not looked at: one trajectory per prompt is enough.

    Args:
        token_rewards: [B, T] float, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per sampled token, in [0, 1].

    Returns:
        [B, T], dtype of the rewards, mean 0 and deviation 1 over the sampled tokens, 0 at masked positions.

    Raises:
        ValueError: shapes differ, or gamma is outside [0, 1].
    """
    check_same_shape(token_rewards=token_rewards, mask=mask)
    check_in_unit_interval(gamma=gamma)
    return masked_whiten(_discounted_sums(token_rewards.double(), mask, gamma), mask).to(token_rewards.dtype)


def optimal_token_baseline(
    rewards: Tensor, group_ids: Tensor, mask: Tensor, trainer_logprobs: Tensor, sum_squared_probs: Tensor
) -> Tensor:
    """A_t = R - B_t with the baseline of least variance, B_t = sum_i R_i W_it / sum_i W_it.

    W_t = sum_{j <= t} (1 - 2 pi_j + sum pi_j^2). OTB, https://arxiv.org/abs/2602.07078: W is the squared norm
    of the gradient at the logits up to token t. Token t is the t-th sampled one, and B_t is over the siblings
    that have one. Where no other has one, in the tail of the longest or without siblings, B_t is the row's
    own reward, so it gets 0 there; https://github.com/volcengine/verl takes B_t = 0 by default. Where all W
    are 0 (each token so far had probability 1) B_t is the plain mean.

    Args:
        rewards: [B] float, one per trajectory; the return of all its tokens.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        mask: [B, T] bool, True where the policy sampled the token.
        trainer_logprobs: [B, T] float, of the sampled tokens, not read at masked positions.
        sum_squared_probs: [B, T] float, sum of the squares of all probabilities, not read at masked
            positions.

    Returns:
        [B, T], dtype and unit of the rewards, 0 at masked positions.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    siblings = siblings_of(rewards, group_ids)
    check_same_shape(mask=mask, trainer_logprobs=trainer_logprobs, sum_squared_probs=sum_squared_probs)
    check_same_rows(rewards=rewards, mask=mask)
    probs = trainer_logprobs.double().clamp(max=0).exp()
    # (1 - pi)^2 + the squares of the others: 1 - 2 pi + sum pi^2 itself cancels where pi is near 1, and may
    # fall below 0.
    energy = torch.expm1(trainer_logprobs.double().clamp(max=0)).square() + (
        sum_squared_probs.double() - probs.square()
    ).clamp(min=0)
    weights, present = _sampled_first(torch.where(mask, energy, 0.0).cumsum(1), mask)
    weights = torch.where(siblings.sum(weights) > 0, weights, 1.0) * present
    # From deviations, so that equal rewards give exactly 0.
    deviation = siblings.deviation(rewards)[:, None]
    baseline = siblings.sum(deviation * weights) / siblings.sum(weights).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    advantages = torch.zeros_like(weights)
    advantages[mask] = (deviation - baseline)[present]
    return advantages.to(rewards.dtype)


def grpo_turns(
    token_rewards: Tensor, mask: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """A_t = sum of (r_k - mean(r)) / (std(r) + eps) over the turns k that end at t or later.

    Mean and std are over all turns of the group. GRPO with process supervision,
    https://arxiv.org/abs/2402.03300, section 4.1.3, where a turn is a step. A turn is an unbroken run of
    sampled tokens, its reward the sum of theirs, 0 included. A trajectory without siblings is compared with
    itself, turn by turn; the only turn of a group gets 0.

    Args:
        token_rewards: [B, T] float, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        normalize_std: divide by the sample standard deviation (n - 1) of the group's turns.
        eps: added to that deviation, same unit as the rewards, at least 0.

    Returns:
        [B, T], dtype of the rewards, 0 at masked positions.

    Raises:
        ValueError: shapes differ, or eps is negative.
    """
    check_same_shape(token_rewards=token_rewards, mask=mask)
    check_same_rows(token_rewards=token_rewards, group_ids=group_ids)
    check_not_negative(eps=eps)
    starts, turn, rewards = _turn_rewards(token_rewards, mask)
    siblings = Siblings.of(group_ids[:, None].expand_as(mask)[starts])
    advantages = siblings.deviation(rewards)
    if normalize_std:
        advantages = siblings.over_std(advantages, rewards, eps=eps)
    # Of each turn on its first token, so that the sum from any token of a turn on has that of its own too.
    later = _discounted_sums(_at(starts, advantages), mask, 1.0)[starts]
    return torch.where(mask, later[turn], 0.0).to(token_rewards.dtype)


def gigpo(
    rewards: Tensor,
    token_rewards: Tensor,
    states: Tensor,
    mask: Tensor,
    group_ids: Tensor,
    *,
    step_weight: float = 1.0,
    gamma: float = 0.95,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """A_t = (R - mean(R)) / (std(R) + eps) + step_weight (G_k - mean(G)) / (std(G) + eps), t in turn k.

    The first part compares a whole episode with its siblings, as GRPO does. The second compares the return of
    a turn, G_k = sum_{j >= k} gamma^(j-k) r_j, with those of all turns of its siblings and its own that start
    from the same state. GiGPO, https://arxiv.org/abs/2505.10978, equations 3 to 8. A turn is an unbroken run
    of sampled tokens, its reward the sum of theirs. A turn from a state that no other turn starts from has a
    second part of 0, a trajectory without siblings a first part of 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        token_rewards: [B, T] float, not read at masked positions.
        states: [B, T] int, equal for equal states before a turn, read at the first token of each turn.
        mask: [B, T] bool, True where the policy sampled the token.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        step_weight: omega of the paper, at least 0; 0 is GRPO.
        gamma: discount per turn, in [0, 1].
        normalize_std: divide each part by its sample standard deviation (n - 1).
        eps: added to both deviations, same unit as the rewards, at least 0.

    Returns:
        [B, T], dtype of the rewards, 0 at masked positions.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, step_weight or eps is negative, or
            gamma is outside [0, 1].
    """
    siblings = siblings_of(rewards, group_ids)
    check_same_shape(token_rewards=token_rewards, states=states, mask=mask)
    check_same_rows(rewards=rewards, mask=mask)
    check_not_negative(step_weight=step_weight, eps=eps)
    check_in_unit_interval(gamma=gamma)
    episodes = siblings.deviation(rewards)
    starts, turn, of_turns = _turn_rewards(token_rewards, mask)
    returns = _discounted_sums(_at(starts, of_turns), starts, gamma)[starts]
    anchors = torch.stack([group_ids[:, None].expand_as(states)[starts], states[starts]])
    same_state = Siblings.of(torch.unique(anchors, dim=1, return_inverse=True)[1])
    steps = same_state.deviation(returns)
    if normalize_std:
        episodes = siblings.over_std(episodes, rewards, eps=eps)
        steps = same_state.over_std(steps, returns, eps=eps)
    if not len(steps):  # nothing was sampled
        return torch.zeros_like(token_rewards)
    return torch.where(mask, episodes[:, None] + step_weight * steps[turn], 0.0).to(token_rewards.dtype)


def prime(
    rewards: Tensor,
    group_ids: Tensor,
    prm_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
) -> Tensor:
    """A_t = sum_{s >= t} gamma^(s-t) (p_s - mean_{j != i}(p_j)) + R_i - mean_{j != i}(R_j).

    The process reward of a token is p = beta (log pi_prm - log pi_ref). PRIME,
    https://arxiv.org/abs/2502.01456, equation 5. The p_j of a sibling is the mean over its sampled tokens, as
    the text above the equation says; siblings without any do not count. https://github.com/PRIME-RL/PRIME
    takes n / (n - 1) p_s minus sum_j p_j / (n - 1) over all j instead, which has the same mean over a row.
    The log-ratio is clamped at +-20 nats. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, outcome of each trajectory.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        prm_logprobs: [B, T] float, of the implicit process reward model, not read at masked positions.
        ref_logprobs: [B, T] float, of the reference, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        beta: reward per nat, at least 0.
        gamma: discount per sampled token, in [0, 1].

    Returns:
        [B, T], dtype of the rewards, 0 at masked positions.

    Raises:
        ValueError: shapes differ, the rewards are not floating point, beta is negative, or gamma is outside
            [0, 1].
    """
    siblings = siblings_of(rewards, group_ids)
    check_same_shape(prm_logprobs=prm_logprobs, ref_logprobs=ref_logprobs, mask=mask)
    check_same_rows(rewards=rewards, mask=mask)
    check_not_negative(beta=beta)
    check_in_unit_interval(gamma=gamma)
    process_rewards = torch.where(mask, beta * log_ratio(prm_logprobs.double(), ref_logprobs.double()), 0.0)
    lengths = mask.sum(1)
    present = (lengths > 0).double()
    means = process_rewards.sum(1) / lengths.clamp(min=1)
    num_others = siblings.sum(present) - present
    baseline = (siblings.sum(means) - means) / num_others.clamp(min=1)
    centered = torch.where(num_others[:, None] > 0, process_rewards - baseline[:, None], 0.0)
    outcome = siblings.leave_one_out(rewards)[:, None]
    return torch.where(mask, _discounted_sums(centered, mask, gamma) + outcome, 0.0).to(rewards.dtype)


def reverse_kl(old_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """A_t = log pi_teacher - log pi: the policy gradient lowers the reverse KL at each sampled token.

    On-policy distillation, https://thinkingmachines.ai/blog/on-policy-distillation/; the objective is that of
    GKD, https://arxiv.org/abs/2306.13649, with the reverse KL on the student's own answers, without the
    gradient through what comes later. Clamped at +-20 nats. No rewards and no groups.

    Args:
        old_logprobs: [B, T] float, of the policy that is corrected for in the ratio, on its own tokens.
        teacher_logprobs: [B, T] float, of the teacher on the same tokens.

    Returns:
        [B, T] in nats; masked positions hold what their own entries give, NaN for NaN.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(old_logprobs=old_logprobs, teacher_logprobs=teacher_logprobs)
    return log_ratio(teacher_logprobs, old_logprobs)


def _turn_rewards(token_rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First tokens of turns [B, T] bool, number of the turn of each sampled token [B, T], rewards [turns].

    Numbers count over the whole batch, at least 0 also at masked positions.
    """
    starts = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], 1)
    # Row by row, so a number that counts over the whole batch never joins two rows.
    turn = (starts.flatten().cumsum(0).view_as(mask) - 1).clamp(min=0)
    sampled = token_rewards[mask].double()
    return starts, turn, sampled.new_zeros(int(starts.sum())).index_add(0, turn[mask], sampled)


def _at(places: Tensor, values: Tensor) -> Tensor:
    """Values at the places [B, T] bool where they belong, in order, and 0 elsewhere."""
    return torch.zeros(places.shape, dtype=values.dtype, device=values.device).masked_scatter(places, values)


def _one_step_errors(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """delta_t = r_t + gamma V_next - V_t [B, T] with the next sampled token; V is 0 behind the last one."""
    check_same_shape(token_rewards=token_rewards, values=values, mask=mask)
    width = mask.shape[1]
    # Position of the first sampled token from t on; the position `width`, behind the row, has the value 0.
    from_here = (
        torch.where(mask, torch.arange(width, device=mask.device), width).flip(1).cummin(1).values.flip(1)
    )
    behind = torch.full_like(from_here[:, :1], width)
    next_sampled = torch.cat([from_here, behind], 1)[:, 1:]
    next_values = torch.cat([values, torch.zeros_like(values[:, :1])], 1).gather(1, next_sampled)
    return token_rewards + gamma * next_values - values


def _discounted_sums(values: Tensor, mask: Tensor, decay: float | Tensor) -> Tensor:
    """S_t = x_t + decay S_next [B, T] over the sampled tokens, 0 at the others; decay: a number or [B]."""
    # Time first, so that each iteration reads adjacent memory.
    values_first, mask_first = values.T.contiguous(), mask.T.contiguous()
    sums_first = torch.zeros_like(values_first)
    later = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        later = torch.where(mask_first[t], values_first[t] + decay * later, later)
        sums_first[t] = later
    return torch.where(mask, sums_first.T, 0.0)


def _sampled_first(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B, T] of the sampled tokens at the front of their rows, then zeros; True where a value is."""
    present = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    moved = torch.zeros_like(values)
    moved[present] = values[mask]
    return moved, present
