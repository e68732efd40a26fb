"""The run around steps: what it says, callbacks, and loops of a user with the files of a run."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from tests.training import logged, toy_config, toy_trainer
from verl import Callback
from verl.data.trajectory import Trajectory
from verl.trainer.export.exporting import check_destination
from verl.trainer.rl_trainer import Trainer
from verl.utils.sampling_types import Prompt

SHOWN = ["tracking.sinks=[console, jsonl]", "steps=2"]
OWN_REWARD = ["rewards.functions=[]", "rewards.isolation=thread"]
PROMPTS = ["abc=", "aac="]


def length(prompt, response):
    return float(len(response))


def constant(prompt, response):
    return 0.0


def one_fails(prompt, response):
    if prompt.startswith("aac"):
        raise ValueError("the judge is down")
    return float(len(response))


def first_samples(folder):
    """The rows of the first step's samples."""
    text = (folder / "run" / "samples" / "step-000001.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def lines_of(letters, folder, *overrides, **given):
    """Lines that a run shows."""
    console = Console(file=io.StringIO(), width=80)
    config = toy_config("grpo", letters, folder, *SHOWN, *overrides)
    Trainer(config, console=console, **given).fit()
    return console.file.getvalue().splitlines()


def test_a_run_says_what_it_loads_writes_and_does_before_its_first_step(letters, tmp_path):
    lines = lines_of(letters, tmp_path, "evaluation.prompts=5")
    run = tmp_path / "run"
    assert lines[0] == f"loading {letters}"
    assert lines[1].startswith(f"policy: {letters}, 0.01") and lines[1].endswith("M parameters, fp32, cpu")
    assert lines[2].startswith(f"writes to {run}: metrics.jsonl, checkpoints (at the end, about ")
    start = lines.index(f"evaluating 5 prompts of {tmp_path / 'prompts.jsonl'}")
    assert lines[start + 1].startswith("evaluation after step 0: reward ")
    assert lines[start + 2] == "step 1/2: generating 16 answers to 4 prompts"
    assert "step 1/2: updating the policy" in lines
    assert not any(line.startswith("step 2/2") for line in lines)
    checkpoint = next(line for line in lines if line.startswith("checkpoint: "))
    assert (
        checkpoint.startswith(f"checkpoint: {run / 'checkpoints' / 'step-00000002'} (") and "kB" in checkpoint
    )
    assert lines[-1] == f"writing the model to {run / 'model'}"


def test_the_first_answers_are_shown_with_their_special_tokens(letters, tmp_path):
    lines = lines_of(letters, tmp_path)
    start = next(i for i, line in enumerate(lines) if line.startswith("answers of step 1"))
    rows = first_samples(tmp_path)
    assert lines[start + 1] == f"  prompt     {rows[0]['prompt_text']}"
    assert lines[start + 2].startswith(f"  answer     {rows[0]['response_text']}")
    assert any(row["response_text"].endswith("<eos>") for row in rows)
    assert all(row["prompt_tokens"] == 4 and row["columns"] == {} for row in rows)


def test_steps_that_teach_nothing_are_said_once_and_summed_up(letters, tmp_path):
    lines = lines_of(letters, tmp_path, *OWN_REWARD, reward_fn=constant)
    assert sum("no group has different rewards (mean reward 0)" in line for line in lines) == 1
    assert "2 of 2 steps had no group with different rewards" in "\n".join(lines)


def test_answers_without_a_reward_are_said_with_the_first_cause(letters, tmp_path):
    lines = lines_of(
        letters,
        tmp_path,
        *OWN_REWARD,
        "prompts_per_step=12",
        "pipeline.retries.reward=0",
        "rewards.max_failed_share=1",
        reward_fn=one_fails,
    )
    (said,) = [line for line in lines if "have no reward" in line]
    assert said.startswith("step 1: 4 of 52 answers have no reward") and "the judge is down" in said
    rows = first_samples(tmp_path)
    assert any("the judge is down" in row["detail"] for row in rows)


def test_an_output_without_the_characters_of_an_answer_escapes_them(letters, tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    trainer = toy_trainer("grpo", letters, tmp_path, *SHOWN)
    trainer.progress._console = Console(file=file, width=80)
    trainer.progress.say("数")
    file.flush()
    assert file.buffer.getvalue() == b"\\u6570\n"


class Recorder(Callback):
    """Notes its calls, adds a metric, and stops the run."""

    def __init__(self, stop_after=99):
        self.calls, self.stop_after = [], stop_after

    def on_start(self, trainer):
        self.calls.append("start")

    def on_step(self, trainer, metrics):
        self.calls.append(f"step {trainer.version}")
        metrics["mine"] = 2.0 * trainer.version
        if trainer.version == self.stop_after:
            trainer.request_stop()

    def on_evaluate(self, trainer, metrics):
        self.calls.append("evaluate")
        metrics["eval/mine"] = 7.0

    def on_checkpoint(self, trainer, folder):
        self.calls.append(folder.name)

    def on_end(self, trainer):
        self.calls.append("end")


def test_callbacks_are_called_may_add_metrics_and_may_end_the_run(letters, tmp_path):
    recorder = Recorder(stop_after=2)
    trainer = toy_trainer("grpo", letters, tmp_path, "evaluation.prompts=2", "steps=5", callbacks=[recorder])
    assert len(trainer.fit()) == 2
    steps = ["step 1", "step 2", "evaluate", "step-00000002", "end"]
    assert recorder.calls == ["start", "evaluate", *steps]
    lines = logged(tmp_path / "run")
    assert [line.get("mine") for line in lines] == [None, 2.0, 4.0]
    assert lines[2]["eval/mine"] == 7.0
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert len(toy_trainer("grpo", letters, tmp_path, "steps=5").fit()) == 3  # the same command goes on


def test_an_error_in_a_callback_ends_the_run_and_names_it(letters, tmp_path):
    class Broken(Callback):
        def on_step(self, trainer, metrics):
            raise KeyError("x")

    with pytest.raises(RuntimeError, match=r"Broken.on_step failed: KeyError: 'x'; mend this callback"):
        toy_trainer("grpo", letters, tmp_path, callbacks=[Broken()]).fit()


def own_loop(letters, folder, *overrides):
    """Steps of a loop over `collect_data` and `update_policy`."""
    config = toy_config("grpo", letters, folder, "data.train=null", *OWN_REWARD, *overrides)
    trainer = Trainer(config, reward_fn=length, console=Console(file=io.StringIO()))
    with trainer.run() as run:
        while run.goes_on:
            run.log(trainer.update_policy(trainer.collect_data(PROMPTS)))
    return run.history


def test_a_metric_that_is_no_number_is_named(letters, tmp_path):
    class Adds(Callback):
        def on_step(self, trainer, metrics):
            metrics["mine"] = "good"

    with pytest.raises(ValueError, match="need a number for the metric 'mine', got str"):
        toy_trainer("grpo", letters, tmp_path, "steps=1", callbacks=[Adds()]).fit()


def test_a_loop_of_the_user_writes_the_files_of_a_run_and_resumes(letters, tmp_path):
    settings = ["evaluation.prompts=2", "checkpoint.every_steps=1"]
    whole = own_loop(letters, tmp_path / "one", "steps=3", *settings)
    own_loop(letters, tmp_path / "two", "steps=1", *settings)
    rest = own_loop(letters, tmp_path / "two", "steps=3", *settings)
    assert [m["reward"] for m in rest] == [m["reward"] for m in whole[1:]]
    assert [m["loss"] for m in rest] == [m["loss"] for m in whole[1:]]
    run = tmp_path / "one" / "run"
    assert [line["step"] for line in logged(run)] == [0, 1, 2, 3]
    assert {"eval/reward", "seconds", "time/update_policy_s"} <= logged(run)[3].keys()
    names = {path.name for path in run.iterdir()}
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "model", "samples", "waits.json"} <= names


def test_steps_that_a_loop_did_not_log_are_kept_and_said(letters, tmp_path):
    shown = io.StringIO()
    trainer = toy_trainer("grpo", letters, tmp_path, "tracking.sinks=[console]")
    trainer.console = Console(file=shown, width=200)
    with trainer.run():
        trainer.update_policy(trainer.collect_data(trainer.loader.take(2)))
    assert "steps 1 to 1 were not logged: call log with the metrics of each step" in shown.getvalue()
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.pt").exists()


def test_a_step_is_logged_once(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, *OWN_REWARD, reward_fn=length)
    with pytest.raises(ValueError, match="need one call of log after each step"), trainer.run() as run:
        metrics = trainer.update_policy(trainer.collect_data(PROMPTS))
        run.log(metrics)
        run.log(metrics)


def test_a_checkpoint_can_be_asked_for(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, *OWN_REWARD, reward_fn=length)
    trainer.update_policy(trainer.collect_data(PROMPTS))
    assert trainer.save_checkpoint() == tmp_path / "run" / "checkpoints" / "step-00000001"
    assert len(toy_trainer("grpo", letters, tmp_path, *OWN_REWARD, "steps=2", reward_fn=length).fit()) == 1


def test_trajectories_of_several_turns_are_learned_without_what_the_environment_wrote(letters, tmp_path):
    config = toy_config("grpo", letters, tmp_path, "data.train=null", "rewards.functions=[]")
    trainer = Trainer(config, console=Console(file=io.StringIO()))
    played = [Trajectory.begin(Prompt("a="), trainer.codec.encode("a="), group=i // 2) for i in range(4)]
    for _ in range(2):
        turns = trainer.collector.complete([game.token_ids for game in played], max_tokens=3)
        for number, (game, turn) in enumerate(zip(played, turns, strict=True)):
            game.add_turn(turn)
            game.add_observation([5, 6])
            game.reward = float(number)
    first, second = played[:2]
    assert first.response_ids[:3] != second.response_ids[:3]  # each has random numbers of its own
    count = len(first.response_ids)
    assert count == len(first.response_mask) == len(first.rollout_logprobs) == len(first.versions)
    assert first.response_mask[-2:] == [False, False] and first.rollout_logprobs[-1] == 0.0
    metrics = trainer.update_policy(played)
    assert metrics["reward"] == 1.5 and metrics["grad_norm"] > 0 and metrics["kl_sampler"] < 1e-6
    played[0].reward = None
    with pytest.raises(ValueError, match="need trajectories with a reward each"):
        trainer.update_policy(played)


def test_a_run_does_not_replace_the_model_that_it_starts_from(letters, tmp_path):
    shutil.copytree(letters, tmp_path / "run" / "model")
    trainer = toy_trainer("grpo", tmp_path / "run" / "model", tmp_path, "steps=1")
    with pytest.raises(ValueError, match=r"got .*model, the policy.path of the run, which would be replaced"):
        trainer.fit()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="need a folder to write the model into, got the file"):
        check_destination(tmp_path / "file", trainer.config.model_dump(mode="json"))
