"""95 % confidence intervals over prompts, and tests of two policies on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
# Quantile of the normal distribution for 95 %, 1.96.
Z = NormalDist().inv_cdf(0.975)
# Random signs in the test of a difference; its p-value has a standard error of at most 0.005.
_NUM_DRAWS = 10_000
_DRAWS_AT_A_TIME = 500


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval; None: there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def between(cls, value: float, interval: Interval | None) -> Estimate:
        """A value with the bounds of its interval, if it has one."""
        return cls(value, *interval) if interval else cls(value)


@dataclass(frozen=True)
class Difference:
    """Difference of two policies over the same prompts, the second less the first.

    Attributes:
        value: mean over prompts.
        low: of the 95 % interval.
        high: of the 95 % interval.
        p_value: probability of a difference at least as large if the policies were equal.
        test: name of the test.
        better: prompts on which the second is better.
        worse: prompts on which it is worse.
        prompts: compared.
    """

    value: float
    low: float
    high: float
    p_value: float
    test: str
    better: int
    worse: int
    prompts: int


def wilson(share: float, count: float, z: float = Z) -> Interval:
    """Wilson's score interval of a share of `count` independent trials.

    Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", Statistical Science 2001: it
    stays in [0, 1], and holds its level for small counts and for shares near 0 and 1.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(values: Sequence[float], *, draws: float = 1.0) -> Interval:
    """Interval of the mean over independent prompts of values in [0, 1], such as mean@k of each.

    Values that are all 0 or 1 have Wilson's interval. Else the answers to one prompt are a cluster: the
    interval is Wilson's with the effective number of independent trials, mean (1 - mean) / variance of the
    mean, and Student's quantile (Korn and Graubard, "Confidence intervals for proportions with small
    expected number of positive counts", Survey Methodology 1998).

    Args:
        values: of each prompt, at least one.
        draws: independent trials that one prompt holds at most, such as its number of answers. Between that
            and 1 per prompt lies the effective number.
    """
    count, mean = len(values), sum(values) / len(values)
    mean = min(max(mean, 0.0), 1.0)
    if count == 1 or all(value in (0.0, 1.0) for value in values):
        return wilson(mean, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1) / count
    most = count * max(draws, 1.0)
    effective = min(max(mean * (1 - mean) / variance, count), most) if variance > 0 else most
    return wilson(mean, effective * (Z / student(count - 1)) ** 2)


def mean_interval(sums: Sequence[float], counts: Sequence[int]) -> Interval | None:
    """Interval of the mean over all answers of values without bounds, such as rewards.

    Standard errors are clustered by prompt: Miller, "Adding error bars to evals",
    https://arxiv.org/abs/2411.00640, section 2.2, here with Student's quantile.

    Args:
        sums: of the values of each prompt.
        counts: values of each prompt.

    Returns:
        None for fewer than two prompts that have values, and where they do not differ, which says nothing
        about how much others would.
    """
    clusters = [(total, count) for total, count in zip(sums, counts, strict=True) if count]
    size, total = len(clusters), sum(count for _, count in clusters)
    if size < 2:
        return None
    mean = sum(s for s, _ in clusters) / total
    squares = sum((s - count * mean) ** 2 for s, count in clusters)
    if squares <= 1e-24 * total * total:
        return None
    half = student(size - 1) * math.sqrt(squares * size / (size - 1)) / total
    return mean - half, mean + half


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, each with the same weight.

    The distances to the bounds add up in squares: Zou and Donner, "Construction of confidence limits about
    effect measures", Statistics in Medicine 2008.
    """
    size = len(estimates)
    value = sum(e.value for e in estimates) / size
    if size == 1:
        return estimates[0]
    below = [e.value - e.low for e in estimates if e.low is not None]
    above = [e.high - e.value for e in estimates if e.high is not None]
    if len(below) < size or len(above) < size:
        return Estimate(value)
    return Estimate(value, value - math.hypot(*below) / size, value + math.hypot(*above) / size)


def paired_difference(first: Sequence[float], second: Sequence[float], *, bounded: bool) -> Difference:
    """Difference of two policies on the same prompts, with its interval and a test.

    Pairs take the difficulty of the prompts out of the comparison (Miller, 2411.00640, section 4.2). The
    interval of values in [0, 1] is that of Bonett and Price ("Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", 2012): Wald's after one more prompt that the
    second policy wins and one more that it loses. The test is McNemar's exact one where each prompt is won
    or lost, else a test of random signs with a fixed seed.

    Args:
        first: of each prompt, at least one.
        second: of the same prompts.
        bounded: values are in [0, 1].

    Raises:
        ValueError: no prompts, or not the same number.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"need the same prompts, at least one, got {len(first)} and {len(second)}")
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    size, better, worse = len(gaps), sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    if all(gap in (-1.0, 0.0, 1.0) for gap in gaps) and bounded:
        p_value, test = mcnemar(better, worse), "McNemar, exact"
    else:
        p_value, test = sign_test(gaps), f"random signs, {_NUM_DRAWS:,} draws"
    padded = [*gaps, 1.0, -1.0] if bounded else gaps
    mean = sum(padded) / len(padded)
    degrees = len(padded) - 1
    squares = sum((gap - mean) ** 2 for gap in padded)
    if bounded:
        half = Z * math.sqrt(squares) / len(padded)
    else:
        # Equal differences say nothing about how much others would differ.
        half = student(degrees) * math.sqrt(squares / degrees / size) if squares > 0 else math.inf
    low, high = mean - half, mean + half
    if bounded:
        low, high = max(low, -1.0), min(high, 1.0)
    return Difference(sum(gaps) / size, low, high, p_value, test, better, worse, size)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of McNemar's test: the smaller count of won and lost prompts is binomial."""
    size, ways, tail = better + worse, 1, 0
    for i in range(min(better, worse) + 1):
        tail += ways
        ways = ways * (size - i) // (i + 1)
    return min(1.0, 2 * tail / 2**size)


def sign_test(gaps: Sequence[float]) -> float:
    """Two-sided p-value of the mean of differences whose signs are random if the policies are equal."""
    # NumPy promises that the raw bits of a generator never change.
    generator = np.random.Philox(key=np.array([len(gaps), 0], dtype=np.uint64))
    values = np.array([gap for gap in gaps if gap], dtype=np.float64)
    least, hits = abs(values.sum()) * (1 - 1e-12), 0
    for _ in range(_NUM_DRAWS // _DRAWS_AT_A_TIME):
        bits = generator.random_raw(_DRAWS_AT_A_TIME * len(values)) >> np.uint64(63)
        signs = bits.reshape(_DRAWS_AT_A_TIME, len(values)).astype(np.float64) * 2 - 1
        hits += int((np.abs(signs @ values) >= least).sum())
    return (hits + 1) / (_NUM_DRAWS + 1)


def student(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5, with four terms; exact for one and
    two degrees of freedom, where the series is not.
    """
    if degrees <= 2:
        return {1: 12.7062, 2: 4.30265}[degrees]
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
