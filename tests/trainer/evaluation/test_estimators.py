"""pass@k, maj@k and best@k against every subset of the answers, and where numbers are large."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from verl.trainer.evaluation.estimators import best_at, majority_at, pass_at


def majority_of(votes, accuracy_of):
    """The accuracy of one vote: the mean over the winners."""
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    return fmean([accuracy_of[vote] for vote, count in counts.items() if count == most] or [0.0])


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            hits = [min(subset) < correct for subset in combinations(range(n), k)]
            assert pass_at(n, correct, k) == pytest.approx(fmean(hits), abs=1e-15)


def test_pass_at_k_of_the_codex_paper_holds_for_many_answers():
    # 1 - C(197, 100) / C(200, 100), by hand: 1 - (100 * 99 * 98) / (200 * 199 * 198).
    assert pass_at(200, 3, 100) == pytest.approx(1 - 100 * 99 * 98 / (200 * 199 * 198), rel=1e-12)
    assert pass_at(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at(10_000, 5_000, 9_000) == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_majority_is_the_mean_over_all_subsets_with_ties_shared(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 9))
    votes = [None if v == 4 else int(v) for v in random.integers(0, 5, n)]
    correct = [float(c) for c in random.integers(0, 2, n)]
    accuracies = {v: fmean(c for u, c in zip(votes, correct, strict=True) if u == v) for v in set(votes)}
    for k in range(1, n + 1):
        expected = fmean(majority_of(subset, accuracies) for subset in combinations(votes, k))
        assert majority_at(votes, correct, k) == pytest.approx(expected, abs=1e-12)


def test_two_of_three_equal_votes_win_and_a_tie_is_half_won():
    assert majority_at(["4", "4", "5"], [1, 1, 0], 3) == 1.0
    assert majority_at(["4", "5"], [1, 0], 2) == 0.5
    assert majority_at([None, None, "4"], [0, 0, 1], 3) == 1.0
    assert majority_at([None, None], [0, 0], 2) == 0.0


def test_majority_of_a_thousand_answers_approaches_that_of_the_model():
    votes, correct = ["right"] * 600 + ["wrong"] * 400, [1.0] * 600 + [0.0] * 400
    won = majority_at(votes, correct, 101)
    ways = [math.comb(600, i) * math.comb(400, 101 - i) for i in range(51, 102)]
    assert won == pytest.approx(sum(ways) / math.comb(1000, 101), rel=1e-9)


def test_best_at_k_is_the_mean_of_the_largest_over_all_subsets():
    rewards = [0.3, -1.0, 2.5, 0.3, 1.0]
    for k in range(1, 6):
        expected = fmean(max(subset) for subset in combinations(rewards, k))
        assert best_at(rewards, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_k_answers_cannot_be_drawn_from_fewer(k):
    with pytest.raises(ValueError, match="need k from 1 to the number of answers, 2"):
        pass_at(2, 1, k)
    with pytest.raises(ValueError, match="need k from 1"):
        majority_at(["a", "b"], [1, 0], k)
    with pytest.raises(ValueError, match="need k from 1"):
        best_at([1.0, 0.0], k)


def test_more_correct_answers_than_answers_are_refused():
    with pytest.raises(ValueError, match="need from 0 to 2 correct answers, got 3"):
        pass_at(2, 3, 1)
    with pytest.raises(ValueError, match="one accuracy per vote"):
        majority_at(["a"], [], 1)
