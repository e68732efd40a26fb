"""KL estimators and coefficients by hand, against a second implementation, and as estimators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import kl as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.kl import KL_ESTIMATORS, adapted_coef, k1, k2, k3, scheduled_coef


def test_estimates_of_one_token_by_hand():
    logprobs, ref_logprobs = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2))
    assert k2(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@given(seed=st.integers(0, 10_000))
def test_estimates_agree_with_the_oracle(name, seed):
    c = random_columns(seed)
    pairs = zip(c["logprobs"].flatten().tolist(), c["ref_logprobs"].flatten().tolist(), strict=True)
    expected = torch.tensor([oracle.estimate(name, *pair) for pair in pairs], dtype=torch.float64)
    estimate = KL_ESTIMATORS[name](c["logprobs"], c["ref_logprobs"])
    torch.testing.assert_close(estimate.flatten(), expected, atol=1e-6, rtol=1e-6)
    assert name == "k1" or bool((estimate >= 0).all())


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_have_the_kl_as_their_mean(estimator):
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * estimator(policy.log(), reference.log())).sum(), exact)


def test_only_k2_has_the_gradient_of_the_kl_when_sampled_from_the_policy():
    logits, reference = torch.tensor([0.5, -0.2, 0.1], requires_grad=True), torch.tensor([0.2, 0.5, 0.3]).log()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    sampled = {k: (logprobs.exp().detach() * k(logprobs, reference)).sum() for k in (k1, k2, k3)}
    gradient = {k: torch.autograd.grad(mean, logits, retain_graph=True)[0] for k, mean in sampled.items()}
    torch.testing.assert_close(gradient[k1], torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient[k2], exact)
    assert not torch.allclose(gradient[k3], exact, atol=1e-3)


def test_k3_keeps_small_distances_in_fp32():
    assert k3(torch.tensor([0.0]), torch.tensor([1e-4])).item() == pytest.approx(5e-9, rel=1e-2)


def test_k3_stays_finite_where_the_policy_gave_a_token_up():
    logprobs = torch.tensor([[-400.0]], requires_grad=True)
    estimate = k3(logprobs, torch.zeros(1, 1))
    estimate.sum().backward()
    assert estimate.item() == pytest.approx(math.exp(20) - 21)
    assert logprobs.grad.item() == 0.0


def test_scheduled_coefficient_goes_straight_from_start_to_end_and_stays():
    coefs = [scheduled_coef(step, start=0.01, end=0.1, steps=10) for step in (0, 5, 10, 99)]
    assert coefs == pytest.approx([0.01, 0.055, 0.1, 0.1])


def test_adapted_coefficient_moves_by_the_bounded_error():
    options = {"target": 0.1, "horizon": 1000, "num_trajectories": 100}
    assert adapted_coef(1.0, 0.1, **options) == 1.0
    assert adapted_coef(1.0, 0.11, **options) == pytest.approx(1.01)
    assert adapted_coef(1.0, 9.9, **options) == pytest.approx(1.02)
    assert adapted_coef(1.0, 0.0, **options) == pytest.approx(0.98)


def test_coefficients_refuse_what_they_cannot_follow():
    with pytest.raises(ValueError, match="kl=nan"):
        adapted_coef(1.0, math.nan, target=0.1, horizon=1000, num_trajectories=1)
    with pytest.raises(ValueError, match="steps=0"):
        scheduled_coef(0, start=0.0, end=1.0, steps=0)


def test_estimates_over_different_positions_are_refused():
    with pytest.raises(ValueError, match=r"ref_logprobs \(2, 1\)"):
        k1(torch.zeros(2, 3), torch.zeros(2, 1))
