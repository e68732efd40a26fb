"""Corrections and mismatch monitors by hand and against a second implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracles import kl as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.correction import bypass, mismatch, recompute, token_tis


def test_without_weights_the_ratio_divides_by_what_was_given():
    given_logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for correction in (bypass, recompute):
        old_logprobs, weights = correction(given_logprobs)
        assert torch.equal(old_logprobs, given_logprobs)
        assert weights is None and not old_logprobs.requires_grad


def test_truncated_weights_are_the_capped_ratio_without_gradient():
    trainer = torch.tensor([[math.log(0.5), math.log(0.9), math.log(0.2)]], requires_grad=True)
    rollout = torch.tensor([[math.log(0.5), math.log(0.1), math.log(0.4)]])
    old_logprobs, weights = token_tis(trainer, rollout)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.5]]))
    assert torch.equal(old_logprobs, trainer) and not (weights.requires_grad or old_logprobs.requires_grad)


def test_the_cap_is_an_option_and_must_be_positive():
    trainer, rollout = torch.tensor([[0.0]]), torch.tensor([[-3.0]])
    assert token_tis(trainer, rollout, cap=5.0)[1].item() == 5.0
    with pytest.raises(ValueError, match="cap > 0, got 0"):
        token_tis(trainer, rollout, cap=0.0)


@given(st.integers(0, 10_000))
def test_monitors_agree_with_the_oracle(seed):
    c = random_columns(seed)
    assume(bool(c["mask"].any()))
    columns = (c["trainer_logprobs"], c["rollout_logprobs"], c["mask"])
    monitors = {name: value.item() for name, value in mismatch(*columns).items()}
    assert monitors == pytest.approx(oracle.mismatch(*(column.tolist() for column in columns)), rel=1e-6, abs=1e-9)


def test_monitors_ignore_masked_tokens_and_padding():
    c = random_columns(3)
    garbage = torch.where(c["mask"], c["trainer_logprobs"], float("nan"))
    wide = [torch.nn.functional.pad(column, (0, 2)) for column in (garbage, c["rollout_logprobs"], c["mask"])]
    expected = mismatch(c["trainer_logprobs"], c["rollout_logprobs"], c["mask"])
    torch.testing.assert_close(mismatch(*wide), expected)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_sampler_that_agrees_and_an_empty_batch_show_no_mismatch(sampled):
    logprobs = torch.full((2, 3), -1.5)
    monitors = mismatch(logprobs, logprobs, torch.full((2, 3), sampled))
    assert {name: value.item() for name, value in monitors.items()} == {
        "kl_k1": 0.0,
        "kl_k3": 0.0,
        "chi2_token": 0.0,
        "max_abs_difference": 0.0,
        "ess_share": 1.0,
    }


def test_half_of_the_weight_on_one_of_many_tokens_shrinks_the_effective_sample():
    rollout, mask = torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool)
    trainer = torch.tensor([[math.log(4.0), 0.0, 0.0, 0.0, 0.0]])
    assert mismatch(trainer, rollout, mask)["ess_share"].item() == pytest.approx(64 / (5 * 20))
