"""Tasks of several turns: their questions, their teachers, and the rendering of traces."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiny import tiny_codec
from verl.config.data import SFTDataConfig
from verl.data.dataset import load_prompts
from verl.data.examples import answer_row, load_examples
from verl.data.tasks.answer_tasks import ANSWER_TASKS
from verl.data.tasks.episode_tasks import EPISODE_TASKS, EpisodeTask, feedback
from verl.data.tasks.table import TASKS, rows_of, write_jsonl

every_task = pytest.mark.parametrize("task", EPISODE_TASKS.values(), ids=list(EPISODE_TASKS))


@every_task
def test_a_task_is_a_source_of_prompts(task: EpisodeTask):
    prompts, _ = load_prompts(f"task:{task.name}", SFTDataConfig(), split="test")
    assert [{"prompt": p.content, "answer": p.answer} for p in prompts] == task.rows("test")
    assert TASKS[task.name] is task


@pytest.mark.parametrize("name", ["calculator", "search"])
def test_held_out_questions_are_never_trained_on(name):
    task = EPISODE_TASKS[name]
    questions = {split: {r["prompt"][0]["content"] for r in task.rows(split)} for split in ("train", "test")}
    assert [len(questions[split]) for split in ("train", "test")] == [task.num_train, task.num_test]
    assert not questions["train"] & questions["test"] and task.rows("train", 1) != task.rows("train")


def test_a_game_has_all_its_numbers_in_both_splits():
    task = EPISODE_TASKS["guess"]
    assert sorted(int(row["answer"]) for row in task.rows("test")) == list(range(32))
    assert task.rows("train", 3) == task.rows("test")


@every_task
def test_a_teacher_calls_the_tool_and_its_traces_are_learned(task: EpisodeTask, tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    assert write_jsonl(task, "train", path, form="traces") == 4096
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:40]))
    codec = tiny_codec()
    examples, _ = load_examples(str(path), SFTDataConfig(), split="train")
    for example in examples:
        row = answer_row(codec, example, example.answer)
        text = codec.decode_all([*row.prompt_ids, *row.response_ids])
        assert text.startswith(f"T:{task.name}(") and len(text) < 300
        turns = codec.decode_all([t for t, own in zip(row.response_ids, row.mask, strict=True) if own])
        longest = max(len(turn) + 1 for turn in turns.split("<eos>"))
        assert f"[{task.name}(" in turns and longest <= task.max_tokens


def test_the_player_of_guess_is_told_the_truth():
    for trace in EPISODE_TASKS["guess"].traces(count=64):
        number = None
        guesses = re.findall(r'"number": (\d+)', json.dumps(trace["messages"]))
        told = [m["content"] for m in trace["messages"] if m["role"] == "tool"]
        if told[-1] == "yes":
            number = int(guesses[-1])
            assert told == [feedback(int(guess), number) for guess in guesses]
        else:
            assert len(guesses) == 6 and "yes" not in told
    wins = [m["messages"][-1]["content"] == "ok" for m in EPISODE_TASKS["guess"].traces(count=2048)]
    assert 0.6 < sum(wins) / len(wins) < 0.9  # better than 6/32, far from 1


def test_every_product_and_every_code_is_right():
    for row in EPISODE_TASKS["calculator"].rows("test"):
        _, _, left, _, right = row["prompt"][0]["content"].strip("?").split()
        assert int(left) * int(right) == int(row["answer"])
    search = EPISODE_TASKS["search"]
    codes = dict(re.fullmatch(r"The code of (\w+) is (\d+)\.", text).groups() for text in search.documents)
    assert len(codes) == len(search.documents) == 1024
    for row in search.rows("train") + search.rows("test"):
        name = row["prompt"][0]["content"].strip("?").split()[-1]
        assert codes[name] == row["answer"]


def test_a_form_that_a_task_has_not_is_refused():
    assert len(list(rows_of(EPISODE_TASKS["search"], "train", form="documents"))) == 1024
    with pytest.raises(
        ValueError, match="need a task with the texts that the tool searches, got guess"
    ):
        rows_of(EPISODE_TASKS["guess"], "train", form="documents")
    with pytest.raises(ValueError, match="got add-2; there are guess, calculator, search"):
        rows_of(ANSWER_TASKS["add-2"], "train", form="traces")
