"""Prompts in a file: equal to those in memory, whatever values they have."""

from __future__ import annotations

from datetime import date, datetime, time, timezone
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from verl.config.data import WeightedChoice
from verl.data.loading.prompt_loader import PromptLoader
from verl.data.loading.prompt_store import (
    PromptStore,
    approximate_bytes,
    prompt_of_tensor,
    prompt_tensor,
    selected,
)
from verl.utils.sampling_types import Prompt

VALUES = {
    "text": "\ud83d half a character",
    "numbers": [1, 2.5, True, None, float("inf")],
    "pairs": [("a", 1), ("b", (2, 3))],
    "bytes": b"\x00\xff",
    "exact": [Decimal("1.50"), Fraction(3, 4)],
    "times": [date(2024, 5, 1), datetime(2024, 5, 1, 9, 30, 0, 5, timezone.utc), time(9, 30)],
    "deep": {"a": {"b": []}},
}
ROWS = [
    Prompt([{"role": "user", "content": "x" * i}], "answer", "source", 3 * i, VALUES, ({"name": "tool"},))
    for i in range(20)
] + [
    Prompt(
        "text", Decimal(2), reward=WeightedChoice(name="exact", weight=2, a=[1]), sampling={"stop": ("a",)}
    )
]


def store(bound):
    made = PromptStore(in_memory_bytes=bound)
    for row in ROWS:
        made.append(row)
    return made


@pytest.mark.parametrize("bound", [0, approximate_bytes(ROWS[0]) * 5])
def test_a_file_gives_the_same_prompts_as_memory(bound):
    made = store(bound)
    assert made.is_on_disk and made.num_bytes > 1000
    assert list(made) == ROWS and made[-1] == ROWS[-1] and made[3:5] == ROWS[3:5]
    assert [made.index_at(i) for i in range(20)] == [3 * i for i in range(20)]
    with pytest.raises(IndexError):
        made[len(ROWS)]


def test_below_the_bound_prompts_stay_as_they_are():
    made = store(1e9)
    assert not made.is_on_disk and made[4] is ROWS[4]


def test_what_no_file_can_hold_stays_in_memory():
    made, image = PromptStore(in_memory_bytes=0), object()
    made.append(ROWS[0])
    made.append(Prompt("a", columns={"image": image}))
    made.append(ROWS[1])
    assert made[1].columns["image"] is image and made[2] == ROWS[1]
    assert np.array_equal(prompt_of_tensor(prompt_tensor(Prompt("a", np.arange(3)))).answer, np.arange(3))


def test_a_loader_draws_the_same_from_memory_and_from_a_file():
    in_memory, on_disk = (PromptLoader(store(bound), seed=0, shuffle=True) for bound in (1e9, 0))
    assert in_memory.state_dict() == on_disk.state_dict() and in_memory.take(30) == on_disk.take(30)
    assert on_disk.prompt(6) == ROWS[2] and on_disk.prompt(7) is None


def test_some_of_the_prompts_are_a_view():
    made = store(0)
    assert selected(made, range(len(made))) is made
    view = selected(made, [2, 4])
    assert (list(view), len(view), view[1:], view[-1]) == ([ROWS[2], ROWS[4]], 2, [ROWS[4]], ROWS[4])
    assert PromptLoader(view, seed=0, shuffle=False).prompt(12) == ROWS[4]
