"""Functions of single rows: of their own, of their data set, and of the settings."""

import pytest

from verl.config.checks.function_options import option_parameters
from verl.config.data import RewardsConfig, WeightedChoice
from verl.data.loading.row_prompts import REACHING
from verl.data.trajectory import Trajectory
from verl.rewards.data_sources import DATA_SOURCES, choices_of
from verl.rewards.functions import build_rewards
from verl.rewards.library.reward_table import REWARDS, checked_options, load_function
from verl.utils import user_code
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, character_tokenizer


def chosen(name, **options):
    return WeightedChoice.model_validate({"name": name, **options})


def prompt(reward=None, *, answer="ab", source="set", index=0):
    return Prompt("q", answer=answer, source=source, index=index, reward=reward)


def scored(prompts, text, *functions, **settings):
    rewards = build_rewards(RewardsConfig(functions=functions, **settings), prompts=prompts)
    rewards.check_data(prompts)
    rows = [Trajectory(p, [1], [2], [True], None, [0], i, text=text) for i, p in enumerate(prompts)]
    rewards.attempt(rows)
    rewards.close()
    return rewards, rows


def test_a_row_has_the_function_of_its_own_in_place_of_those_of_the_settings():
    own = chosen("prefix_share", weight=2.0)
    rewards, (common, single) = scored([prompt(), prompt(own)], "a", "exact", "position_share")
    assert rewards.names == ["exact", "position_share", "prefix_share"]
    assert (common.scores["position_share"], common.reward) == (0.5, 0.5)
    assert (single.scores, single.reward) == ({"prefix_share": 0.5, "accuracy": 0.0}, 1.0)
    assert single.parts == [(0.0, 0.0), (0.0, 0.0), (2.0, 0.5)]


def test_equal_choices_are_one_function_and_different_ones_have_names_of_their_own():
    choices = [chosen("exact"), chosen("exact", normalize="loose"), chosen("exact", normalize="loose")]
    rewards, rows = scored([prompt(c) for c in choices], "AB")
    assert rewards.names == ["exact", "exact_2"]
    assert [row.scores for row in rows] == [
        {"exact": 0.0, "accuracy": 0.0},
        {"exact_2": 1.0, "accuracy": 1.0},
        {"exact_2": 1.0, "accuracy": 1.0},
    ]


def test_every_function_is_checked_with_its_own_rows_before_the_first_step():
    rewards = build_rewards(RewardsConfig(functions=("exact",)))
    rewards.check_data([prompt(), prompt(chosen("repetition"), answer=None)])
    with pytest.raises(ValueError, match="'position_share': row 4 of set.*got none"):
        rewards.check_data([prompt(chosen("position_share"), answer=None, index=4)])
    with pytest.raises(ValueError, match="reward of row 0 of set: .*nearest is prefix_share"):
        rewards.check_data([prompt(chosen("prefixshare"))])
    with pytest.raises(ValueError, match="'code' cannot be used: .*sandbox"):
        rewards.check_data([prompt(chosen("code"))])


def test_a_run_whose_rows_all_have_their_own_needs_no_functions_and_a_row_without_is_named():
    rewards = build_rewards(RewardsConfig(), prompts=[prompt(chosen("exact"))])
    with pytest.raises(ValueError, match="1 of 2 rows have no reward function, the first is row 7 of set"):
        rewards.check_data([prompt(chosen("exact")), prompt(index=7)])


def test_a_function_that_appears_later_costs_its_own_rows_alone():
    rewards = build_rewards(RewardsConfig(functions=("exact",)))
    rows = [
        Trajectory(p, [1], [2], [True], None, [0], 0, text="ab")
        for p in (prompt(), prompt(chosen("exakt")), prompt(chosen("prefix_share")))
    ]
    rewards.attempt(rows)
    assert [row.reward for row in rows] == [1.0, None, 1.0]
    assert rows[1].outcome == "reward_error" and "the nearest is exact" in rows[1].detail


def test_a_dry_run_tries_each_function_on_its_own_first_row():
    prompts = [prompt(), prompt(chosen("prefix_share"), index=1)]
    rewards = build_rewards(RewardsConfig(functions=("exact",)))
    assert rewards.try_out(prompts, TextCodec(character_tokenizer())) == [
        "reward function exact: 1 for its reference answer to row 0",
        "reward function prefix_share: 1 for its reference answer to row 1",
    ]


def test_the_data_set_chooses_the_function_where_the_settings_say_so():
    rows = [
        prompt(source="searchR1_nq", answer={"target": ["The Beatles", "Beatles"]}),
        prompt(chosen("exact")),
    ]
    rewards, (question, own) = scored(rows, "<answer>beatles!</answer>", chosen("by_data_source", weight=0.5))
    assert (question.reward, question.scores["accuracy"], own.reward) == (0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"got data_source 'mine'; known are openai/gsm8k"):
        rewards.check_data([prompt(source="mine")])
    with pytest.raises(ValueError, match="'code' cannot be used"):
        rewards.check_data([prompt(source="taco")])


def test_without_functions_public_data_sets_choose_and_that_is_said():
    notes = []
    rows = [prompt(source="searchR1_nq", answer={"target": ["x"]})]
    rewards = build_rewards(RewardsConfig(), prompts=rows, note=notes.append)
    rewards.check_data(rows)
    assert notes == ["no reward function is named, so they are chosen by the data set (searchR1_nq: exact)"]
    with pytest.raises(ValueError, match="need at least one reward function, got none"):
        build_rewards(RewardsConfig(), prompts=[*rows, prompt(source="mine")])


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("openai/gsm8k", ["gsm8k"]),
        ("openai/gsm8k:main", ["gsm8k"]),
        ("HuggingFaceH4/MATH-500", ["math"]),
        ("math_dapo", ["math"]),
        ("aime_2025", ["math"]),
        ("numina_cn_k12", ["math"]),
        ("hiyouga/geometry3k", ["math", "format"]),
        ("codeforces", ["code"]),
    ],
)
def test_names_of_public_data_sets(source, names):
    assert [choice.name for choice in choices_of(source)] == names
    assert choices_of(f"my_{source}") is None


def test_every_function_of_the_table_exists_and_takes_its_defaults():
    for name, entry in REWARDS.items():
        parts = [part for part in (entry.check, entry.prepare, entry.build) if part]
        assert all(user_code.load_function(part, user=name, keeps_class=True) for part in parts)
        if entry.function:
            checked_options(name, load_function(name), {})
    assert {choice.name for found in DATA_SOURCES.values() for choice in found} <= REWARDS.keys()


def test_what_reaches_out_of_the_run_is_not_for_data_to_choose():
    places = {"path", "address", "schema_file", "url", "file", "folder"}
    for name, entry in REWARDS.items():
        if entry.refusal:
            continue
        options = option_parameters(load_function(name)).keys() if entry.function else {"address"}
        found = {option for option in options if option in places or option.endswith(("_file", "_path"))}
        assert bool(found) == (name in REACHING), name
        assert not REACHING.get(name) or REACHING[name] == found


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("similarity", {"threshold": 2}, "'similarity', option threshold: .*less than or equal to 1; got 2"),
        ("similarity", {"treshold": 1}, "got treshold; the nearest is threshold"),
        ("exact", {"extract": "box"}, "'exact', option extract: .*'boxed'.*got 'box'"),
        ("format", {"tags": "think"}, "'format', option tags: .*valid list"),
        ("regex", {"pattern": "("}, "need a regular expression"),
    ],
)
def test_options_are_checked_when_the_function_is_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(RewardsConfig(functions=(chosen(name, **options),)))


def test_a_column_does_not_take_the_place_of_an_option():
    row = Prompt("q", answer="a", columns={"tags": ["x"], "normalize": "loose", "extract": "boxed"})
    rewards = build_rewards(RewardsConfig(functions=("exact", "format")))
    trajectory = Trajectory(row, [1], [2], [True], None, [0], 0, text="a")
    rewards.attempt([trajectory])
    rewards.close()
    assert trajectory.scores == {"exact": 1.0, "format": 0.0, "accuracy": 1.0}
