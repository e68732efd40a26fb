"""Advantages written from the papers, one trajectory at a time in Python floats (fp64)."""

from __future__ import annotations

from math import sqrt


def grpo(rewards, group_ids, normalize_std=True, eps=1e-6):
    """2402.03300, section 4.1.2."""
    out = []
    for reward, group in zip(rewards, group_ids, strict=True):
        siblings = [r for r, g in zip(rewards, group_ids, strict=True) if g == group]
        mean = sum(siblings) / len(siblings)
        if len(siblings) == 1:
            out.append(0.0)
            continue
        std = sqrt(sum((r - mean) ** 2 for r in siblings) / (len(siblings) - 1))
        out.append((reward - mean) / (std + eps) if normalize_std else reward - mean)
    return out


def rloo(rewards, group_ids):
    """2402.14740: the baseline is the mean of the others."""
    out = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rewards)) if j != i and group_ids[j] == group_ids[i]]
        out.append(reward - sum(others) / len(others) if others else 0.0)
    return out


def gae(token_rewards, values, mask, gamma, lam):
    """1506.02438, equation 16, as the double sum itself; raw advantages and returns."""
    advantages = [[0.0] * len(row) for row in values]
    returns = [[0.0] * len(row) for row in values]
    for b, row in enumerate(mask):
        actions = [t for t, sampled in enumerate(row) if sampled]
        deltas = []
        for i, t in enumerate(actions):
            following = values[b][actions[i + 1]] if i + 1 < len(actions) else 0.0
            deltas.append(token_rewards[b][t] + gamma * following - values[b][t])
        for i, t in enumerate(actions):
            advantages[b][t] = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(actions)))
            returns[b][t] = advantages[b][t] + values[b][t]
    return advantages, returns


def whiten(values, mask, eps=1e-8):
    """Mean 0, population deviation 1 over the sampled tokens."""
    sampled = [v for row, flags in zip(values, mask, strict=True) for v, flag in zip(row, flags, strict=True) if flag]
    if not sampled:
        return [[0.0] * len(row) for row in values]
    mean = sum(sampled) / len(sampled)
    std = sqrt(sum((v - mean) ** 2 for v in sampled) / len(sampled) + eps)
    out = []
    for row, flags in zip(values, mask, strict=True):
        out.append([(v - mean) / std if flag else 0.0 for v, flag in zip(row, flags, strict=True)])
    return out
