"""Tests of the tasks of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl.data.tasks.answer_tasks import ANSWER_TASKS as TASKS
from verl.data.tasks.answer_tasks import Task
from verl.data.tasks.table import write_jsonl

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def right_answer(name: str, prompt: str) -> str:
    """The answer worked out from the prompt alone."""
    if name == "digits":
        first, second, modulus, count = (int(n) for part in prompt.split(":") for n in part.split(","))
        sequence = [first, second]
        while len(sequence) < count + 2:
            sequence.append((2 * sequence[-1] - sequence[-2]) % modulus)
        return ",".join(str(n) for n in sequence[2:])
    body = prompt.removesuffix("=")
    return {
        "copy-8": lambda: body,
        "reverse-8": lambda: "".join(reversed(body)),
        "sort-6": lambda: "".join(sorted(body)),
        "add-2": lambda: str(sum(int(n) for n in body.split("+"))),
    }[name]()


@every_task
def test_every_answer_is_right_and_fits_with_its_end_token(task: Task):
    rows = task.rows("train") + task.rows("test")
    assert all(row["answer"] == right_answer(task.name, row["prompt"]) for row in rows)
    assert max(len(row["answer"]) for row in rows) + 1 == task.max_tokens


@every_task
def test_held_out_prompts_are_never_trained_on_whatever_the_seed(task: Task):
    test = {row["prompt"] for row in task.rows("test", seed=3)}
    assert len(test) == task.num_test and task.rows("test", seed=3) == task.rows("test")
    for seed in (0, 1):
        train = {row["prompt"] for row in task.rows("train", seed)}
        assert len(train) == task.num_train and not train & test


@every_task
def test_the_numbers_of_a_task_are_different_prompts(task: Task):
    numbers = range(min(task.num_questions, 20_000))
    assert len({task.question(number)[0] for number in numbers}) == len(numbers)
    assert task.num_train + task.num_test <= task.num_questions


def test_the_held_out_prompts_stay_the_same_in_every_version():
    first = {name: task.rows("test")[0] for name, task in TASKS.items()}
    assert first == {
        "copy-8": {"prompt": "dcbfbhbb=", "answer": "dcbfbhbb"},
        "reverse-8": {"prompt": "beedbdee=", "answer": "eedbdeeb"},
        "sort-6": {"prompt": "358105=", "answer": "013558"},
        "add-2": {"prompt": "69+23=", "answer": "92"},
        "digits": {"prompt": "7,3:9,4", "answer": "8,4,0,5"},
    }


@every_task
def test_another_seed_draws_another_training_set(task: Task):
    assert task.rows("train", 0) != task.rows("train", 1)
    assert task.rows("train", 1) == task.rows("train", 1)


def test_a_split_is_written_as_jsonl(tmp_path: Path):
    assert write_jsonl(TASKS["add-2"], "test", tmp_path / "test.jsonl") == 512
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == TASKS["add-2"].rows("test")
