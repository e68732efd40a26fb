"""Advantages of tokens and turns: by hand, in simple cases, and against a second implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import advantages as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.advantages import grpo, rloo
from verl.algorithms.token_advantages import (
    gae,
    gigpo,
    grpo_turns,
    optimal_token_baseline,
    prime,
    reinforce_pp,
    reverse_kl,
    vapo_gae,
)

SEEDS = st.integers(0, 10_000)
SHARES = st.floats(0, 1)


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def chosen(columns, *names):
    """Columns by name, as tensors and as lists."""
    tensors = [columns[name] for name in names]
    return tensors, [tensor.tolist() for tensor in tensors]


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.8]])
    advantages, returns = gae(
        rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5, whiten=False
    )
    # Errors of one step: -0.1, 0.4, 0.2; each advantage adds half of the next one.
    torch.testing.assert_close(advantages, torch.tensor([[0.15, 0.5, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.65, 0.9, 1.0]]))


@given(SEEDS, SHARES, SHARES)
def test_gae_agrees_with_the_double_sum(seed, gamma, lam):
    columns, lists = chosen(random_columns(seed), "token_rewards", "values", "mask")
    advantages, returns = oracle.gae(*lists, gamma, lam)
    raw, learned = gae(*columns, gamma=gamma, lam=lam, whiten=False)
    assert_near(raw, fp64(advantages))
    assert_near(learned, fp64(returns))
    whitened, also_learned = gae(*columns, gamma=gamma, lam=lam)
    assert_near(whitened, fp64(oracle.whiten(advantages, lists[2])))
    assert torch.equal(also_learned, learned)


@given(SEEDS)
def test_undiscounted_gae_is_the_reward_to_go_minus_the_value(seed):
    c = random_columns(seed)
    rewards = c["token_rewards"] * c["mask"]
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, c["values"], c["mask"], gamma=1.0, lam=1.0, whiten=False)
    assert_near(advantages, (to_go - c["values"]) * c["mask"])
    assert_near(returns, to_go * c["mask"])


@pytest.mark.parametrize("function", [gae, vapo_gae])
@given(seed=SEEDS, gamma=SHARES)
def test_a_row_without_the_tokens_of_the_environment_is_the_same(function, seed, gamma):
    c = random_columns(seed, rows=1, width=12)
    columns = [c[name] for name in ("token_rewards", "values", "mask")]
    kept = c["mask"]
    long, short = (
        function(*columns, gamma=gamma),
        function(*(column[kept][None] for column in columns), gamma=gamma),
    )
    for with_environment, without in zip(long, short, strict=True):
        assert_near(with_environment[kept][None], without)
        assert with_environment[~kept].count_nonzero() == 0


@pytest.mark.parametrize("function", [gae, vapo_gae])
def test_returns_read_nothing_at_masked_positions_and_accept_padding(function):
    mask = torch.tensor([[True, False, True, False, False]])
    garbage = torch.where(mask, torch.tensor([[0.5, 0, 1.0, 0, 0]]), float("nan"))
    padded = function(garbage, garbage, mask)
    plain = function(garbage[:, :3], garbage[:, :3], mask[:, :3])
    assert all(
        torch.equal(wide[:, :3], narrow) and wide[:, 3:].count_nonzero() == 0
        for wide, narrow in zip(padded, plain, strict=True)
    )


def test_vapo_takes_the_decay_of_the_policy_from_the_length_and_another_for_the_critic():
    rewards, values = (
        torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        torch.tensor([[0.5, 0.4, 0.8], [0.5, 0.4, 0.0]]),
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = vapo_gae(rewards, values, mask, alpha=2 / 3, whiten=False)
    # Three tokens: decay 1 - 1 / 2. Two: 1 - 3 / 4.
    torch.testing.assert_close(advantages, torch.tensor([[0.15, 0.5, 0.2], [0.05, 0.6, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))


@given(SEEDS, SHARES, st.floats(0.05, 2), SHARES)
def test_vapo_agrees_with_gae_row_by_row(seed, gamma, alpha, critic_lam):
    columns, lists = chosen(random_columns(seed), "token_rewards", "values", "mask")
    advantages, returns = oracle.vapo_gae(*lists, gamma, alpha, critic_lam)
    raw, learned = vapo_gae(*columns, gamma=gamma, alpha=alpha, critic_lam=critic_lam, whiten=False)
    assert_near(raw, fp64(advantages))
    assert_near(learned, fp64(returns))
    whitened, _ = vapo_gae(*columns, gamma=gamma, alpha=alpha, critic_lam=critic_lam)
    assert_near(whitened, fp64(oracle.whiten(advantages, lists[2])))


def test_rows_too_short_for_vapo_have_errors_of_one_step():
    mask = torch.ones(1, 7, dtype=torch.bool)
    rewards, values = torch.arange(7.0)[None], torch.arange(7.0).flip(0)[None]
    short, _ = vapo_gae(rewards, values, mask, alpha=0.05)
    assert torch.equal(short, gae(rewards, values, mask, lam=0.0)[0])


def test_reinforce_pp_by_hand():
    advantages = reinforce_pp(
        torch.tensor([[0.0, 9.0, 0.0, 1.0]]), torch.tensor([[True, False, True, True]]), gamma=0.5
    )
    # Returns 0.25, 0.5, 1: mean 0.5833, deviation 0.3118.
    torch.testing.assert_close(advantages, torch.tensor([[-1.0690, 0.0, -0.2673, 1.3363]]), atol=1e-4, rtol=0)


@given(SEEDS, SHARES)
def test_reinforce_pp_agrees_with_the_oracle(seed, gamma):
    columns, lists = chosen(random_columns(seed), "token_rewards", "mask")
    assert_near(reinforce_pp(*columns, gamma=gamma), fp64(oracle.reinforce_pp(*lists, gamma)))


def test_the_optimal_baseline_weighs_siblings_by_their_energy_so_far():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    probs, squares = (
        torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.8, 0.0]]),
        torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.68, 0.0]]),
    )
    advantages = optimal_token_baseline(
        torch.tensor([1.0, 0.0]), torch.tensor([3, 3]), mask, probs.log(), squares
    )
    # First tokens: energies 0.5 and 0.08, baseline 0.5 / 0.58. The second token has no counterpart.
    torch.testing.assert_close(
        advantages, torch.tensor([[0.1379, 0.0, 0.0], [0.0, -0.8621, 0.0]]), atol=1e-4, rtol=0
    )


@given(SEEDS)
def test_the_optimal_baseline_agrees_with_the_oracle(seed):
    columns, lists = chosen(
        random_columns(seed), "rewards", "group_ids", "mask", "trainer_logprobs", "sum_squared_probs"
    )
    assert_near(optimal_token_baseline(*columns), fp64(oracle.optimal_token_baseline(*lists)))


@given(SEEDS, st.sampled_from([0.0, -1.0, -1e-4, -1e-9]))
def test_with_equal_energies_the_optimal_baseline_of_the_first_token_is_the_mean(seed, logprob):
    c = random_columns(seed)
    mask = torch.arange(7).expand(6, 7) < 3
    logprobs = torch.full((6, 7), logprob)
    squares = logprobs.exp().square() + (1 - logprobs.exp()).square()
    advantages = optimal_token_baseline(c["rewards"], c["group_ids"], mask, logprobs, squares)
    assert_near(advantages[:, 0], grpo(c["rewards"], c["group_ids"], normalize_std=False))
    assert_near(advantages[:, 2], advantages[:, 0])


def test_a_turn_gets_the_normalized_rewards_of_itself_and_of_later_turns():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    rewards = torch.tensor([[0.25, 0.75, 9.0, 0.0], [0.0, 9.0, 9.0, 9.0]])
    advantages = grpo_turns(rewards, mask, torch.tensor([1, 1]), normalize_std=False)
    # Turns 1, 0 and 0: mean 1/3.
    torch.testing.assert_close(
        advantages, torch.tensor([[1 / 3, 1 / 3, 0.0, -1 / 3], [-1 / 3, 0.0, 0.0, 0.0]])
    )


def test_turns_of_two_rows_are_not_joined_where_one_ends_and_the_other_begins():
    rewards, mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert grpo_turns(rewards, mask, torch.tensor([0, 0]), normalize_std=False).tolist() == [
        [1.0, 1.0],
        [-1.0, -1.0],
    ]


@given(SEEDS, st.booleans())
def test_turns_agree_with_the_oracle(seed, normalize_std):
    columns, lists = chosen(random_columns(seed), "token_rewards", "mask", "group_ids")
    assert_near(
        grpo_turns(*columns, normalize_std=normalize_std), fp64(oracle.grpo_turns(*lists, normalize_std))
    )


@given(SEEDS)
def test_trajectories_of_one_turn_get_what_grpo_gives_them(seed):
    c = random_columns(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=torch.Generator().manual_seed(seed))
    whole = grpo((c["token_rewards"] * mask).sum(1), c["group_ids"])
    assert_near(grpo_turns(c["token_rewards"], mask, c["group_ids"]), whole[:, None] * mask)


@given(SEEDS, st.floats(-5, 5))
def test_a_reward_for_every_turn_of_a_group_changes_nothing(seed, bonus):
    c = random_columns(seed)
    mask = c["mask"]
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    moved = c["token_rewards"] + bonus * (1 + c["group_ids"][:, None]) * ends
    assert_near(grpo_turns(moved, mask, c["group_ids"]), grpo_turns(c["token_rewards"], mask, c["group_ids"]))


def test_gigpo_adds_what_a_turn_gains_over_turns_from_the_same_state():
    # Two siblings start in state 7. The first goes to 8 and wins, the second comes back to 7 and loses.
    mask = torch.tensor([[True, True, False, True], [True, False, True, False]])
    states = torch.tensor([[7, 7, 0, 8], [7, 0, 7, 0]])
    rewards = torch.tensor([1.0, 0.0])
    token_rewards = torch.tensor([[0.0, 0.0, 9.0, 1.0], [0.0, 9.0, 0.0, 0.0]])
    options = {"gamma": 0.5, "normalize_std": False}
    advantages = gigpo(rewards, token_rewards, states, mask, torch.tensor([3, 3]), step_weight=3.0, **options)
    # Episodes: 1/2 and -1/2. Returns of turns from 7: 1/2, 0 and 0, mean 1/6; state 8 has one turn alone.
    torch.testing.assert_close(
        advantages,
        torch.tensor([[0.5 + 1.0, 0.5 + 1.0, 0.0, 0.5], [-0.5 - 0.5, 0.0, -0.5 - 0.5, 0.0]]),
    )
    # The same state in other groups is another one.
    apart = gigpo(rewards, token_rewards, states, mask, torch.tensor([3, 4]), **options)
    torch.testing.assert_close(apart, torch.zeros(2, 4))


@given(SEEDS)
def test_gigpo_agrees_with_the_oracle_and_without_its_second_part_with_grpo(seed):
    names = ("rewards", "token_rewards", "states", "mask", "group_ids")
    columns, lists = chosen(random_columns(seed), *names)
    assert_near(gigpo(*columns, step_weight=0.7, gamma=0.9), fp64(oracle.gigpo(*lists, 0.7, 0.9)))
    whole = grpo(columns[0], columns[4])
    assert_near(gigpo(*columns, step_weight=0.0), whole[:, None] * columns[3])


def test_prime_adds_the_outcome_to_process_rewards_above_those_of_the_siblings():
    prm, ref = (
        torch.tensor([[0.0, -8.0, 1.0], [-1.0, 0.0, 0.0]]),
        torch.tensor([[-1.0, 0.0, -2.0], [-3.0, 0.0, 0.0]]),
    )
    mask = torch.tensor([[True, False, True], [True, False, False]])
    advantages = prime(torch.tensor([1.0, 0.0]), torch.tensor([5, 5]), prm, ref, mask, beta=1.0, gamma=0.5)
    # Process rewards 1, 3 and 2, the mean of the sibling is 2 for both rows.
    assert advantages.tolist() == [[0.5, 0.0, 2.0], [-1.0, 0.0, 0.0]]


@given(SEEDS, SHARES, SHARES)
def test_prime_agrees_with_the_oracle(seed, beta, gamma):
    columns, lists = chosen(
        random_columns(seed), "rewards", "group_ids", "prm_logprobs", "ref_logprobs", "mask"
    )
    assert_near(prime(*columns, beta=beta, gamma=gamma), fp64(oracle.prime(*lists, beta, gamma)))


@given(SEEDS)
def test_prime_with_a_model_that_has_learned_nothing_is_rloo(seed):
    c = random_columns(seed)
    advantages = prime(c["rewards"], c["group_ids"], c["ref_logprobs"], c["ref_logprobs"], c["mask"])
    assert_near(advantages, rloo(c["rewards"], c["group_ids"])[:, None] * c["mask"])


@given(SEEDS, st.floats(-3, 3))
def test_a_process_reward_for_every_token_of_a_group_changes_nothing(seed, bonus):
    c = random_columns(seed)
    moved = c["prm_logprobs"] + bonus * (1 + c["group_ids"][:, None])
    before, after = (
        prime(c["rewards"], c["group_ids"], prm, c["ref_logprobs"], c["mask"])
        for prm in (c["prm_logprobs"], moved)
    )
    several = (c["group_ids"][:, None] == c["group_ids"])[:, c["mask"].any(1)].sum(1) > 1
    assert_near(after[several], before[several])


def test_reverse_kl_is_what_the_teacher_finds_likelier_within_limits():
    advantages = reverse_kl(torch.tensor([[-1.0, -2.0, -300.0]]), torch.tensor([[-0.5, -3.0, 0.0]]))
    assert advantages.tolist() == [[0.5, -1.0, 20.0]]


@given(SEEDS)
def test_reverse_kl_agrees_with_the_difference(seed):
    (old, teacher), _ = chosen(random_columns(seed), "old_logprobs", "teacher_logprobs")
    expected = [
        [t - o for o, t in zip(*rows, strict=True)]
        for rows in zip(old.tolist(), teacher.tolist(), strict=True)
    ]
    assert_near(reverse_kl(old, teacher), fp64(expected))
