"""Losses and aggregations by hand, against a second implementation, and independent of padding and of the split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import losses as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.aggregations import AGGREGATIONS, seq_mean_token_sum_norm, token_mean
from verl.algorithms.binding import bind
from verl.algorithms.losses import POLICY_LOSSES, policy_gradient, ppo_clip
from verl.algorithms.value_losses import VALUE_LOSSES, value_clip, value_mse
from verl.settings import Choice

SEEDS = st.integers(0, 10_000)
LENGTH = {"seq_mean_token_sum_norm": {"length": 7}}
LOSSES = [("logprobs", POLICY_LOSSES, name) for name in POLICY_LOSSES] + [("new_values", VALUE_LOSSES, name) for name in VALUE_LOSSES]
EVERY_SUM = pytest.mark.parametrize("aggregation", AGGREGATIONS)
EVERY_LOSS = pytest.mark.parametrize(("learned", "table", "name"), LOSSES, ids=[name for _, _, name in LOSSES])


def summed(columns, weights, learned, table, name):
    """Loss and its gradient with respect to the learned column."""
    leaf = columns[learned].clone().requires_grad_()
    loss, _ = bind(Choice(name=name), table)(columns | {learned: leaf})
    total = (loss * weights).sum()
    total.backward()
    return total.detach(), leaf.grad


def scalar_ppo(ratio, advantage, **options):
    loss, monitors = ppo_clip(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([[advantage]]), **options)
    return round(loss.item(), 5), {name: round(value.item(), 5) for name, value in monitors.items()}


def test_ppo_stops_rewarding_a_good_token_above_the_clip_and_a_bad_one_below_it():
    assert scalar_ppo(1.5, 2.0)[0] == -2.4
    assert scalar_ppo(0.5, 2.0)[0] == -1.0
    assert scalar_ppo(0.5, -2.0)[0] == 1.6
    assert scalar_ppo(1.5, -2.0)[0] == 3.0


def test_a_higher_upper_bound_leaves_more_of_a_good_token():
    assert scalar_ppo(1.5, 1.0, clip_high=0.28)[0] == -1.28
    assert scalar_ppo(0.5, -1.0, clip_low=0.3)[0] == 0.7


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    loss, monitors = scalar_ppo(9.0, -2.0, dual_clip=3.0)
    assert (loss, monitors["clip_share"], monitors["dual_clip_share"]) == (6.0, 0.0, 1.0)
    loss, monitors = scalar_ppo(9.0, 2.0, dual_clip=3.0)
    assert (loss, monitors["clip_share"], monitors["dual_clip_share"]) == (-2.4, 1.0, 0.0)


@given(SEEDS, st.floats(0, 1), st.floats(0, 2), st.none() | st.floats(1.01, 5))
def test_ppo_clip_agrees_with_the_oracle(seed, clip_low, clip_high, dual_clip):
    c = random_columns(seed)
    options = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    loss, _ = ppo_clip(c["logprobs"], c["old_logprobs"], c["advantages"], **options)
    columns = (c[name].flatten().tolist() for name in ("logprobs", "old_logprobs", "advantages"))
    expected = [oracle.ppo_clip(*token, **options) for token in zip(*columns, strict=True)]
    torch.testing.assert_close(loss.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


@given(SEEDS, st.none() | st.floats(1.01, 2))
def test_clip_shares_mark_exactly_the_tokens_without_gradient(seed, dual_clip):
    c = random_columns(seed)
    leaf = c["logprobs"].clone().requires_grad_()
    loss, monitors = ppo_clip(leaf, c["old_logprobs"], c["advantages"], dual_clip=dual_clip)
    loss.sum().backward()
    clipped = monitors["clip_share"] + monitors.get("dual_clip_share", torch.zeros_like(loss))
    assert not any(value.requires_grad for value in monitors.values())
    assert torch.equal(clipped == 1, (leaf.grad == 0) & (c["advantages"] != 0))


def test_on_policy_ppo_has_the_gradient_of_the_policy_gradient():
    c = random_columns(1)
    c["old_logprobs"] = c["logprobs"]
    weights = torch.ones(6, 7)
    _, clipped = summed(c, weights, "logprobs", POLICY_LOSSES, "ppo_clip")
    _, plain = summed(c, weights, "logprobs", POLICY_LOSSES, "policy_gradient")
    torch.testing.assert_close(clipped, plain)


def test_ppo_reports_the_ratio_and_how_far_the_policy_moved():
    monitors = scalar_ppo(1.5, 2.0)[1]
    assert monitors == {"ratio": 1.5, "clip_share": 1.0, "approx_kl": round(0.5 - math.log(1.5), 5)}


def test_policy_gradient_is_minus_advantage_times_logprob():
    loss, monitors = policy_gradient(torch.tensor([[-2.0]]), torch.tensor([[3.0]]))
    assert (loss.item(), monitors) == (6.0, {})


def test_a_token_that_became_impossible_gives_a_finite_loss_and_gradient():
    leaf = torch.tensor([[-500.0, 0.0]], requires_grad=True)
    loss, _ = ppo_clip(leaf, torch.tensor([[0.0, -500.0]]), torch.tensor([[1.0, -1.0]]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.tolist() == [[0.0, 0.0]]


def test_value_clip_takes_the_worse_of_moved_and_clipped_value():
    loss, monitors = value_clip(torch.tensor([[2.0, 2.0, 0.25]]), torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 1.0]]))
    assert loss.tolist() == [[1.125, 2.0, 0.28125]]
    assert monitors["value_clip_share"].tolist() == [[1.0, 0.0, 0.0]]


@given(SEEDS, st.floats(0.01, 3))
def test_value_clip_agrees_with_the_oracle_and_a_wide_one_with_the_squared_error(seed, clip):
    c = random_columns(seed)
    columns = [c[name] for name in ("new_values", "values", "returns")]
    tokens = zip(*(column.flatten().tolist() for column in columns), strict=True)
    expected = torch.tensor([oracle.value_clip(*token, clip) for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(value_clip(*columns, clip=clip)[0].flatten(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(value_clip(*columns, clip=1e6)[0], value_mse(c["new_values"], c["returns"])[0])


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


@EVERY_LOSS
@EVERY_SUM
@given(seed=SEEDS, first=st.integers(1, 5))
def test_loss_and_gradient_are_the_same_in_micro_batches(aggregation, learned, table, name, seed, first):
    c = random_columns(seed)
    weights = AGGREGATIONS[aggregation](c["mask"], **LENGTH.get(aggregation, {}))
    whole, gradient = summed(c, weights, learned, table, name)
    parts = [summed({k: v[rows] for k, v in c.items()}, weights[rows], learned, table, name) for rows in (slice(first), slice(first, None))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), gradient, rtol=1e-6, atol=0)


@EVERY_LOSS
@EVERY_SUM
@given(seed=SEEDS, padding=st.integers(1, 4))
def test_padding_and_masked_tokens_change_nothing_and_get_no_gradient(aggregation, learned, table, name, seed, padding):
    c = random_columns(seed)
    options = LENGTH.get(aggregation, {})
    wide = {k: torch.nn.functional.pad(v, (0, padding)) if v.ndim == 2 else v for k, v in c.items()}
    loss, gradient = summed(c, AGGREGATIONS[aggregation](c["mask"], **options), learned, table, name)
    wide_loss, wide_gradient = summed(wide, AGGREGATIONS[aggregation](wide["mask"], **options), learned, table, name)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient[:, :7], gradient)
    assert wide_gradient[~wide["mask"]].count_nonzero() == 0


@EVERY_SUM
@given(seed=SEEDS)
def test_shuffling_rows_shuffles_weights(aggregation, seed):
    mask, order = random_columns(seed)["mask"], torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    options = LENGTH.get(aggregation, {})
    torch.testing.assert_close(AGGREGATIONS[aggregation](mask[order], **options), AGGREGATIONS[aggregation](mask, **options)[order])


@given(SEEDS, st.floats(0.1, 10))
def test_scaling_advantages_scales_the_policy_loss_and_its_gradient(seed, scale):
    c = random_columns(seed)
    weights = token_mean(c["mask"])
    for name in POLICY_LOSSES:
        loss, gradient = summed(c, weights, "logprobs", POLICY_LOSSES, name)
        scaled = summed(c | {"advantages": scale * c["advantages"]}, weights, "logprobs", POLICY_LOSSES, name)
        torch.testing.assert_close(scaled, (scale * loss, scale * gradient))


@pytest.mark.parametrize("options", [{"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}])
def test_bounds_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=f"got .*{next(iter(options.values()))}"):
        scalar_ppo(1.0, 1.0, **options)
    with pytest.raises(ValueError, match="value_mse"):
        value_clip(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), clip=0.0)


def test_advantages_per_row_are_refused_where_they_would_broadcast():
    with pytest.raises(ValueError, match=r"advantages \(3,\)"):
        ppo_clip(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3))
