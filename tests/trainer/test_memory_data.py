"""Trainers on rows in memory: the same run as on a file, resumed on the same rows alone."""

from __future__ import annotations

import io
import json

import datasets
import pandas as pd
import pytest
from rich.console import Console

from tests.training import toy_config, write_prompts
from verl.config import load_run
from verl.config.run import PreferenceConfig, RewardModelConfig, SFTConfig
from verl.trainer.preference import PreferenceTrainer
from verl.trainer.reward_model import RewardModelTrainer
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer

PAIRS = [{"prompt": f"{a}=", "chosen": a, "rejected": "hh"} for a in "abcdefg"]
LEARNED = {
    SFTTrainer: (SFTConfig, "rows_per_step=2", [{"prompt": f"{a}=", "answer": a} for a in "abcde"]),
    PreferenceTrainer: (PreferenceConfig, "pairs_per_step=2", PAIRS),
    RewardModelTrainer: (RewardModelConfig, "pairs_per_step=2", PAIRS),
}


def config_without_data(letters, folder, *overrides):
    return toy_config("grpo", letters, folder, "data.train=null", *overrides)


def rl(letters, folder, *overrides, **given):
    config = config_without_data(letters, folder, *overrides)
    return Trainer(config, console=Console(file=io.StringIO()), **given)


def rewards_of(history):
    return [metrics["reward"] for metrics in history]


def test_a_run_on_rows_in_memory_is_that_on_their_file_and_resumes(letters, tmp_path):
    rows = [json.loads(line) for line in write_prompts(tmp_path / "prompts.jsonl").read_text().splitlines()]
    quiet = Console(file=io.StringIO())
    expected = rewards_of(Trainer(toy_config("grpo", letters, tmp_path / "file"), console=quiet).fit())
    begun = rl(letters, tmp_path, "steps=2", train_dataset=datasets.Dataset.from_list(rows)).fit()
    # Another form of the same rows.
    rest = rl(letters, tmp_path, "steps=3", train_dataset=pd.DataFrame(rows)).fit()
    assert rewards_of(begun) + rewards_of(rest) == pytest.approx(expected)
    with pytest.raises(ValueError, match="fingerprint was"):
        rl(letters, tmp_path, "steps=4", train_dataset=[*rows[1:], {"prompt": "b=", "answer": "b"}]).fit()


def test_held_out_rows_in_memory_are_evaluated(letters, tmp_path):
    rows = [{"prompt": "a=", "answer": "a"}]
    given = {"train_dataset": rows, "test_dataset": rows * 2}
    trainer = rl(letters, tmp_path, "data.test=memory", "evaluation.every_steps=1", "steps=1", **given)
    assert "eval/reward" in trainer.fit()[-1]
    assert trainer.held_out.startswith("2 prompts")
    config = trainer.config.data
    assert (config.train, config.test) == ("memory", "memory")


def test_rows_are_given_once(letters, tmp_path):
    with pytest.raises(ValueError, match="need train_dataset or data.train, got both"):
        Trainer(toy_config("grpo", letters, tmp_path), train_dataset=["a="])
    with pytest.raises(ValueError, match="need train_dataset of the trainer for data.train=memory, got none"):
        Trainer(toy_config("grpo", letters, tmp_path, "data.train=memory"))
    with pytest.raises(TypeError, match="need a datasets.Dataset"):
        rl(letters, tmp_path, train_dataset=3)


@pytest.mark.parametrize("kind", LEARNED)
def test_the_other_trainers_take_rows_in_memory(kind, letters, tmp_path):
    config, per_step, rows = LEARNED[kind]
    overrides = [f"policy.path={letters}", f"output_dir={tmp_path}", "device=cpu", per_step]
    settings = load_run(config, {"steps": 1, "tracking": {"sinks": ["jsonl"]}}, overrides)
    trainer = kind(settings, train_dataset=datasets.Dataset.from_list(rows), test_dataset=rows[:3])
    (metrics,) = trainer.fit()
    assert {"loss", "eval/loss"} <= metrics.keys()
    with pytest.raises(ValueError, match=r"train_dataset, row 1: need a"):
        kind(settings, train_dataset=[rows[0], {"prompt": "a="}])


def level_reward(prompt, response, answer, level):
    return float(len(response) > 0) + level


def test_collected_rows_have_their_columns(letters, tmp_path):
    settings = ["rewards.functions=[]", "rewards.isolation=thread"]
    trainer = rl(letters, tmp_path, *settings, reward_fn=level_reward)
    rows = [{"prompt": f"{a}=", "answer": a, "level": 10} for a in "ab"]
    for form in (rows, pd.DataFrame(rows)):
        data = trainer.collect_data(form)
        assert {t.reward >= 10 for t in data.trajectories} == {True}
        assert [t.prompt.content for t in data.trajectories[::4]] == ["a=", "b="]
    with pytest.raises(ValueError, match="prompts, row 1: need a column 'prompt'"):
        trainer.collect_data([rows[0], {"text": "a"}])
    with pytest.raises(TypeError, match="got a stream; take some of it"):
        trainer.collect_data(datasets.Dataset.from_list(rows).to_iterable_dataset())
