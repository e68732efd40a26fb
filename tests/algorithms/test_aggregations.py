"""Weights of tokens by hand, against a second implementation, and independent of padding and of the order of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import losses as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.aggregations import AGGREGATIONS, seq_mean_token_sum_norm

SEEDS = st.integers(0, 10_000)
LENGTH = {"seq_mean_token_sum_norm": {"length": 7}}
EVERY_SUM = pytest.mark.parametrize("aggregation", AGGREGATIONS)
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [("token_mean", 1 / 4, 1 / 4), ("seq_mean_token_mean", 1 / 6, 1 / 2), ("seq_mean_token_sum", 1 / 2, 1 / 2)],
)
def test_weights_by_hand_and_an_empty_row_is_no_row(aggregation, first, second):
    expected = torch.tensor([[first] * 3 + [0.0], [second, 0, 0, 0], [0.0] * 4])
    torch.testing.assert_close(AGGREGATIONS[aggregation](MASK), expected)


def test_the_constant_length_divides_by_rows_too():
    torch.testing.assert_close(seq_mean_token_sum_norm(MASK, length=10), MASK / 20)


def test_a_constant_length_of_no_token_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        seq_mean_token_sum_norm(MASK, length=0)


@EVERY_SUM
def test_a_batch_without_sampled_tokens_weighs_nothing(aggregation):
    weights = AGGREGATIONS[aggregation](torch.zeros(2, 3, dtype=torch.bool), **LENGTH.get(aggregation, {}))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.0] * 3] * 2


@EVERY_SUM
@given(seed=SEEDS)
def test_weighted_sums_agree_with_the_oracle(aggregation, seed):
    c = random_columns(seed)
    loss = c["advantages"]
    weights = AGGREGATIONS[aggregation](c["mask"], **LENGTH.get(aggregation, {}))
    expected = oracle.aggregated(aggregation, loss.tolist(), c["mask"].tolist(), length=7)
    assert (loss * weights).sum().item() == pytest.approx(expected, abs=1e-6)


@EVERY_SUM
@given(seed=SEEDS, padding=st.integers(1, 4))
def test_padding_changes_no_weight(aggregation, seed, padding):
    mask, options = random_columns(seed)["mask"], LENGTH.get(aggregation, {})
    wide = AGGREGATIONS[aggregation](torch.nn.functional.pad(mask, (0, padding)), **options)
    assert torch.equal(wide[:, :7], AGGREGATIONS[aggregation](mask, **options))
    assert wide[:, 7:].count_nonzero() == 0


@EVERY_SUM
@given(seed=SEEDS)
def test_shuffling_rows_shuffles_weights(aggregation, seed):
    mask, order = random_columns(seed)["mask"], torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    options = LENGTH.get(aggregation, {})
    torch.testing.assert_close(AGGREGATIONS[aggregation](mask[order], **options), AGGREGATIONS[aggregation](mask, **options)[order])
