"""Reward functions in the forms of this and of other trainers: each parameter is filled by its name."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.rewards.answers import CHAT, rows, scored
from verl.rewards.functions import RewardFunctions
from verl.rewards.parameters import CallContext
from verl.rewards.reward_function import RewardFunction
from verl.rewards.reward_log import TrainerState
from verl.utils.sampling_types import Prompt

SEEN: dict = {}
CHAT_ANSWER = [{"role": "assistant", "content": "y"}]
CONTEXT = CallContext(
    prompt_text=lambda prompt: f"<{prompt.content}>", state=lambda: TrainerState(3, 10, 0.5)
)


@pytest.fixture(autouse=True)
def nothing_seen():
    SEEN.clear()


def noted(result=0.0, **values):
    """Keeps what a function was given, and returns its value."""
    SEEN.update(values)
    return result


def ok(trajectories, function, **given):
    """Reward of rows that a function has scored without a failure."""
    wrapped = function if isinstance(function, RewardFunction) else RewardFunction(function, place="inline")
    functions = RewardFunctions([wrapped], timeout_s=5.0, max_failed_share=1.0, **given)
    functions.check_data([t.prompt for t in trajectories])
    functions.score(trajectories)
    assert {t.outcome for t in trajectories} == {"ok"}, trajectories[0].detail
    return [t.reward for t in trajectories]


def test_names_of_one_answer_are_filled_in_any_order_and_from_the_data():
    def f(level, answer, response, prompt, *, ground_truth, source, unit="m", bonus=1):
        return noted(**dict(locals()))

    ok(
        rows("x", content=CHAT, answer=7, level=3, unit="km"),
        RewardFunction(f, options={"bonus": 2}, place="inline"),
    )
    assert SEEN == {
        "prompt": CHAT, "response": "x", "answer": 7, "ground_truth": 7, "level": 3, "source": "set",
        "unit": "km", "bonus": 2,
    }  # fmt: skip


def test_every_column_of_the_data_has_its_name_in_both_forms():
    columns = {"data_source": "mine", "reward_model": {"style": "rule"}, "extra_info": {"split": "train"}}

    def one(response, data_source, reward_model, extra_info, answer):
        return noted(one=[data_source, reward_model, extra_info, answer])

    def every(completions, data_source, reward_model, extra_info, answer):
        return noted([0.0], every=[data_source, reward_model, extra_info, answer])

    ok(rows("x", answer="7", **columns), one)
    ok(rows("x", answer="7", **columns), every)
    assert SEEN["one"] == [*columns.values(), "7"]
    assert SEEN["every"] == [[value] for value in SEEN["one"]]


def test_double_starred_parameters_take_all_columns_of_a_row():
    def f(prompt, response, **columns):
        return noted(columns=columns)

    ok(rows("x", level=3, prompt="other"), f)
    assert SEEN == {"columns": {"level": 3}}


def test_positional_only_parameters_are_filled_by_their_names_too():
    def f(response, prompt, /, scale=2.0):
        return noted(scale * len(response), prompt=prompt)

    assert ok(rows("abc"), f) == [6.0] and SEEN == {"prompt": "q"}


def test_a_function_of_verl_gets_its_four_parameters_and_no_column_instead_of_an_option():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, method="strict", **kwargs):
        given = dict(locals())
        return noted({"score": 1.0, "acc": True, "pred": ["4", "2"]}, **given)

    trajectories = rows("42", answer="42", method="of the data", level=3)
    assert ok(trajectories, RewardFunction(compute_score, options={"strict": 1}, place="inline")) == [1.0]
    assert SEEN == {
        "data_source": "set", "solution_str": "42", "ground_truth": "42", "extra_info": {},
        "method": "strict", "kwargs": {"strict": 1},
    }  # fmt: skip
    assert trajectories[0].scores == {"compute_score": 1.0, "accuracy": 1.0}
    assert trajectories[0].extras == {"pred": "['4', '2']"}


def test_a_function_of_verl_over_all_answers_gets_lists():
    async def compute_score(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
        return [float(a == b) for a, b in zip(solution_strs, ground_truths, strict=True)]

    def noting(data_sources, solution_strs, ground_truths, extra_infos):
        return noted([1, 2], sources=data_sources, truths=ground_truths, infos=extra_infos)

    assert [t.reward for t in scored(rows("a", "b"), compute_score)] == [1.0, 0.0]
    assert ok(rows("x") + rows("y", answer=None, extra_info={"i": 1}), noting) == [1.0, 2.0]
    assert SEEN == {"sources": ["set", "set"], "truths": ["a", None], "infos": [{}, {"i": 1}]}


def test_a_function_of_trl_gets_columns_as_lists_and_completions_in_the_format_of_the_prompt():
    def f(prompts, completions, completion_ids, **kwargs):
        return noted([1.0, None], prompts=prompts, completions=completions, ids=completion_ids, **kwargs)

    first, second = rows("x", level=3) + rows("y", content=CHAT, answer=None)
    functions = RewardFunctions(
        [RewardFunction(f, place="inline")], timeout_s=5.0, max_failed_share=1.0, context=CONTEXT
    )
    functions.attempt([first, second])
    assert (first.reward, second.outcome) == (1.0, "reward_not_applicable")
    assert SEEN["prompts"] == ["q", CHAT] and SEEN["completions"] == ["x", CHAT_ANSWER]
    assert SEEN["ids"] == [[5, 6], [5, 6]] and SEEN["trainer_state"] == TrainerState(3, 10, 0.5)
    assert SEEN["answer"] == ["a", None] and SEEN["level"] == [3, None]
    assert SEEN.keys() - {"prompts", "completions", "ids"} == {
        "answer", "level", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip


def test_a_function_of_trl_without_double_star_gets_only_what_it_names():
    def f(completions, level, trainer_state, absent=None):
        return noted([level[0] + trainer_state.max_steps], absent=absent)

    assert ok(rows("x", level=3, other=4), f, context=CONTEXT) == [13.0] and SEEN == {"absent": None}


def test_a_function_may_change_what_it_is_given_and_nothing_else_sees_it():
    def f(prompts, completions, extra_info, **columns):
        for prompt, tests in zip(prompts, extra_info, strict=True):
            prompt.append("mine")
            noted(popped=[*SEEN.get("popped", []), tests.pop("limit", None)])
        return [0.0] * len(completions)

    given = rows("x", "y", content=[*CHAT], extra_info={"limit": 3})
    given[1].prompt = given[0].prompt
    ok(given, f)
    assert SEEN["popped"] == [3, 3]
    assert given[0].prompt.content == CHAT and given[0].prompt.columns["extra_info"] == {"limit": 3}


def test_plain_texts_of_chat_answers_are_called_responses():
    assert ok(rows("abc", content=CHAT), lambda responses: [len(r) for r in responses]) == [3.0]


def test_a_function_of_openrlhf_gets_texts_and_may_return_tensors_by_name():
    def reward_func(queries, prompts, labels, **kwargs):
        rewards = torch.tensor([1.0, 0.0])
        logs = {"length": torch.tensor([3, 4])}
        return noted(
            {"rewards": rewards, "scores": rewards, "extra_logs": logs},
            queries=queries, prompts=prompts, labels=labels,
        )  # fmt: skip

    trajectories = rows("x", "y", content=CHAT)
    assert ok(trajectories, reward_func, context=CONTEXT) == [1.0, 0.0]
    assert SEEN["prompts"] == [f"<{CHAT}>"] * 2 and SEEN["labels"] == ["a", "a"]
    assert SEEN["queries"] == [f"<{CHAT}>x", f"<{CHAT}>y"]
    assert trajectories[1].scores == {"reward_func": 0.0, "scores": 0.0, "length": 4.0}
    (failed,) = scored(rows("x", content=CHAT), lambda queries, prompts: [0.0])
    assert "need the tokenizer for the text of a chat prompt" in failed.detail


def test_a_function_of_verifiers_gets_messages_and_the_state():
    def f(completion, answer, state, info, task):
        return noted(completion=completion, state=state, info=info, task=task)

    ok(rows("y", content=CHAT), f)
    assert SEEN["completion"] == CHAT_ANSWER and (SEEN["info"], SEEN["task"]) == ({}, "set")
    assert SEEN["state"]["completion"] == CHAT_ANSWER and SEEN["state"]["answer"] == "a"


class Judge:
    """A callable with state."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, response: str) -> float:
        return self.scale * len(response)

    def halved(self, response: str) -> float:
        return self(response) / 2


def test_objects_methods_and_bound_arguments_are_functions_too():
    def scaled(response, scale):
        return scale * len(response)

    functions = (
        Judge(2.0),
        Judge(4.0).halved,
        partial(scaled, scale=2.0),
        lambda response: 2 * len(response),
    )
    assert [ok(rows("abc"), function) for function in functions] == [[6.0]] * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda output, target: 0.0,
        lambda p, r: 0.0,
        lambda prompt, answer: 0.0,
        lambda t: 0.0,
        lambda data_source, ground_truth: 0.0,
        lambda *everything: 0.0,
        lambda: 0.0,
    ],
    ids=range(7),
)
def test_a_function_whose_names_do_not_take_the_answer_is_refused_with_those_that_would(function):
    with pytest.raises(
        ValueError, match=r"takes the answer of the policy, such as `response`.*known by name"
    ):
        RewardFunction(function)


def test_the_refusal_shows_the_parameters_and_the_columns_of_the_data():
    with pytest.raises(
        ValueError, match=r"got lambda\(output, target\).*every column of the data: answer, level\)"
    ):
        RewardFunction(lambda output, target: 0.0, columns=["level", "answer"])
    with pytest.raises(ValueError, match="need parameters that Python can read"):
        RewardFunction(min)


def test_a_name_that_the_data_does_not_have_is_refused_before_the_first_step():
    prompts = [Prompt("q", answer="1", columns={"level": 3}), Prompt("r", index=1, source="set")]
    with pytest.raises(ValueError, match=r"parameter target, got the columns answer, level;"):
        RewardFunction(lambda response, target: 0.0).check_data(prompts)
    with pytest.raises(ValueError, match=r"parameter target, "):
        RewardFunction(lambda completions, target: [0.0]).check_data(prompts)
    with pytest.raises(
        ValueError, match=r"need answer in every row, 1 of 2 have none, the first is row 1 of set"
    ):
        RewardFunction(lambda response, answer: 0.0).check_data(prompts)
    RewardFunction(lambda completions, answer: [0.0]).check_data(prompts)
    RewardFunction(lambda response, target: 0.0).check_data([])
    RewardFunction(lambda response, answer="": 0.0).check_data(prompts)


def test_a_value_that_is_missing_in_a_call_is_a_failure_that_names_it():
    (row,) = scored(rows("x", level=3), lambda response, lebel: 1.0)
    assert (
        row.outcome == "reward_error"
        and "parameter lebel, got" in row.detail
        and "answer, level" in row.detail
    )
    (row,) = scored(rows("x", answer=None), lambda response, answer: float(response == answer))
    assert row.outcome == "reward_error" and "parameter answer" in row.detail
