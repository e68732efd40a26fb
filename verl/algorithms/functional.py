"""Masked statistics, the clamped log-ratio and the shape guard that the algorithm functions share."""

from __future__ import annotations

import torch
from torch import Tensor

# exp overflows fp32 at 88, and inf times a weight of 0 is NaN: one broken token would poison the loss of the whole batch.
# exp(20) = 5e8 is far outside every clip range, and its square still sums over a batch without loss.
LOG_RATIO_LIMIT = 20.0


def check_same_shape(**columns: Tensor) -> None:
    """Raises ValueError unless all columns have one shape; a column that broadcasts would be read for the wrong tokens."""
    if len({column.shape for column in columns.values()}) > 1:
        came = ", ".join(f"{name} {tuple(column.shape)}" for name, column in columns.items())
        raise ValueError(f"need columns of the same shape, got {came}; pass them padded to the same rows and positions")


def log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """log(p / q) of each token, clamped at +-20 nats; beyond the clamp there is no gradient."""
    return (logprobs - other_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the sampled tokens, for monitors; a loss takes its denominator from the whole optimizer batch instead.

    Args:
        values: [B, T]; what stands at masked positions, NaN included, is not read.
        mask: [B, T] bool.

    Returns:
        [] in the dtype of the values; 0 where nothing was sampled.
    """
    check_same_shape(values=values, mask=mask)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the sampled tokens, with the population variance.

    Whitening of advantages in https://github.com/openai/lm-human-preferences, code of https://arxiv.org/abs/1909.08593.

    Args:
        values: [B, T].
        mask: [B, T] bool.
        eps: added to the variance, square of the unit of the values.

    Returns:
        [B, T] in the dtype of the values, mean 0 and deviation 1 over the sampled tokens, 0 at the others.
    """
    check_same_shape(values=values, mask=mask)
    # In fp64: equal fp32 values must give exactly 0, and rounding of the mean is amplified by up to 1 / sqrt(eps).
    sampled = values[mask].double()
    whitened = torch.zeros_like(values)
    if sampled.numel():
        deviation = sampled - sampled.mean()
        whitened[mask] = (deviation * torch.rsqrt(deviation.square().mean() + eps)).to(values.dtype)
    return whitened
