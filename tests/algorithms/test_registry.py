"""From a choice to a function: what binds, what it then reads, and every way to get it wrong."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.registry import UserFunctionError, bind
from verl.config.fields import Choice
from verl.data.columns import readable_by


def bound(table, name, **options):
    return bind(Choice(name=name, **options), table)


def doubled(rewards, *, scale: float = 2.0):
    """A user's function."""
    return rewards * scale


@pytest.fixture
def user_module(monkeypatch):
    module = ModuleType("user_functions")
    module.doubled, module.constant = doubled, 3
    monkeypatch.setitem(sys.modules, "user_functions", module)
    return module


def test_a_choice_becomes_a_function_of_columns_by_name():
    advantage = bound(ADVANTAGES, "grpo", normalize_std=False)
    assert advantage.columns == ("rewards", "group_ids")
    columns = {
        "values": torch.zeros(2),
        "group_ids": torch.tensor([0, 0]),
        "rewards": torch.tensor([1.0, 0.0]),
    }
    assert advantage(columns).tolist() == [0.5, -0.5]


def test_a_users_function_binds_by_module_and_name(user_module):
    function = bound(ADVANTAGES, "user_functions:doubled", scale=3)
    assert function.columns == ("rewards",)
    assert function({"rewards": torch.ones(2)}).tolist() == [3.0, 3.0]


def test_a_users_function_may_be_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def halved(rewards, *, scale: float = 0.5):\n    return rewards * scale\n")
    assert bound(ADVANTAGES, f"{file}:halved")({"rewards": torch.ones(2)}).tolist() == [0.5, 0.5]
    file.write_text("import no_such_package_of_mine\n")
    with pytest.raises(ValueError, match=r"broken.py:f: cannot import .*No such file"):
        bound(ADVANTAGES, f"{tmp_path / 'broken.py'}:f")


def test_an_error_in_a_users_function_names_it_with_file_and_line(user_module):
    user_module.fails = lambda rewards: rewards / rewards.no_such_method()
    with pytest.raises(UserFunctionError, match=rf":fails fails: AttributeError.*{__file__}:\d+"):
        bound(ADVANTAGES, "user_functions:fails")({"rewards": torch.ones(2)})


def test_a_missing_column_is_named_with_the_function_that_reads_it():
    with pytest.raises(
        ValueError, match="gae reads the columns token_rewards, values, mask; there is no 'values'"
    ):
        bound(ADVANTAGES, "gae")(
            {"token_rewards": torch.zeros(1, 1), "mask": torch.ones(1, 1, dtype=torch.bool)}
        )


def test_an_unknown_name_shows_all_and_the_nearest():
    with pytest.raises(
        ValueError, match="need one of grpo, rloo, .* or .*, got 'grppo'; did you mean 'grpo'?"
    ):
        bound(ADVANTAGES, "grppo")


def test_an_unknown_option_shows_the_valid_ones_with_defaults_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"clip_high: .*float.* = 0\.2.*got 'clip_hi'; did you mean 'clip_high'?"
    ):
        bound(POLICY_LOSSES, "ppo_clip", clip_hi=0.3)
    with pytest.raises(ValueError, match="rloo takes no options; got 'eps'"):
        bound(ADVANTAGES, "rloo", eps=1.0)


def test_a_missing_option_without_default_says_what_to_write():
    with pytest.raises(
        ValueError, match=r"'length' has no default; write \{name: seq_mean_token_sum_norm, length: ...\}"
    ):
        bound(AGGREGATIONS, "seq_mean_token_sum_norm")


@pytest.mark.parametrize("value", ["0.2", True, None, [0.2]])
def test_an_option_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match="not of type float"):
        bound(POLICY_LOSSES, "ppo_clip", clip_low=value)


def test_whole_numbers_are_numbers_and_none_is_taken_where_it_is_offered():
    assert bound(POLICY_LOSSES, "ppo_clip", clip_low=0, dual_clip=None).options == {
        "clip_low": 0,
        "dual_clip": None,
    }
    with pytest.raises(ValueError, match="not of type int"):
        bound(AGGREGATIONS, "seq_mean_token_sum_norm", length=10.5)


def test_types_are_read_from_evaluated_annotations_too():
    def function(rewards, *, scale=1.0, anything=None):
        return rewards

    function.__annotations__ = {"scale": float | None, "anything": list[int]}
    assert bound({"f": function}, "f", scale=None, anything="unchecked").options == {
        "scale": None,
        "anything": "unchecked",
    }
    with pytest.raises(ValueError, match="not of type float | None"):
        bound({"f": function}, "f", scale="2")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda *columns: columns, r"takes \*columns"),
        (lambda rewards, **options: rewards, r"takes \*\*options"),
        (lambda rewards, scale=2.0: rewards, r"a column has no default, got scale=2.0; put \*"),
    ],
)
def test_a_function_must_spell_out_columns_and_options(function, reason):
    with pytest.raises(ValueError, match=reason):
        bound({"f": function}, "f")


def test_a_misspelt_column_is_found_before_the_first_call():
    with pytest.raises(ValueError, match="reads 'reward', which is no column; did you mean 'rewards'?"):
        bind(Choice(name="f"), {"f": lambda reward: reward}, columns=readable_by("advantage"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:f", "cannot import 'no_such_module'"),
        (
            "user_functions:doubles",
            "'doubles' in 'user_functions', there is none; did you mean 'doubled'?",
        ),
        ("user_functions:constant", "need a function 'constant' in 'user_functions', there is int"),
    ],
)
def test_a_users_function_that_is_not_there_is_an_error_with_its_name(user_module, name, reason):
    with pytest.raises(ValueError, match=reason):
        bound(ADVANTAGES, name)
