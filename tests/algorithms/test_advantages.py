"""Advantages by hand, against a second implementation, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import advantages as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.advantages import gae, grpo, rloo

SEEDS = st.integers(0, 10_000)


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_siblings_are_compared_only_with_each_other():
    advantages = grpo(torch.tensor([1.0, 2.0, 0.0, 2.0, 5.0]), torch.tensor([7, 3, 7, 3, 9]))
    torch.testing.assert_close(advantages, torch.tensor([0.7071, 0.0, -0.7071, 0.0, 0.0]), atol=1e-4, rtol=0)


def test_without_the_division_grpo_is_the_distance_to_the_group_mean():
    advantages = grpo(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64), normalize_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_compares_with_the_mean_of_the_others_and_gives_a_lone_row_nothing():
    assert rloo(torch.tensor([3.0, 1.0, 2.0, 8.0]), torch.tensor([0, 0, 0, 1])).tolist() == [1.5, -1.5, 0.0, 0.0]


@pytest.mark.parametrize("advantage", [grpo, rloo])
def test_equal_rewards_give_exactly_zero_in_fp32(advantage):
    assert advantage(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)).count_nonzero() == 0


@given(SEEDS, st.booleans())
def test_group_advantages_agree_with_the_oracles(seed, normalize_std):
    c = random_columns(seed)
    rewards, group_ids = c["rewards"], c["group_ids"]
    expected = oracle.grpo(rewards.tolist(), group_ids.tolist(), normalize_std)
    assert_near(grpo(rewards, group_ids, normalize_std=normalize_std), fp64(expected))
    assert_near(rloo(rewards, group_ids), fp64(oracle.rloo(rewards.tolist(), group_ids.tolist())))


@given(SEEDS, st.floats(0.1, 10), st.floats(-5, 5))
def test_scaling_and_shifting_rewards_leaves_normalized_grpo_and_scales_rloo(seed, scale, shift):
    c = random_columns(seed)
    moved = scale * c["rewards"] + shift
    assert_near(grpo(moved, c["group_ids"], eps=0.0).nan_to_num(), grpo(c["rewards"], c["group_ids"], eps=0.0).nan_to_num())
    assert_near(rloo(moved, c["group_ids"]), scale * rloo(c["rewards"], c["group_ids"]))


@given(SEEDS)
def test_the_order_of_rows_and_the_names_of_groups_do_not_matter(seed):
    c = random_columns(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for advantage in (grpo, rloo):
        renamed = advantage(c["rewards"][order], 100 - 7 * c["group_ids"][order])
        assert_near(renamed, advantage(c["rewards"], c["group_ids"])[order])
    rows = [c[name] for name in ("token_rewards", "values", "mask")]
    for shuffled, original in zip(gae(*(column[order] for column in rows)), gae(*rows), strict=True):
        assert_near(shuffled, original[order])


def test_rewards_per_token_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"rewards \(2, 3\) and group_ids \(2,\); pass per-trajectory sums"):
        grpo(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_integer_rewards_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        rloo(torch.tensor([1, 0]), torch.tensor([0, 0]))


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.8]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5, whiten=False)
    # Errors of one step: -0.1, 0.4, 0.2; each advantage adds half of the next one.
    torch.testing.assert_close(advantages, torch.tensor([[0.15, 0.5, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.65, 0.9, 1.0]]))


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gae_agrees_with_the_double_sum(seed, gamma, lam):
    c = random_columns(seed)
    columns = (c["token_rewards"], c["values"], c["mask"])
    advantages, returns = oracle.gae(*(column.tolist() for column in columns), gamma, lam)
    raw, learned = gae(*columns, gamma=gamma, lam=lam, whiten=False)
    assert_near(raw, fp64(advantages))
    assert_near(learned, fp64(returns))
    whitened, also_learned = gae(*columns, gamma=gamma, lam=lam)
    assert_near(whitened, fp64(oracle.whiten(advantages, c["mask"].tolist())))
    assert torch.equal(also_learned, learned)


@given(SEEDS)
def test_undiscounted_gae_is_the_reward_to_go_minus_the_value(seed):
    c = random_columns(seed)
    rewards = c["token_rewards"] * c["mask"]
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, c["values"], c["mask"], gamma=1.0, lam=1.0, whiten=False)
    assert_near(advantages, (to_go - c["values"]) * c["mask"])
    assert_near(returns, to_go * c["mask"])


@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gae_of_a_row_without_the_tokens_of_the_environment_is_the_same(seed, gamma, lam):
    c = random_columns(seed, rows=1, width=12)
    columns = [c[name] for name in ("token_rewards", "values", "mask")]
    kept = c["mask"]
    for long, short in zip(
        gae(*columns, gamma=gamma, lam=lam), gae(*(column[kept][None] for column in columns), gamma=gamma, lam=lam), strict=True
    ):
        assert_near(long[kept][None], short)
        assert long[~kept].count_nonzero() == 0


def test_gae_reads_nothing_at_masked_positions_and_accepts_padding():
    mask = torch.tensor([[True, False, True, False, False]])
    garbage = torch.where(mask, torch.tensor([[0.5, 0, 1.0, 0, 0]]), float("nan"))
    padded = gae(garbage, garbage, mask)
    plain = gae(garbage[:, :3], garbage[:, :3], mask[:, :3])
    assert all(torch.equal(wide[:, :3], narrow) and wide[:, 3:].count_nonzero() == 0 for wide, narrow in zip(padded, plain, strict=True))


def test_a_decay_above_one_is_refused():
    with pytest.raises(ValueError, match="lam=1.5"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), lam=1.5)
