"""Advantages of whole answers, by hand and against a second implementation, and invariants of all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import advantages as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.advantages import (
    ADVANTAGES,
    gdpo,
    gpg,
    grpo,
    grpo_batch_std,
    grpo_passk,
    maxrl,
    opo,
    reinforce_pp_baseline,
    remax,
    rloo,
)
from verl.algorithms.registry import bind
from verl.config.fields import Choice

SEEDS = st.integers(0, 10_000)
EVERY_ADVANTAGE = pytest.mark.parametrize("name", ADVANTAGES)
REWARDS = ("rewards", "token_rewards", "reward_parts", "greedy_rewards")
# Compare an answer with its siblings, so that a group without differences teaches nothing.
COMPARING = (
    "grpo",
    "grpo_batch_std",
    "rloo",
    "opo",
    "gpg",
    "maxrl",
    "grpo_passk",
    "gdpo",
    "reinforce_pp_baseline",
    "optimal_token_baseline",
    "prime",
)
# Power of the unit of the rewards in that of the advantages; without the eps that breaks the law.
UNITS = {
    "grpo": 0,
    "grpo_batch_std": 0,
    "grpo_passk": 0,
    "gdpo": 0,
    "maxrl": 0,
    "reinforce_pp": 0,
    "reinforce_pp_baseline": 0,
    "gae": 0,
    "vapo_gae": 0,
}
UNITS |= {"rloo": 1, "opo": 1, "gpg": 1, "remax": 1, "optimal_token_baseline": 1, "grpo_turns": 0, "prime": 1}
WITHOUT_EPS = {
    name: {"eps": 0.0} for name in ("grpo", "grpo_batch_std", "grpo_passk", "gdpo", "maxrl", "grpo_turns")
}


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def advantages_of(name, columns, **options):
    """Advantages [B, T] that a function of the table gives, 0 at masked positions."""
    result = bind(Choice(name=name, **options), ADVANTAGES)(columns)
    advantages = result[0] if isinstance(result, tuple) else result
    mask = columns["mask"]
    return torch.where(
        mask, advantages[:, None].expand(mask.shape) if advantages.ndim == 1 else advantages, 0.0
    )


def per_token(columns):
    """Names of the floating-point columns [B, T]."""
    return [name for name, c in columns.items() if c.shape == columns["mask"].shape and c.is_floating_point()]


def test_siblings_are_compared_only_with_each_other():
    advantages = grpo(torch.tensor([1.0, 2.0, 0.0, 2.0, 5.0]), torch.tensor([7, 3, 7, 3, 9]))
    torch.testing.assert_close(advantages, torch.tensor([0.7071, 0.0, -0.7071, 0.0, 0.0]), atol=1e-4, rtol=0)


def test_without_the_division_grpo_is_the_distance_to_the_group_mean():
    advantages = grpo(
        torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64), normalize_std=False
    )
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_compares_with_the_mean_of_the_others_and_gives_a_lone_row_nothing():
    assert rloo(torch.tensor([3.0, 1.0, 2.0, 8.0]), torch.tensor([0, 0, 0, 1])).tolist() == [
        1.5,
        -1.5,
        0.0,
        0.0,
    ]


def test_opo_weighs_the_mean_by_the_number_of_sampled_tokens():
    mask = torch.tensor([[True, False, False, False], [True, True, False, True]])
    assert opo(torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), mask).tolist() == [0.75, -0.25]
    assert opo(torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_gpg_makes_up_for_groups_without_differences():
    rewards, group_ids = torch.tensor([1.0, 5.0, 0.0, 5.0]), torch.tensor([0, 1, 0, 1])
    assert gpg(rewards, group_ids).tolist() == [1.0, 0.0, -1.0, 0.0]
    assert gpg(rewards, group_ids, scale=4.0).tolist() == [0.25, 0.0, -0.25, 0.0]


def test_maxrl_divides_by_the_rate_of_success_and_leaves_groups_without_success():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, 1.0])
    advantages = maxrl(rewards, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), eps=0.0)
    assert advantages.tolist() == [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_deviation_of_the_batch_leaves_the_weights_of_prompts_to_each_other():
    rewards, group_ids = (
        torch.tensor([4.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
    )
    # Distances 2, -2, 0.5, -0.5, 0.5, -0.5, 0, 0: mean square 9 / 8.
    expected = torch.tensor([2.0, -2.0, 0.5, -0.5, 0.5, -0.5, 0.0, 0.0]) / (9 / 8) ** 0.5
    torch.testing.assert_close(grpo_batch_std(rewards, group_ids, eps=0.0), expected)


def test_only_a_single_best_answer_gets_credit_for_pass_at_k():
    rewards, group_ids = (
        torch.tensor([3.0, 0.0, 1.5, 2.0, 2.0, 1.0, 4.0]),
        torch.tensor([0, 0, 0, 1, 1, 1, 2]),
    )
    assert grpo_passk(rewards, group_ids, normalize_std=False).tolist() == [1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert grpo_passk(rewards, group_ids, eps=0.0).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_gdpo_normalizes_each_function_in_its_group_and_the_sum_over_the_batch():
    parts = torch.tensor([[100.0, 0.0], [0.0, 3.0], [7.0, 1.0], [7.0, 1.0]])
    advantages = gdpo(parts, torch.tensor([[1.0, 0.5]] * 4), torch.tensor([0, 0, 1, 1]))
    # Sums +-0.3536, 0, 0 with deviation 0.2887.
    torch.testing.assert_close(advantages, torch.tensor([1.2247, -1.2247, 0.0, 0.0]), atol=1e-4, rtol=0)


def test_remax_compares_with_the_most_likely_answer():
    assert remax(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25])).tolist() == [0.75, -0.25]


def test_reinforce_pp_baseline_takes_the_scale_from_the_tokens_of_the_batch():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = reinforce_pp_baseline(torch.tensor([2.0, 0.0]), torch.tensor([0, 0]), mask)
    # Distances 1, 1, -1: mean 1/3, deviation 0.9428.
    torch.testing.assert_close(
        advantages, torch.tensor([[0.7071, 0.7071, 0.0], [-1.4142, 0.0, 0.0]]), atol=1e-4, rtol=0
    )


@given(SEEDS, st.booleans())
def test_group_advantages_agree_with_the_oracles(seed, normalize_std):
    c = random_columns(seed)
    rewards, group_ids = c["rewards"], c["group_ids"]
    lists = (rewards.tolist(), group_ids.tolist())
    assert_near(
        grpo(rewards, group_ids, normalize_std=normalize_std), fp64(oracle.grpo(*lists, normalize_std))
    )
    assert_near(
        grpo_passk(rewards, group_ids, normalize_std=normalize_std),
        fp64(oracle.grpo_passk(*lists, normalize_std)),
    )
    assert_near(rloo(rewards, group_ids), fp64(oracle.rloo(*lists)))
    assert_near(gpg(rewards, group_ids, scale=0.5), fp64(oracle.gpg(*lists, scale=0.5)))
    assert_near(maxrl(rewards, group_ids), fp64(oracle.maxrl(*lists)))
    assert_near(grpo_batch_std(rewards, group_ids), fp64(oracle.grpo_batch_std(*lists)))


@given(SEEDS)
def test_rewards_with_ties_agree_with_the_oracles(seed):
    c = random_columns(seed)
    rewards, group_ids = (c["rewards"] > 0).double(), c["group_ids"]
    for function, expected in ((gpg, oracle.gpg), (grpo_passk, oracle.grpo_passk), (maxrl, oracle.maxrl)):
        assert_near(function(rewards, group_ids), fp64(expected(rewards.tolist(), group_ids.tolist())))


@given(SEEDS)
def test_advantages_from_lengths_parts_and_batches_agree_with_the_oracles(seed):
    c = random_columns(seed)
    by_length = [c[name] for name in ("rewards", "group_ids", "mask")]
    assert_near(opo(*by_length), fp64(oracle.opo(*(column.tolist() for column in by_length))))
    assert_near(
        reinforce_pp_baseline(*by_length),
        fp64(oracle.reinforce_pp_baseline(*(column.tolist() for column in by_length))),
    )
    parts = [c[name] for name in ("reward_parts", "reward_weights", "group_ids")]
    assert_near(gdpo(*parts), fp64(oracle.gdpo(*(column.tolist() for column in parts))))


@EVERY_ADVANTAGE
@given(seed=SEEDS)
def test_the_order_of_rows_and_the_names_of_groups_do_not_matter(name, seed):
    c = random_columns(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    shuffled = {key: column[order] for key, column in c.items()}
    shuffled["group_ids"] = 100 - 7 * shuffled["group_ids"]
    assert_near(advantages_of(name, shuffled), advantages_of(name, c)[order])


@EVERY_ADVANTAGE
@given(seed=SEEDS)
def test_padding_does_not_matter(name, seed):
    c = random_columns(seed)
    garbage = torch.full((6, 3), 1e4, dtype=torch.float64)
    wider = (
        c
        | {key: torch.cat([c[key], garbage], 1) for key in per_token(c)}
        | {"mask": torch.cat([c["mask"], garbage < 0], 1)}
        | {"states": torch.cat([c["states"], garbage.long()], 1)}
    )
    advantages = advantages_of(name, wider)
    assert_near(advantages[:, :7], advantages_of(name, c))
    assert advantages[:, 7:].count_nonzero() == 0


@EVERY_ADVANTAGE
@given(seed=SEEDS)
def test_masked_positions_are_not_read(name, seed):
    c = random_columns(seed)
    broken = c | {key: torch.where(c["mask"], c[key], torch.nan) for key in per_token(c)}
    assert torch.equal(advantages_of(name, broken), advantages_of(name, c))


@pytest.mark.parametrize("name", COMPARING)
@given(seed=SEEDS, reward=st.floats(-10, 10, width=32))
def test_equal_rewards_give_exactly_zero_in_fp32(name, seed, reward):
    c = {
        key: column.float() if column.is_floating_point() else column
        for key, column in random_columns(seed).items()
    }
    for key in REWARDS:
        c[key] = torch.full_like(c[key], reward)
    assert advantages_of(name, c | {"prm_logprobs": c["ref_logprobs"]}).count_nonzero() == 0


@pytest.mark.parametrize("name", COMPARING)
@given(seed=SEEDS)
def test_a_trajectory_without_siblings_gets_nothing(name, seed):
    assert advantages_of(name, random_columns(seed) | {"group_ids": torch.arange(6)}).count_nonzero() == 0


@pytest.mark.parametrize("name", [name for name in COMPARING if name != "maxrl"] + ["remax"])
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_a_reward_for_all_of_a_group_changes_nothing(name, seed, shift):
    c = random_columns(seed)
    bonus = shift * (1 + c["group_ids"].double())
    moved = (
        c
        | {key: c[key] + bonus for key in ("rewards", "greedy_rewards")}
        | {"reward_parts": c["reward_parts"] + bonus[:, None]}
    )
    assert_near(
        advantages_of(name, moved, **WITHOUT_EPS.get(name, {})),
        advantages_of(name, c, **WITHOUT_EPS.get(name, {})),
    )


@pytest.mark.parametrize(("name", "power"), UNITS.items())
@given(seed=SEEDS, scale=st.floats(0.1, 10))
def test_the_unit_of_the_rewards_goes_where_it_should(name, power, seed, scale):
    c = random_columns(seed)
    scaled = c | {key: scale * c[key] for key in (*REWARDS, "values")}
    # The difference of logprobs is the process reward.
    scaled["prm_logprobs"] = c["ref_logprobs"] + scale * (c["prm_logprobs"] - c["ref_logprobs"])
    options = WITHOUT_EPS.get(name, {})
    expected = scale**power * advantages_of(name, c, **options)
    # Whitening has an eps of its own.
    torch.testing.assert_close(advantages_of(name, scaled, **options), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "grpo_batch_std", "rloo", "gpg", "maxrl", "gdpo"])
@given(seed=SEEDS)
def test_advantages_of_a_group_sum_to_zero(name, seed):
    c = random_columns(seed)
    advantages = bind(Choice(name=name), ADVANTAGES)(c)
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, c["group_ids"], advantages)
    torch.testing.assert_close(
        sums, torch.zeros_like(sums), atol=1e-6 * float(1 + advantages.abs().max()), rtol=0
    )


@given(SEEDS)
def test_advantages_of_opo_sum_to_zero_over_the_tokens_of_a_group(seed):
    c = random_columns(seed)
    advantages = opo(c["rewards"], c["group_ids"], c["mask"])
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, c["group_ids"], advantages * c["mask"].sum(1))
    assert_near(sums, torch.zeros_like(sums))


@EVERY_ADVANTAGE
@pytest.mark.parametrize(("rows", "width"), [(0, 7), (3, 0), (0, 0)])
def test_nothing_gives_nothing(name, rows, width):
    c = {
        key: column[:rows, :width] if column.shape[1:2] == (7,) else column[:rows]
        for key, column in random_columns(0).items()
    }
    advantages = advantages_of(name, c)
    assert advantages.shape == (rows, width) and advantages.isfinite().all()


def test_rewards_per_token_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"rewards \(2, 3\) and group_ids \(2,\); pass per-trajectory sums"):
        grpo(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_integer_rewards_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        rloo(torch.tensor([1, 0]), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, "eps", -1e-6) for name in WITHOUT_EPS]
    + [("gpg", "scale", 0.0), ("prime", "beta", -1.0), ("vapo_gae", "alpha", 0.0)],
)
def test_options_out_of_bounds_are_refused_with_what_came(name, option, value):
    with pytest.raises(ValueError, match=f"need {option} .* got {option}={value}"):
        advantages_of(name, random_columns(0), **{option: value})


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gae", "lam"),
        ("gae", "gamma"),
        ("vapo_gae", "critic_lam"),
        ("reinforce_pp", "gamma"),
        ("prime", "gamma"),
    ],
)
def test_decays_above_one_are_refused(name, option):
    with pytest.raises(ValueError, match=f"{option}=1.5"):
        advantages_of(name, random_columns(0), **{option: 1.5})


@pytest.mark.parametrize(
    "name", ["opo", "reinforce_pp_baseline", "optimal_token_baseline", "prime", "gdpo", "grpo_turns"]
)
def test_columns_with_fewer_rows_are_refused(name):
    c = random_columns(0)
    with pytest.raises(ValueError, match=r"same rows.*\(5,"):
        advantages_of(
            name, c | {key: column[:5] for key, column in c.items() if key not in ("rewards", "group_ids")}
        )
