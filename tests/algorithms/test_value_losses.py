"""Losses of the critic: by hand, against a second implementation, independent of padding and split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import losses as oracle
from tests.oracles.columns import random_columns
from tests.oracles.gradients import assert_agrees, summed
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.value_losses import VALUE_LOSSES, value_clip, value_mse
from verl.config.fields import Choice

SEEDS = st.integers(0, 10_000)
LEARNED = {"value_clip": "new_values", "value_mse": "new_values", "outcome_cross_entropy": "prm_logprobs"}
EVERY_LOSS = pytest.mark.parametrize("name", VALUE_LOSSES)


def weighed(c, name):
    """Weights of the tokens, or of the rows in the first place for a loss of whole rows."""
    if LEARNED[name] == "new_values":
        return AGGREGATIONS["token_mean"](c["mask"])
    return (c["mask"].any(1) / c["mask"].any(1).sum().clamp(min=1))[:, None].expand(c["mask"].shape)


def test_value_clip_takes_the_worse_of_moved_and_clipped_value():
    loss, monitors = value_clip(
        torch.tensor([[2.0, 2.0, 0.25]]), torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 1.0]])
    )
    assert loss.tolist() == [[1.125, 2.0, 0.28125]]
    assert monitors["value_clip_share"].tolist() == [[1.0, 0.0, 0.0]]


@given(SEEDS, st.floats(0.01, 3))
def test_value_clip_and_its_gradient_agree_with_the_oracle_and_a_wide_one_with_the_squared_error(seed, clip):
    c = random_columns(seed, rows=3, width=4)
    columns = [c[name] for name in ("new_values", "values", "returns")]
    loss, _ = value_clip(*columns, clip=clip)
    _, gradient = summed(c, c["mask"], "new_values", VALUE_LOSSES, Choice(name="value_clip", clip=clip))
    assert_agrees(
        loss,
        gradient,
        c["mask"].double(),
        columns,
        c["mask"],
        lambda *token: oracle.value_clip(*token, clip),
        "token",
    )
    torch.testing.assert_close(value_clip(*columns, clip=1e6)[0], value_mse(c["new_values"], c["returns"])[0])


@EVERY_LOSS
@given(seed=SEEDS, first=st.integers(1, 5))
def test_loss_and_gradient_are_the_same_in_micro_batches(name, seed, first):
    c, learned = random_columns(seed), LEARNED[name]
    weights = weighed(c, name)
    whole, gradient = summed(c, weights, learned, VALUE_LOSSES, name)
    split = (slice(first), slice(first, None))
    parts = [
        summed({k: v[rows] for k, v in c.items()}, weights[rows], learned, VALUE_LOSSES, name)
        for rows in split
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), gradient, rtol=1e-6, atol=0)


@EVERY_LOSS
@given(seed=SEEDS, padding=st.integers(1, 4))
def test_padding_and_masked_tokens_change_nothing_and_get_no_gradient(name, seed, padding):
    c, learned = random_columns(seed), LEARNED[name]
    wide = {k: torch.nn.functional.pad(v, (0, padding)) if v.shape == (6, 7) else v for k, v in c.items()}
    loss, gradient = summed(c, weighed(c, name), learned, VALUE_LOSSES, name)
    wide_loss, wide_gradient = summed(wide, weighed(wide, name), learned, VALUE_LOSSES, name)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient[:, :7], gradient)
    assert wide_gradient[~wide["mask"]].count_nonzero() == 0


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_clip_that_leaves_no_room_is_refused(clip):
    with pytest.raises(ValueError, match=f"got {clip}.*value_mse"):
        value_clip(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), clip=clip)
