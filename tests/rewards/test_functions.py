import math
import time

import pytest
import torch

from tests.rewards.answers import by_trajectory, length, rewards_of, rows, scored, slow_length
from verl.agents.collector import collection_metrics
from verl.config.data import RewardsConfig
from verl.data.trajectory import Trajectory
from verl.rewards.functions import RewardFunctions, build_rewards
from verl.rewards.library.reward_table import load_function
from verl.rewards.reward_function import RewardFunction
from verl.trainer.evaluation import sample_row
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, character_tokenizer


def raising(prompt, response):
    return 1 / len(response)


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
        rows("ab"),
        lambda response: {"reward": 1, "accuracy": True},
        lambda response: {"reward": 2, "accuracy": 0.0},
    )
    assert row.reward == 3.0
    assert row.scores == {"lambda": 1.0, "lambda_2": 2.0, "accuracy": 1.0, "lambda_2/accuracy": 0.0}


def test_one_failing_function_leaves_no_partial_reward_but_keeps_the_other_scores():
    (row,) = scored(rows(""), length, raising)
    assert (row.reward, row.outcome, row.scores) == (None, "reward_error", {"length": 0.0})


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
        ("exactt", "exact, position_share, prefix_share, .*; the nearest is exact"),
        ("no_such_package_of_mine:f", "ModuleNotFoundError"),
        ("no_such_folder/rewards.py:f", "FileNotFoundError"),
        ("math:no_such_function", "'no_such_function' in 'math', there is none"),
        ("math:pi", "there is float"),
        ("json:JSONDecoder", "need a function or a class with __call__, got 'JSONDecoder'"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(RewardsConfig(functions=[name]))


def test_a_script_that_ends_the_program_is_refused_by_its_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"reward function .*script\.py:f: cannot import .*: SystemExit: 0"):
        load_function(f"{script}:f")


def test_a_class_in_a_file_is_made_once_and_a_method_of_an_object_is_named_with_dots(tmp_path):
    file = tmp_path / "judges.py"
    file.write_text(
        "class Judge:\n    def __init__(self, value=2.0):\n        self.value = value\n"
        "    def __call__(self, response):\n        return self.value\n"
        "    def half(self, response):\n        return self.value / 2\n\njudge = Judge(6.0)\n"
    )
    config = RewardsConfig(functions=[f"{file}:Judge", f"{file}:judge.half", f"{file}:judge"])
    rewards = build_rewards(config)
    (row,) = trajectories = rows("x")
    rewards.score(trajectories)
    rewards.close()
    assert row.scores == {"Judge": 2.0, "half": 3.0, "Judge_2": 6.0}


def test_built_in_functions_that_compare_need_an_answer_in_every_row_before_the_first_step():
    rewards = build_rewards(RewardsConfig(functions=["exact"]))
    rewards.check_data([Prompt("a", answer="1")])
    with pytest.raises(
        ValueError, match="'exact': row 1 of set, column 'answer' .*: need a reference answer .* got none"
    ):
        rewards.check_data([Prompt("a", answer="1"), Prompt("b", source="set", index=1)])


def test_a_dry_run_calls_each_function_once_and_says_the_value_or_the_failure():
    codec = TextCodec(character_tokenizer())
    rewards = rewards_of(length, lambda completions, **_: [None])
    assert rewards.try_out([Prompt("q", answer="abc", index=4)], codec) == [
        "reward function length: 3 for its reference answer to row 4",
        "reward function lambda: not applicable for its reference answer to row 4",
    ]
    with pytest.raises(ValueError, match=r"'raising' fails for an empty answer to row 0: ZeroDivisionError"):
        rewards_of(length, raising).try_out([Prompt("q")], codec)


def test_what_a_function_logs_goes_to_the_samples_and_the_metrics():
    def graded(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(c) for c in completions])
        log_extra("object", [object] * len(completions))
        log_metric("longest", max(map(len, completions)))
        return [1.0, 2.0]

    async def graded_later(completions, log_metric=None, **kwargs):
        log_metric("rows", torch.tensor(len(completions)))
        return [0.0, 0.0]

    first, second = scored(rows("ab", "a"), graded, graded_later)
    assert (first.extras["length"], second.extras["length"]) == (2, 1)
    assert second.extras["object"] == "<class 'object'>"
    assert first.logged == second.logged == {"longest": 2.0, "rows": 2.0}
    metrics = collection_metrics([[first, second]])
    assert (metrics["logged/longest"], metrics["score/graded"]) == (2.0, 1.5)
    assert sample_row(first, TextCodec(character_tokenizer()))["extras"] == first.extras


def test_a_logged_column_needs_one_value_per_row():
    def wrong(completions, log_extra):
        log_extra("length", [1])
        return [0.0] * len(completions)

    first, _ = scored(rows("ab", "a"), wrong)
    assert (
        first.outcome == "reward_error" and "need one value per row in log_extra, got 1 for 2" in first.detail
    )


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
    functions = rewards_of(RewardFunction(lambda response: 1.0, place=place))
    functions.score(rows("x"))
    seconds = []
    for _ in range(20):
        trajectories = rows(*["x"] * 512)
        start = time.perf_counter()
        functions.score(trajectories)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < limit_s


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
        [RewardFunction(lambda trajectory: {"reward": 1.0, "turn_rewards": values})],
        timeout_s=5,
        max_failed_share=1,
    )
    trajectory = two_turns()
    functions.score([trajectory])
    assert (trajectory.reward, trajectory.outcome, trajectory.turn_rewards) == (None, outcome, [])
