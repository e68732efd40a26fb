"""KL estimators and coefficients by hand, against a second implementation, and as estimators."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import kl as oracle
from tests.oracles.columns import random_columns
from tests.oracles.gradients import assert_agrees
from verl.algorithms.kl import (
    KL_ESTIMATORS,
    adapted_coef,
    k1,
    k1_straight_through,
    k2,
    k3,
    k3_importance,
    k3_straight_through,
    scheduled_coef,
)
from verl.algorithms.registry import bind
from verl.config.fields import Choice

POLICY, SAMPLER, REFERENCE = ([0.5, -0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3])


def expected_gradient(estimator, *, sampler=None):
    """Gradients of the KL over three tokens, and of the mean estimate under the sampling policy.

    Both are with respect to the logits.
    """
    logits, reference = (
        torch.tensor(POLICY, dtype=torch.float64, requires_grad=True),
        torch.tensor(REFERENCE, dtype=torch.float64).log(),
    )
    logprobs = logits.log_softmax(0)
    sampled = logprobs.detach().exp() if sampler is None else torch.tensor(sampler, dtype=torch.float64)
    columns = (logprobs, reference) if sampler is None else (logprobs, sampled.log(), reference)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    (estimated,) = torch.autograd.grad((sampled * estimator(*columns)).sum(), logits)
    return exact, estimated


def test_estimates_of_one_token_by_hand():
    logprobs, ref_logprobs = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2))
    assert k2(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) - 0.5)


def test_straight_through_estimates_by_hand_have_the_gradient_of_k2():
    for estimator, value in ((k1_straight_through, math.log(2)), (k3_straight_through, math.log(2) - 0.5)):
        logprobs = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
        estimate = estimator(logprobs, torch.tensor([[0.25]], dtype=torch.float64).log())
        estimate.sum().backward()
        assert (estimate.item(), logprobs.grad.item()) == pytest.approx((value, math.log(2)))


def test_k3_importance_by_hand_weighs_by_the_ratio_and_differentiates_it():
    logprobs = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
    estimate = k3_importance(logprobs, torch.tensor([[0.125]]).log(), torch.tensor([[0.25]]).log())
    estimate.sum().backward()
    # r k3 = (p_ref - p - p log(p_ref / p)) / p_old, whose derivative by log p is -p log(p_ref / p) / p_old.
    assert estimate.item() == pytest.approx(4 * (math.log(2) - 0.5))
    assert logprobs.grad.item() == pytest.approx(4 * math.log(2))


def plain(name):
    """The columns that the second implementation reads, and itself."""
    if name == "k3_importance":
        return ("logprobs", "old_logprobs", "ref_logprobs"), oracle.k3_importance
    if name.endswith("straight_through"):
        return ("logprobs", "held", "ref_logprobs"), partial(oracle.straight_through, name[:2])
    return ("logprobs", "ref_logprobs"), partial(oracle.estimate, name)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@given(seed=st.integers(0, 10_000))
def test_estimates_and_their_gradients_agree_with_the_oracle(name, seed):
    c = random_columns(seed, rows=3, width=4)
    reads, function = plain(name)
    weights = c["mask"] * c["noise"]
    estimate = bind(Choice(name=name), KL_ESTIMATORS)(c)
    leaf = c["logprobs"].clone().requires_grad_()
    (bind(Choice(name=name), KL_ESTIMATORS)(c | {"logprobs": leaf}) * weights).sum().backward()
    columns = [(c | {"held": c["logprobs"]})[column] for column in reads]
    assert_agrees(estimate, leaf.grad, weights, columns, c["mask"], function, "token")
    assert name in ("k1", "k1_straight_through") or bool((estimate >= 0).all())


@pytest.mark.parametrize("estimator", [k1, k3, k1_straight_through, k3_straight_through])
def test_k1_and_k3_have_the_kl_as_their_mean(estimator):
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * estimator(policy.log(), reference.log())).sum(), exact)


def test_k3_importance_has_the_kl_as_its_mean_whoever_sampled():
    policy, sampler, reference = (
        torch.tensor(values) for values in ([0.7, 0.2, 0.1], SAMPLER, [0.3, 0.3, 0.4])
    )
    exact = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close(
        (sampler * k3_importance(policy.log(), sampler.log(), reference.log())).sum(), exact
    )


@pytest.mark.parametrize("estimator", [k2, k1_straight_through, k3_straight_through])
def test_the_gradient_of_k2_is_that_of_the_kl_when_sampled_from_the_policy(estimator):
    exact, estimated = expected_gradient(estimator)
    torch.testing.assert_close(estimated, exact)


def test_k1_has_no_expected_gradient_and_k3_another_one():
    exact, of_k1 = expected_gradient(k1)
    torch.testing.assert_close(of_k1, torch.zeros_like(exact), atol=1e-12, rtol=0)
    assert not torch.allclose(expected_gradient(k3)[1], exact, atol=1e-3)


def test_k3_importance_has_the_gradient_of_the_kl_when_another_policy_sampled():
    exact, estimated = expected_gradient(k3_importance, sampler=SAMPLER)
    torch.testing.assert_close(estimated, exact)
    _, without_the_ratio = expected_gradient(
        lambda logprobs, _, ref_logprobs: k3(logprobs, ref_logprobs), sampler=SAMPLER
    )
    assert not torch.allclose(without_the_ratio, exact, atol=1e-3)


def test_k3_keeps_small_distances_in_fp32():
    assert k3(torch.tensor([0.0]), torch.tensor([1e-4])).item() == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize("estimator", [k3, k3_straight_through])
def test_k3_stays_finite_where_the_policy_gave_a_token_up(estimator):
    logprobs = torch.tensor([[-400.0]], requires_grad=True)
    estimate = estimator(logprobs, torch.zeros(1, 1))
    estimate.sum().backward()
    assert estimate.item() == pytest.approx(math.exp(20) - 21)
    assert logprobs.grad.item() == (0.0 if estimator is k3 else -400.0)


def test_k3_importance_stays_finite_where_the_policy_gave_a_token_up():
    logprobs = torch.tensor([[-400.0, 0.0]], requires_grad=True)
    estimate = k3_importance(logprobs, torch.tensor([[0.0, -400.0]]), torch.zeros(1, 2))
    estimate.sum().backward()
    assert estimate.tolist()[0] == pytest.approx([1 - 21 * math.exp(-20), 0.0])
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


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
    with pytest.raises(ValueError, match=r"old_logprobs \(2, 1\)"):
        k3_importance(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3))
