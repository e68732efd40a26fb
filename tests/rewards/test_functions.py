import math
import time

import pytest

from tests.rewards.answers import by_trajectory, length, rewards_of, rows, scored, slow_length
from verl.config.data import RewardsConfig
from verl.data.batch import Trajectory
from verl.rewards.functions import RewardFunctions, build_rewards, load_function
from verl.rewards.reward_function import RewardFunction
from verl.utils.sampling_types import Prompt


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
        rows("ab"), lambda p, r: {"reward": 1, "accuracy": True}, lambda p, r: {"reward": 2, "accuracy": 0.0}
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
