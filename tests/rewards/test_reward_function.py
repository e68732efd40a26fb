import math
from functools import partial

import numpy as np
import pytest
import torch

from tests.rewards.answers import (
    CHAT,
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
    lambda p, r: len(r),
]


@pytest.mark.parametrize("function", FORMS)
def test_every_form_scores_every_row(function):
    trajectories = scored(rows("", "ab", "abc"), function)
    assert [t.reward for t in trajectories] == [0.0, 2.0, 3.0]
    assert {t.outcome for t in trajectories} == {"ok"}
    assert all(list(t.scores.values()) == [t.reward] for t in trajectories)


def test_further_parameters_are_filled_from_the_data():
    seen = {}

    def f(prompt, response, answer, level, *, ground_truth, source, unit="m", bonus=1):
        seen.update(
            prompt=prompt,
            answer=answer,
            level=level,
            ground_truth=ground_truth,
            source=source,
            unit=unit,
            bonus=bonus,
        )
        return 0.0

    (row,) = scored(
        rows("x", content=CHAT, answer=7, level=3, unit="km"), RewardFunction(f, options={"bonus": 2})
    )
    assert row.outcome == "ok", row.detail
    assert seen == {
        "prompt": CHAT,
        "answer": 7,
        "level": 3,
        "ground_truth": 7,
        "source": "set",
        "unit": "km",
        "bonus": 2,
    }


def test_double_starred_parameters_take_all_columns_of_a_row():
    (row,) = scored(
        rows("x", level=3, prompt="other"),
        lambda prompt, response, **columns: columns["level"] + len(columns),
    )
    assert row.reward == 4.0


def test_a_batched_function_gets_columns_as_lists_and_completions_in_the_format_of_the_prompt():
    seen = {}

    def f(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, columns=columns)
        return [1.0, 1.0]

    scored(rows("x", level=3) + rows("y", content=CHAT, answer=None), f)
    assert seen["prompts"] == ["q", CHAT]
    assert seen["completions"] == ["x", [{"role": "assistant", "content": "y"}]]
    assert seen["ids"] == [[5, 6], [5, 6]]
    assert seen["columns"] == {"answer": ["a", None], "level": [3, None]}


def test_a_batched_function_without_double_star_gets_only_what_it_names():
    (row,) = scored(
        rows("x", level=3, other=4),
        lambda completions, level, absent=None: [level[0] if absent is None else 0],
    )
    assert row.reward == 3.0


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.bool_(True), torch.tensor(1.0)], ids=repr)
def test_numbers_of_other_libraries_are_numbers(value):
    (one,) = scored(rows("x"), lambda p, r: value)
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
        ({"score": 1.0}, "reward_wrong_type"),
        (torch.ones(2), "reward_wrong_type"),
    ],
)
def test_what_is_no_finite_number_is_never_a_reward(value, outcome):
    failed, good = scored(rows("bad", "good"), lambda p, r: value if r == "bad" else 1.0)
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


def test_a_missing_column_and_a_missing_answer_are_errors_that_name_what_there_is():
    (row,) = scored(rows("x", level=3), lambda prompt, response, lebel: 1.0)
    assert row.outcome == "reward_error" and "lebel, it has level, answer" in row.detail
    (row,) = scored(rows("x", answer=None), lambda prompt, response, answer: float(response == answer))
    assert row.outcome == "reward_error" and "answer" in row.detail


@pytest.mark.parametrize(
    "function",
    [
        lambda: 0.0,
        lambda *everything: 0.0,
        lambda response: 0.0,
        lambda response, prompt: 0.0,
        lambda response, answer: 0.0,
        lambda prompt, answer: 0.0,
        lambda data_source, solution_str, ground_truth: 0.0,
        lambda *, prompt, response: 0.0,
        min,
    ],
    ids=range(9),
)
def test_a_function_of_no_known_form_is_refused_with_the_forms(function):
    with pytest.raises(ValueError, match=r"f\(prompt, response\)"):
        RewardFunction(function)


def test_an_unknown_option_is_refused_with_those_there_are():
    def f(prompt, response, *, scale=1.0, offset=0.0):
        return scale * len(response) + offset

    with pytest.raises(ValueError, match=r"takes \(scale, offset\), got scael"):
        RewardFunction(f, options={"scael": 2.0})
    assert scored(rows("ab"), RewardFunction(f, options={"scale": 2.0}))[0].reward == 4.0


def test_a_trajectory_function_must_get_its_options_at_the_start():
    with pytest.raises(ValueError, match="needs scale"):
        RewardFunction(lambda trajectory, *, scale: scale)


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite weight"):
        RewardFunction(length, weight=math.nan)
