"""Weights of corrections and their monitors, one token at a time in Python floats (fp64).

The log-ratios must be within the clamp.
"""

from __future__ import annotations

from math import exp, log


def sampled(logprobs, rollout_logprobs, mask):
    """Per row the ratios of its sampled tokens."""
    rows = []
    for p, q, flags in zip(logprobs, rollout_logprobs, mask, strict=True):
        rows.append([exp(p[t]) / exp(q[t]) for t, flag in enumerate(flags) if flag])
    return rows


def spread(rows, mask):
    """Values of the sampled tokens back at their places, 0 elsewhere."""
    out = []
    for row, flags in zip(rows, mask, strict=True):
        left = iter(row)
        out.append([next(left) if flag else 0.0 for flag in flags])
    return out


def product(ratios):
    """Plainly multiplied."""
    total = 1.0
    for ratio in ratios:
        total *= ratio
    return total


def token_tis(rows, cap, normalize=False):
    """min(rho, C), over the mean of all of them."""
    weights = [[ratio if cap is None or ratio < cap else cap for ratio in row] for row in rows]
    every = [w for row in weights for w in row]
    mean = sum(every) / len(every) if normalize and every else 1.0
    return [[w / mean for w in row] for row in weights]


def seq_tis(rows, cap, normalize=False):
    """min(prod rho, C), over the mean of the rows that have a token."""
    weights = [product(row) if cap is None else min(product(row), cap) for row in rows]
    counted = [w for w, row in zip(weights, rows, strict=True) if row]
    mean = sum(counted) / len(counted) if normalize and counted else 1.0
    return [[w / mean] * len(row) for w, row in zip(weights, rows, strict=True)]


def token_mis(rows, low, high):
    """IcePop's M(k)."""
    return [[ratio if low <= ratio <= high else 0.0 for ratio in row] for row in rows]


def seq_mis(rows, low, high):
    """The product as a weight, or nothing."""
    return [[product(row) if low <= product(row) <= high else 0.0] * len(row) for row in rows]


def geometric_rs(rows, low, high, cap):
    """The T-th root of the product decides."""
    return [
        [
            (1.0 if cap is None else min(ratio, cap))
            if low <= product(row) ** (1 / len(row)) <= high
            else 0.0
            for ratio in row
        ]
        for row in rows
    ]


def k3_rs(rows, threshold, cap):
    """The mean of rho - log rho - 1 decides."""
    out = []
    for row in rows:
        mean = sum(ratio - log(ratio) - 1 for ratio in row) / max(1, len(row))
        out.append([(1.0 if cap is None else min(ratio, cap)) if mean <= threshold else 0.0 for ratio in row])
    return out


def loglinear(logprob, rollout_logprob, version, behave, cap):
    """Old logprob and weight of one token by AReaL's interpolation.

    v_prox is the version, and v_theta the version + 1.
    """
    alpha = (version - behave) / (version + 1 - behave)
    old = rollout_logprob + alpha * (logprob - rollout_logprob)
    weight = exp(old) / exp(rollout_logprob)
    return old, weight if cap is None else min(weight, cap)


def off_policy_mask(logprobs, rollout_logprobs, advantages, mask, threshold):
    """2512.02556: M of every token."""
    out = []
    for b, flags in enumerate(mask):
        places = [t for t, flag in enumerate(flags) if flag]
        drift = sum(rollout_logprobs[b][t] - logprobs[b][t] for t in places) / max(1, len(places))
        out.append(
            [
                0.0 if not flag or (advantages[b][t] < 0 and drift > threshold) else 1.0
                for t, flag in enumerate(flags)
            ]
        )
    return out


def row_monitors(logprobs, rollout_logprobs, mask):
    """The monitors over rows that have a token."""
    rows = [row for row in sampled(logprobs, rollout_logprobs, mask) if row]
    squares = [product(row) ** 2 for row in rows]
    drifts = [sum(-log(ratio) for ratio in row) / len(row) for row in rows]
    return {"chi2_seq": sum(squares) / len(rows) - 1, "ppl_ratio": exp(sum(drifts) / len(rows))}


def weight_monitors(weights, mask):
    """Shares over the sampled tokens."""
    ws = [
        w
        for row, flags in zip(weights, mask, strict=True)
        for w, flag in zip(row, flags, strict=True)
        if flag
    ]
    squares = sum(w * w for w in ws)
    return {
        "rejected_share": sum(w == 0 for w in ws) / len(ws),
        "weight_mean": sum(ws) / len(ws),
        "ess_share": sum(ws) ** 2 / squares / len(ws) if squares else 0.0,
    }
