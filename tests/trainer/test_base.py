"""A whole run: what it leaves on disk, when it evaluates, and that a run in two parts is the same run."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training import engine_of, logged, toy_config, toy_trainer, weights
from verl.config import load_config
from verl.engines.dcp_checkpoint import read_saved
from verl.rewards.library.text_match import position_share
from verl.trainer.checkpoint_store import only_run_in
from verl.trainer.rl_trainer import Trainer

# What a run learned, but not how long it took.
LEARNED = (
    "step",
    "reward",
    "loss",
    "kl",
    "kl_coef",
    "entropy",
    "grad_norm",
    "lr",
    "critic/loss",
    "explained_variance",
)


def fitted(recipe, model, folder, *overrides, **given):
    """A trainer that has run to its end."""
    trainer = toy_trainer(recipe, model, folder, *overrides, **given)
    trainer.fit()
    return trainer


def learned(folder):
    """The metrics of a run's steps, without evaluations."""
    return [
        {name: line[name] for name in LEARNED if name in line}
        for line in logged(folder / "run")
        if "reward" in line
    ]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def assert_same_end(one, other, step):
    """Bitwise equal weights and optimizer states in the checkpoints of a step."""
    name = f"run/checkpoints/step-{step:08d}"
    models = sorted(path.parent.relative_to(one / name) for path in (one / name).rglob("progress.json"))
    assert models
    for model in models:
        states = [read_saved(folder / name / model) for folder in (one, other)]
        assert any(key.startswith("optimizer.") for key in states[0])
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
        progress = [(folder / name / model / "progress.json").read_text() for folder in (one, other)]
        assert progress[0] == progress[1]


def test_a_run_leaves_its_settings_metrics_samples_checkpoints_and_model(letters, tmp_path):
    trainer = fitted(
        "grpo",
        letters,
        tmp_path,
        "tracking.samples_every_steps=2",
        "tracking.num_samples=3",
        "checkpoint.every_steps=2",
    )
    run = tmp_path / "run"
    assert load_config(run / "config.yaml") == trainer.config
    assert [line["step"] for line in logged(run)] == [1, 2, 3]
    assert {"reward", "loss", "seconds", "tokens_per_s", "limit_share", "time/generate_s"} <= logged(run)[
        0
    ].keys()
    # Of the first, the last, and every second step.
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        f"step-00000{step}.jsonl" for step in (1, 2, 3)
    ]
    assert len((run / "samples" / "step-000002.jsonl").read_text().splitlines()) == 3
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_trained_model_is_one_of_transformers(letters, tmp_path):
    trainer = fitted("grpo", letters, tmp_path, "steps=1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), weights(engine_of(trainer)))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("abc=")["input_ids"] == [4, 5, 6, 12]


def test_the_last_step_is_saved_once(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "checkpoint.every_steps=3")
    saves = []
    save = engine_of(trainer).save
    engine_of(trainer).save = lambda folder: saves.append(folder) or save(folder)
    trainer.fit()
    assert len(saves) == 1


def test_a_run_evaluates_at_the_start_at_the_interval_and_at_the_end(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "evaluation.every_steps=2", "evaluation.prompts=5")
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 3]
    assert all(line["time/evaluate_s"] > 0 for line in lines if "eval/reward" in line)
    # The time of an evaluation is not that of a step.
    assert lines[1]["time/generate_s"] + lines[1]["time/reward_s"] <= lines[1]["seconds"]


def test_evaluations_are_lines_for_people(letters, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    config = toy_config(
        "grpo", letters, tmp_path, "evaluation.every_steps=2", "steps=2", "tracking.sinks=[console]"
    )
    Trainer(config, console=console).fit()
    lines = [
        line for line in console.file.getvalue().splitlines() if line.startswith("evaluation after step")
    ]
    assert [line.split(":")[0] for line in lines] == ["evaluation after step 0", "evaluation after step 2"]
    assert "accuracy" in lines[1] and "reward" in lines[1]


def test_two_runs_do_not_write_into_one_folder(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path)
    with only_run_in(tmp_path / "run"), pytest.raises(RuntimeError, match="for one run at a time"):
        trainer.fit()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert len(trainer.fit()) == 3


def test_the_first_evaluation_can_be_left_out(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "evaluation.every_steps=3", "evaluation.at_start=false")
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3]


def test_evaluation_does_not_change_what_is_learned(letters, tmp_path):
    fitted("grpo", letters, tmp_path / "plain")
    fitted("grpo", letters, tmp_path / "measured", "evaluation.every_steps=1", "evaluation.samples=2")
    assert learned(tmp_path / "plain") == learned(tmp_path / "measured")
    assert_same_end(tmp_path / "plain", tmp_path / "measured", 3)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("grpo", ["algorithm.kl.coef={start: 0.1, end: 0.0, steps: 5}", "policy.optimizer.warmup_steps=4"]),
        ("ppo", ["algorithm.kl.coef={initial: 0.1, target: 0.01, horizon: 50}", "algorithm.epochs=2"]),
        ("dapo", ["policy.precision=fp16"]),
        # A draw in each step, a second language model that learns, greedy answers between the sampled ones,
        # versions of tokens.
        ("clip_cov", ["algorithm.policy_loss={share: 0.2, cov_low: -10.0, cov_high: 10.0}"]),
        ("prime", []),
        ("remax", ["policy.optimizer.schedule=constant"]),
        ("decoupled_ppo", ["algorithm.correction=loglinear"]),
    ],
)
def test_a_run_in_two_parts_is_the_run_in_one(recipe, overrides, letters, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fitted(recipe, letters, one, "steps=6", *overrides)
    fitted(recipe, letters, two, "steps=3", *overrides)
    second = fitted(recipe, letters, two, "steps=6", *overrides, "evaluation.every_steps=2")
    assert second.version == second.rollout.version == 6
    assert learned(one) == learned(two)
    assert_same_end(one, two, 6)


class StopsOnce:
    """The usual reward, but the machine goes down at one call."""

    def __init__(self, call):
        self.left = call

    def __call__(self, trajectory):
        self.left -= 1
        if self.left == 0:
            raise OSError("power cut")
        return position_share(trajectory)


def test_a_run_that_was_stopped_between_checkpoints_goes_on_from_the_last_one(letters, tmp_path):
    settings = [
        "steps=6",
        "checkpoint.every_steps=2",
        "rewards.functions=[]",
        "rewards.max_failed_share=0.0",
        "pipeline.retries.reward=0",
    ]
    fitted("grpo", letters, tmp_path / "one", *settings, reward_fn=StopsOnce(0))
    with pytest.raises(RuntimeError, match="power cut"):
        fitted("grpo", letters, tmp_path / "two", *settings, reward_fn=StopsOnce(5 * 16))
    assert [line["step"] for line in learned(tmp_path / "two")] == [1, 2, 3, 4]
    fitted("grpo", letters, tmp_path / "two", *settings, reward_fn=StopsOnce(0))
    assert learned(tmp_path / "one") == learned(tmp_path / "two")
    assert_same_end(tmp_path / "one", tmp_path / "two", 6)


def test_what_is_left_of_a_half_written_checkpoint_is_passed_over(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=2")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".writing-step-00000003")
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    (folder / "step-00000003" / "state.pt").unlink()
    trainer = toy_trainer("grpo", letters, tmp_path, "steps=3")
    assert len(trainer.fit()) == 1


def test_a_run_that_is_over_is_left_as_it_is(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=2")
    before = logged(tmp_path / "run")
    assert toy_trainer("grpo", letters, tmp_path, "steps=2").fit() == []
    assert logged(tmp_path / "run") == before


def test_a_run_does_not_go_on_with_other_settings_and_says_which(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=1")
    with pytest.raises(
        ValueError,
        match=r"other settings \(policy.optimizer.lr was 0.001, is 0.002; "
        r"algorithm.kl.coef was 0.04, is 0.1\)",
    ):
        fitted("grpo", letters, tmp_path, "policy.optimizer.lr=0.002", "algorithm.kl.coef=0.1")
    assert [line["step"] for line in logged(tmp_path / "run")] == [1]


def test_a_checkpoint_from_before_a_setting_existed_counts_as_its_default(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=1")
    path = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["data"]["chat_template_kwargs"], state["config"]["policy"]["optimizer"]["name"]
    state["config"]["policy"]["micro_batch_tokens"] = 16384  # changes memory alone
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"other settings \(policy.optimizer.name was adamw, is sgd\)"):
        fitted("grpo", letters, tmp_path, "steps=2", "policy.optimizer.name=sgd")
    assert len(toy_trainer("grpo", letters, tmp_path, "steps=2", "policy.micro_batch_rows=2").fit()) == 1


def test_a_run_goes_on_with_other_settings_from_a_checkpoint_that_is_named(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=2", "checkpoint.every_steps=1")
    first = tmp_path / "run" / "checkpoints" / "step-00000001"
    trainer = toy_trainer(
        "grpo", letters, tmp_path, "steps=4", "policy.optimizer.lr=0.002", f"checkpoint.resume={first}"
    )
    assert len(trainer.fit()) == 3
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_run_starts_anew_if_told_never_to_resume(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=3")
    fitted("grpo", letters, tmp_path, "steps=2", "seed=1", "checkpoint.resume=never")
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2]
    assert checkpoints(tmp_path) == ["step-00000002"]
    assert len(toy_trainer("grpo", letters, tmp_path, "steps=4", "seed=1").fit()) == 2


def test_a_checkpoint_that_is_none_is_refused(letters, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: it has no state.pt"):
        fitted("grpo", letters, tmp_path, f"checkpoint.resume={tmp_path}")


def test_so_many_checkpoints_are_kept(letters, tmp_path):
    fitted("grpo", letters, tmp_path, "steps=4", "checkpoint.every_steps=1", "checkpoint.keep=3")
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=missing.jsonl", "missing.jsonl"),
        ("data.train=null", "need data.train"),
        ("rewards.functions=[exakt]", "need a reward function by name"),
        (
            "sampling.max_tokens=2000",
            "within the policy's context of 1024 tokens, got a prompt of 4 and sampling.max_tokens 2000",
        ),
        ("checkpoint.resume=nowhere", "nowhere is not a checkpoint"),
        ("tracking.sinks=[jsonll]", "did you mean 'jsonl'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(override, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        fitted("grpo", letters, tmp_path, override)
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_are_read_before_the_first_step(letters, tmp_path):
    with pytest.raises(ValueError, match="missing.jsonl"):
        fitted("grpo", letters, tmp_path, "evaluation.every_steps=1", "data.test=missing.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_model_path_is_needed(letters, tmp_path):
    config = toy_config("grpo", letters, tmp_path, "policy.path=null")
    with pytest.raises(ValueError, match="need policy.path"):
        type(toy_trainer("grpo", letters, tmp_path))(config)
