"""Policy losses: by hand, against a second implementation with its gradient, independent of padding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import losses as oracle
from tests.oracles.columns import random_columns
from tests.oracles.gradients import assert_agrees, central_differences, summed
from verl.algorithms.aggregations import AGGREGATIONS, seq_mean_token_mean, token_mean
from verl.algorithms.losses import (
    POLICY_LOSSES,
    cispo,
    dppo,
    forward_kl_topk,
    gmpo,
    gspo,
    gspo_token,
    importance,
    policy_gradient,
    ppo_clip,
    sapo,
)
from verl.algorithms.registry import bind
from verl.config.fields import Choice

SEEDS = st.integers(0, 10_000)
LENGTH = {"seq_mean_token_sum_norm": {"length": 7}}
ABOVE_ZERO = st.floats(0.01, 3)
CLIP = {"clip_low": st.floats(0, 1), "clip_high": st.floats(0, 2)}
# What the second implementation reads, what it is called with at once, and the options to try; `held` is
# logprobs without gradient.
DPPO = {
    "divergence": st.sampled_from(["tv", "kl"]),
    "threshold_low": st.floats(0.01, 0.5),
    "threshold_high": st.floats(0.01, 0.5),
}
PLAIN = {
    "policy_gradient": ("logprobs advantages", "token", {}),
    "importance": ("logprobs old_logprobs advantages", "token", {}),
    "ppo_clip": (
        "logprobs old_logprobs advantages",
        "token",
        CLIP | {"dual_clip": st.none() | st.floats(1.01, 5)},
    ),
    "gspo": ("logprobs old_logprobs advantages", "row", CLIP),
    "gspo_token": ("logprobs held old_logprobs advantages", "row", CLIP),
    "gmpo": ("logprobs old_logprobs advantages", "row", {"clip": ABOVE_ZERO}),
    "cispo": (
        "logprobs held old_logprobs advantages",
        "token",
        CLIP | {"clip_low": st.none() | st.floats(0, 1)},
    ),
    "sapo": (
        "logprobs old_logprobs advantages",
        "token",
        {"tau_positive": ABOVE_ZERO, "tau_negative": ABOVE_ZERO},
    ),
    "dppo": ("logprobs held rollout_logprobs advantages", "token", DPPO),
}
EVERY_SUM = pytest.mark.parametrize("aggregation", AGGREGATIONS)
WITH_RATIO = [name for name in PLAIN if name != "policy_gradient"]
IN_MICRO_BATCHES = [
    name for name in POLICY_LOSSES if "minibatch_mask" not in bind(Choice(name=name), POLICY_LOSSES).columns
]


def learned_column(name):
    return "top_logprobs" if name == "forward_kl_topk" else "logprobs"


def called(function, ratios, advantages, **options):
    """Loss, monitors and gradient of a row with these ratios and advantages; old probabilities are 1."""
    logprobs = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    columns = [logprobs, torch.zeros_like(logprobs), torch.tensor([advantages], dtype=torch.float64)]
    columns += [torch.ones(1, len(ratios), dtype=torch.bool)] if function in (gspo, gspo_token, gmpo) else []
    loss, monitors = function(*columns, **options)
    loss.sum().backward()
    monitors = {
        name: [round(value, 5) for value in monitor[0].tolist()] for name, monitor in monitors.items()
    }
    return (
        [round(value, 5) for value in loss[0].tolist()],
        monitors,
        [round(value, 5) for value in logprobs.grad[0].tolist()],
    )


def scalar(function, ratio, advantage, **options):
    """Loss and monitors of one token."""
    loss, monitors, _ = called(function, [ratio], [advantage], **options)
    return loss[0], {name: value[0] for name, value in monitors.items()}


def test_every_loss_of_the_table_is_tried_here_or_with_the_minibatch():
    assert set(IN_MICRO_BATCHES) == {*PLAIN, "forward_kl_topk"}


def test_ppo_stops_rewarding_a_good_token_above_the_clip_and_a_bad_one_below_it():
    assert scalar(ppo_clip, 1.5, 2.0)[0] == -2.4
    assert scalar(ppo_clip, 0.5, 2.0)[0] == -1.0
    assert scalar(ppo_clip, 0.5, -2.0)[0] == 1.6
    assert scalar(ppo_clip, 1.5, -2.0)[0] == 3.0


def test_a_higher_upper_bound_leaves_more_of_a_good_token():
    assert scalar(ppo_clip, 1.5, 1.0, clip_high=0.28)[0] == -1.28
    assert scalar(ppo_clip, 0.5, -1.0, clip_low=0.3)[0] == 0.7


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    loss, monitors = scalar(ppo_clip, 9.0, -2.0, dual_clip=3.0)
    assert (loss, monitors["clip_share"], monitors["dual_clip_share"]) == (6.0, 0.0, 1.0)
    loss, monitors = scalar(ppo_clip, 9.0, 2.0, dual_clip=3.0)
    assert (loss, monitors["clip_share"], monitors["dual_clip_share"]) == (-2.4, 1.0, 0.0)


@given(SEEDS, st.floats(0, 1), st.floats(0.001, 2))
def test_dual_clip_above_the_upper_bound_is_the_two_sided_clip(seed, eps, above):
    c, delta = random_columns(seed), 1 + eps + above
    columns = [c[name] for name in ("logprobs", "old_logprobs", "advantages")]
    loss, _ = ppo_clip(*columns, clip_low=eps, clip_high=eps, dual_clip=delta)
    tokens = zip(*(column.flatten().tolist() for column in columns), strict=True)
    expected = torch.tensor([oracle.intellect2(*token, eps, delta) for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(loss.flatten(), expected, atol=1e-12, rtol=1e-12)


def test_ppo_reports_the_ratio_and_how_far_the_policy_moved():
    monitors = scalar(ppo_clip, 1.5, 2.0)[1]
    assert monitors == {"ratio": 1.5, "clip_share": 1.0, "approx_kl": round(0.5 - math.log(1.5), 5)}


def test_how_far_the_policy_moved_keeps_small_distances_in_fp32():
    monitors = importance(torch.tensor([[1e-4]]), torch.zeros(1, 1), torch.ones(1, 1))[1]
    assert monitors["approx_kl"].item() == pytest.approx(5e-9, rel=1e-2)


def test_policy_gradient_is_minus_advantage_times_logprob():
    loss, monitors = policy_gradient(torch.tensor([[-2.0]]), torch.tensor([[3.0]]))
    assert (loss.item(), monitors) == (6.0, {})


def test_importance_has_no_bound():
    assert called(importance, [9.0, 0.25], [2.0, -4.0])[::2] == ([-18.0, 1.0], [-18.0, 1.0])


def test_gspo_clips_the_geometric_mean_and_gives_its_loss_to_each_token():
    ratios = [math.exp(0.2), 1.0]
    loss, monitors, gradient = called(gspo, ratios, [1.0, 1.0], clip_high=0.05)
    assert (loss, monitors["clip_share"], gradient) == ([-1.05, -1.05], [1.0, 1.0], [0.0, 0.0])
    loss, monitors, gradient = called(gspo, ratios, [-1.0, -1.0], clip_high=0.05)
    assert (loss, monitors["clip_share"], gradient) == ([1.10517] * 2, [0.0, 0.0], [1.10517] * 2)
    assert monitors["ratio"] == [1.10517] * 2


def test_gspo_token_clips_by_the_sequence_and_weighs_by_the_token():
    loss, monitors, gradient = called(gspo_token, [math.exp(0.2), 1.0], [1.0, -1.0], clip_high=0.05)
    assert (loss, gradient, monitors["clip_share"]) == ([-1.05, 1.10517], [0.0, 1.10517], [1.0, 0.0])


def test_gmpo_clips_each_token_before_the_geometric_mean():
    ratios = [math.e, math.exp(-0.2)]
    loss, monitors, gradient = called(gmpo, ratios, [2.0, 2.0])
    assert (loss, monitors["clip_share"], gradient) == (
        [round(-2 * math.exp(0.1), 5)] * 2,
        [1.0, 0.0],
        [0.0, round(-2 * math.exp(0.1), 5)],
    )
    loss, monitors, _ = called(gmpo, ratios, [-2.0, -2.0])
    assert (loss, monitors["clip_share"]) == ([round(2 * math.exp(0.4), 5)] * 2, [0.0, 0.0])


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient():
    _, monitors, gradient = called(cispo, [9.0, 2.0, 0.1], [1.0, 1.0, -1.0])
    assert (gradient, monitors["clip_share"]) == ([-5.0, -2.0, 0.1], [1.0, 0.0, 0.0])
    _, monitors, gradient = called(cispo, [9.0, 2.0, 0.1], [1.0, 1.0, -1.0], clip_high=0.5, clip_low=0.2)
    assert (gradient, monitors["clip_share"]) == ([-1.5, -1.5, 0.8], [1.0, 1.0, 1.0])


def test_sapo_is_the_policy_gradient_at_the_old_policy_and_fades_around_it():
    loss, monitors, gradient = called(sapo, [1.0, 1.0], [3.0, -2.0], tau_positive=1.0, tau_negative=2.0)
    assert (loss, gradient, monitors["gate"]) == ([-6.0, 2.0], [-3.0, 2.0], [1.0, 1.0])
    sigmoid = 1 / (1 + math.exp(-4.0))
    loss, monitors, gradient = called(sapo, [3.0], [-1.0], tau_negative=2.0)
    gate = 4 * sigmoid * (1 - sigmoid)
    assert (loss, monitors["gate"], gradient) == (
        [round(2 * sigmoid, 5)],
        [round(gate, 5)],
        [round(3 * gate, 5)],
    )


@pytest.mark.parametrize(
    ("probability", "advantage", "masked"),
    [
        (0.8, 1.0, 1.0),
        (0.8, -1.0, 0.0),
        (0.3, -1.0, 1.0),
        (0.3, 1.0, 0.0),
        (0.65, 1.0, 0.0),
        (0.65, -1.0, 0.0),
    ],
)
def test_dppo_masks_tokens_that_would_leave_further(probability, advantage, masked):
    logprobs, sampler = torch.tensor([[math.log(probability)]]), torch.tensor([[math.log(0.55)]])
    loss, monitors = dppo(logprobs, sampler, torch.tensor([[advantage]]))
    assert monitors["clip_share"].item() == masked
    assert monitors["divergence"].item() == pytest.approx(abs(probability - 0.55), abs=1e-6)
    assert loss.item() == pytest.approx((masked - 1) * advantage * probability / 0.55)


def test_dppo_leaves_a_rare_token_that_ppo_would_clip():
    columns = torch.tensor([[0.02]]).log(), torch.tensor([[0.01]]).log(), torch.ones(1, 1)
    assert dppo(*columns)[0].item() == pytest.approx(-2.0)
    assert ppo_clip(*columns)[1]["clip_share"].item() == 1.0


def test_dppo_measures_the_kl_from_the_sampler_to_the_policy():
    _, monitors = dppo(
        torch.tensor([[0.8]]).log(), torch.tensor([[0.5]]).log(), torch.ones(1, 1), divergence="kl"
    )
    assert monitors["divergence"].item() == pytest.approx(
        0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-6
    )


def test_dppo_keeps_in_fp32_the_kl_of_tokens_that_are_nearly_certain():
    logprobs, sampler = torch.tensor([[-2e-6]]), torch.tensor([[-1e-5]])
    _, monitors = dppo(logprobs, sampler, torch.ones(1, 1), divergence="kl")
    p, q = (-math.expm1(x.item()) for x in (logprobs, sampler))
    assert monitors["divergence"].item() == pytest.approx(
        (1 - q) * math.log((1 - q) / (1 - p)) + q * math.log(q / p), rel=1e-3
    )
    assert (
        dppo(torch.zeros(1, 1), sampler, torch.ones(1, 1), divergence="kl")[1]["divergence"].isfinite().all()
    )


def test_forward_kl_is_zero_at_the_teacher_and_pulls_the_policy_to_it():
    teacher = torch.tensor([[[0.5, 0.25]]]).log()
    policy = torch.tensor([[[0.25, 0.5]]]).log().requires_grad_()
    loss, monitors = forward_kl_topk(policy, teacher)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.25 * math.log(2))
    torch.testing.assert_close(policy.grad, -teacher.exp())
    assert {name: value.item() for name, value in monitors.items()} == pytest.approx(
        {"teacher_mass": 0.75, "policy_mass": 0.75}
    )
    assert forward_kl_topk(teacher, teacher)[0].item() == 0.0


@given(SEEDS)
def test_forward_kl_and_its_gradient_agree_with_the_oracle(seed):
    c = random_columns(seed, rows=3, width=4)
    loss, _ = forward_kl_topk(c["top_logprobs"], c["teacher_top_logprobs"])
    teacher, weights = c["teacher_top_logprobs"].flatten(0, 1).tolist(), c["noise"].flatten().tolist()
    _, gradient = summed(c, c["noise"], "top_logprobs", POLICY_LOSSES, "forward_kl_topk")

    def plain(point):
        return [oracle.forward_kl_topk(point[3 * i : 3 * i + 3], q) for i, q in enumerate(teacher)]

    point = c["top_logprobs"].flatten().tolist()
    assert loss.flatten().tolist() == pytest.approx(plain(point), rel=1e-6, abs=1e-9)
    differences = central_differences(
        lambda moved: sum(w * x for w, x in zip(weights, plain(moved), strict=True)), point
    )
    assert gradient.flatten().tolist() == pytest.approx(differences, rel=1e-6, abs=1e-6)


def test_forward_kl_over_the_whole_vocabulary_is_the_kl_of_the_policy_from_the_teacher():
    generator = torch.Generator().manual_seed(0)
    policy, teacher = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(policy, teacher, reduction="none", log_target=True).sum(-1)
    loss, monitors = forward_kl_topk(policy, teacher)
    torch.testing.assert_close(loss, expected)
    assert bool((loss > 0).all()) and monitors["teacher_mass"].tolist() == [[pytest.approx(1.0)] * 5] * 3


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), seed=SEEDS)
def test_losses_and_their_gradients_agree_with_the_oracle(name, data, seed):
    reads, unit, options = PLAIN[name]
    options = data.draw(st.fixed_dictionaries(options))
    c = random_columns(seed, rows=3, width=4)
    # Probabilities below 1, as the KL between two coins needs them.
    c |= {column: c[column].clamp(max=-0.01) for column in ("logprobs", "rollout_logprobs")}
    weights = c["mask"] * (0.5 + c["noise"])
    loss, _ = bind(Choice(name=name, **options), POLICY_LOSSES)(c)
    _, gradient = summed(c, weights, "logprobs", POLICY_LOSSES, Choice(name=name, **options))
    columns = [(c | {"held": c["logprobs"]})[column] for column in reads.split()]
    assert_agrees(loss, gradient, weights, columns, c["mask"], partial(_plain, name, options), unit)


def _plain(name, options, *columns):
    return oracle.TABLE[name](*columns, **options)


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gspo_token", "gmpo", "dppo"])
@given(seed=SEEDS)
def test_clip_shares_mark_exactly_the_sampled_tokens_without_gradient(name, seed):
    c = random_columns(seed)
    loss, monitors = bind(Choice(name=name), POLICY_LOSSES)(c)
    _, gradient = summed(c, c["mask"], "logprobs", POLICY_LOSSES, name)
    assert torch.equal(monitors["clip_share"][c["mask"]] == 1, gradient[c["mask"]] == 0)


@given(SEEDS, st.floats(1.01, 2))
def test_clip_and_dual_clip_together_mark_the_tokens_without_gradient(seed, dual_clip):
    c = random_columns(seed)
    leaf = c["logprobs"].clone().requires_grad_()
    loss, monitors = ppo_clip(leaf, c["old_logprobs"], c["advantages"], dual_clip=dual_clip)
    loss.sum().backward()
    clipped = monitors["clip_share"] + monitors["dual_clip_share"]
    assert torch.equal(clipped == 1, (leaf.grad == 0) & (c["advantages"] != 0))


@pytest.mark.parametrize("name", IN_MICRO_BATCHES)
def test_monitors_are_detached_and_have_the_shape_of_the_loss(name):
    c = random_columns(3)
    for column in ("logprobs", "top_logprobs"):
        c[column] = c[column].requires_grad_()
    loss, monitors = bind(Choice(name=name), POLICY_LOSSES)(c)
    assert loss.requires_grad
    assert not any(monitor.requires_grad or monitor.shape != loss.shape for monitor in monitors.values())
    assert {"ratio", "approx_kl"} <= set(monitors) or name not in WITH_RATIO


@pytest.mark.parametrize("name", ["importance", "ppo_clip", "gspo_token", "cispo", "sapo", "dppo"])
@given(seed=SEEDS)
def test_on_policy_every_loss_of_tokens_has_the_gradient_of_the_policy_gradient(name, seed):
    c = random_columns(seed)
    c["old_logprobs"] = c["rollout_logprobs"] = c["logprobs"]
    weights = c["mask"] * c["noise"]
    _, plain = summed(c, weights, "logprobs", POLICY_LOSSES, "policy_gradient")
    torch.testing.assert_close(summed(c, weights, "logprobs", POLICY_LOSSES, name)[1], plain)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
@given(seed=SEEDS)
def test_on_policy_losses_of_sequences_have_that_gradient_under_the_mean_over_sequences(name, seed):
    c = random_columns(seed)
    c["old_logprobs"], c["advantages"] = c["logprobs"], c["rewards"][:, None].expand(6, 7)
    weights = seq_mean_token_mean(c["mask"]).double()
    _, plain = summed(c, weights, "logprobs", POLICY_LOSSES, "policy_gradient")
    torch.testing.assert_close(
        summed(c, weights, "logprobs", POLICY_LOSSES, name)[1], plain, rtol=1e-6, atol=1e-9
    )


@given(SEEDS)
def test_gspo_token_is_gspo_where_the_tokens_of_a_row_share_their_advantage(seed):
    c = random_columns(seed)
    c["advantages"] = c["rewards"][:, None].expand(6, 7)
    weights = seq_mean_token_mean(c["mask"]).double()
    by_row, by_token = (
        summed(c, weights, "logprobs", POLICY_LOSSES, name) for name in ("gspo", "gspo_token")
    )
    torch.testing.assert_close(by_token, by_row, rtol=1e-6, atol=1e-9)


def test_the_ratio_of_a_sequence_keeps_in_fp32_what_its_narrow_clip_compares():
    old_logprobs = torch.full((1, 3), -20.0)
    logprobs = old_logprobs + torch.tensor([[2**-13, 0.0, 0.0]])
    for function in (gspo, gspo_token):
        _, monitors = function(logprobs, old_logprobs, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
        assert (monitors["ratio"].double() - 1).tolist()[0] == pytest.approx(
            [math.expm1(2**-13 / 3)] * 3, rel=5e-3
        )


@pytest.mark.parametrize("name", WITH_RATIO)
def test_a_token_that_became_impossible_gives_a_finite_loss_and_gradient(name):
    old = torch.tensor([[0.0, -500.0], [-500.0, 0.0]])
    c = {
        "logprobs": torch.tensor([[-500.0, 0.0], [0.0, -500.0]]),
        "old_logprobs": old,
        "rollout_logprobs": old,
    }
    c |= {"advantages": torch.tensor([[1.0, -1.0], [1.0, -1.0]]), "mask": torch.ones(2, 2, dtype=torch.bool)}
    loss, gradient = summed(c, torch.ones(2, 2), "logprobs", POLICY_LOSSES, name)
    assert loss.isfinite() and gradient.isfinite().all()
    # A weight without gradient is all that is left of the ratio in these two.
    assert name in ("cispo", "gspo_token") or gradient.count_nonzero() == 0


@pytest.mark.parametrize("name", IN_MICRO_BATCHES)
@EVERY_SUM
@given(seed=SEEDS, first=st.integers(1, 5))
def test_loss_and_gradient_are_the_same_in_micro_batches(aggregation, name, seed, first):
    c, learned = random_columns(seed), learned_column(name)
    weights = bind(Choice(name=aggregation, **LENGTH.get(aggregation, {})), AGGREGATIONS)(c)
    whole, gradient = summed(c, weights, learned, POLICY_LOSSES, name)
    split = (slice(first), slice(first, None))
    parts = [
        summed({k: v[rows] for k, v in c.items()}, weights[rows], learned, POLICY_LOSSES, name)
        for rows in split
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@given(seed=SEEDS, padding=st.integers(1, 4))
def test_padding_and_masked_tokens_change_nothing_and_get_no_gradient(name, seed, padding):
    c, learned = random_columns(seed), learned_column(name)
    wide = {
        k: torch.nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, padding)) if v.shape[1:2] == (7,) else v
        for k, v in c.items()
    }
    for column in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "noise"):
        wide[column] = torch.where(wide["mask"], wide[column], -3.0)
    loss, gradient = summed(c, token_mean(c["mask"]), learned, POLICY_LOSSES, name)
    wide_loss, wide_gradient = summed(wide, token_mean(wide["mask"]), learned, POLICY_LOSSES, name)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient[:, :7], gradient)
    assert wide_gradient[~wide["mask"]].count_nonzero() == 0


@pytest.mark.parametrize("name", PLAIN)
@given(SEEDS, st.floats(0.1, 10))
def test_scaling_advantages_scales_the_loss_and_its_gradient_down_to_zero(name, seed, scale):
    c = random_columns(seed)
    weights = token_mean(c["mask"])
    loss, gradient = summed(c, weights, "logprobs", POLICY_LOSSES, name)
    scaled = summed(c | {"advantages": scale * c["advantages"]}, weights, "logprobs", POLICY_LOSSES, name)
    torch.testing.assert_close(scaled, (scale * loss, scale * gradient))
    loss, gradient = summed(c | {"advantages": 0 * c["advantages"]}, weights, "logprobs", POLICY_LOSSES, name)
    assert (loss.item(), gradient.count_nonzero()) == (0.0, 0)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        *(
            (ppo_clip, options)
            for options in (
                {"clip_low": 1.5},
                {"clip_high": -0.1},
                {"dual_clip": 1.0},
                {"clip_low": math.nan},
            )
        ),
        *(
            (function, options)
            for function in (gspo, gspo_token)
            for options in ({"clip_low": -0.1}, {"clip_high": -0.2})
        ),
        *((cispo, options) for options in ({"clip_low": 1.5}, {"clip_high": -0.1})),
        *((sapo, options) for options in ({"tau_positive": 0.0}, {"tau_negative": -1.0})),
        *(
            (dppo, options)
            for options in ({"threshold_low": 0.0}, {"threshold_high": -1.0}, {"divergence": "js"})
        ),
        (gmpo, {"clip": 0.0}),
    ],
)
def test_options_that_make_no_sense_are_refused(function, options):
    with pytest.raises(ValueError, match=f"need .* got .*{next(iter(options.values()))}"):
        scalar(function, 1.0, 1.0, **options)


def test_advantages_per_row_are_refused_where_they_would_broadcast():
    square, row, mask = torch.zeros(3, 3), torch.zeros(3), torch.ones(3, 3, dtype=torch.bool)
    for function in (ppo_clip, importance, cispo, sapo, dppo):
        with pytest.raises(ValueError, match=r"advantages \(3,\)"):
            function(square, square, row)
    for function in (gspo, gspo_token, gmpo):
        with pytest.raises(ValueError, match=r"advantages \(3,\)"):
            function(square, square, row, mask)
    with pytest.raises(ValueError, match=r"teacher_top_logprobs \(3, 3, 1\)"):
        forward_kl_topk(torch.zeros(3, 3, 2), torch.zeros(3, 3, 1))
