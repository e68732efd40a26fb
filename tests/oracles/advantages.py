"""Advantages written from the papers, one trajectory at a time in Python floats (fp64)."""

from __future__ import annotations

from math import exp, sqrt


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


def siblings(i, group_ids):
    """Rows of the group of row i, itself among them."""
    return [j for j in range(len(group_ids)) if group_ids[j] == group_ids[i]]


def opo(rewards, group_ids, mask):
    """2505.23585: the baseline weighs each sibling by its length."""
    out = []
    for i, reward in enumerate(rewards):
        tokens = weighted = 0.0
        for j in siblings(i, group_ids):
            for sampled in mask[j]:
                tokens += sampled
                weighted += sampled * rewards[j]
        out.append(reward - weighted / tokens if tokens else 0.0)
    return out


def gpg(rewards, group_ids, scale=1.0):
    """2504.02546: only groups with differing rewards count in the mean over the batch."""
    useful = [len({rewards[j] for j in siblings(i, group_ids)}) > 1 for i in range(len(rewards))]
    out = []
    for i, reward in enumerate(rewards):
        group = siblings(i, group_ids)
        mean = sum(rewards[j] for j in group) / len(group)
        out.append(len(rewards) / sum(useful) * (reward - mean) / scale if useful[i] else 0.0)
    return out


def maxrl(rewards, group_ids, eps=1e-6):
    """2602.02710: divided by the mean, nothing without success."""
    out = []
    for i, reward in enumerate(rewards):
        group = siblings(i, group_ids)
        mean = sum(rewards[j] for j in group) / len(group)
        out.append((reward - mean) / (mean + eps) if mean > 0 else 0.0)
    return out


def grpo_batch_std(rewards, group_ids, eps=1e-6):
    """2510.13786: distances to the group mean, over their root mean square in the batch."""
    distances = []
    for i, reward in enumerate(rewards):
        group = siblings(i, group_ids)
        distances.append(reward - sum(rewards[j] for j in group) / len(group))
    scale = sqrt(sum(d * d for d in distances) / len(distances)) + eps
    return [d / scale for d in distances]


def grpo_passk(rewards, group_ids, normalize_std=True, eps=1e-6):
    """2503.19595: best of all minus best of all but one, for each one in turn."""
    out = []
    for i in range(len(rewards)):
        group = [rewards[j] for j in siblings(i, group_ids)]
        others = [rewards[j] for j in siblings(i, group_ids) if j != i]
        if not others:
            out.append(0.0)
            continue
        mean = sum(group) / len(group)
        std = sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        out.append((max(group) - max(others)) / (std + eps if normalize_std else 1.0))
    return out


def gdpo(reward_parts, reward_weights, group_ids, eps=1e-6):
    """2601.05242: each function by itself in its group, the weighted sum over the batch."""
    sums = [0.0] * len(reward_parts)
    for k in range(len(reward_parts[0])):
        for i, advantage in enumerate(grpo([row[k] for row in reward_parts], group_ids, eps=eps)):
            sums[i] += reward_weights[i][k] * advantage
    return grpo(sums, [0] * len(sums), eps=eps)


def reinforce_pp_baseline(rewards, group_ids, mask):
    """2501.03262: REINFORCE++ with the group mean as baseline."""
    centered = grpo(rewards, group_ids, normalize_std=False)
    return whiten([[value] * len(row) for value, row in zip(centered, mask, strict=True)], mask)


def reinforce_pp(token_rewards, mask, gamma):
    """2501.03262: returns as the double sum itself, whitened."""
    out = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        actions = [t for t, sampled in enumerate(row) if sampled]
        for i, t in enumerate(actions):
            out[b][t] = sum(gamma ** (k - i) * token_rewards[b][s] for k, s in enumerate(actions) if k >= i)
    return whiten(out, mask)


def optimal_token_baseline(rewards, group_ids, mask, trainer_logprobs, sum_squared_probs):
    """2602.07078 with the proxy for the gradient's norm, tokens numbered without those of the environment."""
    actions = [[t for t, sampled in enumerate(row) if sampled] for row in mask]
    weights = []
    for b, positions in enumerate(actions):
        terms = [1 - 2 * exp(min(trainer_logprobs[b][t], 0.0)) + sum_squared_probs[b][t] for t in positions]
        weights.append([sum(terms[: n + 1]) for n in range(len(terms))])
    out = [[0.0] * len(row) for row in mask]
    for b, positions in enumerate(actions):
        for n, t in enumerate(positions):
            there = [j for j in siblings(b, group_ids) if n < len(weights[j])]
            certain = not any(weights[j][n] for j in there)
            weight = {j: 1.0 if certain else weights[j][n] for j in there}
            out[b][t] = rewards[b] - sum(rewards[j] * weight[j] for j in there) / sum(weight.values())
    return out


def turns(row):
    """Unbroken runs of sampled tokens, as lists of positions."""
    out = []
    for t, sampled in enumerate(row):
        if sampled and t and row[t - 1]:
            out[-1].append(t)
        elif sampled:
            out.append([t])
    return out


def grpo_turns(token_rewards, mask, group_ids, normalize_std=True, eps=1e-6):
    """2402.03300, section 4.1.3, a turn being a step."""
    found = [
        (b, turn, sum(token_rewards[b][t] for t in turn)) for b, row in enumerate(mask) for turn in turns(row)
    ]
    normalized = []
    for b, _, reward in found:
        rewards = [r for c, _, r in found if group_ids[c] == group_ids[b]]
        mean = sum(rewards) / len(rewards)
        std = sqrt(sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1))
        normalized.append((reward - mean) / (std + eps if normalize_std else 1.0))
    out = [[0.0] * len(row) for row in mask]
    for b, turn, _ in found:
        for t in turn:
            out[b][t] = sum(
                n for n, (c, other, _) in zip(normalized, found, strict=True) if c == b and other[-1] >= t
            )
    return out


def gigpo(rewards, token_rewards, states, mask, group_ids, step_weight=1.0, gamma=0.95, eps=1e-6):
    """2505.10978, equations 3 to 8, with the deviations of samples."""
    episodes = grpo(rewards, group_ids, True, eps)
    found = []
    for b, row in enumerate(mask):
        own = turns(row)
        earned = [sum(token_rewards[b][t] for t in turn) for turn in own]
        for k, turn in enumerate(own):
            discounted = sum(gamma ** (j - k) * earned[j] for j in range(k, len(own)))
            found.append((b, turn, discounted, (group_ids[b], states[b][turn[0]])))
    out = [[0.0] * len(row) for row in mask]
    for b, turn, discounted, anchor in found:
        returns = [r for _, _, r, other in found if other == anchor]
        mean = sum(returns) / len(returns)
        std = sqrt(sum((r - mean) ** 2 for r in returns) / max(len(returns) - 1, 1))
        for t in turn:
            out[b][t] = episodes[b] + step_weight * (discounted - mean) / (std + eps)
    return out


def prime(rewards, group_ids, prm_logprobs, ref_logprobs, mask, beta=0.05, gamma=1.0):
    """2502.01456, equation 5, with the mean per token as the process reward of a sibling."""
    actions = [[t for t, sampled in enumerate(row) if sampled] for row in mask]
    gains = [
        [beta * (p - r) for p, r in zip(prm, ref, strict=True)]
        for prm, ref in zip(prm_logprobs, ref_logprobs, strict=True)
    ]
    outcome = rloo(rewards, group_ids)
    out = [[0.0] * len(row) for row in mask]
    for b, positions in enumerate(actions):
        others = [j for j in siblings(b, group_ids) if j != b and actions[j]]
        means = [sum(gains[j][t] for t in actions[j]) / len(actions[j]) for j in others]
        for i, t in enumerate(positions):
            process = (
                sum(
                    gamma ** (k - i) * (gains[b][s] - sum(means) / len(means))
                    for k, s in enumerate(positions)
                    if k >= i
                )
                if means
                else 0.0
            )
            out[b][t] = process + outcome[b]
    return out


def vapo_gae(token_rewards, values, mask, gamma, alpha, critic_lam):
    """2504.05118: the critic's returns with one decay, each row's advantages with that of its length; raw."""
    _, returns = gae(token_rewards, values, mask, gamma, critic_lam)
    advantages = []
    for rewards, row_values, row in zip(token_rewards, values, mask, strict=True):
        lam = max(1 - 1 / (alpha * sum(row)), 0.0) if any(row) else 0.0
        advantages.append(gae([rewards], [row_values], [row], gamma, lam)[0][0])
    return advantages, returns


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
    sampled = [
        v for row, flags in zip(values, mask, strict=True) for v, flag in zip(row, flags, strict=True) if flag
    ]
    if not sampled:
        return [[0.0] * len(row) for row in values]
    mean = sum(sampled) / len(sampled)
    std = sqrt(sum((v - mean) ** 2 for v in sampled) / len(sampled) + eps)
    out = []
    for row, flags in zip(values, mask, strict=True):
        out.append([(v - mean) / std if flag else 0.0 for v, flag in zip(row, flags, strict=True)])
    return out
