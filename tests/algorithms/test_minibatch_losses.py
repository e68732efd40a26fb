"""Losses over whole minibatches: by hand, against a second implementation, and by their invariants."""

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
from verl.algorithms.aggregations import seq_mean_token_mean
from verl.algorithms.losses import POLICY_LOSSES, ppo_clip
from verl.algorithms.minibatch_losses import clip_cov, kl_cov, online_dpo
from verl.algorithms.preference_losses import dpo
from verl.algorithms.registry import bind
from verl.config.fields import Choice

SEEDS = st.integers(0, 10_000)
NAMES = ["clip_cov", "kl_cov", "online_dpo"]
SHARE = st.floats(1e-4, 1)
CLIP_COV = {
    "share": SHARE,
    "cov_low": st.floats(-1, 0.5),
    "cov_high": st.floats(0.6, 3),
    "clip_low": st.floats(0, 1),
}
PLAIN = {
    "clip_cov": ("logprobs held old_logprobs advantages noise", CLIP_COV | {"clip_high": st.floats(0, 2)}),
    "kl_cov": ("logprobs held old_logprobs advantages", {"share": SHARE, "kl_coef": st.floats(0, 3)}),
}
# Two rows of two tokens: mean logprob -2.5, mean advantage 0.5, covariances 0.75, 0.25, 2.25 and 0.75; the
# third is masked.
LOGPROBS = torch.tensor([[-1.0, -3.0, 9.0], [-4.0, -2.0, 9.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 0.0, 9.0], [-1.0, 2.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, True, False]])
OLD = LOGPROBS - torch.tensor([[2.0, 1.0, 1.0], [0.5, 0.25, 1.0]], dtype=torch.float64).log()


def covariance(name, **options):
    """Loss, gradient and monitors of the four tokens, in order, under a share that a test gives."""
    noise = torch.tensor([[0.9, 0.5, 0.0], [0.1, 0.2, 0.0]])
    columns = {
        "logprobs": LOGPROBS,
        "old_logprobs": OLD,
        "advantages": ADVANTAGES,
        "minibatch_mask": MASK,
        "noise": noise,
    }
    choice = Choice(name=name, **options)
    loss, monitors = bind(choice, POLICY_LOSSES)(columns)
    _, gradient = summed(columns, MASK.double(), "logprobs", POLICY_LOSSES, choice)
    return (
        loss[MASK].tolist(),
        gradient[MASK].tolist(),
        {name: monitor[MASK].tolist() for name, monitor in monitors.items()},
    )


def pairs(logprobs, rewards, group_ids, **options):
    """Loss and monitors per row, with one token in each row and a reference of 0."""
    column = torch.tensor(logprobs, dtype=torch.float64)[:, None]
    mask = torch.ones_like(column, dtype=torch.bool)
    loss, monitors = online_dpo(
        column, torch.zeros_like(column), torch.tensor(rewards), torch.tensor(group_ids), mask, **options
    )
    return loss[:, 0].tolist(), {name: monitor[:, 0].tolist() for name, monitor in monitors.items()}


def test_covariances_by_hand():
    assert oracle.covariances(LOGPROBS[MASK].tolist(), ADVANTAGES[MASK].tolist()) == [0.75, 0.25, 2.25, 0.75]


def test_kl_cov_penalizes_the_tokens_of_the_largest_covariance_only():
    loss, gradient, monitors = covariance("kl_cov", share=0.25, kl_coef=3.0)
    assert monitors["cov_share"] == [0.0, 0.0, 1.0, 0.0]
    assert loss == pytest.approx([-2.0, 0.0, 0.5 + 3 * math.log(2), -0.5])
    assert gradient == pytest.approx([-2.0, 0.0, 0.5 - 3.0, -0.5])


def test_kl_cov_takes_at_least_one_token_and_all_at_a_share_of_one():
    assert covariance("kl_cov", share=1e-9)[2]["cov_share"] == [0.0, 0.0, 1.0, 0.0]
    assert covariance("kl_cov", share=1.0)[2]["cov_share"] == [1.0] * 4


def test_clip_cov_drops_the_gradient_of_the_eligible_token_with_the_smallest_noise():
    loss, gradient, monitors = covariance("clip_cov", share=0.25, cov_low=0.5, cov_high=2.0)
    assert monitors["cov_share"] == [0.0, 0.0, 0.0, 1.0]
    assert (loss, gradient) == (pytest.approx([-2.0, 0.0, 0.5, -0.5]), pytest.approx([-2.0, 0.0, 0.5, 0.0]))


def test_clip_cov_counts_its_share_of_all_sampled_tokens_and_takes_no_other_than_eligible_ones():
    assert covariance("clip_cov", share=0.5, cov_low=0.5, cov_high=5.0)[2]["cov_share"] == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]
    assert covariance("clip_cov", share=1.0, cov_low=0.5, cov_high=2.0)[2]["cov_share"] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    assert covariance("clip_cov", share=1e-9, cov_low=0.5, cov_high=2.0)[2]["cov_share"] == [
        0.0,
        0.0,
        0.0,
        1.0,
    ]
    assert covariance("clip_cov", share=1.0, cov_low=3.0, cov_high=5.0)[2]["cov_share"] == [0.0] * 4


def test_a_covariance_on_a_bound_is_not_between_the_bounds():
    assert covariance("clip_cov", share=1.0, cov_low=0.25, cov_high=2.25)[2]["cov_share"] == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]


def test_clip_cov_clips_the_ratio_too():
    loss, gradient, monitors = covariance("clip_cov", cov_low=4.0, clip_low=0.2, clip_high=0.5)
    assert monitors["clip_share"] == [1.0, 0.0, 1.0, 0.0]
    assert (loss, gradient) == (pytest.approx([-1.5, 0.0, 0.8, -0.5]), pytest.approx([0.0, 0.0, 0.0, -0.5]))


@given(SEEDS)
def test_without_an_eligible_token_clip_cov_is_ppo_clip(seed):
    c = random_columns(seed)
    columns = [c[name] for name in ("logprobs", "old_logprobs", "advantages")]
    loss, monitors = clip_cov(
        *columns, c["mask"], c["noise"], cov_low=1e6, cov_high=2e6, clip_low=0.2, clip_high=0.3
    )
    expected, of_ppo = ppo_clip(*columns, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(
        (loss, monitors["clip_share"]), (expected, of_ppo["clip_share"]), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data(), seed=SEEDS)
def test_covariance_losses_and_their_gradients_agree_with_the_oracle(name, data, seed):
    reads, options = PLAIN[name]
    options = data.draw(st.fixed_dictionaries(options))
    c = random_columns(seed, rows=3, width=4)
    weights = c["mask"] * (0.5 + c["noise"])
    choice = Choice(name=name, **options)
    loss, _ = bind(choice, POLICY_LOSSES)(c)
    _, gradient = summed(c, weights, "logprobs", POLICY_LOSSES, choice)
    columns = [(c | {"held": c["logprobs"]})[column] for column in reads.split()]
    assert_agrees(loss, gradient, weights, columns, c["mask"], partial(_plain, name, options), "minibatch")


def _plain(name, options, *columns):
    return oracle.TABLE[name](*columns, **options)


@given(SEEDS)
def test_kl_cov_without_coefficient_is_the_importance_loss(seed):
    c = random_columns(seed)
    free, plain = (
        summed(c, c["mask"], "logprobs", POLICY_LOSSES, choice)
        for choice in (Choice(name="kl_cov", share=0.5, kl_coef=0.0), "importance")
    )
    torch.testing.assert_close(free, plain)


@given(SEEDS)
def test_on_policy_kl_cov_has_the_gradient_of_the_policy_gradient(seed):
    c = random_columns(seed)
    c["old_logprobs"] = c["logprobs"]
    weights = c["mask"] * c["noise"]
    _, plain = summed(c, weights, "logprobs", POLICY_LOSSES, "policy_gradient")
    choice = Choice(name="kl_cov", share=0.5, kl_coef=2.0)
    torch.testing.assert_close(summed(c, weights, "logprobs", POLICY_LOSSES, choice)[1], plain)


@given(SEEDS, st.floats(0.01, 1))
def test_clip_cov_chooses_its_share_or_all_that_are_eligible_and_takes_their_gradient_alone(seed, share):
    c = random_columns(seed)
    columns, weights = (
        [c[name] for name in ("logprobs", "old_logprobs", "advantages", "mask", "noise")],
        c["mask"] * (0.5 + c["noise"]),
    )
    options = {"cov_low": 0.1, "cov_high": 1.0, "clip_low": 0.2, "clip_high": 0.2}
    chosen = clip_cov(*columns, share=share, **options)[1]["cov_share"] == 1
    eligible = clip_cov(*columns, share=1.0, **options)[1]["cov_share"] == 1
    assert int(chosen.sum()) == min(max(1, int(share * int(c["mask"].sum()))), int(eligible.sum()))
    assert bool((chosen <= eligible).all()) and bool((eligible <= c["mask"]).all())
    _, gradient = summed(
        c, weights, "logprobs", POLICY_LOSSES, Choice(name="clip_cov", share=share, **options)
    )
    _, of_ppo = summed(
        c, weights, "logprobs", POLICY_LOSSES, Choice(name="ppo_clip", clip_low=0.2, clip_high=0.2)
    )
    torch.testing.assert_close(gradient, torch.where(chosen, 0.0, of_ppo))


@given(SEEDS)
def test_tokens_without_advantage_have_no_gradient_in_clip_cov(seed):
    c = random_columns(seed)
    c["advantages"] = 0 * c["advantages"]
    assert summed(c, c["mask"], "logprobs", POLICY_LOSSES, "clip_cov")[1].count_nonzero() == 0


@given(SEEDS)
def test_equal_advantages_have_no_covariance_to_choose_by(seed):
    c = random_columns(seed)
    c["advantages"] = torch.full_like(c["advantages"], 0.3)
    assert bind(Choice(name="clip_cov", share=1.0), POLICY_LOSSES)(c)[1]["cov_share"].count_nonzero() == 0


def test_online_dpo_pairs_the_best_with_the_worst_answer_of_each_prompt():
    loss, monitors = pairs(
        [-1.0, -2.0, -4.0, -1.0, -3.0], [0.5, 1.0, 0.0, 0.0, 1.0], [7, 7, 7, 3, 3], beta=0.5
    )
    first, second = math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))
    assert loss == pytest.approx([0.0, first, first, second, second])
    assert monitors["pair_share"] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert monitors["pair_margin"] == pytest.approx([0.0, 1.0, 1.0, -1.0, -1.0])


def test_online_dpo_has_no_pair_in_ties_and_in_groups_of_one():
    loss, monitors = pairs([-1.0, -2.0, -4.0], [1.0, 1.0, 0.0], [0, 0, 1])
    assert (loss, monitors["pair_share"], monitors["pair_margin"]) == ([0.0] * 3, [0.0] * 3, [0.0] * 3)


def test_online_dpo_takes_the_first_row_of_equal_rewards():
    assert pairs([-1.0] * 4, [1.0, 0.0, 1.0, 0.0], [0] * 4)[1]["pair_share"] == [1.0, 1.0, 0.0, 0.0]


def test_label_smoothing_believes_the_other_order_in_part():
    loss, _ = pairs([-1.0, -3.0], [1.0, 0.0], [0, 0], beta=1.0, label_smoothing=0.25)
    assert loss == pytest.approx([0.75 * math.log1p(math.exp(-2.0)) + 0.25 * math.log1p(math.exp(2.0))] * 2)


def test_a_row_without_sampled_tokens_is_in_no_pair():
    logprobs, mask = (
        torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]),
        torch.tensor([[True, True], [True, False], [False, False]]),
    )
    _, monitors = online_dpo(
        logprobs,
        torch.zeros(3, 2),
        torch.tensor([1.0, 0.5, 0.0]),
        torch.zeros(3, dtype=torch.int64),
        mask,
        beta=1.0,
    )
    assert monitors["pair_share"].tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert monitors["pair_margin"].tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@given(SEEDS, st.floats(0.01, 3), st.floats(0, 0.49))
def test_online_dpo_and_its_gradient_agree_with_the_oracle(seed, beta, label_smoothing):
    c = random_columns(seed, rows=4, width=3)
    choice = Choice(name="online_dpo", beta=beta, label_smoothing=label_smoothing)
    weights = seq_mean_token_mean(c["mask"]).double()
    mask, reference = c["mask"].tolist(), c["ref_logprobs"].tolist()

    def plain(point):
        rows = [[(point[3 * b + t], reference[b][t]) for t in range(3) if mask[b][t]] for b in range(4)]
        columns = [([p for p, _ in row], [q for _, q in row]) for row in rows]
        return oracle.online_dpo(list(_with_prompts(columns, c)), beta, label_smoothing)

    def total(point):
        """Each row's loss over the number of rows, as the mean over sequences has it."""
        used = max(1, sum(any(row) for row in mask))
        return sum(value for value, row in zip(plain(point), mask, strict=True) if any(row)) / used

    point = c["logprobs"].flatten().tolist()
    loss, _ = bind(choice, POLICY_LOSSES)(c)
    assert loss[:, 0].tolist() == pytest.approx(plain(point), rel=1e-6, abs=1e-9)
    found, gradient = summed(c, weights, "logprobs", POLICY_LOSSES, choice)
    assert found.item() == pytest.approx(total(point), rel=1e-6, abs=1e-9)
    assert gradient.flatten().tolist() == pytest.approx(central_differences(total, point), rel=1e-5, abs=1e-7)


def _with_prompts(columns, c):
    rewards, groups = c["rewards"].tolist(), c["group_ids"].tolist()
    return ((*pair, reward, group) for pair, reward, group in zip(columns, rewards, groups, strict=True))


@given(SEEDS, st.floats(0.01, 3), st.floats(0, 0.4))
def test_online_dpo_is_dpo_on_the_sums_of_the_two_answers(seed, beta, label_smoothing):
    c = random_columns(seed, rows=2)
    c |= {
        "group_ids": torch.zeros(2, dtype=torch.int64),
        "minibatch_mask": torch.arange(7) < torch.tensor([[3], [7]]),
    }
    best, worst = c["rewards"].argmax(), c["rewards"].argmin()
    sums = {name: (c[name] * c["minibatch_mask"]).sum(1) for name in ("logprobs", "ref_logprobs")}
    answers = [sums[name][row] for name in ("logprobs", "ref_logprobs") for row in (best, worst)]
    expected, of_dpo = dpo(*answers, beta=beta, label_smoothing=label_smoothing)
    loss, monitors = bind(
        Choice(name="online_dpo", beta=beta, label_smoothing=label_smoothing), POLICY_LOSSES
    )(c)
    torch.testing.assert_close(loss, expected.expand(2, 7))
    torch.testing.assert_close(monitors["pair_margin"], of_dpo["margin"].expand(2, 7))


@given(SEEDS)
def test_a_prompt_does_not_move_the_loss_of_another(seed):
    c = random_columns(seed)
    other = c["group_ids"] != c["group_ids"][0]
    moved = c | {
        name: torch.where(other.view(-1, *[1] * (c[name].ndim - 1)), 3 - 2 * c[name], c[name])
        for name in ("logprobs", "rewards")
    }
    choice = Choice(name="online_dpo")
    for before, after in zip(
        *(summed(x, x["mask"], "logprobs", POLICY_LOSSES, choice)[1:] for x in (c, moved)), strict=True
    ):
        torch.testing.assert_close(after[~other], before[~other])
    torch.testing.assert_close(*(bind(choice, POLICY_LOSSES)(x)[0][~other] for x in (c, moved)))


def test_with_two_answers_per_prompt_the_mean_over_sequences_is_the_mean_over_pairs():
    c = random_columns(11, rows=6, width=7)
    c |= {
        "group_ids": torch.tensor([0, 1, 2, 0, 1, 2]),
        "minibatch_mask": torch.arange(7) < torch.tensor([[1], [2], [3], [4], [5], [7]]),
    }
    loss, monitors = bind(Choice(name="online_dpo"), POLICY_LOSSES)(c)
    margins = monitors["pair_margin"][:3, 0]
    whole = (loss * seq_mean_token_mean(c["minibatch_mask"])).sum()
    torch.testing.assert_close(whole, -torch.nn.functional.logsigmoid(margins).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_shuffling_rows_shuffles_losses_and_gradients(name, seed):
    c, order = random_columns(seed), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    choice = Choice(name=name, **({} if name == "online_dpo" else {"share": 0.3}))
    loss, _ = bind(choice, POLICY_LOSSES)(c)
    shuffled = {key: column[order] for key, column in c.items()}
    torch.testing.assert_close(
        bind(choice, POLICY_LOSSES)(shuffled)[0][c["mask"][order]], loss[order][c["mask"][order]]
    )
    _, gradient = summed(c, c["mask"], "logprobs", POLICY_LOSSES, choice)
    torch.testing.assert_close(
        summed(shuffled, shuffled["mask"], "logprobs", POLICY_LOSSES, choice)[1], gradient[order]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 2])
def test_a_minibatch_without_sampled_tokens_has_no_loss_to_learn_from(name, rows):
    c = {key: column[:rows] for key, column in random_columns(2).items()}
    c["mask"] = c["minibatch_mask"] = torch.zeros_like(c["mask"])
    loss, monitors = bind(Choice(name=name), POLICY_LOSSES)(c)
    assert loss.isfinite().all() and all(monitor.isfinite().all() for monitor in monitors.values())
    assert all(
        monitors[share].count_nonzero() == 0 for share in ("cov_share", "pair_share") if share in monitors
    )


@pytest.mark.parametrize("name", NAMES)
def test_monitors_are_detached_and_have_the_shape_of_the_loss(name):
    c = random_columns(3)
    c["logprobs"] = c["logprobs"].requires_grad_()
    loss, monitors = bind(Choice(name=name), POLICY_LOSSES)(c)
    assert loss.requires_grad
    assert not any(monitor.requires_grad or monitor.shape != loss.shape for monitor in monitors.values())
    assert {"ratio", "approx_kl"} <= set(monitors) or name == "online_dpo"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            ("clip_cov", options)
            for options in (
                {"share": 0.0},
                {"share": 1.5},
                {"cov_low": 5.0},
                {"clip_low": 1.5},
                {"clip_high": -0.1},
            )
        ),
        *(("kl_cov", options) for options in ({"share": 0.0}, {"share": math.nan}, {"kl_coef": -1.0})),
        *(
            ("online_dpo", options)
            for options in ({"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1})
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options):
    with pytest.raises(ValueError, match=f"need .* got .*{next(iter(options.values()))}"):
        bind(Choice(name=name, **options), POLICY_LOSSES)(random_columns(0))


def test_columns_of_other_rows_are_refused():
    column, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"noise \(2, 1\)"):
        clip_cov(column, column, column, mask, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"advantages \(3,\)"):
        kl_cov(column, column, torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"rewards \(3,\)"):
        online_dpo(column, column, torch.zeros(3), torch.zeros(2, dtype=torch.int64), mask)
