"""The five choices together: which columns they read, from rewards to advantages, from logprobs to one loss."""

from __future__ import annotations

import math

import pytest
import torch

from verl.algorithms.compose import Algorithm, at_last_sampled_token, write_advantages
from verl.config import load_config
from verl.data.batch import Batch, Trajectory
from verl.settings import AlgorithmConfig, Choice, KLConfig
from verl.utils.rollout import Prompt

GAE = Choice(name="gae", gamma=1.0, lam=1.0, whiten=False)


def rows(rewards, masks, groups=None, logprob=-1.0):
    """One row per reward; masks as texts, x: sampled, -: of the environment."""
    groups = groups or [0] * len(rewards)
    trajectories = [
        Trajectory(Prompt(""), [1], [2] * len(m), [c == "x" for c in m], [logprob] * len(m), [0] * len(m), g, reward=r)
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


@pytest.mark.parametrize(
    ("recipe", "present", "absent"),
    [
        ("ppo", {"values", "ref_logprobs", "token_rewards", "rollout_logprobs"}, {"group_ids", "trainer_logprobs"}),
        ("grpo", {"ref_logprobs", "group_ids", "rollout_logprobs"}, {"values", "trainer_logprobs"}),
        ("dapo", {"group_ids", "rollout_logprobs"}, {"values", "ref_logprobs", "trainer_logprobs"}),
    ],
)
def test_a_recipe_reads_what_its_functions_name_and_nothing_else(recipe, present, absent):
    reads = Algorithm.bind(load_config(recipe).algorithm).reads
    assert present <= reads
    assert not reads & absent


def test_a_function_that_reads_an_unknown_column_is_found_before_the_first_step():
    with pytest.raises(ValueError, match="reads 'old_logprob', which is no column; did you mean 'old_logprobs'"):
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
    # k1 is 0.5 and 1 in the first row, 0 in the second; with gamma and lam 1 an advantage is the sum of what is to come.
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
        assert write_advantages(batch, bound(advantage=GAE), 0.0)["explained_variance"] == pytest.approx(expected)


def test_returns_without_a_critic_explain_no_variance():
    batch = rows([1.0, 3.0], ["x", "x"])
    assert write_advantages(batch, bound(advantage=Choice(name=f"{__name__}:centred")), 0.0) == {}
    assert batch["returns"].tolist() == [[-1], [1]]


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
        {"entropy": 4.0, "kl": 2.0, "kl_sampler": 2 - 1 - math.log(2)}
    )


@pytest.mark.parametrize("name", ["ppo_clip", "policy_gradient"])
def test_masked_tokens_get_no_gradient_whatever_stands_there(name):
    columns = {column: torch.tensor([[-1.0, torch.inf, torch.nan]]) for column in ("old_logprobs", "rollout_logprobs", "advantages")}
    columns |= {"mask": torch.tensor([[True, False, False]]), "weights": torch.tensor([[1.0, 0.0, 0.0]])}
    columns["logprobs"] = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    loss, sums = bound(policy_loss=Choice(name=name)).policy_objective(columns, torch.ones(1, 3), 0.0)
    loss.backward()
    assert columns["logprobs"].grad[0, 1:].tolist() == [0, 0]
    assert columns["logprobs"].grad[0, 0] == 1
    assert all(math.isfinite(value) for value in sums.values())
