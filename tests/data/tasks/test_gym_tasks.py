"""Tests of the generators of reasoning-gym as sources of rows."""

from __future__ import annotations

import json

import pytest

from verl.config.data import DataSource, RewardsConfig
from verl.config.run import TrainerConfig
from verl.data.reading.row_stream import open_rows
from verl.data.reading.sources import reward_of_tasks, sources_of
from verl.data.tasks.gym_tasks import COLUMN, NOT_TASKS, gym_rows, gym_score, plain, restored
from verl.trainer.rl_trainer import with_task_rewards

pytest.importorskip("reasoning_gym")
factory = __import__("reasoning_gym.factory", fromlist=["DATASETS"])

# Two rows of these take seconds with the default configuration.
SMALLER = {
    "futoshiki": {"min_board_size": 4, "max_board_size": 4},
    "knight_swap": {"min_nodes": 6, "max_nodes": 6, "min_pieces": 2, "max_pieces": 2},
    "sudoku": {"min_empty": 30, "max_empty": 30},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
}
# The library has no answer of its own to these; what a model answers is scored all the same.
WITHOUT_ANSWER = {"boxnet", "rush_hour"}
SHORT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def questions(name: str, split: str, **options) -> list[str]:
    return [row["prompt"][0]["content"] for row in gym_rows(name, options, split)]


@pytest.mark.parametrize("name", sorted(factory.DATASETS.keys() - NOT_TASKS))
def test_every_generator_gives_rows_whose_own_answer_is_right(name):
    for row in gym_rows(name, {"size": 2, **SMALLER.get(name, {})}, "train"):
        again = json.loads(json.dumps(row))  # as checkpoints and records keep it
        assert again == row and restored(again[COLUMN]["entry"]) == restored(row[COLUMN]["entry"])
        if name in WITHOUT_ANSWER:
            assert row["answer"] is None
        else:
            assert gym_score(again[COLUMN], row["answer"]) == 1.0
        # Whatever a model writes is no error.
        assert all(0 <= gym_score(again[COLUMN], text) <= 1 for text in ("", "nonsense", "{}", "[1]"))


def test_a_generator_that_is_no_task_says_why():
    assert NOT_TASKS.keys() == {"composite"}
    with pytest.raises(ValueError, match="several sources, each with a weight"):
        questions("composite", "train")


def test_no_question_is_in_both_splits_whatever_seeds_and_sizes():
    test = questions("chain_sum", "test", **SHORT, seed=5, size=40)[:30]
    assert len(set(test)) == 30
    for seed in (0, 1, 5):
        train = questions("chain_sum", "train", **SHORT, seed=seed, size=150)
        assert len(train) == len(set(train)) and not set(train) & set(test)


def test_a_seed_draws_rows_of_its_own_and_the_same_ones_each_time():
    first, second = (questions("chain_sum", "train", seed=seed, size=50) for seed in (0, 1))
    assert first == questions("chain_sum", "train", seed=0, size=50)
    assert len(set(first) & set(second)) < 3


def test_a_generator_with_few_questions_gives_each_once():
    few = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    rows = questions("chain_sum", "train", **few, size=50) + questions("chain_sum", "test", **few, size=50)
    assert 5 < len(rows) == len(set(rows)) < 50


def test_a_level_of_the_curriculum_sets_what_options_leave_open():
    easy, hard = (questions("spell_backward", "train", level=level, size=30) for level in (0, 4))
    assert max(map(len, easy)) < max(map(len, hard))
    assert questions("spell_backward", "train", level=4, max_word_len=3, size=2)
    with pytest.raises(ValueError, match="need a level from 0 to 4, got 7"):
        questions("spell_backward", "train", level=7)
    with pytest.raises(ValueError, match="has no curriculum"):
        questions("gsm_symbolic", "train", level=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "the nearest is task:reasoning-gym/chain_sum, and there are ab, "),
        (
            "chain_sum",
            {"max_term": 3},
            "the nearest is max_terms, and there are size, seed, level",
        ),
        ("chain_sum", {"max_terms": 1}, "max_terms must be >= min_terms"),
        ("chain_sum", {"max_terms": "many"}, "does not take"),
        ("chain_sum", {"size": 0}, "need a whole number from 1 for size, got 0"),
        ("chain_sum", {"seed": True}, "need a whole number from 0 for seed, got True"),
    ],
)
def test_a_mistake_names_what_there_is(name, options, message):
    with pytest.raises(ValueError, match=message):
        questions(name, "train", **options)


def test_a_source_of_the_settings_is_read_and_brings_its_reward():
    source = DataSource(path="task:reasoning-gym/chain_sum", options={**SHORT, "size": 3})
    (_, first), *more = open_rows(source, "train")
    assert first["answer"].lstrip("-").isdigit() and len(more) == 2
    assert reward_of_tasks(sources_of(["task:reasoning-gym/gcd", source])) == "reasoning_gym"
    assert reward_of_tasks(sources_of(["task:reasoning-gym/gcd", "task:add-2"])) is None
    with pytest.raises(ValueError, match="task:add-2 has no options, got size"):
        open_rows(DataSource(path="task:add-2", options={"size": 3}), "train")


def test_tasks_that_differ_in_their_reward_each_bring_their_own():
    sources = ["task:add-2", {"path": "task:reasoning-gym/gcd"}, {"path": "task:digits", "reward": "exact"}]
    config = TrainerConfig(data={"train": sources, "test": "task:reasoning-gym/lcm"})
    data = with_task_rewards(config).data
    assert [one.reward.name for one in data.train] == ["exact", "reasoning_gym", "exact"]
    assert data.test[0].reward.name == "reasoning_gym"
    alike = TrainerConfig(data={"train": "task:add-2", "test": "task:sort-6"})
    assert with_task_rewards(alike) is alike
    given = config.model_copy(update={"rewards": RewardsConfig(functions=["exact"])})
    assert with_task_rewards(given) is given


def test_a_scoring_that_fails_on_an_answer_is_0_and_on_the_row_itself_an_error():
    (row,) = gym_rows("boxnet", {"size": 1}, "train")
    assert gym_score(row[COLUMN], "7") == 0  # a TypeError in the library
    with pytest.raises(KeyError, match="answer"):
        gym_score({**row[COLUMN], "entry": {"question": "?"}}, "{}")


def test_values_survive_json_with_their_types():
    for value in ({1: (2, [3, None])}, {"tuple": 1}, {"items": [1]}, [{"a": ((),)}], {}):
        assert restored(json.loads(json.dumps(plain(value)))) == value
