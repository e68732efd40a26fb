"""Losses and weights written from the papers, one token at a time in Python floats (fp64)."""

from __future__ import annotations

from math import exp


def ppo_clip(logprob, old_logprob, advantage, clip_low, clip_high, dual_clip=None):
    """1707.06347, equation 7 as an objective to maximise, bounded from below for bad tokens as in 1912.09729; returned as a loss."""
    ratio = exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def value_clip(new_value, value, target, clip):
    """2005.12729, section 3, with the half."""
    moved = min(max(new_value, value - clip), value + clip)
    return max((new_value - target) ** 2, (moved - target) ** 2) / 2


def aggregated(name, loss, mask, length=None):
    """The loss of the whole batch, as each paper writes the sums."""
    rows = [[v for v, flag in zip(row, flags, strict=True) if flag] for row, flags in zip(loss, mask, strict=True)]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if name == "token_mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if name == "seq_mean_token_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if name == "seq_mean_token_sum":
        return sum(sum(row) for row in rows) / len(rows)
    return sum(sum(row) / length for row in rows) / len(rows)
