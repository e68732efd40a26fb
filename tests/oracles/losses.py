"""Losses and weights written from the papers, one token at a time in Python floats (fp64).

A stop-gradient is an argument of its own: `held` is the value of `logprob` at which the gradient is taken.
"""

from __future__ import annotations

from math import exp, log, prod


def ppo_clip(logprob, old_logprob, advantage, clip_low, clip_high, dual_clip=None):
    """1707.06347, equation 7, an objective to maximise, returned as a loss.

    The bound for tokens with a negative advantage is that of 1912.09729.
    """
    ratio = exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def intellect2(logprob, old_logprob, advantage, eps, delta):
    """2505.07291, two-sided clip: the ratio of the unclipped term is cut at delta, whatever the advantage."""
    ratio = exp(logprob - old_logprob)
    return -min(min(ratio, delta) * advantage, min(max(ratio, 1 - eps), 1 + eps) * advantage)


def policy_gradient(logprob, advantage):
    """REINFORCE."""
    return -advantage * logprob


def importance(logprob, old_logprob, advantage):
    """The probability of the token now over that when it was sampled, times its advantage."""
    return -exp(logprob) / exp(old_logprob) * advantage


def cispo(logprob, held, old_logprob, advantage, clip_high, clip_low=None):
    """2506.13585, equations 4 and 5, as an objective to maximise; returned as a loss."""
    weight = min(exp(held - old_logprob), 1 + clip_high)
    if clip_low is not None:
        weight = max(weight, 1 - clip_low)
    return -(weight * advantage * logprob)


def sapo(logprob, old_logprob, advantage, tau_positive, tau_negative):
    """2511.20347, equations 5 and 6."""
    tau = tau_positive if advantage > 0 else tau_negative
    return -4 / tau / (1 + exp(-tau * (exp(logprob - old_logprob) - 1))) * advantage


def dppo(logprob, held, rollout_logprob, advantage, divergence, threshold_low, threshold_high):
    """2602.04879: the mask in words, with the distance between two coins."""
    p, q = exp(held), exp(rollout_logprob)
    total_variation = (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    kl = sum(b * log(b / a) for a, b in ((p, q), (1 - p, 1 - q)))
    distance = {"tv": total_variation, "kl": kl}[divergence]
    if advantage > 0 and p > q and distance > threshold_high:
        return 0.0
    if advantage < 0 and p < q and distance > threshold_low:
        return 0.0
    return -exp(logprob - rollout_logprob) * advantage


def gspo(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """2507.18071, equations 5 and 7: the likelihood ratio of a sequence to the power 1 / length."""
    n = len(logprobs)
    ratio = (exp(sum(logprobs)) / exp(sum(old_logprobs))) ** (1 / n)
    return [ppo_clip(log(ratio), 0.0, sum(advantages) / n, clip_low, clip_high)] * n


def gspo_token(logprobs, held, old_logprobs, advantages, clip_low, clip_high):
    """2507.18071, equations 13 and 14."""
    of_sequence = exp(sum(p - q for p, q in zip(held, old_logprobs, strict=True)) / len(held))
    ratios = [of_sequence * exp(p) / exp(h) for p, h in zip(logprobs, held, strict=True)]
    return [ppo_clip(log(r), 0.0, a, clip_low, clip_high) for r, a in zip(ratios, advantages, strict=True)]


def gmpo(logprobs, old_logprobs, advantages, clip):
    """2507.20673, equation 4: geometric mean of the absolute clipped terms, signed as the advantage."""
    n = len(logprobs)
    advantage = sum(advantages) / n
    ratios = [exp(p - q) for p, q in zip(logprobs, old_logprobs, strict=True)]
    terms = [abs(min(r * advantage, min(max(r, exp(-clip)), exp(clip)) * advantage)) for r in ratios]
    sign = (advantage > 0) - (advantage < 0)
    return [-(prod(terms) ** (1 / n)) * sign] * n


def clip_cov(logprobs, held, old_logprobs, advantages, noise, share, cov_low, cov_high, clip_low, clip_high):
    """2505.22617, equations 10 and 11, over the sampled tokens of a minibatch in any order."""
    covariance = covariances(held, advantages)
    eligible = [i for i, c in enumerate(covariance) if cov_low < c < cov_high]
    chosen = sorted(eligible, key=lambda i: noise[i])[: max(1, int(share * len(held)))]
    tokens = ((held if i in chosen else logprobs)[i] for i in range(len(held)))
    return [ppo_clip(p, old_logprobs[i], advantages[i], clip_low, clip_high) for i, p in enumerate(tokens)]


def kl_cov(logprobs, held, old_logprobs, advantages, share, kl_coef):
    """2505.22617, equations 12 and 13, over the sampled tokens of a minibatch in any order."""
    covariance = covariances(held, advantages)
    chosen = sorted(range(len(held)), key=lambda i: covariance[i], reverse=True)[
        : max(1, int(share * len(held)))
    ]
    loss = []
    for i, (p, q, a) in enumerate(zip(logprobs, old_logprobs, advantages, strict=True)):
        loss.append(-exp(p - q) * a + (kl_coef * abs(p - q) if i in chosen else 0.0))
    return loss


def covariances(logprobs, advantages):
    """2505.22617, equation 9."""
    mean_logprob, mean_advantage = sum(logprobs) / len(logprobs), sum(advantages) / len(advantages)
    return [(p - mean_logprob) * (a - mean_advantage) for p, a in zip(logprobs, advantages, strict=True)]


def online_dpo(rows, beta, label_smoothing):
    """2402.04792, and 2305.18290, equation 7.

    A row is (logprobs, ref_logprobs, reward, group), and gets one number.
    """
    loss = [0.0] * len(rows)
    for group in {row[3] for row in rows}:
        members = [i for i, row in enumerate(rows) if row[3] == group and row[0]]
        if not members or len({rows[i][2] for i in members}) == 1:
            continue
        best = max(members, key=lambda i: (rows[i][2], -i))
        worst = min(members, key=lambda i: (rows[i][2], i))
        h_best, h_worst = (sum(rows[i][0]) - sum(rows[i][1]) for i in (best, worst))
        preferred = 1 / (1 + exp(-beta * (h_best - h_worst)))
        loss[best] = loss[worst] = -(1 - label_smoothing) * log(preferred) - label_smoothing * log(
            1 - preferred
        )
    return loss


def forward_kl_topk(top_logprobs, teacher_top_logprobs):
    """2306.13649: the terms of KL(teacher || student) of the teacher's k tokens."""
    return sum(exp(q) * log(exp(q) / exp(p)) for p, q in zip(top_logprobs, teacher_top_logprobs, strict=True))


def value_clip(new_value, value, target, clip):
    """2005.12729, section 3, with the half."""
    moved = min(max(new_value, value - clip), value + clip)
    return max((new_value - target) ** 2, (moved - target) ** 2) / 2


def aggregated(name, loss, mask, length=None, group_ids=None):
    """The loss of the whole batch, as each paper writes the sums."""
    rows = [
        [v for v, flag in zip(row, flags, strict=True) if flag] for row, flags in zip(loss, mask, strict=True)
    ]
    if name == "prompt_mean":
        prompts = [
            [v for row, g in zip(rows, group_ids, strict=True) if g == group for v in row]
            for group in set(group_ids)
        ]
        prompts = [prompt for prompt in prompts if prompt]
        return sum(sum(prompt) / len(prompt) for prompt in prompts) / max(1, len(prompts))
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


TABLE = {
    function.__name__: function
    for function in (
        ppo_clip,
        policy_gradient,
        importance,
        gspo,
        gspo_token,
        gmpo,
        cispo,
        sapo,
        dppo,
        clip_cov,
        kl_cov,
    )
}
