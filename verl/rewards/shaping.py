"""Rewards for the length of an answer: compared with its siblings, or near the longest answer allowed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl.algorithms.dry_run import try_out
from verl.algorithms.registry import BoundFunction
from verl.algorithms.returns import bind_as
from verl.config.fields import Choice
from verl.data.columns import readable_by


def kimi_length(rewards: Tensor, num_tokens: Tensor, *, weight: float = 1.0) -> Tensor:
    """Length reward of Kimi k1.5: weight lambda for right answers, weight min(0, lambda) for wrong ones.

    lambda = 1/2 - (n - n_min) / (n_max - n_min), https://arxiv.org/abs/2501.12599, section 2.3.3. Answers of
    one length all get 0. An answer is right if its reward is above 0.

    Args:
        rewards: [n] float, of the siblings of one group.
        num_tokens: [n] int, lengths of their answers.
        weight: factor, unit of the rewards.

    Returns:
        [n], to be added to the rewards, in [-weight / 2, weight / 2].

    Raises:
        ValueError: weight is negative.
    """
    _check_weight(weight)
    lengths = num_tokens.to(rewards.dtype)
    spread = lengths.max() - lengths.min()
    if spread == 0:
        return torch.zeros_like(rewards)
    share = 0.5 - (lengths - lengths.min()) / spread
    return weight * torch.where(rewards > 0, share, share.clamp(max=0))


def relative_length(rewards: Tensor, num_tokens: Tensor, *, weight: float = 0.1) -> Tensor:
    """Penalty -weight sigmoid((n - mean) / std) of right answers, 0 for wrong ones.

    Training language models to reason efficiently, https://arxiv.org/abs/2502.04463, section 3. Mean and
    deviation are over the right answers of the group. An answer is right if its reward is above 0.

    Args:
        rewards: [n] float, of the siblings of one group.
        num_tokens: [n] int, lengths of their answers.
        weight: most that can be lost, unit of the rewards.

    Returns:
        [n], to be added to the rewards, in [-weight, 0].

    Raises:
        ValueError: weight is negative.
    """
    _check_weight(weight)
    right = rewards > 0
    if not right.any():
        return torch.zeros_like(rewards)
    lengths = num_tokens.to(rewards.dtype)
    own = lengths[right]
    deviation = own.std(correction=0)
    score = torch.zeros_like(lengths) if deviation == 0 else (lengths - own.mean()) / deviation
    return torch.where(right, -weight * score.sigmoid(), 0)


def overlong_penalty(length: int, *, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Soft overlong punishment of DAPO: 0 up to max - buffer, from there linearly down to -penalty at max.

    https://arxiv.org/abs/2503.14476, section 3.4, equation 13.

    Args:
        length: tokens of the answer.
        max_tokens: tokens of the longest answer.
        buffer_tokens: last tokens of the longest answer, over which the reward falls; 0: no punishment.
        penalty: reward lost at the full length and beyond, unit of the reward.

    Returns:
        A number in [-penalty, 0].

    Raises:
        ValueError: the buffer is negative or longer than the longest answer.
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"need 0 <= buffer_tokens <= max_tokens, got buffer_tokens={buffer_tokens} and "
            f"max_tokens={max_tokens}"
        )
    over = length - (max_tokens - buffer_tokens)
    return -penalty * min(over / buffer_tokens, 1.0) if buffer_tokens and over > 0 else 0.0


def bound_length_penalty(choice: Choice) -> BoundFunction | None:
    """The chosen function with its options bound; None for "off".

    It is called once on a small group, so that a wrong option is found at the start.

    Raises:
        ValueError: an unknown function or option, one out of its bounds, or a function that cannot be called
            with these columns.
    """
    if choice.name == "off":
        if choice.options:
            raise ValueError(
                f"algorithm.length_penalty off takes no options, got {', '.join(choice.options)}; name one "
                f"of {', '.join(LENGTH_PENALTIES)}"
            )
        return None
    bound = bind_as("length_penalty", choice, LENGTH_PENALTIES)
    try_out(bound, readable_by("length_penalty"))
    return bound


def _check_weight(weight: float) -> None:
    if weight < 0:
        raise ValueError(f"need weight >= 0, got {weight}; a negative one would reward length")


# Name -> function of the rewards and lengths of one group; "off" stands for no function.
LENGTH_PENALTIES: dict[str, Callable[..., Tensor]] = {
    "kimi_length": kimi_length,
    "relative_length": relative_length,
}
