"""Weights of tokens: by hand, against a second implementation, independent of padding and row order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import losses as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.aggregations import AGGREGATIONS, DENOMINATORS, prompt_mean, seq_mean_token_sum_norm
from verl.algorithms.registry import bind
from verl.config.fields import Choice

SEEDS = st.integers(0, 10_000)
LENGTH = {"seq_mean_token_sum_norm": {"length": 7}}
GROUPS = torch.tensor([0, 0, 1, 2, 1, 2])
EVERY_SUM = pytest.mark.parametrize("aggregation", AGGREGATIONS)
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


def weights_of(aggregation, mask, group_ids=GROUPS):
    choice = Choice(name=aggregation, **LENGTH.get(aggregation, {}))
    return bind(choice, AGGREGATIONS)({"mask": mask, "group_ids": group_ids[: len(mask)]})


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        ("token_mean", 1 / 4, 1 / 4),
        ("seq_mean_token_mean", 1 / 6, 1 / 2),
        ("seq_mean_token_sum", 1 / 2, 1 / 2),
        ("prompt_mean", 1 / 4, 1 / 4),
    ],
)
def test_weights_by_hand_and_an_empty_row_is_no_row(aggregation, first, second):
    expected = torch.tensor([[first] * 3 + [0.0], [second, 0, 0, 0], [0.0] * 4])
    torch.testing.assert_close(weights_of(aggregation, MASK), expected)


def test_each_prompt_counts_the_same_and_within_it_each_token():
    weights = prompt_mean(MASK, torch.tensor([5, 2, 5]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 6] * 3 + [0.0], [1 / 2, 0, 0, 0], [0.0] * 4]))


def test_the_constant_length_divides_by_rows_too():
    torch.testing.assert_close(seq_mean_token_sum_norm(MASK, length=10), MASK / 20)


def test_a_constant_length_of_no_token_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        seq_mean_token_sum_norm(MASK, length=0)


@EVERY_SUM
def test_a_batch_without_sampled_tokens_weighs_nothing(aggregation):
    weights = weights_of(aggregation, torch.zeros(2, 3, dtype=torch.bool))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.0] * 3] * 2


@EVERY_SUM
@given(seed=SEEDS)
def test_weighted_sums_agree_with_the_oracle(aggregation, seed):
    c = random_columns(seed)
    loss = c["advantages"]
    weights = weights_of(aggregation, c["mask"], c["group_ids"])
    expected = oracle.aggregated(
        aggregation, loss.tolist(), c["mask"].tolist(), length=7, group_ids=c["group_ids"].tolist()
    )
    assert (loss * weights).sum().item() == pytest.approx(expected, abs=1e-6)


@EVERY_SUM
@given(seed=SEEDS, padding=st.integers(1, 4))
def test_padding_changes_no_weight(aggregation, seed, padding):
    mask = random_columns(seed)["mask"]
    wide = weights_of(aggregation, torch.nn.functional.pad(mask, (0, padding)))
    assert torch.equal(wide[:, :7], weights_of(aggregation, mask))
    assert wide[:, 7:].count_nonzero() == 0


@EVERY_SUM
@given(seed=SEEDS)
def test_shuffling_rows_shuffles_weights(aggregation, seed):
    mask, order = (
        random_columns(seed)["mask"],
        torch.randperm(6, generator=torch.Generator().manual_seed(seed)),
    )
    torch.testing.assert_close(
        weights_of(aggregation, mask[order], GROUPS[order]), weights_of(aggregation, mask)[order]
    )


def denominator_of(aggregation, mask, group_ids):
    return int(bind(Choice(name=aggregation), DENOMINATORS)({"mask": mask, "group_ids": group_ids}))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", 4),
        ("seq_mean_token_mean", 2),
        ("prompt_mean", 1),
        ("seq_mean_token_sum", 2),
        ("seq_mean_token_sum_norm", 2),
    ],
)
def test_denominators_by_hand(aggregation, expected):
    assert denominator_of(aggregation, MASK, torch.tensor([5, 5, 2])) == expected
    assert denominator_of(aggregation, torch.zeros_like(MASK), torch.tensor([5, 5, 2])) == 0


@EVERY_SUM
@given(seed=SEEDS, prompts=st.integers(1, 5), cut=st.integers(0, 4))
def test_weights_of_portions_times_their_denominators_are_those_of_the_whole(aggregation, seed, prompts, cut):
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.randint(prompts, (9,), generator=generator)
    mask = (torch.rand(9, 5, generator=generator) < 0.4) & (torch.rand(9, 1, generator=generator) < 0.7)
    portions = [
        (group_ids % 2 == 0) & (group_ids < cut),
        (group_ids % 2 == 1) & (group_ids < cut),
        group_ids >= cut,
    ]
    gathered, total = torch.zeros(9, 5), max(1, denominator_of(aggregation, mask, group_ids))
    for rows in (rows for rows in portions if rows.any()):
        own = denominator_of(aggregation, mask[rows], group_ids[rows])
        gathered[rows] = weights_of(aggregation, mask[rows], group_ids[rows]) * own / total
    torch.testing.assert_close(gathered, weights_of(aggregation, mask, group_ids))


def test_every_aggregation_has_its_denominator():
    assert DENOMINATORS.keys() == AGGREGATIONS.keys()
