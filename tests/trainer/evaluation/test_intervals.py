"""Intervals and tests against published values, and the share of simulated samples that they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from verl.trainer.evaluation.intervals import (
    Estimate,
    Z,
    mcnemar,
    mean_interval,
    mean_of,
    paired_difference,
    share_interval,
    sign_test,
    student,
    wilson,
)


def test_wilsons_interval_has_its_published_values():
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_students_quantiles_have_their_tabulated_values():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    for degrees, quantile in table.items():
        assert student(degrees) == pytest.approx(quantile, abs=0.012)


def test_greedy_answers_have_wilsons_interval():
    assert share_interval([1.0] * 15 + [0.0] * 133) == wilson(15 / 148, 148)


def test_answers_to_one_prompt_count_between_one_and_all_of_them():
    # Of each prompt all answers are equal: they say as much as one. Independent ones say as much as all.
    equal = share_interval([1.0, 0.0] * 50, draws=8)
    assert equal == wilson(0.5, 100)
    random = np.random.default_rng(0)
    independent = share_interval([float(v) for v in random.binomial(8, 0.5, 100) / 8], draws=8)
    width = independent[1] - independent[0]
    assert width == pytest.approx(2 * 1.98 * math.sqrt(0.25 / 800), rel=0.2)
    assert share_interval([0.5] * 10, draws=4) == wilson(0.5, 40 * (Z / student(9)) ** 2)
    assert share_interval([0.25], draws=4) == wilson(0.25, 1)


@pytest.mark.parametrize("samples, spread", [(1, 0.0), (4, 0.5), (8, 2.0), (8, 30.0)])
def test_intervals_cover_the_accuracy_of_the_model(samples, spread):
    random, hits, repeats = np.random.default_rng(7), 0, 1000
    for _ in range(repeats):
        # Prompts differ in difficulty: Beta(spread, 2 spread) has mean 1/3; without spread all are equal.
        rates = random.beta(spread, 2 * spread, 60) if spread else np.full(60, 1 / 3)
        values = random.binomial(samples, rates) / samples
        low, high = share_interval([float(v) for v in values], draws=samples)
        hits += low <= 1 / 3 <= high
    assert 0.93 <= hits / repeats <= 0.99


def test_the_interval_of_rewards_is_clustered_by_prompt():
    # Three prompts with two answers each, by hand: mean 2, deviations of the sums -2, 0, 2.
    low, high = mean_interval([2.0, 4.0, 6.0], [2, 2, 2])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(student(2) * math.sqrt(8 * 3 / 2) / 6)
    assert mean_interval([1.0, 0.0], [1, 0]) is None
    assert mean_interval([0.2, 0.1, 0.3], [2, 1, 3]) is None  # all 0.1


def test_rewards_of_few_prompts_are_covered():
    random, hits = np.random.default_rng(3), 0
    for _ in range(600):
        rewards = random.normal(0, 1, 12)[:, None] + random.normal(0, 1, (12, 4))
        low, high = mean_interval([float(s) for s in rewards.sum(1)], [4] * 12)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 600 <= 0.98


def test_the_mean_over_sets_is_surer_than_each_set():
    one = Estimate(0.4, 0.3, 0.52)
    mean = mean_of([one, Estimate(0.6, 0.5, 0.68)])
    assert mean.value == 0.5
    assert mean.low == pytest.approx(0.5 - math.hypot(0.1, 0.1) / 2)
    assert mean.high == pytest.approx(0.5 + math.hypot(0.12, 0.08) / 2)
    assert mean_of([one, Estimate(0.6)]).low is None
    assert mean_of([one]) is one


def test_mcnemars_test_has_its_known_values():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(40, 40) == 1.0


def test_paired_answers_are_compared_prompt_by_prompt():
    first = [1.0] * 50 + [0.0] * 50
    second = [1.0] * 48 + [0.0] * 2 + [1.0] * 12 + [0.0] * 38
    d = paired_difference(first, second, bounded=True)
    assert (d.value, d.better, d.worse, d.prompts) == (pytest.approx(0.1), 12, 2, 100)
    assert d.p_value == mcnemar(12, 2) and d.test == "McNemar, exact"
    # Bonett and Price: (b + 1, c + 1) of n + 2.
    won, lost = 13 / 102, 3 / 102
    half = 1.959964 * math.sqrt((won + lost - (won - lost) ** 2) / 102)
    assert (d.low, d.high) == pytest.approx((won - lost - half, won - lost + half))


def test_equal_policies_differ_by_nothing_that_is_sure():
    d = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], bounded=True)
    assert d.value == 0 and d.p_value == 1 and d.low < -0.3 < 0.3 < d.high


def test_shares_are_compared_by_random_signs():
    gaps = [0.25, 0.5, 0.25, 0.25, 0.75, 0.5, 0.25, -0.25]
    # Of the 256 signs, by hand: those whose sum is at least 2.5 of 3: all but one of the quarters turned.
    exact = np.mean([
        abs(sum(g * s for g, s in zip(gaps, signs, strict=True))) >= abs(sum(gaps)) - 1e-9
        for signs in np.ndindex(*[2] * 8)
        for signs in [[2 * s - 1 for s in signs]]
    ])  # fmt: skip
    assert sign_test(gaps) == pytest.approx(exact, abs=0.005)
    assert sign_test(gaps) == sign_test(gaps)
    assert sign_test([0.0, 0.0]) == 1.0


def test_differences_of_rewards_have_students_interval():
    d = paired_difference([1.0, 2.0, 4.0], [2.0, 4.0, 4.0], bounded=False)
    assert d.value == 1.0 and (d.low + d.high) / 2 == pytest.approx(1.0)
    assert (d.high - d.low) / 2 == pytest.approx(student(2) * 1 / math.sqrt(3))
    assert paired_difference([1.0], [2.0], bounded=False).high == math.inf
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([1.0], [], bounded=False)


def test_intervals_of_differences_cover_the_difference():
    random, hits, repeats = np.random.default_rng(5), 0, 600
    for _ in range(repeats):
        rates = random.beta(1, 1, 50)
        first = random.binomial(4, rates) / 4
        second = random.binomial(4, np.minimum(rates + 0.1 * (1 - rates), 1)) / 4
        d = paired_difference([float(v) for v in first], [float(v) for v in second], bounded=True)
        hits += d.low <= 0.05 <= d.high
    assert 0.93 <= hits / repeats <= 0.995
