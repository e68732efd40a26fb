"""Parts of adapters that need no package of others; the packages themselves: `test_public_environments`."""

from __future__ import annotations

import pytest

from verl.agents.environments.adapters.openenv_env import mcp_text, text_of
from verl.agents.environments.adapters.reasoning_gym_env import ReasoningGymEnvironment
from verl.agents.environments.adapters.text_actions import action_text, marked, named_action, numbers_in
from verl.agents.environments.choices import row_environment

MOVES = ("left", "down", "right", "up")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("right", 2),
        ("not left but Right.", 2),
        ("3", 3),
        ("I am at 12, so 1", 1),
        ("upright", None),
        ("9", None),
        ("", None),
    ],
)
def test_the_last_action_that_a_text_names_is_taken(text, action):
    assert named_action(text, MOVES) == action


def test_an_action_is_in_the_last_tags_or_behind_the_thoughts():
    assert action_text({"content": "<action>a</action> or <action> b </action>?"}) == "b"
    assert action_text({"content": "<think>left?</think> up"}) == "up"
    assert numbers_in("x = -0.5, then 1e-3") == [-0.5, 0.001]


def test_a_coloured_place_of_a_drawing_is_in_brackets():
    assert marked("  \x1b[41mS\x1b[0mFF\nF\x1b[34;1mH\x1b[0mF") == "  [S]FF\nF[H]F"


def test_observations_of_servers_become_texts():
    assert text_of({"echo": "hi", "done": False, "reward": 1, "metadata": {}}) == "hi"
    assert text_of({"board": [1, 2], "hint": "up"}) == "board: [1, 2]\nhint: up"
    assert mcp_text({"data": "wrong", "content": []}) == "wrong"
    assert mcp_text({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == "a\nb"
    assert mcp_text({"data": {"x": 1}}) == '{"x": 1}'


def test_a_wrong_answer_is_told_and_worth_less_the_next_time():
    pytest.importorskip("reasoning_gym")
    environment = ReasoningGymEnvironment("chain_sum", tries=2, discount=0.5)
    row = environment.rows("train", size=1)[0]
    assert environment.reset(seed=0, reasoning_gym=row["reasoning_gym"]) is None
    wrong = environment.step({"content": "<answer>no</answer>"})
    right = environment.step({"content": f"<think>?</think> {row['answer']}"})
    assert (wrong.reward, wrong.is_over, right.reward, right.is_over) == (0.0, False, 0.5, True)


@pytest.mark.parametrize("value", [{"name": "reasoning-gym:chain_sum", "tries": 2, "x": None}, None])
def test_options_of_a_row_are_beside_the_name_or_below_options(value):
    pytest.importorskip("reasoning_gym")
    value = value or '{"name": "reasoning-gym:chain_sum", "options": {"tries": 2}}'
    assert row_environment(value, "environment", given={}).options == {"name": "chain_sum", "tries": 2}
