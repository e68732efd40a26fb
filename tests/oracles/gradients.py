"""Gradients of losses: by autograd of a table's function, by finite differences of a plain one."""

from __future__ import annotations

import torch

from verl.algorithms.registry import bind
from verl.config.fields import Choice


def summed(columns, weights, learned, table, choice):
    """Weighted loss, and its gradient with respect to the learned column.

    A loss [B] is weighted by the first weight of its row.
    """
    leaf = columns[learned].clone().requires_grad_()
    loss, _ = bind(choice if isinstance(choice, Choice) else Choice(name=choice), table)(
        {**columns, learned: leaf}
    )
    total = (loss * (weights if loss.ndim == 2 else weights[:, 0])).sum()
    total.backward()
    return total.detach(), leaf.grad


def units(unit, mask):
    """Flat places of the sampled tokens of one call of a plain loss: of a token, a row, or the minibatch."""
    rows = [[b * len(row) + t for t, sampled in enumerate(row) if sampled] for b, row in enumerate(mask)]
    places = [place for row in rows for place in row]
    groups = {"token": [[place] for place in places], "row": rows, "minibatch": [places]}[unit]
    return [group for group in groups if group]


def plain_losses(function, unit, columns, mask):
    """Flat place -> loss, of a function of floats (token) or lists (row, minibatch); flat columns."""
    losses = {}
    for group in units(unit, mask):
        given = [[column[place] for place in group] for column in columns]
        values = [function(*(tokens[0] for tokens in given))] if unit == "token" else function(*given)
        losses |= dict(zip(group, values, strict=True))
    return losses


def central_differences(function, point, step=1e-5):
    """The gradient of a function of a list of floats."""
    moved = [[[*point[:i], x + d, *point[i + 1 :]] for d in (step, -step)] for i, x in enumerate(point)]
    return [(function(up) - function(down)) / (2 * step) for up, down in moved]


def assert_agrees(loss, gradient, weights, columns, mask, function, unit):
    """Check the loss at sampled tokens, and the gradient of its weighted sum, against the plain loss.

    The gradient is with respect to the first column.
    """
    first, *others = (column.flatten().tolist() for column in columns)
    flags, flat_weights = mask.tolist(), weights.flatten().tolist()

    def total(point):
        return sum(
            flat_weights[place] * value
            for place, value in plain_losses(function, unit, [point, *others], flags).items()
        )

    expected = plain_losses(function, unit, [first, *others], flags)
    found = loss.detach().flatten()[list(expected)]
    torch.testing.assert_close(
        found, torch.tensor(list(expected.values()), dtype=torch.float64), atol=1e-6, rtol=1e-6
    )
    differences = torch.tensor(central_differences(total, first), dtype=torch.float64)
    torch.testing.assert_close(gradient.flatten(), differences, atol=1e-6, rtol=1e-6)
