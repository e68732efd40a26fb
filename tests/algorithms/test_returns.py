"""What chosen functions return is checked before a model is loaded, and in every call of the run."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.algorithms.test_objective import rows
from verl.algorithms.dry_run import example_columns, try_out
from verl.algorithms.objective import Algorithm, write_advantages
from verl.algorithms.registry import ReturnedError
from verl.algorithms.returns import bind_as
from verl.config.algorithm import AlgorithmConfig, KLConfig
from verl.config.fields import Choice
from verl.data.columns import readable_by

NO_MONITORS: dict = {}
PAIR = "need a pair of per-token losses [B, T] = [4, 3] and a dict of monitors, got "
WRONG = [
    # An advantage.
    (
        "advantage",
        lambda rewards: rewards.mean(),
        "[B] = [4] or [B, T] = [4, 3], got a tensor [] of torch.float32",
    ),
    ("advantage", lambda token_rewards: token_rewards[:, :2], "got a tensor [4, 2]"),
    ("advantage", lambda rewards: rewards.tolist(), "got an object of type list"),
    ("advantage", lambda rewards: np.zeros(4), "got an object of type ndarray"),
    ("advantage", lambda rewards: None, "got nothing"),
    ("advantage", lambda rewards: rewards > 0.5, "need advantages of a floating-point type, got torch.bool"),
    (
        "advantage",
        lambda rewards: (rewards, rewards),
        "need returns as a tensor [B, T] = [4, 3], got a tensor [4]",
    ),
    ("advantage", lambda rewards: (rewards, None, 1), "need advantages, or a pair .*, got a tuple of 3"),
    ("advantage", lambda rewards: rewards / 0, "need finite values, got NaN or infinity in 4 of 4 rows"),
    ("advantage", lambda rewards: rewards.sub_(1), "got changes in rewards, which others read too"),
    # A policy loss.
    ("policy_loss", lambda logprobs: (-logprobs).mean(), PAIR + "a tensor []"),
    ("policy_loss", lambda logprobs: -logprobs, PAIR + "a tensor [4, 3]"),
    (
        "policy_loss",
        lambda logprobs: ((-logprobs).mean(), {}),
        "got a tensor [] of torch.float32; do not average",
    ),
    (
        "policy_loss",
        lambda logprobs: (-logprobs.detach(), {}),
        "need a loss with a gradient with respect to logprobs",
    ),
    ("policy_loss", lambda advantages: (-advantages, {}), "but it reads only advantages"),
    (
        "policy_loss",
        lambda logprobs: (-logprobs, None),
        "need a dict of monitors beside the losses, got nothing",
    ),
    (
        "policy_loss",
        lambda logprobs: (-logprobs, {"m": 1.0}),
        "the monitor 'm' as a tensor [B, T] = [4, 3], got an",
    ),
    ("policy_loss", lambda logprobs: (logprobs.mul_(-1), {}), "got changes in logprobs"),
    ("policy_loss", lambda logprobs: (torch.log(logprobs), {}), "need finite values"),
    # The others.
    ("value_loss", lambda new_values: (new_values.mean(), {}), "need losses per token or per row"),
    ("value_loss", lambda returns: (returns, {}), "need a loss with a gradient"),
    (
        "correction",
        lambda rollout_logprobs: rollout_logprobs,
        "need a pair (old_logprobs, weights), got a tensor [4",
    ),
    ("correction", lambda rollout_logprobs: (rollout_logprobs, 1.0), "need weights as a tensor [B, T]"),
    ("kl", lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).sum(), "need the KL of each token"),
    ("kl", lambda logprobs: torch.zeros(4, 3), "need a loss with a gradient"),
    ("aggregation", lambda mask: 1 / mask.sum(), "need the weight of each token as a tensor [B, T] = [4, 3]"),
    ("aggregation", lambda mask: mask, "of a floating-point type, got torch.bool; convert with .float()"),
    ("length_penalty", lambda num_tokens: -num_tokens, "of a floating-point type, got torch.int64"),
    (
        "preference_loss",
        lambda chosen_logprobs: (-chosen_logprobs.mean(), {}),
        "per pair as a tensor [P] = [3]",
    ),
    (
        "preference_loss",
        lambda chosen_logprobs: (chosen_logprobs / 0, {}),
        "got NaN or infinity in 3 of 3 rows (number 0, 1, 2), although the columns that it reads",
    ),
    ("policy_loss", lambda logprobs: (-logprobs, {1: logprobs}), "need texts as names of monitors, got 1"),
    ("reward_loss", lambda chosen_rewards: -chosen_rewards, "need a pair of losses per pair [P] = [3]"),
]


@pytest.fixture
def named(monkeypatch):
    """Makes a function one that a user names as mine:f."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)

    def name(function):
        module.f = function
        return Choice(name="mine:f")

    return name


@pytest.mark.parametrize(("reader", "function", "message"), WRONG, ids=range(len(WRONG)))
def test_what_a_function_must_not_return_or_do_is_refused_with_its_name(reader, function, message, named):
    learns = reader in ("policy_loss", "value_loss", "kl", "preference_loss", "reward_loss")
    with pytest.raises(ReturnedError) as refusal:
        try_out(bind_as(reader, named(function), {}), readable_by(reader), learns=learns)
    assert str(refusal.value).startswith("mine:f: ")
    first, _, rest = message.partition(" .*, ")
    assert first in str(refusal.value) and rest in str(refusal.value)


def test_errors_of_the_backward_pass_name_the_function_before_the_run(named):
    def f(logprobs):
        ratio = logprobs.exp()
        loss = ratio * ratio
        ratio.add_(1)
        return loss, {}

    with pytest.raises(ValueError, match=r"mine:f fails on 4 rows of small columns: RuntimeError.*inplace"):
        try_out(bind_as("policy_loss", named(f), {}), learns=True)


def test_a_loss_that_returns_another_shape_in_the_run_is_refused_there(named):
    calls = []

    def f(logprobs):
        calls.append(logprobs)
        return (-logprobs if len(calls) < 3 else -logprobs.mean()), NO_MONITORS

    algorithm = Algorithm.bind(AlgorithmConfig(policy_loss=named(f)))
    columns = example_columns()
    columns["weights"] = columns["mask"].float()
    columns["logprobs"] = columns["logprobs"].requires_grad_()
    with pytest.raises(ReturnedError, match=r"mine:f: need per-token losses as a tensor"):
        algorithm.policy_objective(columns, torch.zeros(4, 3), 0.0)


def test_advantages_that_are_not_finite_in_the_run_name_the_function_and_the_rows(named):
    def f(rewards, group_ids):
        same = (group_ids[:, None] == group_ids[None, :]).to(rewards.dtype)
        mean = same @ rewards / same.sum(1)
        return (rewards - mean) / (rewards - mean).abs()

    algorithm = Algorithm.bind(AlgorithmConfig(advantage=named(f)))
    batch = rows([1.0, 0.0, 2.0, 2.0], ["xx", "xx", "xx", "-x"], groups=[0, 0, 1, 1])
    with pytest.raises(ReturnedError, match=r"mine:f: need finite values.* in 2 of 4 rows \(number 2, 3\)"):
        write_advantages(batch, algorithm, 0.0)


@pytest.mark.parametrize("reader", ["policy_loss", "kl"])
def test_losses_that_are_not_finite_in_the_run_name_the_function(reader, named):
    def f(logprobs):
        values = -logprobs / (logprobs > -9)
        return (values, NO_MONITORS) if reader == "policy_loss" else values

    if reader == "kl":
        config = AlgorithmConfig(kl=KLConfig(where="loss", estimator=named(f)))
    else:
        config = AlgorithmConfig(policy_loss=named(f))
    columns = example_columns()
    columns["weights"] = columns["mask"].float()
    columns["logprobs"][2, 0] = -10
    columns["logprobs"].requires_grad_()
    with pytest.raises(ReturnedError, match=r"mine:f: need finite values, .* in 1 of 4 rows \(number 2\)"):
        Algorithm.bind(config).policy_objective(columns, torch.zeros(4, 3), 0.1)


def test_a_function_that_ends_the_program_is_named(named):
    with pytest.raises(ValueError, match=r"mine:f fails on 4 rows of small columns: SystemExit: 0"):
        try_out(bind_as("advantage", named(lambda rewards: sys.exit(0)), {}))


def test_values_that_are_not_finite_because_a_column_is_not_are_left_to_the_update(named):
    algorithm = Algorithm.bind(AlgorithmConfig(advantage=named(lambda rewards: rewards)))
    batch = rows([1.0, float("nan")], ["xx", "xx"])
    write_advantages(batch, algorithm, 0.0)
    assert batch["advantages"].isnan().any()


def two_values(rewards, values):
    return rewards[:, None] - values, values.clone()


def test_functions_that_return_what_they_must_are_called_as_they_are(named):
    bound = bind_as("advantage", named(two_values), {})
    advantages, returns = try_out(bound)
    assert advantages.shape == returns.shape == (4, 3)
