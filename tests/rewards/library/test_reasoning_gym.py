"""Tests of the reward of reasoning-gym's tasks."""

from __future__ import annotations

import pytest

from tests.rewards.answers import rows
from verl.config.data import RewardsConfig
from verl.rewards.functions import build_rewards
from verl.rewards.library.reasoning_gym import answer_in_tags, reasoning_gym

pytest.importorskip("reasoning_gym")
ENTRY = {"question": "4 + 3 =", "answer": "7", "metadata": {}}
COLUMN = {"name": "chain_sum", "options": {}, "entry": ENTRY}


def score(text: str, **options) -> tuple[float, float]:
    return tuple(reasoning_gym(text, COLUMN, **options).values())


def test_the_whole_text_is_the_answer_and_a_right_one_among_words_earns_a_part():
    assert score(" 7\n") == (1, 1) and score("8") == (0, 0)
    assert score("it is 7") == (1 / 7, 0)


def test_tags_and_thoughts_are_left_out():
    assert score("four and three <answer> 7 </answer> done") == (1, 1)
    assert score("<answer>8</answer> no, <answer>7</answer>") == (1, 1)
    assert score("<think>4 + 3</think>\n7") == (1, 1)
    assert score("<think>7</think>8") == score("<think><answer>7</answer></think>8") == (0, 0)
    assert score("<think>4 + 3 = 7", number=True) == (0, 0)  # it was cut off while it thought
    assert score("<final>7</final>", tag="final") == (1, 1)
    assert score("7", need_tag=True) == score("<answer>7", need_tag=True) == (0, 0)
    assert answer_in_tags("</answer><answer>7", "answer") is None


def test_the_last_number_is_the_answer_where_that_is_asked_for():
    for text in ("4 + 3 = 7", "The answer is 7.", "7", "11-7", "4+3=7, of course", "<answer>so 7</answer>"):
        assert score(text, number=True) == (1, 1), text
    for text in ("-7", "4 + 3 = -7", "7 or 8", "seven", "", "1,007"):
        assert score(text, number=True)[1] == 0, text


def test_it_is_a_reward_by_name_in_a_worker_process():
    functions = build_rewards(RewardsConfig(functions=[{"name": "reasoning_gym", "tag": "a"}]))
    trajectories = rows("<a>7</a>", "8", reasoning_gym=COLUMN)
    functions.check_data([trajectories[0].prompt])
    functions.score(trajectories)
    functions.close()
    assert [t.reward for t in trajectories] == [1, 0] and trajectories[0].scores["accuracy"] == 1
    with pytest.raises(ValueError, match="need a column of the data for the parameter reasoning_gym"):
        functions.check_data([rows("7")[0].prompt])
