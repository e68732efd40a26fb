"""Losses on pairs, of the implicit process reward, and calibration, one row at a time in Python floats."""

from __future__ import annotations

from math import exp, log


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-x))


def dpo(chosen, rejected, chosen_ref, rejected_ref, beta, label_smoothing):
    """2305.18290, equation 7, as cross-entropy with the label 1 - e: loss and both rewards."""
    rewards = (beta * (chosen - chosen_ref), beta * (rejected - rejected_ref))
    p = sigmoid(rewards[0] - rewards[1])
    return -((1 - label_smoothing) * log(p) + label_smoothing * log(1 - p)), *rewards


def ipo(chosen, rejected, chosen_ref, rejected_ref, chosen_tokens, rejected_tokens, beta):
    """2310.12036, equation 17, over means of tokens."""
    w, lo = (chosen - chosen_ref) / chosen_tokens, (rejected - rejected_ref) / rejected_tokens
    return (w - lo - 0.5 / beta) ** 2, beta * w, beta * lo


def simpo(chosen, rejected, chosen_tokens, rejected_tokens, beta, margin):
    """2405.14734, equation 6."""
    rewards = (beta / chosen_tokens * chosen, beta / rejected_tokens * rejected)
    return -log(sigmoid(rewards[0] - rewards[1] - margin)), *rewards


def bradley_terry(chosen, rejected, margin, center_coef):
    """2307.09288, equation 2, plus the square of the sum."""
    return (
        -log(sigmoid(chosen - rejected - margin)) + center_coef * (chosen + rejected) ** 2,
        chosen,
        rejected,
    )


def outcome_cross_entropy(prm_logprobs, ref_logprobs, reward, mask, beta):
    """2502.01456, equation 5, for one row: loss, reward of the model, whether it is right."""
    total = 0.0
    for p, q, flag in zip(prm_logprobs, ref_logprobs, mask, strict=True):
        total += p - q if flag else 0.0
    p, label = sigmoid(beta * total), 1.0 if reward > 0 else 0.0
    return -(label * log(p) + (1 - label) * log(1 - p)), beta * total, float(p > 0.5 if label else p < 0.5)


def calibration(probabilities, labels, bins):
    """1706.04599, equation 3, bin by bin, and the Brier score."""
    n, error = len(labels), 0.0
    for k in range(bins):
        inside = [
            i for i, p in enumerate(probabilities) if k / bins < p <= (k + 1) / bins or (k == 0 and p == 0)
        ]
        if inside:
            accuracy, confidence = (
                sum(labels[i] for i in inside) / len(inside),
                sum(probabilities[i] for i in inside) / len(inside),
            )
            error += len(inside) / n * abs(accuracy - confidence)
    return {
        "expected_calibration_error": error,
        "brier_score": sum((p - y) ** 2 for p, y in zip(probabilities, labels, strict=True)) / n,
    }
