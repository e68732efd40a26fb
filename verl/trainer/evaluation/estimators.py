"""pass@k, maj@k and best@k of a prompt: expectations over k of its n answers, without sampling noise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

Array = np.ndarray


def pass_at(num_answers: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k answers is correct, 1 - C(n - c, k) / C(n, k).

    Unbiased, from n answers of which c are correct, as a product that neither overflows nor cancels: Codex,
    https://arxiv.org/abs/2107.03374, section 2.1.

    Raises:
        ValueError: not 0 <= c <= n and 1 <= k <= n.
    """
    check_subset(num_answers, k)
    if not 0 <= num_correct <= num_answers:
        raise ValueError(f"need from 0 to {num_answers} correct answers, got {num_correct}")
    wrong = num_answers - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(wrong + 1, num_answers + 1))


def best_at(rewards: Sequence[float], k: int) -> float:
    """Expected largest reward of k answers, drawn without replacement from the n given ones.

    The i-th smallest is the largest of C(i - 1, k - 1) of the C(n, k) subsets.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    n = len(rewards)
    check_subset(n, k)
    total, weight = 0.0, k / n
    for i, reward in zip(range(n, k - 1, -1), sorted(rewards, reverse=True), strict=False):
        total += weight * reward
        if i > k:  # the weight of i - 1
            weight *= (i - k) / (i - 1)
    return total


def majority_at(votes: Sequence[Hashable | None], correct: Sequence[float], k: int) -> float:
    """Expected accuracy of the majority vote of k answers, drawn without replacement from the n given ones.

    Self-consistency, https://arxiv.org/abs/2203.11171, without luck: where several answers have the most
    votes, one of them is taken with equal probability. The expectation over the C(n, k) subsets is exact.

    Args:
        votes: of each answer; equal ones are votes for the same. None: the answer does not vote.
        correct: accuracy of each answer, in [0, 1]. That of a vote is the mean over its answers.
        k: answers that vote.

    Returns:
        A value in [0, 1]. Where no answer votes, the vote is wrong.

    Raises:
        ValueError: not one accuracy per vote, or not 1 <= k <= n.
    """
    n = len(votes)
    check_subset(n, k)
    if len(correct) != n:
        raise ValueError(f"need one accuracy per vote, got {n} votes and {len(correct)} accuracies")
    accuracies: dict[Hashable, list[float]] = {}
    for vote, accuracy in zip(votes, correct, strict=True):
        if vote is not None:
            accuracies.setdefault(vote, []).append(accuracy)
    classes = [(len(values), sum(values) / len(values)) for values in accuracies.values()]
    if k == n:
        most = max((size for size, _ in classes), default=0)
        winners = [accuracy for size, accuracy in classes if size == most]
        return sum(winners) / len(winners) if winners else 0.0
    # The numbers of votes in a subset are distributed as independent binomials of any share, given their sum.
    share = k / n
    silent = _binomial(n - sum(size for size, _ in classes), share)
    total = sum(
        _won_with(classes, silent, most, k)
        for most in range(1, min(k, max((s for s, _ in classes), default=0)) + 1)
    )
    return min(1.0, total / float(_binomial(n, share)[k]))


def check_subset(num_answers: int, k: int) -> None:
    """Check that k answers can be drawn from n.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    if not 1 <= k <= num_answers:
        raise ValueError(f"need k from 1 to the number of answers, {num_answers}, got {k}")


def _won_with(classes: Sequence[tuple[int, float]], silent: Array, most: int, k: int) -> float:
    """Probability-weighted accuracy of the subsets in which the winners have exactly `most` votes each.

    A polynomial over answers drawn and winners, [k + 1, k // most + 1]: probabilities, and the same times
    the summed accuracy of the winners.
    """
    share = k / (sum(size for size, _ in classes) + len(silent) - 1)
    chances = np.zeros((k + 1, k // most + 1))
    chances[: len(silent), 0] = silent[: k + 1]
    summed = np.zeros_like(chances)
    for size, accuracy in classes:
        weights = _binomial(size, share)
        next_chances, next_summed = np.zeros_like(chances), np.zeros_like(summed)
        for drawn in range(min(size, most - 1, k) + 1):
            next_chances[drawn:] += weights[drawn] * chances[: k + 1 - drawn]
            next_summed[drawn:] += weights[drawn] * summed[: k + 1 - drawn]
        if size >= most:
            before, sums = chances[: k + 1 - most, :-1], summed[: k + 1 - most, :-1]
            next_chances[most:, 1:] += weights[most] * before
            next_summed[most:, 1:] += weights[most] * (sums + accuracy * before)
        chances, summed = next_chances, next_summed
    return float(sum(summed[k, winners] / winners for winners in range(1, summed.shape[1])))


@lru_cache(maxsize=4096)
def _binomial(size: int, share: float) -> Array:
    """[size + 1], probabilities of 0, 1, ... successes; 0 < share < 1."""
    counts = range(size + 1)
    logs = [
        math.lgamma(size + 1)
        - math.lgamma(i + 1)
        - math.lgamma(size - i + 1)
        + i * math.log(share)
        + (size - i) * math.log1p(-share)
        for i in counts
    ]
    return np.exp(np.array(logs))
