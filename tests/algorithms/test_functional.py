"""Masked statistics by hand and against a second implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import advantages as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.functional import (
    Siblings,
    check_same_rows,
    check_same_shape,
    log_ratio,
    masked_mean,
    masked_whiten,
)


def test_mean_is_over_sampled_tokens_and_ignores_garbage_elsewhere():
    mean = masked_mean(torch.tensor([[1.0, float("nan"), 3.0]]), torch.tensor([[True, False, True]]))
    assert mean.item() == 2.0


def test_mean_and_whitening_of_nothing_are_zero():
    values, mask = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(values, mask).item() == 0.0
    assert masked_whiten(values, mask).count_nonzero() == 0


def test_whitened_tokens_have_mean_zero_and_population_deviation_one():
    whitened = masked_whiten(torch.tensor([[1.0, 9.0, 3.0]]), torch.tensor([[True, False, True]]))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 0.0, 1.0]]))


def test_equal_values_are_whitened_to_exactly_zero():
    assert masked_whiten(torch.full((3, 7), 0.1), torch.ones(3, 7, dtype=torch.bool)).count_nonzero() == 0


@given(st.integers(0, 10_000))
def test_whitening_agrees_with_the_oracle(seed):
    c = random_columns(seed)
    expected = oracle.whiten(c["values"].tolist(), c["mask"].tolist())
    torch.testing.assert_close(
        masked_whiten(c["values"], c["mask"]), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_log_ratio_is_clamped_where_exp_would_overflow():
    ratio = log_ratio(torch.tensor([0.0, -300.0, -1.0]), torch.tensor([-300.0, 0.0, -1.5]))
    assert ratio.tolist() == [20.0, -20.0, 0.5]


def test_columns_that_would_broadcast_are_refused_by_name():
    with pytest.raises(ValueError, match=r"advantages \(3,\)"):
        check_same_shape(logprobs=torch.zeros(3, 3), advantages=torch.zeros(3))


def test_each_row_is_given_the_statistics_of_its_group():
    siblings = Siblings.of(torch.tensor([5, -1, 5, 5]))
    values = torch.tensor([1.0, 8.0, 2.0, 6.0])
    assert siblings.sum(values).tolist() == [9.0, 8.0, 9.0, 9.0]
    assert siblings.mean(torch.stack([values, -values], 1)).tolist() == [
        [3.0, -3.0],
        [8.0, -8.0],
        [3.0, -3.0],
        [3.0, -3.0],
    ]
    assert siblings.max(-values).tolist() == [-1.0, -8.0, -1.0, -1.0]
    assert siblings.leave_one_out(values).tolist() == [-3.0, 0.0, -1.5, 4.5]


def test_nothing_over_no_deviation_is_nothing():
    siblings, values = Siblings.of(torch.tensor([0, 0, 1])), torch.tensor([0.1, 0.1, 7.0])
    assert siblings.over_std(siblings.deviation(values), values, eps=0.0).tolist() == [0.0, 0.0, 0.0]


def test_columns_with_other_rows_are_refused_by_name():
    with pytest.raises(ValueError, match=r"rewards \(3,\), mask \(2, 4\)"):
        check_same_rows(rewards=torch.zeros(3), mask=torch.zeros(2, 4))
