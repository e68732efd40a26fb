"""Runs by epochs: the steps that the rows give, wherever steps are read, and the pass that a step is in."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from tests.trainer.test_preference import preference
from tests.trainer.test_sft import sft
from tests.training import logged, toy_config, toy_trainer, write_prompts
from verl.config import load_config, load_sft_config, make_trainer_config
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer


def test_the_steps_of_every_kind_of_run_are_those_of_its_epochs(letters, tmp_path):
    made = [
        sft(letters, tmp_path / "sft", "epochs=2.5"),
        preference(letters, tmp_path / "pairs", "epochs=1"),
        toy_trainer("grpo", letters, tmp_path / "rl", "epochs=3"),
    ]
    # 12 rows by 4, 24 pairs by 6, 12 prompts by 4.
    assert [trainer.config.steps for trainer in made] == [8, 4, 9]


def test_the_last_step_reads_what_the_epochs_are_rounded_up_to(letters, tmp_path):
    trainer = sft(letters, tmp_path, "epochs=1", "rows_per_step=5")
    history = trainer.fit()
    assert [metrics["epoch"] for metrics in history] == pytest.approx([5 / 12, 10 / 12, 15 / 12])
    assert sft(letters, tmp_path / "tenth", "epochs=0.25", "rows_per_step=3").config.steps == 1


def test_the_learning_rate_falls_to_its_end_over_the_steps_of_the_epochs(letters, tmp_path):
    given = [
        "policy.optimizer.schedule=linear",
        "policy.optimizer.min_lr_ratio=0",
        "policy.optimizer.lr=0.01",
    ]
    by_epochs = sft(letters, tmp_path / "epochs", "epochs=2", *given)
    by_steps = sft(letters, tmp_path / "steps", "steps=6", *given)
    rates = [[metrics["lr"] for metrics in trainer.fit()] for trainer in (by_epochs, by_steps)]
    assert rates[0] == rates[1] and rates[0][-1] == pytest.approx(0.01 / 6)


def test_a_run_by_epochs_goes_on_with_more_of_them(letters, tmp_path):
    sft(letters, tmp_path, "epochs=1").fit()
    more = sft(letters, tmp_path, "epochs=2")
    assert [metrics["epoch"] for metrics in more.fit()] == pytest.approx([4 / 3, 5 / 3, 2])
    assert [line["epoch"] for line in logged(tmp_path / "run")] == pytest.approx([i / 3 for i in range(1, 7)])


def test_steps_beside_epochs_are_refused_unless_a_file_is_overridden():
    with pytest.raises(ValueError, match="steps.* would be ignored: epochs is set and decides the number of"):
        load_sft_config(None, ["epochs=1", "steps=5"])
    assert load_config({"steps": 5}, ["epochs=1"]).epochs == 1
    with pytest.raises(ValueError, match="need a number of steps for kl_coef"):
        make_trainer_config("ppo", epochs=1, kl_coef=(0.1, 0.0))


def test_settings_are_compared_with_the_steps_once_these_are_known(letters, tmp_path):
    config = toy_config("ppo", letters, tmp_path, "epochs=2", "critic.warmup_steps=3")
    with pytest.raises(ValueError, match="critic.warmup_steps below steps, got 3 and 3"):
        Trainer(config, console=Console(file=io.StringIO()))


def test_epochs_need_rows(letters):
    with pytest.raises(ValueError, match="need data.train"):
        SFTTrainer(load_sft_config(None, [f"policy.path={letters}", "epochs=1", "device=cpu"]))


def test_a_data_set_shorter_than_a_step_is_said(letters, tmp_path):
    data = write_prompts(tmp_path / "few.jsonl", 3)
    trainer = sft(letters, tmp_path, f"data.train={data}", "rows_per_step=6", "epochs=4")
    assert trainer.config.steps == 4
    assert (
        "data.train has 3 usable rows, fewer than rows_per_step 6: a step takes all of them" in trainer.notes
    )
    trainer.load_train_data()
    assert trainer.step()["tokens"] == 3 * 4 + 3 * 4


def test_bad_rows_are_found_before_the_model_is_loaded(letters, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "ab="}) + "\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in letters.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="1 of 1 rows cannot be used"):
        sft(broken, tmp_path, f"data.train={tmp_path / 'bad.jsonl'}")
