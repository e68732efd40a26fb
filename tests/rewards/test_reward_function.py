import math
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch

from tests.rewards.answers import (
    batched,
    batched_async,
    by_trajectory,
    by_trajectory_async,
    length,
    rows,
    scored,
    slow_length,
)
from verl.rewards.reward_function import RewardFunction
from verl.utils.sampling_types import Prompt


class Scorer:
    def __call__(self, prompt, response):
        return len(response)

    async def judge(self, prompt, response):
        return len(response)


FORMS = [
    length,
    slow_length,
    by_trajectory,
    by_trajectory_async,
    batched,
    batched_async,
    Scorer(),
    Scorer().judge,
    partial(length),
    lambda response: len(response),
]


@pytest.mark.parametrize("function", FORMS)
def test_every_form_scores_every_row(function):
    trajectories = scored(rows("", "ab", "abc"), function)
    assert [t.reward for t in trajectories] == [0.0, 2.0, 3.0]
    assert {t.outcome for t in trajectories} == {"ok"}
    assert all(list(t.scores.values()) == [t.reward] for t in trajectories)


@pytest.mark.parametrize(
    "value", [True, 1, Decimal(1), np.float32(1), np.bool_(True), np.ones(1), torch.ones(1, 1)], ids=repr
)
def test_numbers_of_other_libraries_are_numbers(value):
    (one,) = scored(rows("x"), lambda response: value)
    (of_list,) = scored(rows("x"), lambda completions: [value])
    assert (one.reward, of_list.reward) == (1.0, 1.0), one.detail + of_list.detail


def test_a_batched_function_may_return_a_tensor():
    assert [t.reward for t in scored(rows("x", "y"), lambda completions: torch.tensor([1.0, 2.0]))] == [
        1.0,
        2.0,
    ]


def raising(prompt, response):
    return 1 / len(response)


async def raising_async(prompt, response):
    return 1 / len(response)


@pytest.mark.parametrize("function", [raising, raising_async])
def test_a_call_that_raises_names_the_function_the_cause_and_the_line(function):
    failed, scored_row = scored(rows("", "ab"), function)
    line = function.__code__.co_firstlineno + 1
    assert (failed.reward, failed.outcome) == (None, "reward_error")
    assert failed.detail == f"{function.__name__}: ZeroDivisionError: division by zero ({__file__}:{line})"
    assert (scored_row.reward, scored_row.outcome, scored_row.detail) == (0.5, "ok", "")


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (math.nan, "reward_not_finite"),
        (-math.inf, "reward_not_finite"),
        ({"reward": 1, "accuracy": math.nan}, "reward_not_finite"),
        ("1.0", "reward_wrong_type"),
        (None, "reward_wrong_type"),
        ([1.0], "reward_wrong_type"),
        (1j, "reward_wrong_type"),
        (np.str_("1"), "reward_wrong_type"),
        (np.complex64(1), "reward_wrong_type"),
        ({"score": "1.0"}, "reward_wrong_type"),
        ({"value": 1.0}, "reward_wrong_type"),
        (torch.ones(2), "reward_wrong_type"),
    ],
)
def test_what_is_no_finite_number_is_never_a_reward(value, outcome):
    failed, good = scored(rows("bad", "good"), lambda response: value if response == "bad" else 1.0)
    assert (failed.reward, failed.outcome, good.reward) == (None, outcome, 1.0)
    assert failed.detail.startswith("lambda: need a ")


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([1.0], "reward_wrong_count"),
        ([1.0] * 3, "reward_wrong_count"),
        (1.0, "reward_wrong_type"),
        ("ab", "reward_wrong_type"),
        ({"reward": 1.0}, "reward_wrong_type"),
        ({1.0, 2.0}, "reward_wrong_type"),
        ([[1.0, 2.0], [1.0, 2.0]], "reward_wrong_type"),
        ({"rewards": [1.0]}, "reward_wrong_count"),
        ({"rewards": [1.0, 2.0], "extra_logs": {"length": [1.0]}}, "reward_wrong_count"),
        ((x for x in "ab"), "reward_wrong_type"),
        (torch.tensor(1.0), "reward_wrong_type"),
    ],
)
def test_a_batched_call_without_one_value_per_row_fails_all_rows(values, outcome):
    assert [(t.reward, t.outcome) for t in scored(rows("x", "y"), lambda completions: values)] == [
        (None, outcome)
    ] * 2


def test_one_bad_value_of_a_batched_call_fails_only_its_row():
    first, second = scored(rows("x", "y"), lambda completions: [math.nan, 1.0])
    assert (first.outcome, second.reward) == ("reward_not_finite", 1.0)


def test_an_unknown_option_is_refused_with_those_there_are():
    def f(prompt, response, *, scale=1.0, offset=0.0):
        return scale * len(response) + offset

    with pytest.raises(ValueError, match=r"takes \(scale, offset\), got scael"):
        RewardFunction(f, options={"scael": 2.0})
    assert scored(rows("ab"), RewardFunction(f, options={"scale": 2.0}))[0].reward == 4.0


def test_an_option_without_default_must_be_given_before_the_first_step():
    def f(trajectory, *, scale):
        return scale

    with pytest.raises(ValueError, match="need a column of the data for the parameter scale"):
        RewardFunction(f).check_data([Prompt("q")])
    RewardFunction(f, options={"scale": 2.0}).check_data([Prompt("q")])


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite weight"):
        RewardFunction(length, weight=math.nan)
