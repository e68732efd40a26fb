"""KL estimators, coefficients and mismatch monitors, one token at a time in Python floats (fp64)."""

from __future__ import annotations

from math import exp, log


def estimate(name, logprob, ref_logprob):
    """joschu.net/blog/kl-approx.html; r = p_ref / p."""
    log_r = ref_logprob - logprob
    return {"k1": -log_r, "k2": log_r * log_r / 2, "k3": (exp(log_r) - 1) - log_r}[name]


def straight_through(name, logprob, held, ref_logprob):
    """The value of k1 or k3 at `held`, where the gradient is taken, plus how far k2 has moved from there."""
    return (
        estimate(name, held, ref_logprob)
        + estimate("k2", logprob, ref_logprob)
        - estimate("k2", held, ref_logprob)
    )


def k3_importance(logprob, old_logprob, ref_logprob):
    """2512.02556, equation 7."""
    return (
        exp(logprob)
        / exp(old_logprob)
        * (exp(ref_logprob) / exp(logprob) - log(exp(ref_logprob) / exp(logprob)) - 1)
    )


def mismatch(logprobs, rollout_logprobs, mask):
    """The five monitors over the sampled tokens."""
    pairs = []
    for b, row in enumerate(mask):
        for t, sampled in enumerate(row):
            if sampled:
                pairs.append((logprobs[b][t], rollout_logprobs[b][t]))
    n = len(pairs)
    ratios = [exp(p - q) for p, q in pairs]
    return {
        "kl_k1": sum(q - p for p, q in pairs) / n,
        "kl_k3": sum(exp(p - q) - 1 - (p - q) for p, q in pairs) / n,
        "chi2_token": sum(r * r for r in ratios) / n - 1,
        "max_abs_difference": max(abs(p - q) for p, q in pairs),
        "ess_share": sum(ratios) ** 2 / (n * sum(r * r for r in ratios)),
    }
