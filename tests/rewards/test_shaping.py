"""Length penalties by hand, and what must hold for every group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.rewards.shaping import LENGTH_PENALTIES, kimi_length, overlong_penalty, relative_length

GROUPS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.integers(1, 50)), min_size=1, max_size=8)


def columns(group):
    rewards, lengths = zip(*group, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths)


def by_hand(group, weight):
    """2501.12599, section 2.3.3, one answer at a time."""
    lengths = [n for _, n in group]
    if max(lengths) == min(lengths):
        return [0.0] * len(group)
    shares = [0.5 - (n - min(lengths)) / (max(lengths) - min(lengths)) for n in lengths]
    return [
        weight * (share if reward > 0 else min(0.0, share))
        for share, (reward, _) in zip(shares, group, strict=True)
    ]


def efficient(group, weight):
    """2502.04463, section 3, one answer at a time."""
    right = [n for reward, n in group if reward > 0]
    if not right:
        return [0.0] * len(group)
    mean = sum(right) / len(right)
    std = math.sqrt(sum((n - mean) ** 2 for n in right) / len(right))
    scores = [(n - mean) / std if std else 0.0 for _, n in group]
    return [
        -weight / (1 + math.exp(-s)) if reward > 0 else 0.0
        for s, (reward, _) in zip(scores, group, strict=True)
    ]


def test_short_right_answers_gain_and_long_wrong_ones_lose():
    added = kimi_length(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([10, 30, 10, 30]), weight=2.0)
    assert added.tolist() == [1, -1, 0, -1]


def test_a_right_answer_of_mean_length_loses_half_the_weight_and_wrong_ones_nothing():
    added = relative_length(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([10, 20, 30, 90]), weight=0.2)
    assert added[1].item() == pytest.approx(-0.1) and added[3] == 0
    assert added[0] > added[1] > added[2]


@given(GROUPS, st.floats(0, 3))
def test_both_agree_with_a_second_implementation(group, weight):
    for function, oracle in ((kimi_length, by_hand), (relative_length, efficient)):
        expected = torch.tensor(oracle(group, weight), dtype=torch.float64)
        torch.testing.assert_close(function(*columns(group), weight=weight), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("function", LENGTH_PENALTIES.values(), ids=LENGTH_PENALTIES)
@given(group=GROUPS)
def test_the_order_of_siblings_does_not_matter_and_longer_is_never_better(function, group):
    rewards, lengths = columns(group)
    added = function(rewards, lengths)
    torch.testing.assert_close(function(rewards.flip(0), lengths.flip(0)).flip(0), added)
    for right in (0.0, 1.0):
        mine = sorted(
            (int(n), float(a)) for n, a, r in zip(lengths, added, rewards, strict=True) if r == right
        )
        assert all(
            first[1] >= second[1] - 1e-12
            for first, second in zip(mine, mine[1:], strict=False)
            if first[0] < second[0]
        )


@pytest.mark.parametrize("function", LENGTH_PENALTIES.values(), ids=LENGTH_PENALTIES)
def test_a_negative_weight_is_refused(function):
    with pytest.raises(ValueError, match="need weight >= 0, got -1"):
        function(torch.ones(2), torch.tensor([1, 2]), weight=-1)


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (80, 0.0), (90, -0.25), (100, -0.5), (120, -0.5)])
def test_the_overlong_penalty_falls_linearly_over_the_buffer(tokens, expected):
    assert overlong_penalty(tokens, max_tokens=100, buffer_tokens=20, penalty=0.5) == pytest.approx(expected)


def test_an_overlong_buffer_of_nothing_punishes_nothing_and_one_too_long_is_refused():
    assert overlong_penalty(100, max_tokens=100, buffer_tokens=0, penalty=1.0) == 0.0
    with pytest.raises(ValueError, match="buffer_tokens=101"):
        overlong_penalty(100, max_tokens=100, buffer_tokens=101, penalty=1.0)
