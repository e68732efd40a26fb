"""The composed algorithm: its columns, from rewards to advantages, from logprobs to one loss."""

from __future__ import annotations

import math

import pytest
import torch

from verl.algorithms.objective import Algorithm, at_last_sampled_token, token_rewards, write_advantages
from verl.config import load_config
from verl.config.algorithm import AlgorithmConfig, KLConfig
from verl.config.fields import Choice
from verl.data.batch import Batch
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Prompt

GAE = Choice(name="gae", gamma=1.0, lam=1.0, whiten=False)


def rows(rewards, masks, groups=None, logprob=-1.0):
    """One row per reward; masks as texts, x: sampled, -: of the environment."""
    groups = groups or [0] * len(rewards)
    trajectories = [
        Trajectory(
            Prompt(""),
            [1],
            [2] * len(m),
            [c == "x" for c in m],
            [logprob] * len(m),
            [0] * len(m),
            g,
            reward=r,
        )
        for r, m, g in zip(rewards, masks, groups, strict=True)
    ]
    return Batch.from_trajectories(trajectories)


def bound(**config):
    return Algorithm.bind(AlgorithmConfig(**config))


def reads_clipped(logprobs, old_logprob, advantages):
    """A user's loss with a misspelt column."""


def centred(rewards, mask):
    """A user's advantage that also returns what a critic would learn, though there is none."""
    advantages = (rewards - rewards.mean())[:, None].expand(mask.shape)
    return advantages, advantages


def as_it_comes(token_rewards):
    """An advantage that is the reward of the token."""
    return token_rewards


def reads_noise(logprobs, noise, staleness):
    return noise * staleness * logprobs, {}


def by_process(prm_logprobs):
    return prm_logprobs


def halfway(logprobs, rollout_logprobs):
    return (logprobs + rollout_logprobs) / 2, torch.full_like(logprobs, 3.0)


def by_reward(mask, rewards):
    return mask * rewards[:, None]


def reads_too_early(rewards, logprobs):
    return rewards * logprobs.mean()


def broken(rewards):
    return rewards * (1 // 0)


@pytest.mark.parametrize(
    ("recipe", "present", "absent"),
    [
        (
            "ppo",
            {"values", "ref_logprobs", "token_rewards", "rollout_logprobs"},
            {"group_ids", "trainer_logprobs"},
        ),
        ("grpo", {"ref_logprobs", "group_ids", "rollout_logprobs"}, {"values", "trainer_logprobs"}),
        ("dapo", {"group_ids", "rollout_logprobs"}, {"values", "ref_logprobs", "trainer_logprobs"}),
    ],
)
def test_a_recipe_reads_what_its_functions_name_and_nothing_else(recipe, present, absent):
    reads = Algorithm.bind(load_config(recipe).algorithm).reads
    assert present <= reads
    assert not reads & absent


def test_what_the_loss_of_a_critic_reads_exists_too():
    loss = {"value_loss": Choice(name="outcome_cross_entropy")}
    assert {"ref_logprobs", "rewards"} <= bound(advantage=Choice(name=f"{__name__}:by_process"), **loss).reads


def test_a_function_that_reads_an_unknown_column_is_found_before_the_first_step():
    with pytest.raises(
        ValueError, match="reads 'old_logprob', which is no column; did you mean 'old_logprobs'"
    ):
        bound(policy_loss=Choice(name=f"{__name__}:reads_clipped"))


def test_the_reward_stands_at_the_last_sampled_token():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    placed = at_last_sampled_token(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert placed.tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0], [4, 0, 0]]


def test_siblings_share_their_advantage_over_their_sampled_tokens():
    batch = rows([0.0, 1.0, 5.0], ["xx", "x-x", "x"], [0, 0, 1])
    assert write_advantages(batch, bound(advantage=Choice(name="grpo", normalize_std=False)), 0.0) == {}
    assert batch["advantages"].tolist() == [[-0.5, -0.5, 0], [0.5, 0, 0.5], [0, 0, 0]]
    assert torch.equal(batch["old_logprobs"], batch["rollout_logprobs"])


def test_a_row_that_is_masked_as_a_whole_counts_among_its_siblings_with_its_own_reward():
    batch = rows([1.0, 1.0, 4.0], ["xx", "x", "--"])
    write_advantages(batch, bound(advantage=Choice(name="grpo", normalize_std=False)), 0.0)
    assert batch["advantages"].tolist() == [[-1, -1], [-1, 0], [0, 0]]


def test_kl_in_the_reward_is_taken_from_every_sampled_token():
    batch = rows([2.0, 0.0], ["x-x", "xx"])
    batch.write("ref_logprobs", torch.tensor([[-1.5, 9.0, -2.0], [-1.0, -1.0, 0.0]]))
    batch.write("values", torch.zeros(2, 3))
    kl = KLConfig(where="reward", estimator=Choice(name="k1"))
    metrics = write_advantages(batch, bound(advantage=GAE, kl=kl), 0.1)
    # k1 is 0.5 and 1 in the first row, 0 in the second; with gamma and lam 1 an advantage is the sum of what
    # is to come.
    assert metrics["kl"] == pytest.approx(1.5 / 4)
    torch.testing.assert_close(batch["advantages"], torch.tensor([[1.85, 0, 1.9], [0, 0, 0]]))
    torch.testing.assert_close(batch["returns"], batch["advantages"])


def test_kl_in_the_reward_also_moves_the_rewards_that_siblings_compare():
    batch = rows([1.0, 1.0], ["x-", "xx"])
    batch.write("ref_logprobs", torch.tensor([[-2.0, 5.0], [-1.0, -1.0]]))
    kl = KLConfig(where="reward", estimator=Choice(name="k1"))
    write_advantages(batch, bound(advantage=Choice(name="grpo", normalize_std=False), kl=kl), 0.5)
    torch.testing.assert_close(batch["advantages"], torch.tensor([[-0.25, 0], [0.25, 0.25]]))


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_one_that_knows_the_mean():
    for values, expected in (([[1.0], [3.0]], 1.0), ([[2.0], [2.0]], 0.0)):
        batch = rows([1.0, 3.0], ["x", "x"])
        batch.write("values", torch.tensor(values))
        assert write_advantages(batch, bound(advantage=GAE), 0.0)["explained_variance"] == pytest.approx(
            expected
        )


def test_returns_without_a_critic_explain_no_variance():
    batch = rows([1.0, 3.0], ["x", "x"])
    assert write_advantages(batch, bound(advantage=Choice(name=f"{__name__}:centred")), 0.0) == {}
    assert batch["returns"].tolist() == [[-1], [1]]


def test_rewards_of_turns_stand_at_their_ends_and_the_rest_at_the_last_token():
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    turns = torch.tensor([[0.0, 0.5, 0, 0.25, 0], [0, 0, 0, 0, 0]])
    assert token_rewards(torch.tensor([2.0, 1.0]), mask, turns).tolist() == [
        [0, 0.5, 0, 1.5, 0],
        [1, 0, 0, 0, 0],
    ]


def test_turn_rewards_of_trajectories_reach_the_advantage():
    prompt = Prompt("")
    turns = Trajectory(
        prompt,
        [1],
        [2] * 4,
        [True, False, True, True],
        [-1.0] * 4,
        [0] * 4,
        0,
        reward=3.0,
        turn_rewards=[1.0, 0.5],
    )
    other = Trajectory(prompt, [1], [2], [True], [-1.0], [0], 0, reward=0.0)
    batch = Batch.from_trajectories([turns, other])
    write_advantages(batch, bound(advantage=Choice(name=f"{__name__}:as_it_comes")), 0.0)
    assert batch["advantages"].tolist() == [[1, 0, 0, 2], [0, 0, 0, 0]]


def test_noise_is_written_only_if_it_is_read_and_staleness_also_where_a_token_is_stale():
    batch = rows([1.0, 0.0], ["xx", "x"])
    write_advantages(batch, bound(), 0.0, version=0)
    assert not {"staleness", "noise"} & set(batch.names)
    noise = []
    for seed, version in ((0, 3), (0, 3), (0, 4), (1, 3)):
        write_advantages(
            batch, bound(policy_loss=Choice(name=f"{__name__}:reads_noise")), 0.0, version=version, seed=seed
        )
        noise.append(batch["noise"])
    assert (
        torch.equal(noise[0], noise[1])
        and not torch.equal(noise[0], noise[2])
        and not torch.equal(noise[0], noise[3])
    )
    assert batch["staleness"].tolist() == [[3, 3], [3, 0]]


def test_the_step_reports_how_far_trainer_and_sampler_are_apart():
    batch = rows([1.0, 0.0], ["xx", "x"])
    batch.write("trainer_logprobs", batch["rollout_logprobs"] + math.log(4))
    metrics = write_advantages(batch, bound(correction=Choice(name="token_mis", high=2.0)), 0.0)
    assert metrics["mismatch/kl_k1"] == pytest.approx(-math.log(4))
    assert metrics["correction/rejected_share"] == 1
    assert not batch["correction_weights"].any()


def test_a_correction_that_reads_logprobs_is_made_anew_in_every_update():
    algorithm = bound(correction=Choice(name=f"{__name__}:halfway"), policy_loss=Choice(name="ppo_clip"))
    assert algorithm.corrects_in_update
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    columns = {
        "logprobs": logprobs,
        "rollout_logprobs": torch.tensor([[-3.0]]),
        "advantages": torch.ones(1, 1),
    }
    columns |= {"mask": torch.ones(1, 1, dtype=torch.bool), "weights": torch.ones(1, 1)}
    loss, sums = algorithm.policy_objective(columns, torch.zeros(1, 1), 0.0)
    # The ratio is e, clipped to 1.2, times the weight of 3; what the correction gives has no gradient.
    assert loss.item() == pytest.approx(-3.6) and float(sums["ratio"]) == pytest.approx(math.e)
    assert (float(sums["correction_weight"]), float(sums["rejected_share"])) == (3, 0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        halfway(logprobs, columns["rollout_logprobs"])[0].detach().sum().backward()


def test_the_likelihood_of_good_answers_is_a_term_of_its_own():
    algorithm = bound(policy_loss=Choice(name="policy_gradient"), likelihood_coef=0.5)
    columns = {"logprobs": torch.tensor([[-1.0, -2.0]], requires_grad=True), "advantages": torch.zeros(1, 2)}
    columns |= {
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "weights": torch.ones(1, 2),
        "likelihood_weights": torch.tensor([[0.5, 0.25]]),
    }
    loss, _ = algorithm.policy_objective(columns, torch.zeros(1, 2), 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 + 0.5))
    assert columns["logprobs"].grad.tolist() == [[-0.25, -0.125]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy_loss": Choice(name="ppo_clip", dual_clip=0.5)}, "ppo_clip: need dual_clip > 1, got 0.5"),
        ({"advantage": Choice(name="gae", lam=2.0)}, "gae: need .* got .*2.0"),
        ({"correction": Choice(name="token_tis", cap=-1.0)}, "token_tis: need cap > 0, got -1.0"),
        (
            {"advantage": Choice(name=f"{__name__}:broken")},
            "broken fails on 4 rows of small columns: ZeroDivisionError",
        ),
        (
            {"aggregation": Choice(name=f"{__name__}:by_reward")},
            "by_reward reads 'rewards', which is no column.*the columns are mask, group_ids",
        ),
        (
            {"advantage": Choice(name=f"{__name__}:reads_too_early")},
            "reads_too_early reads 'logprobs', which is no column .* is called",
        ),
        (
            {"advantage": Choice(name="prime")},
            "need a loss of the process reward model .* set algorithm.value_loss=outcome_cross_entropy",
        ),
        ({"value_loss": Choice(name="outcome_cross_entropy")}, "need an advantage that reads prm_logprobs"),
        (
            {"advantage": Choice(name="gdpo"), "kl": KLConfig(where="reward")},
            "where reward, got gdpo and ppo_clip, which would ignore the KL",
        ),
        (
            {"advantage": Choice(name="reverse_kl"), "kl": KLConfig(where="reward")},
            "where reward, got reverse_kl and ppo_clip",
        ),
        (
            {"policy_loss": Choice(name="online_dpo"), "kl": KLConfig(where="reward")},
            "where reward, got grpo and online_dpo",
        ),
        (
            {"policy_loss": Choice(name="kl_cov"), "skip_zero_advantages": True},
            "algorithm.skip_zero_advantages, got kl_cov",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(config, message):
    with pytest.raises(ValueError, match=message):
        bound(**config)


@pytest.mark.parametrize("name", ["ppo_clip", "policy_gradient", "gspo", "cispo", "sapo", "gmpo", "dppo"])
def test_losses_that_leave_rows_without_advantage_alone_may_skip_them(name):
    assert bound(policy_loss=Choice(name=name), skip_zero_advantages=True).skip_zero_advantages


def test_the_loss_is_the_weighted_sum_of_its_parts():
    algorithm = bound(
        policy_loss=Choice(name="policy_gradient"),
        kl=KLConfig(where="loss", estimator=Choice(name="k2")),
        correction=Choice(name="token_tis"),
        entropy_coef=0.5,
    )
    columns = {
        "logprobs": torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True),
        "ref_logprobs": torch.tensor([[-3.0, -2.0, 4.0]]),
        "advantages": torch.tensor([[1.0, -1.0, 7.0]]),
        "correction_weights": torch.tensor([[2.0, 0.5, 3.0]]),
        "rollout_logprobs": torch.tensor([[-1.0, -2.0 - math.log(2), 0.0]]),
        "mask": torch.tensor([[True, True, False]]),
        "weights": torch.tensor([[0.25, 0.25, 0.0]]),
    }
    loss, sums = algorithm.policy_objective(columns, torch.tensor([[1.0, 3.0, 8.0]]), kl_coef=0.1)
    # Policy: 2 * 1 and 0.5 * -2; entropy: 0.5 * (1 + 3); KL: 0.1 * (2 + 0).
    assert loss.item() == pytest.approx(0.25 * (2 - 1 - 2 + 0.2))
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        {
            "entropy": 4.0,
            "kl": 2.0,
            "kl_sampler": 2 - 1 - math.log(2),
            "sampler_gap": math.log(2),
            "sampler_gap_max": math.log(2),
        }
    )


@pytest.mark.parametrize("name", ["ppo_clip", "policy_gradient"])
def test_masked_tokens_get_no_gradient_whatever_stands_there(name):
    columns = {
        column: torch.tensor([[-1.0, torch.inf, torch.nan]])
        for column in ("old_logprobs", "rollout_logprobs", "advantages")
    }
    columns |= {"mask": torch.tensor([[True, False, False]]), "weights": torch.tensor([[1.0, 0.0, 0.0]])}
    columns["logprobs"] = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    loss, sums = bound(policy_loss=Choice(name=name)).policy_objective(columns, torch.ones(1, 3), 0.0)
    loss.backward()
    assert columns["logprobs"].grad[0, 1:].tolist() == [0, 0]
    assert columns["logprobs"].grad[0, 0] == 1
    assert all(math.isfinite(value) for value in sums.values())
