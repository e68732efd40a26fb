"""Losses on pairs and of the implicit process reward, and calibration, against a second implementation."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import preference as oracle
from tests.oracles.columns import random_columns
from verl.algorithms.preference_losses import (
    PAIR_LOSSES,
    REWARD_LOSSES,
    bradley_terry,
    calibration,
    dpo,
    ipo,
    outcome_cross_entropy,
    simpo,
)
from verl.algorithms.registry import bind
from verl.config.fields import Choice
from verl.data.columns import CHOSEN, readable_by

LOSSES = {**PAIR_LOSSES, **REWARD_LOSSES}
OPTIONS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.2},
    "simpo": {"beta": 2.5, "margin": 0.5},
    "bradley_terry": {"margin": 0.5, "center_coef": 0.01},
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)
SEEDS = given(seed=st.integers(0, 10_000))


def random_pairs(seed, pairs=5):
    """Every column of pairs, in fp64; the logprobs are those of answers of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    columns = {
        name: torch.randint(1, 30, (pairs,), generator=g) for name in ("chosen_tokens", "rejected_tokens")
    }
    for answer in ("chosen", "rejected"):
        noise = torch.randn(3, pairs, generator=g, dtype=torch.float64)
        columns[f"{answer}_logprobs"] = -columns[f"{answer}_tokens"] * noise[0].abs()
        columns[f"{answer}_ref_logprobs"] = columns[f"{answer}_logprobs"] + noise[1]
        columns[f"{answer}_rewards"] = noise[2]
    return columns


def pair(*values):
    """One column of one pair for each value."""
    return tuple(torch.tensor([value]) for value in values)


def numbers(loss, monitors):
    """The single pair of a result as Python floats."""
    return loss.item(), {name: monitor.item() for name, monitor in monitors.items()}


def test_dpo_of_one_pair_by_hand():
    loss, monitors = numbers(*dpo(*pair(-1.0, -5.0, -3.0, -4.0), beta=0.5))
    assert loss == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert monitors == {"chosen_reward": 1.0, "rejected_reward": -0.5, "margin": 1.5, "accuracy": 1.0}


def test_smoothed_labels_hold_a_margin_at_the_odds_of_the_labels():
    margin = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    loss, _ = dpo(margin, *pair(0.0, 0.0, 0.0), beta=1.0, label_smoothing=0.1)
    loss.sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_ipo_is_drawn_to_its_target_at_any_length():
    for tokens in (1, 10):
        loss, monitors = numbers(*ipo(*pair(2.0 * tokens, -0.5 * tokens, 0.0, 0.0, tokens, tokens), beta=0.2))
        assert loss == pytest.approx(0.0, abs=1e-6)
        assert monitors["margin"] == pytest.approx(0.5)
    assert ipo(*pair(0.0, 0.0, 0.0, 0.0, 4, 4), beta=0.2)[0].item() == pytest.approx(2.5**2)


def test_simpo_compares_means_of_tokens_and_wants_a_margin():
    loss, monitors = numbers(*simpo(*pair(-4.0, -3.0, 4, 2), beta=2.0, margin=0.25))
    assert loss == pytest.approx(math.log(1 + math.exp(-0.75)))
    assert monitors == {"chosen_reward": -2.0, "rejected_reward": -3.0, "margin": 1.0, "accuracy": 1.0}


def test_bradley_terry_by_hand():
    loss, monitors = numbers(*bradley_terry(*pair(2.0, 3.0), margin=0.5, center_coef=0.1))
    assert loss == pytest.approx(math.log(1 + math.exp(1.5)) + 2.5)
    assert monitors == {"chosen_reward": 2.0, "rejected_reward": 3.0, "margin": -1.0, "accuracy": 0.0}


def test_centering_leaves_the_difference_alone():
    rewards = [torch.tensor([r], requires_grad=True) for r in (3.0, 1.0)]
    free, centered = (bradley_terry(*rewards, center_coef=coef)[0].sum() for coef in (0.0, 0.1))
    pull = [grad.item() for grad in torch.autograd.grad(centered - free, rewards)]
    assert pull == pytest.approx([0.8, 0.8])


@EVERY_LOSS
def test_columns_and_options_follow_the_contract(name):
    function = bind(Choice(name=name), LOSSES, columns=readable_by("preference_loss", "reward_loss")).function
    doc = inspect.getdoc(function)
    assert function.__name__ == name and "http" in doc and "Args:" in doc and "Returns:" in doc
    parameters = inspect.signature(function).parameters.values()
    assert all(
        f"{p.name}:" in doc and (p.kind is not p.KEYWORD_ONLY or p.default is not p.empty) for p in parameters
    )


def test_the_columns_of_a_loss_are_those_of_its_model():
    assert set(random_pairs(0)) == set(readable_by("preference_loss", "reward_loss"))
    assert all(
        "rewards" not in column
        for name in PAIR_LOSSES
        for column in bind(Choice(name=name), PAIR_LOSSES).columns
    )
    assert bind(Choice(name="bradley_terry"), REWARD_LOSSES).columns == ("chosen_rewards", "rejected_rewards")
    assert "chosen_ref_logprobs" not in bind(Choice(name="simpo"), PAIR_LOSSES).columns


@EVERY_LOSS
@SEEDS
def test_losses_agree_with_the_oracle(name, seed):
    columns = random_pairs(seed)
    function = bind(Choice(name=name, **OPTIONS[name]), LOSSES)
    loss, monitors = function(columns)
    for i in range(5):
        expected, chosen, rejected = vars(oracle)[name](
            *(columns[c][i].item() for c in function.columns), **OPTIONS[name]
        )
        assert loss[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert monitors["chosen_reward"][i].item() == pytest.approx(chosen)
        assert monitors["rejected_reward"][i].item() == pytest.approx(rejected)
        assert monitors["margin"][i].item() == pytest.approx(chosen - rejected, abs=1e-9)
        assert monitors["accuracy"][i].item() == (chosen > rejected)


@EVERY_LOSS
def test_the_gradient_raises_the_chosen_answer_and_lowers_the_other(name):
    columns = {n: torch.zeros(3) if c.is_floating_point() else c[:3] for n, c in random_pairs(0).items()}
    answers = [
        n
        for n in bind(Choice(name=name), LOSSES).columns
        if n in ("chosen_logprobs", "rejected_logprobs") or n.endswith("rewards")
    ]
    columns |= {n: columns[n].clone().requires_grad_() for n in answers}
    loss, monitors = bind(Choice(name=name), LOSSES)(columns)
    chosen, rejected = torch.autograd.grad(loss.sum(), [columns[n] for n in answers])
    assert bool((chosen < 0).all() and (rejected > 0).all())
    assert not any(monitor.requires_grad for monitor in monitors.values())


@EVERY_LOSS
def test_fp32_is_near_fp64_and_inputs_stay_as_they_are(name):
    columns, function = random_pairs(3), bind(Choice(name=name), LOSSES)
    before = {n: column.clone() for n, column in columns.items()}
    loss, monitors = function({n: c.float() if c.is_floating_point() else c for n, c in columns.items()})
    expected_loss, expected = function(columns)
    assert loss.shape == (5,) and loss.dtype == torch.float32
    torch.testing.assert_close({"loss": loss.double()}, {"loss": expected_loss}, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close({n: m.double() for n, m in monitors.items()}, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(columns[n], before[n]) for n in columns)


@EVERY_LOSS
def test_pairs_do_not_see_each_other_and_none_is_no_special_case(name):
    columns, function = random_pairs(6), bind(Choice(name=name), LOSSES)
    order = torch.tensor([3, 1, 0])
    loss, monitors = function({n: column[order] for n, column in columns.items()})
    whole, whole_monitors = function(columns)
    torch.testing.assert_close(
        {**monitors, "loss": loss}, {n: m[order] for n, m in {**whole_monitors, "loss": whole}.items()}
    )
    assert function({n: column[:0] for n, column in columns.items()})[0].shape == (0,)


@EVERY_LOSS
def test_a_hopeless_pair_and_empty_answers_have_a_finite_loss_and_gradient(name):
    columns = {
        n: torch.zeros(2, dtype=c.dtype) if "tokens" in n else torch.zeros(2)
        for n, c in random_pairs(0).items()
    }
    columns |= {
        n: torch.tensor([-9000.0, 9000.0], requires_grad=True) for n in ("chosen_logprobs", "chosen_rewards")
    }
    loss, _ = bind(Choice(name=name), LOSSES)(columns)
    loss.sum().backward()
    gradients = [
        columns[n].grad for n in ("chosen_logprobs", "chosen_rewards") if columns[n].grad is not None
    ]
    assert len(gradients) == 1 and bool(loss.isfinite().all() and gradients[0].isfinite().all())


@EVERY_LOSS
def test_a_model_that_prefers_nothing_is_not_right(name):
    columns = {n: torch.ones_like(column) for n, column in random_pairs(0).items()}
    assert bind(Choice(name=name), LOSSES)(columns)[1]["accuracy"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[(name, {"beta": 0.0}, "beta > 0, got 0") for name in PAIR_LOSSES],
        *[("dpo", {"label_smoothing": share}, "label_smoothing < 0.5, got") for share in (-0.1, 0.5)],
        *[(name, {"margin": -1.0}, "margin >= 0, got -1") for name in ("simpo", "bradley_terry")],
        ("bradley_terry", {"center_coef": -0.1}, "center_coef >= 0, got -0.1"),
    ],
)
def test_options_out_of_bounds_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        bind(Choice(name=name, **options), LOSSES)(random_pairs(0))


@EVERY_LOSS
def test_columns_of_different_lengths_are_refused(name):
    columns, function = random_pairs(0), bind(Choice(name=name), LOSSES)
    for column in function.columns:
        with pytest.raises(ValueError, match=rf"{column} \(1,\)"):
            function({**columns, column: columns[column][:1]})


def test_outcome_cross_entropy_by_hand():
    prm_logprobs, mask = (
        torch.tensor([[-1.0, -9.0, -1.0], [-1.0, -1.0, -1.0]]),
        torch.tensor([[True, False, True]] * 2),
    )
    loss, monitors = outcome_cross_entropy(
        prm_logprobs, torch.full((2, 3), -2.0), torch.tensor([1.0, -1.0]), mask, beta=0.5
    )
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.e)])
    assert {name: monitor.tolist() for name, monitor in monitors.items()} == {
        "prm_reward": [1.0, 1.0],
        "prm_accuracy": [1.0, 0.0],
    }


@SEEDS
def test_outcome_cross_entropy_agrees_with_the_oracle(seed):
    c = random_columns(seed)
    columns = [c[name] for name in ("prm_logprobs", "ref_logprobs", "rewards", "mask")]
    loss, monitors = outcome_cross_entropy(*columns, beta=0.7)
    for b, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        result = (loss[b].item(), monitors["prm_reward"][b].item(), monitors["prm_accuracy"][b].item())
        assert result == pytest.approx(oracle.outcome_cross_entropy(*row, 0.7), rel=1e-6, abs=1e-9)


def test_outcome_cross_entropy_reads_known_columns_and_only_sampled_tokens():
    bound = bind(Choice(name="prm"), {"prm": outcome_cross_entropy}, columns=readable_by(*CHOSEN))
    c = random_columns(2)
    garbage = torch.where(c["mask"], c["prm_logprobs"], math.nan).requires_grad_()
    loss, _ = bound({**c, "prm_logprobs": garbage})
    torch.testing.assert_close(loss.detach(), bound(c)[0])
    loss.sum().backward()
    assert torch.equal(garbage.grad != 0, c["mask"])


def test_a_row_without_a_token_teaches_the_process_reward_nothing():
    prm_logprobs = torch.zeros(1, 2, requires_grad=True)
    loss, monitors = outcome_cross_entropy(
        prm_logprobs, torch.ones(1, 2), torch.tensor([1.0]), torch.zeros(1, 2, dtype=torch.bool)
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2)) and monitors["prm_accuracy"].item() == 0
    assert prm_logprobs.grad.tolist() == [[0.0, 0.0]] and not any(
        monitor.requires_grad for monitor in monitors.values()
    )


def test_the_process_reward_refuses_what_does_not_fit():
    columns = [random_columns(0)[name] for name in ("prm_logprobs", "ref_logprobs", "rewards", "mask")]
    with pytest.raises(ValueError, match="beta > 0, got 0"):
        outcome_cross_entropy(*columns, beta=0.0)
    with pytest.raises(ValueError, match=r"rewards \(6, 1\)"):
        outcome_cross_entropy(columns[0], columns[1], columns[2][:, None], columns[3])


def test_calibration_by_hand():
    probabilities, labels = torch.tensor([0.1, 0.2, 0.7, 0.9]), torch.tensor([False, True, True, True])
    scores = calibration(probabilities, labels, bins=2)
    assert scores["expected_calibration_error"] == pytest.approx((0.7 + 0.4) / 4)
    assert scores["brier_score"] == pytest.approx((0.01 + 0.64 + 0.09 + 0.01) / 4)


def test_a_bin_ends_with_its_upper_bound():
    scores = calibration(torch.tensor([0.5, 0.25]), torch.tensor([True, False]), bins=2)
    assert scores["expected_calibration_error"] == pytest.approx(0.25 / 2)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1
    ),
    st.integers(1, 15),
)
def test_calibration_agrees_with_the_oracle(pairs, bins):
    probabilities, labels = zip(*pairs, strict=True)
    scores = calibration(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels), bins=bins)
    assert scores == pytest.approx(oracle.calibration(probabilities, labels, bins), abs=1e-9)
    assert all(0 <= score <= 1 for score in scores.values())


def test_a_perfect_judge_and_nothing_to_judge_have_no_error():
    nothing = {"expected_calibration_error": 0.0, "brier_score": 0.0}
    assert calibration(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])) == nothing
    assert calibration(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == nothing


@pytest.mark.parametrize(
    "bad",
    [{"probabilities": [2.0]}, {"probabilities": [math.nan]}, {"labels": [2.0]}, {"labels": [0.0, 1.0]}],
)
def test_calibration_refuses_what_is_no_probability_or_label(bad):
    columns = {
        name: torch.tensor(values)
        for name, values in ({"probabilities": [0.5], "labels": [1.0]} | bad).items()
    }
    with pytest.raises(ValueError, match="need "):
        calibration(**columns)
    with pytest.raises(ValueError, match="bins >= 1, got 0"):
        calibration(torch.tensor([0.5]), torch.tensor([1.0]), bins=0)
