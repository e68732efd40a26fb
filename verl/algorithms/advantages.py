"""Credit of each trajectory or token, from rewards to advantages; placing the rewards is left to the trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.functional import check_same_shape, masked_whiten


def grpo(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantage of each trajectory over its siblings, A_i = (r_i - mean(r)) / (std(r) + eps).

    GRPO, https://arxiv.org/abs/2402.03300, section 4.1.2; without the division Dr. GRPO, https://arxiv.org/abs/2503.20783.
    A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.
        normalize_std: divide by the sample standard deviation (n - 1) of the group.
        eps: added to that deviation, same unit as the rewards.

    Returns:
        [B], dtype of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    deviation, group, sizes = _group_deviation(rewards, group_ids)
    if normalize_std:
        squares = torch.zeros_like(sizes).index_add(0, group, deviation.square())
        deviation = deviation / ((squares / (sizes - 1).clamp(min=1)).sqrt() + eps)[group]
    return deviation.to(rewards.dtype)


def rloo(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Advantage over the mean of the other siblings, A_i = r_i - mean_{j != i}(r_j) = n / (n - 1) (r_i - mean(r)).

    RLOO, https://arxiv.org/abs/2402.14740. A trajectory without siblings gets 0.

    Args:
        rewards: [B] float, one per trajectory, unit of the reward function.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.

    Returns:
        [B], dtype and unit of the rewards, mean 0 within each group.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    deviation, group, sizes = _group_deviation(rewards, group_ids)
    return (deviation * (sizes / (sizes - 1).clamp(min=1))[group]).to(rewards.dtype)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True
) -> tuple[Tensor, Tensor]:
    """A_t = sum_l (gamma lam)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t, over the sampled tokens alone.

    GAE, https://arxiv.org/abs/1506.02438, equation 16. Tokens that the environment wrote are no actions: they are stepped over
    without discount, so t + 1 is the next sampled token. Behind the last one the value is 0.

    Args:
        token_rewards: [B, T] float, not read at masked positions.
        values: [B, T] float, unit of the rewards, not read at masked positions.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per sampled token, in [0, 1].
        lam: decay of the multi-step errors, in [0, 1]; 1 is the whole return, 0 one step.
        whiten: bring the advantages (never the returns) to mean 0 and deviation 1 over all sampled tokens of the batch.

    Returns:
        advantages [B, T] and returns [B, T] (advantages before whitening + values), 0 at masked positions.

    Raises:
        ValueError: shapes differ, or gamma or lam is outside [0, 1].
    """
    check_same_shape(token_rewards=token_rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"need gamma and lam in [0, 1], got gamma={gamma} and lam={lam}")
    # Time first, so that each turn of the loop reads its positions from adjacent memory.
    rewards_first, values_first, mask_first = (column.T.contiguous() for column in (token_rewards, values, mask))
    advantages_first = torch.zeros_like(values_first)
    advantage = next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        sampled, value = mask_first[t], values_first[t]
        delta = rewards_first[t] + gamma * next_value - value
        advantage = torch.where(sampled, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(sampled, value, next_value)
        advantages_first[t] = advantage
    advantages = torch.where(mask, advantages_first.T, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return (masked_whiten(advantages, mask) if whiten else advantages), returns


def _group_deviation(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r_i - mean of its group [B], the group's number [B] int64, and the groups' sizes [G], both floats in fp64."""
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"need one group id per reward, got rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}; "
            "pass per-trajectory sums, not per-token rewards"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"need floating point rewards, got {rewards.dtype}; integers would round the advantages away")
    # In fp64 the mean of equal fp32 rewards is that reward: a group without a winner gets exactly 0, not rounding noise
    # divided by eps.
    precise = rewards.double()
    _, group, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    sizes = counts.double()
    means = torch.zeros_like(sizes).index_add(0, group, precise) / sizes
    return precise - means[group], group, sizes


# Each returns [B] (spread over the row's sampled tokens by the caller), [B, T], or (advantages [B, T], returns [B, T]).
ADVANTAGES: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {"grpo": grpo, "rloo": rloo, "gae": gae}
