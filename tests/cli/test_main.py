"""The command line: every command does its work, and every mistake is one clear message before any work."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import verl
from tests.training import CHARACTERS, logged, write_prompts
from verl.cli.main import COMMANDS, import_function, main
from verl.config import load_config, load_run, load_sft_config
from verl.config.run import PreferenceConfig, RewardModelConfig

TOY = [
    "device=cpu",
    "steps=2",
    "prompts_per_step=2",
    "samples_per_prompt=2",
    "sampling.max_tokens=5",
    "tracking.sinks=[jsonl]",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model made by the command for it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert (
        main(["make-model", str(folder), "--hidden", "32", "--layers", "1", "--characters", CHARACTERS]) == 0
    )
    return folder


@pytest.fixture
def toy(model, tmp_path, monkeypatch):
    """Settings of a small run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    prompts = write_prompts(tmp_path / "data" / "prompts.jsonl")
    return [
        *TOY,
        f"policy.path={model}",
        f"data.train={prompts}",
        f"data.test={prompts}",
        "rewards.functions=[position_share]",
    ]


def test_train_runs_to_the_end_and_says_where_the_model_is(toy, capsys):
    assert main(["train", "grpo", *toy]) == 0
    assert "trained model: outputs/run/model" in capsys.readouterr().out
    # Its data.test is evaluated before the first and after the last step.
    assert [line["step"] for line in logged(Path("outputs/run"))] == [0, 1, 2]
    assert AutoModelForCausalLM.from_pretrained("outputs/run/model").config.hidden_size == 32
    assert main(["train", "outputs/run/config.yaml"]) == 0
    assert "outputs/run is already at step 2; raise steps" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["train", "grpo"], ["sft"]])
def test_a_dry_run_checks_everything_prints_the_settings_and_writes_nothing(command, toy, capsys):
    settings = (
        toy
        if command[0] == "train"
        else [s for s in toy if s.split("=")[0] in ("device", "steps", "policy.path", "data.train")]
    )
    before = sorted(Path().rglob("*"))
    assert main([*command, *settings, "--dry-run"]) == 0
    shown, _, last = capsys.readouterr().out.partition("everything fits: ")
    assert "2 steps; nothing was trained" in last
    loaded = (
        load_config(yaml.safe_load(shown))
        if command[0] == "train"
        else load_sft_config(yaml.safe_load(shown))
    )
    assert loaded.steps == 2
    assert sorted(Path().rglob("*")) == before


def test_sft_learns_from_a_file_of_settings_or_without_one(toy, capsys):
    settings = [
        s
        for s in toy
        if s.split("=")[0] in ("device", "steps", "policy.path", "data.train", "tracking.sinks")
    ]
    Path("sft.yaml").write_text("rows_per_step: 3\noutput_dir: outputs/two\n")
    assert main(["sft", *settings, "rows_per_step=3"]) == main(["sft", "sft.yaml", *settings]) == 0
    assert "trained model: outputs/two/model" in capsys.readouterr().out
    assert [line["loss"] for line in logged(Path("outputs/run"))] == [
        line["loss"] for line in logged(Path("outputs/two"))
    ]


PAIRS = ["device=cpu", "steps=2", "pairs_per_step=3", "data.train=pairs.jsonl", "tracking.sinks=[jsonl]"]


@pytest.mark.parametrize(
    ("command", "kind"), [("preference", PreferenceConfig), ("reward-model", RewardModelConfig)]
)
def test_pairs_are_learned_from_a_file_of_settings_or_without_one(
    command, kind, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{c}=", "chosen": c, "rejected": c * 2}) + "\n" for c in "abcd")
    )
    settings = [*PAIRS, f"policy.path={model}"]
    assert main([command, *settings, "--dry-run"]) == 0
    shown, _, last = capsys.readouterr().out.partition("everything fits: ")
    assert (
        "4 rows from pairs.jsonl, 2 steps; nothing was trained" in last
        and load_run(kind, yaml.safe_load(shown)).pairs_per_step == 3
    )
    assert [path.name for path in Path().iterdir()] == ["pairs.jsonl"]
    Path("mine.yaml").write_text("output_dir: outputs/two\n")
    assert main([command, *settings]) == main([command, "mine.yaml", *settings]) == 0
    assert "trained model: outputs/two/model" in capsys.readouterr().out
    assert [line["loss"] for line in logged(Path("outputs/run"))] == [
        line["loss"] for line in logged(Path("outputs/two"))
    ]


def test_eval_shows_answers_and_metrics_and_keeps_them(toy, capsys):
    command = ["eval", "grpo", *toy, "evaluation.prompts=3", "evaluation.samples=2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("accuracy (mean@2)", "pass@2", "maj@2", "reward", "truncated share"):
        assert name in shown
    assert "aac=" in shown
    assert "  reference  aac\n" in shown
    (folder,) = Path("outputs").iterdir()  # beside that of a run, which it does not touch
    assert folder.name.startswith("eval-tiny-")
    results = json.loads((folder / "results.json").read_text())
    assert results["sets"][0]["prompts"] == 3 and len(results["sets"][0]["per_prompt"]) == 3
    kept = (folder / "answers.jsonl").read_bytes()
    assert main(command) == 0
    assert "has the answers to 3 of 3 questions" in capsys.readouterr().out
    assert (folder / "answers.jsonl").read_bytes() == kept


def test_eval_measures_a_model_and_a_run_by_their_folders(toy, model, capsys):
    assert main(["train", "grpo", *toy, "steps=1"]) == 0
    small = ["evaluation.prompts=2", "--output", "of_run"]
    assert main(["eval", "outputs/run", *small]) == 0
    settings = [one for one in toy if not one.startswith("policy.path")]
    assert main(["eval", str(model), *settings, "evaluation.prompts=2", "--output", "of_model"]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", "of_model", "of_run/results.json"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "McNemar" in shown and "reward" in shown


def test_eval_answers_another_evaluation_in_a_folder_only_if_told_to(toy, capsys):
    command = ["eval", "--output", "measured", "grpo", *toy, "evaluation.prompts=2"]
    assert main(command) == 0
    assert main([*command, "evaluation.temperature=0.5"]) == 2
    assert "differs in the sampling parameters" in capsys.readouterr().err
    assert main([*command, "evaluation.temperature=0.5", "--fresh"]) == 0


def test_eval_takes_the_reward_of_the_task_that_it_measures(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"policy.path={model}", "data.test=task:copy-8", "sampling.max_tokens=9"]
    assert main(["eval", "grpo", *settings, "evaluation.prompts=2"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_config_lists_all_settings_one_of_them_or_those_of_a_recipe(capsys):
    assert main(["config"]) == 0
    everything = capsys.readouterr().out
    assert "steps = 100" in everything and "algorithm.kl.where = " in everything
    assert main(["config", "policy.optimizer.lr"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("policy.optimizer.lr = 1e-06") and "critic" not in one and "2402.03300" in one
    assert main(["config", "--recipe", "dapo"]) == 0
    assert load_config(yaml.safe_load(capsys.readouterr().out)) == load_config("dapo")
    assert main(["config", "samples_per_prompt", "--recipe", "dapo"]) == 0
    assert "samples_per_prompt = 16" in capsys.readouterr().out


def test_the_settings_are_shown_without_loading_a_model_library():
    program = "import sys; from verl.cli.main import main; main(['config']); print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(verl.__file__).parents[1],
    )
    assert result.stdout.splitlines()[-1] == "False"


def test_make_model_writes_a_model_of_transformers(model, tmp_path, capsys):
    assert main(["make-model", str(tmp_path / "m"), "--hidden", "64", "--layers", "3", "--seed", "1"]) == 0
    assert f"model: {tmp_path / 'm'}" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.num_hidden_layers == 3
    assert len(AutoTokenizer.from_pretrained(model)) == 4 + len(CHARACTERS)


def test_make_data_writes_a_task(tmp_path, capsys):
    assert main(["make-data", "add-2", str(tmp_path / "test.jsonl"), "--split", "test"]) == 0
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    assert f"{len(lines)} rows" in capsys.readouterr().out
    row = json.loads(lines[0])
    assert sum(map(int, row["prompt"].rstrip("=").split("+"))) == int(row["answer"])


def test_make_data_writes_pairs_of_a_task(tmp_path):
    assert main(["make-data", "add-2", str(tmp_path / "test.jsonl"), "--split", "test", "--pairs"]) == 0
    row = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    assert sum(map(int, row["prompt"].rstrip("=").split("+"))) == int(row["chosen"])
    assert row["rejected"] != row["chosen"]


MISTAKES = {
    "recipe": (["train", "grop"], ["unknown recipe grop", "the nearest is grpo"]),
    "file": (["train", "missing.yaml"], ["got missing.yaml: No such file"]),
    "key": (
        ["train", "grpo", "policy.optimizer.learning_rate=1"],
        ["unknown setting", "here it is policy.optimizer.lr"],
    ),
    "type": (["train", "grpo", "steps=many"], ["steps (override): need an integer >= 1", '"many"']),
    "bound": (["train", "grpo", "steps=0"], ["need an integer >= 1", "got 0"]),
    "no override": (["train", "grpo", "steps"], ['need overrides like key=value, got "steps"']),
    "ignored": (
        ["train", "grpo", "critic.vf_coef=2.0"],
        ["critic.vf_coef (override) would be ignored", "take gae"],
    ),
    "relation": (["train", "grpo", "samples_per_prompt=1"], ["need siblings to compare with"]),
    "function": (
        ["train", "grpo", "algorithm.advantage=gea"],
        ["need one of grpo, rloo, ", "did you mean 'gae'"],
    ),
    "option": (
        ["train", "grpo", "algorithm.policy_loss.clip_hihg=0.3"],
        ["got 'clip_hihg'; did you mean 'clip_high'"],
    ),
    "option type": (
        ["train", "grpo", "algorithm.policy_loss.clip_high=wide"],
        ["clip_high='wide', which is not of type float"],
    ),
    "module": (["train", "grpo", "algorithm.advantage=nowhere:f"], ["cannot import 'nowhere'"]),
    "no model": (["train", "grpo", "policy.path=null"], ["need policy.path"]),
    "model": (
        ["train", "grpo", "policy.path=./nowhere"],
        ["cannot load a causal language model from './nowhere'"],
    ),
    "no data": (["train", "grpo", "data.train=null"], ["need data.train"]),
    "data": (["train", "grpo", "data.train=missing.jsonl"], ["missing.jsonl"]),
    "task": (["train", "grpo", "data.train=task:copy8"], ["copy-8"]),
    "reward": (
        ["train", "grpo", "rewards.functions=[exakt]"],
        ["need a reward function by name (exact, ", "got 'exakt'"],
    ),
    "reward option": (
        ["train", "grpo", "rewards.functions=[{name: exact, strict: true}]"],
        ["'exact' takes (extract, normalize), got strict"],
    ),
    "engine": (["train", "grpo", "rollout.engine=embeded"], ["got 'embeded'", "embedded"]),
    "sink": (["train", "grpo", "tracking.sinks=[jsnl]"], ["got 'jsnl'; did you mean 'jsonl'"]),
    "resume": (["train", "grpo", "checkpoint.resume=nowhere"], ["nowhere is not a checkpoint"]),
    "too long": (["train", "grpo", "sampling.max_tokens=5000"], ["the policy's context of 1024 tokens"]),
    "dry sink": (["train", "grpo", "tracking.sinks=[jsnl]", "--dry-run"], ["did you mean 'jsonl'"]),
    "dry run": (["train", "grpo", "data.train=missing.jsonl", "--dry-run"], ["missing.jsonl"]),
    "eval": (["eval", "grpo", "data.test=null"], ["need data.test"]),
    "sft key": (["sft", "prompts_per_step=3"], ["unknown setting prompts_per_step"]),
    "preference key": (["preference", "rows_per_step=3"], ["unknown setting rows_per_step"]),
    "preference loss": (["preference", "loss=dop"], ["need one of dpo, ipo, simpo", "did you mean 'dpo'"]),
    "preference reference": (
        ["preference", "loss=simpo", "reference=x"],
        ["reference (override) would be ignored"],
    ),
    "reward-model loss": (["reward-model", "loss.margin=-1"], ["need margin >= 0, got -1"]),
    "reward-model model": (
        ["reward-model", "policy.path=./nowhere"],
        ["cannot load a reward model from './nowhere'"],
    ),
    "sft file": (["sft", "missing.yaml"], ["missing.yaml"]),
    "config key": (["config", "algorithm.klx"], ["algorithm.kl"]),
    "make-model": (["make-model", "m", "--hidden", "33"], ["need hidden as a multiple of 32", "hidden=33"]),
    "make-data": (["make-data", "copy8", "x.jsonl"], ["got 'copy8'; did you mean 'copy-8'?"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_before_any_work(mistake, toy, capsys):
    (command, *given), messages = MISTAKES[mistake]
    before = sorted(Path().rglob("*"))
    # Settings that are given come last, so that they replace those of the toy run.
    settings = toy if command in ("train", "eval") else []
    target, rest = given[:1], given[1:]
    assert main([command, *target, *settings, *rest]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("verl: ")
    assert [message for message in messages if message not in shown] == []
    assert "Traceback" not in shown and len(shown) < 700
    assert sorted(Path().rglob("*")) == before


def test_every_function_that_a_command_imports_exists():
    targets = [command for command in COMMANDS.values() if isinstance(command, str)]
    assert all(callable(import_function(target)) for target in targets)


def test_debug_shows_the_stack(capsys):
    assert main(["train", "grop", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_run_that_fails_ends_with_1_and_says_how_to_see_where(toy, capsys):
    Path("mine.py").write_text("def broken(prompt, response):\n    raise OSError('judge is down')\n")
    assert main(["train", "grpo", *toy, "rewards.functions=['mine.py:broken']"]) == 1
    shown = capsys.readouterr().err
    assert "judge is down" in shown and shown.endswith("(--debug shows where)\n")
    assert "Traceback" not in shown


def test_a_run_whose_code_ends_the_program_does_not_count_as_done(toy, capsys):
    Path("ends.py").write_text("import sys\nsys.exit(0)\n")
    assert main(["train", "grpo", *toy, "data.tools=ends.py:tools", "--dry-run"]) == 1
    assert "code of the run ended the program by sys.exit(0)" in capsys.readouterr().err


def test_a_reader_who_ends_early_is_no_mistake(monkeypatch, tmp_path, capsys):
    with (tmp_path / "out").open("w") as file:

        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

            def fileno(self):
                return file.fileno()

        monkeypatch.setattr(sys, "stdout", Closed())
        monkeypatch.setitem(COMMANDS, "score", lambda args: Console().print("a table"))
        assert main(["score", "--list"]) == 1
    assert capsys.readouterr().err == ""
