"""Corrections and their monitors: by hand, by their properties, and against a second implementation."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracles import correction as oracle
from tests.oracles import kl
from tests.oracles.columns import random_columns
from verl.algorithms.correction import (
    CORRECTIONS,
    bypass,
    geometric_rs,
    k3_rs,
    loglinear,
    off_policy_mask,
    recompute,
    seq_mis,
    seq_tis,
    token_mis,
    token_tis,
)
from verl.algorithms.mismatch import mismatch, weight_monitors
from verl.algorithms.registry import bind
from verl.config.fields import Choice

# The random differences are large, so every bound is wide enough to reject some rows and keep others.
OPTIONS = [
    ("token_tis", {"cap": 1.5}),
    ("token_tis", {"cap": None, "normalize": True}),
    ("seq_tis", {"cap": 3.0}),
    ("seq_tis", {"cap": None, "normalize": True}),
    ("token_mis", {"low": 0.6, "high": 1.8}),
    ("seq_mis", {"low": 0.5, "high": 2.0}),
    ("geometric_rs", {"low": 0.8, "high": 1.2, "cap": None}),
    ("geometric_rs", {"low": 0.8, "high": 1.2, "cap": 1.1}),
    ("k3_rs", {"threshold": 0.2, "cap": None}),
    ("k3_rs", {"threshold": 0.2, "cap": 1.1}),
]
WEIGHTED = sorted(CORRECTIONS.keys() - {"bypass", "recompute"})
EVERY_CORRECTION = pytest.mark.parametrize("name", CORRECTIONS)
EVERY_WEIGHT = pytest.mark.parametrize("name", WEIGHTED)
SEEDS = given(seed=st.integers(0, 10_000))


def ratios(*rows):
    """Trainer, rollout and mask for rows of ratios of the same length, all sampled."""
    trainer = torch.tensor(rows).log()
    return trainer, torch.zeros_like(trainer), torch.ones_like(trainer, dtype=torch.bool)


def column_like(columns, change):
    """Columns with the change made to those over tokens."""
    return {
        name: change(column) if column.shape == columns["mask"].shape else column
        for name, column in columns.items()
    }


def test_without_weights_the_ratio_divides_by_what_was_given():
    given_logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for correction in (bypass, recompute):
        old_logprobs, weights = correction(given_logprobs)
        assert torch.equal(old_logprobs, given_logprobs)
        assert weights is None and not old_logprobs.requires_grad


def test_truncated_weights_are_the_capped_ratio():
    trainer, rollout, mask = ratios([1.0, 9.0, 0.5])
    mask[0, 2] = False
    old_logprobs, weights = token_tis(trainer, rollout, mask)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 0.0]]))
    assert torch.equal(old_logprobs, trainer)
    torch.testing.assert_close(
        token_tis(trainer, rollout, mask, cap=None)[1], torch.tensor([[1.0, 9.0, 0.0]])
    )


def test_a_product_weighs_all_tokens_of_its_row():
    columns = ratios([1.5, 2.0], [0.5, 0.5])
    torch.testing.assert_close(seq_tis(*columns)[1], torch.tensor([[2.0, 2.0], [0.25, 0.25]]))
    torch.testing.assert_close(
        seq_mis(*columns, high=4.0, low=0.5)[1], torch.tensor([[3.0, 3.0], [0.0, 0.0]])
    )


def test_normalized_weights_of_tokens_have_mean_1_after_the_cap():
    trainer, rollout, mask = ratios([1.0, 9.0], [0.5, 7.0])
    mask[1, 1] = False
    expected = torch.tensor([[1.0, 2.0], [0.5, 0.0]]) / (3.5 / 3)
    torch.testing.assert_close(token_tis(trainer, rollout, mask, normalize=True)[1], expected)


def test_normalized_weights_of_rows_have_mean_1_whatever_their_length():
    trainer, rollout, mask = ratios([3.0, 1.0], [0.5, 7.0], [7.0, 7.0])
    mask[1, 1], mask[2] = False, False
    expected = torch.tensor([[2.0, 2.0], [0.5, 0.0], [0.0, 0.0]]) / 1.25
    torch.testing.assert_close(seq_tis(trainer, rollout, mask, normalize=True)[1], expected)


def test_bounds_of_a_rejection_are_accepted_themselves():
    torch.testing.assert_close(
        token_mis(*ratios([0.49, 0.5, 2.0, 2.01]))[1], torch.tensor([[0.0, 0.5, 2.0, 0.0]])
    )


def test_the_geometric_mean_rejects_rows_by_their_drift_and_not_by_their_length():
    columns = ratios([1.0005] * 100, [1.002] * 100, [0.998] * 100)
    assert geometric_rs(*columns)[1][:, 0].tolist() == [1.0, 0.0, 0.0]
    assert seq_mis(*columns, low=0.9, high=1.1)[1][:, 0].tolist() == pytest.approx(
        [1.0005**100, 0.0, 0.0], rel=1e-4
    )


def test_k3_counts_differences_that_cancel_in_the_geometric_mean():
    columns = ratios([2.0, 0.5], [1.1, 1 / 1.1])
    assert geometric_rs(*columns)[1].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    torch.testing.assert_close(k3_rs(*columns, cap=1.05)[1], torch.tensor([[0.0, 0.0], [1.05, 1 / 1.1]]))


def test_k3_keeps_small_differences_in_fp32():
    trainer, rollout, mask = ratios([1.0, 1.0])
    trainer = trainer + 1e-4
    assert k3_rs(trainer, rollout, mask, threshold=5.1e-9)[1].tolist() == [[1.0, 1.0]]
    assert k3_rs(trainer, rollout, mask, threshold=4.9e-9)[1].tolist() == [[0.0, 0.0]]


def test_loglinear_goes_the_share_of_the_versions_from_sampler_to_policy():
    logprobs, rollout = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-3.0, -3.0, -3.0]])
    staleness, mask = torch.tensor([[0, 1, 3]]), torch.tensor([[True, True, True]])
    old_logprobs, weights = loglinear(logprobs, rollout, staleness, mask, cap=4.0)
    torch.testing.assert_close(old_logprobs, torch.tensor([[-3.0, -2.0, -1.5]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.e, 4.0]]))


def test_the_off_policy_mask_rejects_only_bad_tokens_of_rows_that_became_unlikely():
    drift, mask = (
        torch.tensor([[0.5, 0.7], [0.5, 0.7], [0.5, 0.5], [-9.0, -9.0]]),
        torch.ones(4, 2, dtype=torch.bool),
    )
    rollout, advantages = -torch.ones(4, 2), torch.tensor([[-1.0], [1.0], [-1.0], [-1.0]]).expand(4, 2)
    old_logprobs, weights = off_policy_mask(rollout - drift, rollout, advantages, mask)
    assert torch.equal(old_logprobs, rollout)
    assert weights.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[
            (name, {"cap": 0.0}, "cap > 0, got 0")
            for name in ("token_tis", "seq_tis", "geometric_rs", "k3_rs", "loglinear")
        ],
        *[(name, {"low": 1.1}, "low=1.1") for name in ("token_mis", "seq_mis", "geometric_rs")],
        *[(name, {"low": 0.0}, "0 < low") for name in ("token_mis", "seq_mis", "geometric_rs")],
        *[(name, {"high": 0.9}, "high=0.9") for name in ("token_mis", "seq_mis", "geometric_rs")],
        *[(name, {"threshold": -0.1}, "threshold >= 0, got -0.1") for name in ("k3_rs", "off_policy_mask")],
    ],
)
def test_options_out_of_bounds_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        bind(Choice(name=name, **options), CORRECTIONS)(random_columns(0))


@EVERY_WEIGHT
def test_columns_of_different_shapes_are_refused(name):
    columns = random_columns(0)
    for column in inspect.signature(CORRECTIONS[name]).parameters.keys() & columns.keys():
        with pytest.raises(ValueError, match=r"same shape, got .*\(6, 1\)"):
            bind(Choice(name=name), CORRECTIONS)({**columns, column: columns[column][:, :1]})


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@SEEDS
def test_weights_agree_with_the_oracle(name, options, seed):
    c = random_columns(seed)
    old_logprobs, weights = bind(Choice(name=name, **options), CORRECTIONS)(c)
    mask = c["mask"].tolist()
    rows = oracle.sampled(c["trainer_logprobs"].tolist(), c["rollout_logprobs"].tolist(), mask)
    expected = oracle.spread(vars(oracle)[name](rows, **options), mask)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert torch.equal(old_logprobs, c["trainer_logprobs"])


@SEEDS
def test_loglinear_agrees_with_the_oracle(seed):
    c = random_columns(seed)
    old_logprobs, weights = loglinear(
        c["logprobs"], c["rollout_logprobs"], c["staleness"], c["mask"], cap=1.5
    )
    for b, t in c["mask"].nonzero().tolist():
        behave = 7 - c["staleness"][b, t].item()
        expected = oracle.loglinear(
            c["logprobs"][b, t].item(), c["rollout_logprobs"][b, t].item(), 7, behave, 1.5
        )
        assert (old_logprobs[b, t].item(), weights[b, t].item()) == pytest.approx(expected, rel=1e-6)


@SEEDS
def test_the_off_policy_mask_agrees_with_the_oracle(seed):
    c = random_columns(seed)
    columns = [c[name] for name in ("logprobs", "rollout_logprobs", "advantages", "mask")]
    expected = oracle.off_policy_mask(*(column.tolist() for column in columns), 0.1)
    assert off_policy_mask(*columns, threshold=0.1)[1].tolist() == expected


@EVERY_CORRECTION
def test_no_gradient_reaches_the_inputs(name):
    columns = {
        n: c.clone().requires_grad_() if c.is_floating_point() else c for n, c in random_columns(1).items()
    }
    assert not any(
        result is not None and result.requires_grad
        for result in bind(Choice(name=name), CORRECTIONS)(columns)
    )


@EVERY_WEIGHT
@SEEDS
def test_a_sampler_that_agrees_has_weight_1_and_loses_nothing(name, seed):
    c = random_columns(seed)
    c |= dict.fromkeys(("logprobs", "trainer_logprobs"), c["rollout_logprobs"])
    old_logprobs, weights = bind(Choice(name=name), CORRECTIONS)(c)
    assert torch.equal(weights, c["mask"].double()) and torch.equal(old_logprobs, c["rollout_logprobs"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {"threshold": 0.0}) for name in ("k3_rs", "off_policy_mask")],
        *[(name, {"low": 1.0, "high": 1.0}) for name in ("token_mis", "seq_mis", "geometric_rs")],
    ],
)
def test_the_tightest_bound_keeps_a_sampler_that_agrees(name, options):
    c = random_columns(1)
    c |= dict.fromkeys(("logprobs", "trainer_logprobs"), c["rollout_logprobs"])
    assert torch.equal(bind(Choice(name=name, **options), CORRECTIONS)(c)[1], c["mask"].double())


@EVERY_WEIGHT
@SEEDS
def test_the_order_of_rows_padding_and_masked_positions_do_not_matter(name, seed):
    c = random_columns(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    changed = column_like(
        c, lambda column: torch.where(c["mask"], column, math.nan if column.is_floating_point() else 9)
    )
    changed = column_like(
        {**changed, "mask": c["mask"]}, lambda column: torch.nn.functional.pad(column[order], (1, 2))
    )
    options = {"normalize": True} if name.endswith("_tis") else {}
    function = bind(Choice(name=name, **options), CORRECTIONS)
    old_logprobs, weights = function(c)
    other_old_logprobs, other_weights = function(changed)
    mask = changed["mask"]
    torch.testing.assert_close(other_weights, torch.nn.functional.pad(weights[order], (1, 2)))
    torch.testing.assert_close(other_old_logprobs[mask], old_logprobs[order][c["mask"][order]])


@EVERY_WEIGHT
def test_a_correction_that_is_called_in_every_update_treats_each_row_alone(name):
    c = random_columns(4)
    function = bind(Choice(name=name), CORRECTIONS)
    if "logprobs" not in function.columns:
        return
    parts = [function({n: column[b : b + 1] for n, column in c.items()}) for b in range(6)]
    for whole, rows in zip(function(c), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(rows))


@EVERY_WEIGHT
def test_a_broken_token_leaves_everything_finite(name):
    c = {
        n: column.float() if column.is_floating_point() else column for n, column in random_columns(2).items()
    }
    c |= {n: torch.full((6, 7), -500.0) for n in ("logprobs", "trainer_logprobs")}
    for rollout_logprobs in (torch.zeros(6, 7), torch.full((6, 7), -1000.0)):
        _, weights = bind(Choice(name=name), CORRECTIONS)({**c, "rollout_logprobs": rollout_logprobs})
        assert bool(weights.isfinite().all()) and 0 <= weight_monitors(weights, c["mask"])["ess_share"] <= 1


def test_logarithms_are_clamped_per_token_and_again_per_row():
    trainer, rollout, mask = torch.full((1, 3), 30.0), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    for correction in (token_tis, seq_tis):
        assert correction(trainer, rollout, mask, cap=None)[1].tolist() == [pytest.approx([math.exp(20)] * 3)]


@EVERY_WEIGHT
@pytest.mark.parametrize(("rows", "width"), [(6, 0), (0, 7), (6, 7)])
def test_empty_rows_and_batches_are_no_special_case(name, rows, width):
    columns = column_like(random_columns(0), lambda column: column[:rows, :width])
    columns["mask"] = torch.zeros(rows, width, dtype=torch.bool)
    options = {"normalize": True} if name.endswith("_tis") else {}
    _, weights = bind(Choice(name=name, **options), CORRECTIONS)(columns)
    assert torch.equal(weights, torch.zeros(rows, width, dtype=torch.float64))


@SEEDS
def test_monitors_agree_with_the_oracles(seed):
    c = random_columns(seed)
    assume(bool(c["mask"].any()))
    columns = (c["trainer_logprobs"], c["rollout_logprobs"], c["mask"])
    monitors = {name: value.item() for name, value in mismatch(*columns).items()}
    lists = [column.tolist() for column in columns]
    assert monitors == pytest.approx(kl.mismatch(*lists) | oracle.row_monitors(*lists), rel=1e-6, abs=1e-9)
    assert 0 < monitors["ess_share"] <= 1


@SEEDS
def test_monitors_of_weights_agree_with_the_oracle(seed):
    c = random_columns(seed)
    assume(bool(c["mask"].any()))
    _, weights = token_mis(c["trainer_logprobs"], c["rollout_logprobs"], c["mask"])
    monitors = {name: value.item() for name, value in weight_monitors(weights, c["mask"]).items()}
    assert monitors == pytest.approx(
        oracle.weight_monitors(weights.tolist(), c["mask"].tolist()), rel=1e-6, abs=1e-9
    )
    assert 0 < monitors["ess_share"] <= 1 or monitors["rejected_share"] == 1


def test_monitors_of_weights_by_hand():
    weights, mask = torch.tensor([[2.0, 0.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]])
    monitors = {name: value.item() for name, value in weight_monitors(weights, mask).items()}
    assert monitors == pytest.approx({"rejected_share": 1 / 3, "weight_mean": 1.0, "ess_share": 9 / (3 * 5)})


@pytest.mark.parametrize(
    ("weights", "sampled", "expected"),
    [(1.0, True, (0, 1, 1)), (0.0, True, (1, 0, 0)), (0.0, False, (0, 1, 1)), (math.nan, False, (0, 1, 1))],
)
def test_monitors_of_equal_weights(weights, sampled, expected):
    monitors = weight_monitors(torch.full((2, 3), weights), torch.full((2, 3), sampled))
    assert tuple(value.item() for value in monitors.values()) == expected


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
        "chi2_seq": 0.0,
        "ppl_ratio": 1.0,
        "max_abs_difference": 0.0,
        "ess_share": 1.0,
    }


def test_monitors_of_rows_by_hand():
    trainer, rollout, mask = ratios([2.0, 0.5, 4.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0])
    mask[1, 1:], mask[2] = False, False
    monitors = mismatch(trainer, rollout, mask)
    assert monitors["chi2_seq"].item() == pytest.approx((4**2 + 0.5**2) / 2 - 1)
    assert monitors["ppl_ratio"].item() == pytest.approx(((1 / 4) ** (1 / 3) * 2) ** 0.5)


def test_half_of_the_weight_on_one_of_many_tokens_shrinks_the_effective_sample():
    monitors = mismatch(*ratios([4.0, 1.0, 1.0, 1.0, 1.0]))
    assert monitors["ess_share"].item() == pytest.approx(64 / (5 * 20))


def test_hopeless_ratios_still_give_numbers_in_fp32():
    columns = torch.full((2, 3), -900.0), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    monitors = mismatch(*columns)
    assert all(bool(value.isfinite()) for value in monitors.values()) and monitors[
        "ess_share"
    ].item() == pytest.approx(1.0)
