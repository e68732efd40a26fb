"""Weights of the tokens in the loss of an optimizer batch: the losses of any split of the batch add up.

A batch may also be trained in portions of whole groups that do not know each other. The weights of the whole
batch are the weights of a portion by itself, times the portion's denominator over the sum of all
denominators. `DENOMINATORS` has these denominators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_mean(mask: Tensor) -> Tensor:
    """1 / (sampled tokens of the optimizer batch): each token counts the same.

    DAPO, https://arxiv.org/abs/2503.14476, section 3.3.

    Args:
        mask: [B, T] bool of the whole optimizer batch, not of a micro-batch.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / num_tokens(mask).clamp(min=1)


def num_tokens(mask: Tensor) -> Tensor:
    """[] int64, sampled tokens of [B, T]: the denominator of `token_mean`."""
    return mask.sum()


def seq_mean_token_mean(mask: Tensor) -> Tensor:
    """1 / (rows x sampled tokens of the row): each row counts the same, however long it is.

    GRPO, https://arxiv.org/abs/2402.03300, equation 3.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_rows(mask).clamp(min=1)


def num_rows(mask: Tensor) -> Tensor:
    """[] int64, rows of [B, T] with at least one sampled token: the denominator of the means over rows."""
    return mask.any(dim=1).sum()


def prompt_mean(mask: Tensor, group_ids: Tensor) -> Tensor:
    """1 / (prompts x sampled tokens of the prompt's answers): each prompt counts the same.

    Within a prompt each token counts the same. ScaleRL, https://arxiv.org/abs/2510.13786, section 3.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a prompt without a sampled token is no prompt.
        group_ids: [B] int, equal for the trajectories of one prompt, in any order.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    tokens, groups = _tokens_of_prompts(mask, group_ids)
    return mask.float() / tokens[groups].clamp(min=1)[:, None] / num_prompts(mask, group_ids).clamp(min=1)


def num_prompts(mask: Tensor, group_ids: Tensor) -> Tensor:
    """[] int64, prompts with at least one sampled token: the denominator of `prompt_mean`."""
    return (_tokens_of_prompts(mask, group_ids)[0] > 0).sum()


def _tokens_of_prompts(mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sampled tokens of each prompt [B] int64, then zeros, and the index of each row's prompt [B] int64."""
    _, groups = torch.unique(group_ids, return_inverse=True)
    return torch.zeros(len(groups), dtype=torch.int64, device=mask.device).index_add(
        0, groups, mask.sum(1)
    ), groups


def seq_mean_token_sum(mask: Tensor) -> Tensor:
    """1 / rows: the tokens of a row are summed, as in the logprob of the whole answer.

    RLOO, https://arxiv.org/abs/2402.14740.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().
    """
    return mask.float() / num_rows(mask).clamp(min=1)


def seq_mean_token_sum_norm(mask: Tensor, *, length: int) -> Tensor:
    """1 / (rows x length) with a constant length.

    Unlike 1 / tokens, it does not favour short right answers and long wrong ones. Dr. GRPO,
    https://arxiv.org/abs/2503.20783, section 3.

    Args:
        mask: [B, T] bool of the whole optimizer batch; a row without a sampled token is no row.
        length: tokens, at least 1; the longest answer that sampling allows, so that the weight is the same in
            every step.

    Returns:
        [B, T] fp32, 0 at masked positions; the loss of any part of the batch is (loss * weights).sum().

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"need length >= 1 token, got {length}; set it to the longest answer")
    return mask.float() / num_rows(mask).clamp(min=1) / length


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "prompt_mean": prompt_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
# Denominator of the weights of each aggregation, to bring portions together; same columns as the aggregation.
DENOMINATORS: dict[str, Callable[..., Tensor]] = {
    "token_mean": num_tokens,
    "seq_mean_token_mean": num_rows,
    "prompt_mean": num_prompts,
    "seq_mean_token_sum": num_rows,
    "seq_mean_token_sum_norm": num_rows,
}
