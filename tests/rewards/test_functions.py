import asyncio
import math
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from verl.config.data import RewardsConfig
from verl.data.batch import Trajectory
from verl.rewards.functions import RewardFunctions, build_rewards, load_function
from verl.rewards.reward_function import RewardFunction
from verl.rewards.shaping import overlong_penalty
from verl.utils.sampling_types import Prompt

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]


def rows(*texts, content="q", answer="a", **columns):
    prompt = Prompt(content, answer=answer, source="set", columns=columns)
    return [Trajectory(prompt, [1], [5, 6], [True, True], None, [0, 0], 0, text=text) for text in texts]


def rewards_of(*functions, timeout_s=5.0, max_failed_share=1.0):
    wrapped = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
    return RewardFunctions(wrapped, timeout_s=timeout_s, max_failed_share=max_failed_share)


def scored(trajectories, *functions, **limits):
    functions_of_run = rewards_of(*functions, **limits)
    functions_of_run.score(trajectories)
    functions_of_run.close()
    return trajectories


def length(prompt, response):
    return len(response)


async def slow_length(prompt, response):
    await asyncio.sleep(0.01)
    return len(response)


def by_trajectory(trajectory):
    return len(trajectory.text)


async def by_trajectory_async(trajectory):
    return len(trajectory.text)


def batched(prompts, completions, **columns):
    return [len(c) for c in completions]


async def batched_async(completions, **columns):
    return [float(len(c)) for c in completions]


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


def test_none_of_a_batched_function_adds_nothing_to_that_row():
    only_first = RewardFunction(lambda completions, **_: [2.0, None], name="first")
    first, second = scored(rows("ab", "abc"), only_first, length)
    assert (first.reward, first.scores) == (4.0, {"first": 2.0, "length": 2.0})
    assert (second.reward, second.scores) == (3.0, {"length": 3.0})


def test_a_row_that_no_function_applies_to_has_no_reward():
    (row,) = scored(rows("x"), lambda completions: [None])
    assert (row.reward, row.outcome) == (None, "reward_not_applicable")


def test_the_reward_is_the_weighted_sum():
    halved, negated = RewardFunction(length, weight=0.5), RewardFunction(by_trajectory, weight=-2.0)
    (row,) = scored(rows("abcd"), halved, negated)
    assert row.reward == -6.0
    assert row.scores == {"length": 4.0, "by_trajectory": 4.0}


def test_a_mapping_adds_named_scores_and_no_score_hides_another():
    (row,) = scored(
        rows("ab"), lambda p, r: {"reward": 1, "accuracy": True}, lambda p, r: {"reward": 2, "accuracy": 0.0}
    )
    assert row.reward == 3.0
    assert row.scores == {"lambda": 1.0, "lambda_2": 2.0, "accuracy": 1.0, "lambda_2/accuracy": 0.0}


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


def test_one_failing_function_leaves_no_partial_reward_but_keeps_the_other_scores():
    (row,) = scored(rows(""), length, raising)
    assert (row.reward, row.outcome, row.scores) == (None, "reward_error", {"length": 0.0})


def test_a_missing_column_and_a_missing_answer_are_errors_that_name_what_there_is():
    (row,) = scored(rows("x", level=3), lambda prompt, response, lebel: 1.0)
    assert row.outcome == "reward_error" and "lebel, it has level, answer" in row.detail
    (row,) = scored(rows("x", answer=None), lambda prompt, response, answer: float(response == answer))
    assert row.outcome == "reward_error" and "answer" in row.detail


release = threading.Event()


def hang(prompt, response):
    return release.wait() if response == "hang" else 1.0


async def hang_async(prompt, response):
    return await asyncio.sleep(1000 if response == "hang" else 0, result=1.0)


async def hang_without_awaiting(prompt, response):
    return release.wait() if response == "hang" else 1.0


def hang_in_batch(completions):
    return [hang("", c) for c in completions]


@pytest.fixture
def _released():
    release.clear()
    yield
    release.set()


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize(
    ("function", "num_hanging"),
    [(hang, 1), (hang, 12), (hang_async, 1), (hang_async, 70), (hang_without_awaiting, 2)],
)
def test_hanging_calls_fail_alone_and_block_neither_the_others_nor_the_next_call(function, num_hanging):
    functions = rewards_of(function, timeout_s=0.25)
    trajectories = rows(*["hang"] * num_hanging, *["good"] * 100)
    start = time.monotonic()
    functions.score(trajectories)
    assert time.monotonic() - start < 10.0
    assert {t.outcome for t in trajectories[:num_hanging]} == {"reward_timeout"}
    assert trajectories[0].detail.startswith(f"{function.__name__}: no answer within 0.25 s")
    assert [t.reward for t in trajectories[num_hanging:]] == [1.0] * 100
    again = rows("good", "good")
    functions.score(again)
    assert [t.reward for t in again] == [1.0, 1.0]


@pytest.mark.usefixtures("_released")
def test_a_hanging_batched_call_fails_its_rows_and_not_another_function():
    trajectories = scored(rows("hang", "good"), hang_in_batch, length, timeout_s=0.25)
    assert [(t.outcome, t.scores) for t in trajectories] == [("reward_timeout", {"length": 4.0})] * 2


@pytest.mark.usefixtures("_released")
def test_a_coroutine_that_holds_the_event_loop_is_told_to_await():
    trajectories = scored(rows("hang", *["good"] * 100), hang_without_awaiting, timeout_s=0.25)
    assert "held the event loop" in trajectories[0].detail
    assert [t.outcome for t in trajectories[1:]] == ["ok"] * 100


def test_the_clock_of_a_call_starts_with_the_call_and_not_in_the_queue():
    def work(prompt, response):
        time.sleep(0.15)
        return 1.0

    async def work_async(prompt, response):
        await asyncio.sleep(0.15)
        return 1.0

    assert {t.outcome for t in scored(rows(*["x"] * 48), work, timeout_s=0.8)} == {"ok"}
    assert {t.outcome for t in scored(rows(*["x"] * 384), work_async, timeout_s=0.8)} == {"ok"}


@pytest.mark.usefixtures("_released")
def test_calls_that_never_return_are_limited_in_number():
    functions = rewards_of(hang, timeout_s=0.02)
    with pytest.raises(
        RuntimeError, match=r"at most 16 reward calls that never return, got \d\d, the last one of 'hang'"
    ):
        functions.score(rows(*["hang"] * 40))
    with pytest.raises(RuntimeError, match="never return"):
        functions.score(rows("good"))
    release.set()
    time.sleep(0.1)
    after = rows("good")
    functions.score(after)
    assert after[0].reward == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("place", [None, "thread"])
def test_a_function_that_exits_fails_its_answer_and_does_not_end_the_program(error, is_async, place):
    def f(prompt, response):
        raise error("stop")

    async def f_async(prompt, response):
        raise error("stop")

    (row,) = scored(rows("x"), RewardFunction(f_async if is_async else f, place=place))
    assert (row.outcome, row.detail.split(" (")[0][-len(error.__name__) - 6 :]) == (
        "reward_error",
        f"{error.__name__}: stop",
    )


def test_a_timeout_error_of_the_function_itself_is_its_error():
    async def f(prompt, response):
        raise asyncio.TimeoutError("judge is down")

    (row,) = scored(rows("x"), f)
    assert row.outcome == "reward_error" and "TimeoutError: judge is down" in row.detail


def test_two_scorings_at_the_same_time_keep_apart():
    functions = rewards_of(length, slow_length)
    batches = [rows(*["x" * i] * 50) for i in range(4)]
    threads = [threading.Thread(target=functions.score, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{t.reward for t in batch} for batch in batches] == [{0.0}, {2.0}, {4.0}, {6.0}]


def test_too_many_failures_stop_the_run_with_their_causes_and_the_remedy():
    message = (
        r"2 of 3 have none \(reward_error 2\); first: raising: ZeroDivisionError.*rewards.max_failed_share"
    )
    with pytest.raises(RuntimeError, match=message):
        scored(rows("", "", "a"), raising, max_failed_share=0.5)
    scored(rows("", "a"), raising, max_failed_share=0.5)


def test_a_trajectory_that_failed_before_is_left_as_it_is():
    failed, good = rows("x", "y")
    failed.outcome, failed.detail = "engine_error", "lost"
    scored([failed, good], length, max_failed_share=0.0)
    assert (failed.reward, failed.outcome, failed.detail, good.reward) == (None, "engine_error", "lost", 1.0)


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


def test_settings_name_functions_with_weights_and_options(tmp_path, monkeypatch):
    (tmp_path / "my_module_of_rewards.py").write_text(
        "def f(prompt, response, *, scale=1):\n    return scale * len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardsConfig(functions=["exact", {"name": "my_module_of_rewards:f", "weight": 0.5, "scale": 3}])
    (row,) = trajectories = rows("a")
    build_rewards(config, length).score(trajectories)
    assert row.scores == {"exact": 1.0, "f": 3.0, "length": 1.0, "accuracy": 1.0}
    assert row.reward == 1.0 + 0.5 * 3.0 + 1.0


def test_a_function_is_loaded_from_a_file(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "import dataclasses\n\n@dataclasses.dataclass\nclass A:\n    x: int\n\n"
        "def f(trajectory):\n    return 2.0\n"
    )
    assert scored(rows("x"), load_function(f"{file}:f"))[0].scores == {"f": 2.0}
    assert load_function(f"{file}:f") is load_function(f"{file}:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactt", "exact, position_share, prefix_share, model; the nearest is exact"),
        ("no_such_package_of_mine:f", "ModuleNotFoundError"),
        ("no_such_folder/rewards.py:f", "FileNotFoundError"),
        ("math:no_such_function", "'no_such_function' in 'math', there is none"),
        ("math:pi", "there is float"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(RewardsConfig(functions=[name]))


def test_no_reward_function_at_all_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"rewards.functions.*reward_fn"):
        build_rewards(RewardsConfig())


def test_functions_are_scored_again_after_closing():
    functions = rewards_of(length, slow_length)
    for _ in range(2):
        (row,) = trajectories = rows("ab")
        functions.score(trajectories)
        assert row.reward == 4.0
        functions.close()


@pytest.mark.parametrize(("place", "limit_s"), [("inline", 0.02), ("thread", 0.1), (None, 0.2)])
def test_five_hundred_trivial_calls_cost_milliseconds(place, limit_s):
    functions = rewards_of(RewardFunction(lambda p, r: 1.0, place=place))
    functions.score(rows("x"))
    seconds = []
    for _ in range(20):
        trajectories = rows(*["x"] * 512)
        start = time.perf_counter()
        functions.score(trajectories)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit_s


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0.0), (80, 0.0), (90, -0.25), (100, -0.5), (120, -0.5)])
def test_the_overlong_penalty_falls_linearly_over_the_buffer(tokens, expected):
    assert overlong_penalty(tokens, max_tokens=100, buffer_tokens=20, penalty=0.5) == pytest.approx(expected)


def test_an_overlong_buffer_of_nothing_punishes_nothing_and_one_too_long_is_refused():
    assert overlong_penalty(100, max_tokens=100, buffer_tokens=0, penalty=1.0) == 0.0
    with pytest.raises(ValueError, match="buffer_tokens=101"):
        overlong_penalty(100, max_tokens=100, buffer_tokens=101, penalty=1.0)


def two_turns(**changes):
    """A trajectory of two turns with an answer of the environment between them."""
    return Trajectory(
        Prompt("q"), [1], [2, 3, 4], [True, False, True], [-1.0] * 3, [0] * 3, 0, text="a", **changes
    )


def test_rewards_of_turns_are_part_of_the_reward_and_weighted_like_it():
    def by_turn(trajectory):
        return {"reward": 1.0, "turn_rewards": [0.5, 0.25]}

    def plain(trajectory):
        return 3.0

    functions = RewardFunctions(
        [RewardFunction(by_turn, weight=2.0), RewardFunction(plain)], timeout_s=5, max_failed_share=1
    )
    trajectory = two_turns()
    functions.score([trajectory])
    assert (trajectory.reward, trajectory.turn_rewards) == (6.5, [1.0, 0.5])
    assert trajectory.scores == {"by_turn": 1.75, "plain": 3.0} and trajectory.parts == [
        (2.0, 1.75),
        (1.0, 3.0),
    ]


@pytest.mark.parametrize(
    ("values", "outcome"),
    [([1.0], "reward_wrong_count"), ([1.0, math.nan], "reward_wrong_type"), (0.5, "reward_wrong_type")],
)
def test_turn_rewards_that_are_not_a_number_for_each_turn_are_a_failure(values, outcome):
    functions = RewardFunctions(
        [RewardFunction(lambda t: {"reward": 1.0, "turn_rewards": values})], timeout_s=5, max_failed_share=1
    )
    trajectory = two_turns()
    functions.score([trajectory])
    assert (trajectory.reward, trajectory.outcome, trajectory.turn_rewards) == (None, outcome, [])
