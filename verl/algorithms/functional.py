"""Statistics over sampled tokens and over groups, the clamped log-ratio, and checks of arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp overflows fp32 at 88, and inf times a weight of 0 is NaN: one broken token would poison the loss of the
# whole batch. exp(20) = 5e8 is far outside every clip range, and its square still sums over a batch without
# loss.
LOG_RATIO_LIMIT = 20.0


def check_same_shape(**columns: Tensor) -> None:
    """Raise ValueError unless all columns have one shape.

    A column that broadcasts would be read for the wrong tokens.
    """
    if len({column.shape for column in columns.values()}) > 1:
        came = ", ".join(f"{name} {tuple(column.shape)}" for name, column in columns.items())
        raise ValueError(
            f"need columns of the same shape, got {came}; pass them padded to the same rows and positions"
        )


def check_same_rows(**columns: Tensor) -> None:
    """Raise ValueError unless all columns have the same number of rows."""
    if len({len(column) for column in columns.values()}) > 1:
        came = ", ".join(f"{name} {tuple(column.shape)}" for name, column in columns.items())
        raise ValueError(
            f"need columns with the same rows, got {came}; pass one entry per trajectory in each"
        )


def check_not_negative(**options: float) -> None:
    """Raise ValueError unless all options are 0 or more."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"need {name} of at least 0, got {name}={value}; set 0 to turn it off")


def check_in_unit_interval(**options: float) -> None:
    """Raise ValueError unless all options are in [0, 1]."""
    if not all(0 <= value <= 1 for value in options.values()):
        came = " and ".join(f"{name}={value}" for name, value in options.items())
        raise ValueError(
            f"need {' and '.join(options)} in [0, 1], got {came}; 1 keeps all that comes later, 0 nothing"
        )


def log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log(p / q) of each token, clamped at +-20 nats; beyond the clamp there is no gradient."""
    return (logprobs - other_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sampled tokens, for monitors.

    A loss takes its denominator from the whole optimizer batch instead.

    Args:
        values: [B, T]; values at masked positions, NaN included, are not read.
        mask: [B, T] bool.

    Returns:
        [] in the dtype of the values; 0 where nothing was sampled.
    """
    check_same_shape(values=values, mask=mask)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B] mean over the sampled tokens of each row of [B, T]; 0 for a row without any."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the sampled tokens, with the population variance.

    Whitening of advantages in https://github.com/openai/lm-human-preferences, code of
    https://arxiv.org/abs/1909.08593.

    Args:
        values: [B, T].
        mask: [B, T] bool.
        eps: added to the variance, square of the unit of the values.

    Returns:
        [B, T] in the dtype of the values, mean 0 and deviation 1 over the sampled tokens, 0 at the others.
    """
    check_same_shape(values=values, mask=mask)
    # In fp64: equal fp32 values must give exactly 0, and rounding of the mean is amplified by up to 1 /
    # sqrt(eps).
    sampled = values[mask].double()
    whitened = torch.zeros_like(values)
    if sampled.numel():
        deviation = sampled - sampled.mean()
        whitened[mask] = (deviation * torch.rsqrt(deviation.square().mean() + eps)).to(values.dtype)
    return whitened


@dataclass(frozen=True)
class Siblings:
    """Groups of rows; each row gets the statistic of its group, in fp64.

    In fp64 the mean of equal fp32 rewards is that reward: a group without a winner gets exactly 0, not
    rounding noise divided by eps.

    Attributes:
        group: [B] int64 below B, equal for the rows of one group.
        sizes: [B] fp64, number of rows in the group of each row.
    """

    group: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, group_ids: Tensor) -> Siblings:
        """The groups of rows with equal ids [B] int, which come in any order."""
        _, group, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return cls(group, counts.double()[group])

    def sum(self, values: Tensor) -> Tensor:
        """[B, ...] sum of the values [B, ...] over the rows of the group."""
        return torch.zeros_like(values, dtype=torch.float64).index_add(0, self.group, values.double())[
            self.group
        ]

    def mean(self, values: Tensor) -> Tensor:
        """[B, ...] mean of the values [B, ...] over the rows of the group."""
        return self.sum(values) / self.sum(torch.ones_like(values))

    def max(self, values: Tensor) -> Tensor:
        """[B] largest of the values [B] in the group."""
        values = values.double()
        return torch.zeros_like(values).scatter_reduce(0, self.group, values, "amax", include_self=False)[
            self.group
        ]

    def deviation(self, values: Tensor) -> Tensor:
        """[B, ...] value minus the mean of the group."""
        return values.double() - self.mean(values)

    def leave_one_out(self, values: Tensor) -> Tensor:
        """[B] value minus the mean of the other rows of the group; 0 in a group of one.

        This is n / (n - 1) (value - mean).
        """
        return self.deviation(values) * (self.sizes / (self.sizes - 1).clamp(min=1))

    def over_std(self, advantages: Tensor, values: Tensor, *, eps: float) -> Tensor:
        """[B, ...] advantages over (s + eps), s the sample deviation (n - 1) of the values in the group.

        0 / 0 is 0.
        """
        degrees = (self.sum(torch.ones_like(values)) - 1).clamp(min=1)
        std = (self.sum(self.deviation(values).square()) / degrees).sqrt()
        return advantages / (std + eps).clamp(min=torch.finfo(std.dtype).tiny)


def siblings_of(rewards: Tensor, group_ids: Tensor) -> Siblings:
    """The groups of one reward per row.

    Args:
        rewards: [B] float.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.

    Raises:
        ValueError: shapes differ, or the rewards are not floating point.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"need one group id per reward, got rewards {tuple(rewards.shape)} and "
            f"group_ids {tuple(group_ids.shape)}; pass per-trajectory sums, not per-token rewards"
        )
    if not rewards.is_floating_point():
        raise ValueError(
            f"need floating point rewards, got {rewards.dtype}; integers would round the advantages away"
        )
    return Siblings.of(group_ids)
