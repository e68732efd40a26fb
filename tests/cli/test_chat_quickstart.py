"""Tests of the quickstart of a chat model, with a tiny random one in its place."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace

import pytest
from rich.console import Console

from verl.cli.chat_quickstart import DEMOS, demo_config, learn, next_commands
from verl.cli.main import main
from verl.config.loader import load_config
from verl.data.reading.sources import read_rows
from verl.engines.hf.pretrained import make_tiny_model

SMALLER = (
    "steps=2",
    "prompts_per_step=2",
    "samples_per_prompt=4",
    "sampling.max_tokens=4",
    "policy.lora.rank=4",
    "evaluation.prompts=3",
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder and the output of a demo of two steps."""
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("quickstart") / "a folder"
    make_tiny_model(folder / "tiny", hidden=32, layers=1)
    console = Console(file=io.StringIO(), width=100)
    result = learn(folder, str(folder / "tiny"), demo=DEMOS["chain_sum"], console=console, overrides=SMALLER)
    return folder, result, console.file.getvalue()


def test_a_demo_shows_the_answers_before_and_after_and_where_the_model_is(shown):
    folder, result, text = shown
    assert result.keys() == {"accuracy_before", "accuracy_after", "seconds"}
    for title in ("1. The model as it comes", "2. 2 steps of GRPO", "3. What it learned"):
        assert title in text
    assert "before: accuracy 0.000 on 3 prompts" in text and "after:  accuracy" in text
    for name in ("run/model/config.json", "run/adapter/adapter_config.json", "accuracy.png"):
        assert (folder / name).exists() and name.split("/")[-2:][0] in text


def test_the_next_commands_run(shown, monkeypatch, capsys):
    folder, _, text = shown
    commands = next_commands(folder / "run")
    assert commands.strip() in text
    serve, evaluate, train = (line.strip() for line in commands.strip().splitlines()[1:])
    assert shlex.split(serve)[-1] == str(folder / "run" / "model")
    monkeypatch.chdir(folder)
    assert main([*shlex.split(evaluate)[1:], "evaluation.prompts=2"]) == 0
    assert "pass@4" in capsys.readouterr().out
    (folder / "YOURS.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}\n')
    assert main([*shlex.split(train)[1:], "--dry-run"]) == 0
    assert main([*shlex.split(train)[1:], "steps=1", "checkpoint.resume=never"]) == 0
    assert (folder / "run" / "own" / "model").is_dir()


@pytest.mark.parametrize("demo", DEMOS.values(), ids=list(DEMOS))
def test_the_settings_of_every_demo_fit(demo, tmp_path):
    config = demo_config(tmp_path / "run", "a model", demo=demo, seed=3)
    assert config.seed == 3 and config.policy.path == "a model" and config.data.train == config.data.test
    assert config.data.train.path == f"task:reasoning-gym/{demo.task}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "gcd"], "need --model smollm2 beside --task gcd"),
        (["--model", "smollm2", "--algo", "ppo"], "need --algo grpo beside --model"),
        (["--model", "smollm2", "--task", "gdc"], "the nearest is task:reasoning-gym/gcd"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_fetched(arguments, message, capsys):
    pytest.importorskip("reasoning_gym")
    assert main(["quickstart", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_recipe_of_a_demo_is_the_one_of_grpo(tmp_path):
    config = demo_config(tmp_path, "m", demo=DEMOS["chain_sum"], seed=0)
    assert config.algorithm.advantage == load_config("grpo").algorithm.advantage


@pytest.mark.parametrize("task", list(DEMOS))
def test_the_questions_of_each_demo_can_be_made(task, tmp_path):
    pytest.importorskip("reasoning_gym")
    config = demo_config(tmp_path, "somewhere", demo=DEMOS[task], seed=0)
    rows = list(read_rows(config.data.train, "train"))
    assert len(rows) == 500 and all(row["answer"] for _, row in rows[:20])


def test_a_demo_may_teach_the_model_before(tmp_path):
    pytest.importorskip("reasoning_gym")
    make_tiny_model(tmp_path / "tiny", hidden=32, layers=1)
    console = Console(file=io.StringIO(), width=100)
    demo = replace(DEMOS["countdown"], taught_steps=2)
    learn(tmp_path, str(tmp_path / "tiny"), demo=demo, console=console, overrides=SMALLER)
    text = console.file.getvalue()
    assert "2 steps of fine-tuning on solved questions" in text
    written = load_config(str(tmp_path / "run" / "config.yaml"))
    assert written.policy.path == str(tmp_path / "taught" / "model")
