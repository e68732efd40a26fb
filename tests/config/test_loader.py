"""Loading, checking and writing settings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.config.problems import problems
from verl.config import RECIPES, ConfigError, load_config, load_sft_config, to_yaml
from verl.config.algorithm import KLAdaptive, KLSchedule
from verl.config.run import TrainerConfig


def test_the_recipes_are_the_files_of_the_folder_by_name():
    assert {"dapo", "distillation", "grpo", "gspo", "ppo", "quickstart", "vapo"} < set(RECIPES)
    assert list(RECIPES) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_being_written_and_read(recipe, write):
    config = load_config(
        recipe,
        [
            "steps=70",
            "sampling.stop=['off', '1e-6', \"a\\nb\"]",
            'tracking.project="1e-6"',
            "tracking.sinks=[wandb]",
        ],
    )
    assert load_config(write(to_yaml(config))) == config


def test_recipes_hold_what_their_papers_say():
    ppo, grpo, dapo = (load_config(name).algorithm for name in ("ppo", "grpo", "dapo"))
    assert ppo.advantage.options == {"gamma": 1.0, "lam": 0.95, "whiten": True} and ppo.kl.where == "reward"
    assert grpo.kl.where == "loss" and grpo.kl.coef == 0.04 and grpo.aggregation.name == "seq_mean_token_mean"
    assert dapo.policy_loss.options == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    assert dapo.kl.where == "off" and dapo.dynamic_sampling and dapo.aggregation.name == "token_mean"


def test_a_mapping_without_keys_is_the_defaults():
    assert load_config({}) == TrainerConfig()


def test_a_file_changes_its_recipe_and_overrides_change_the_file(write):
    path = write("recipe: grpo\nsteps: 5\nalgorithm: {kl: {coef: 1e-3}}\npolicy: {optimizer: {lr: 3e-6}}\n")
    config = load_config(path, ["steps=6", "policy.optimizer.eps=1e-7"])
    assert (config.steps, config.algorithm.kl.coef, config.algorithm.kl.where) == (6, 1e-3, "loss")
    assert (config.policy.optimizer.lr, config.policy.optimizer.eps) == (3e-6, 1e-7)


def test_off_is_a_text_and_not_yamls_false(write):
    assert load_config(write("algorithm: {kl: {where: off}}")).algorithm.kl.where == "off"


def test_one_changed_setting_of_the_critic_keeps_its_other_defaults():
    config = load_config({"algorithm": {"advantage": "gae"}, "critic": {"optimizer": {"eps": 1e-6}}})
    assert config.critic.optimizer.lr == 1e-5


def test_another_function_loses_the_options_of_the_old_one_and_the_same_keeps_them():
    assert load_config("ppo", ["algorithm.policy_loss=mine:loss"]).algorithm.policy_loss.options == {}
    assert (
        load_config("ppo", ["algorithm.advantage={name: gae, lam: 0.9}"]).algorithm.advantage.options[
            "whiten"
        ]
        is True
    )
    assert load_config("ppo", ["algorithm.advantage.lam=0.9"]).algorithm.advantage.options == {
        "gamma": 1.0,
        "lam": 0.9,
        "whiten": True,
    }


def test_a_kl_coefficient_changes_its_form_or_a_part_of_it():
    schedule = ["algorithm.kl.coef={start: 0.1, end: 0.2, steps: 5}"]
    assert load_config("ppo", [*schedule, "algorithm.kl.coef.end=0.3"]).algorithm.kl.coef == KLSchedule(
        start=0.1, end=0.3, steps=5
    )
    assert load_config("ppo", [*schedule, "algorithm.kl.coef={target: 0.2}"]).algorithm.kl.coef == KLAdaptive(
        target=0.2
    )


def test_lists_are_given_anew():
    functions = load_config(
        "grpo", ["rewards.functions=[exact, {name: format, weight: 0.5, pattern: x}]"]
    ).rewards.functions
    assert [(f.name, f.weight, f.options) for f in functions] == [
        ("exact", 1.0, {}),
        ("format", 0.5, {"pattern": "x"}),
    ]


def test_every_problem_is_named_with_its_line_in_one_message(write):
    path = write("recipe: grpo\nsteps: many\npolicy:\n  optimizer:\n    learning_rate: 1.0\n    lr: -1\n")
    message = problems(path)
    assert message.startswith("3 problems in the settings:")
    assert 'steps (run.yaml:2): need an integer >= 1, got "many"' in message
    assert (
        "unknown setting policy.optimizer.learning_rate (run.yaml:5); here it is policy.optimizer.lr\n"
        in message + "\n"
    )
    assert "policy.optimizer.lr (run.yaml:6): need a number > 0, got -1" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "unknown setting lr (override); here it is policy.optimizer.lr"),
        ("device=tpu", 'device (override): need one of auto, cpu, cuda, got "tpu"'),
        ("steps=true", "steps (override): need an integer >= 1, got true"),
        ('seed="5"', 'seed (override): need an integer >= 0, got "5"'),
        ("sampling=3", "sampling (override): need `key: value` settings, got 3"),
        ("policy.optimizer.betas=[0.9]", "need a list of 2, each a number, got [0.9]"),
        ("policy.optimizer.betas=[0.9, 1]", "need two numbers in [0, 1), got [0.9, 1.0]"),
        ("policy.optimizer.eps=.inf", "need a number > 0, got Infinity"),
        ("algorithm.advantage=5", "algorithm.advantage (override): need a name or {name, options}, got 5"),
        ("algorithm.kl.coef=-1", "algorithm.kl.coef (override): need a number >= 0, got -1"),
        ("algorithm.kl.coef.end=x", 'algorithm.kl.coef.end (override): need a number >= 0, got "x"'),
        (
            "algorithm.kl.coef=[1]",
            "need a number or {start, end, steps} or {initial, target, horizon}, got [1]",
        ),
        (
            "rewards.functions=[{weight: 2}]",
            'need a list, each a name or {name, weight, options}, got [{"weight": 2}]',
        ),
        (
            "data.train={path: a.jsonl, weight: 0}",
            "data.train.weight (override): need a number above 0, got 0",
        ),
        (
            "data.train=[b.jsonl, {path: a.jsonl, weight: two}]",
            'data.train.1.weight (override): need a valid number, got "two"',
        ),
        (
            "data.test={path: a.jsonl, wieght: 1}",
            "unknown key data.test.wieght (override); the nearest is weight, and there are path, name,",
        ),
        ("data.train={weight: 1}", "data.train (override): need the key 'path', got none"),
        ("steps", 'need overrides like key=value, got "steps"'),
        ("steps=[1", 'override "steps=[1":1: need valid YAML'),
        ("sampling.stop=['']", "sampling.stop (override): need texts that end an answer, got an empty one"),
        ("reference=", 'need a value behind the = of "reference=", got none; write null for none'),
        ("policy.lora.path=''", "policy.lora.path (override): need a path, got an empty text"),
        ("output_dir=${JOB:-x}/run", "need environment variables as $NAME or ${NAME}, got '${JOB:-x}/run'"),
        ("output_dir=~nobody-of-this-name/run", "need a user of this machine behind ~"),
        (
            "algorithm.policy_loss.clip_low=.nan",
            "algorithm.policy_loss.clip_low (override): need a number, got NaN",
        ),
    ],
)
def test_a_wrong_override_says_what_must_hold_and_what_came(override, message):
    assert message in problems("ppo", override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\nseed: 2", "run.yaml:2: need valid YAML"),
        ("steps: 1\nsteps: 2", "run.yaml:2: steps is given twice, first in run.yaml:1"),
        (
            "rewards:\n  functions:\n  - {name: exact, weight: 1, weight: 2}",
            "run.yaml:3: rewards.functions.0.weight is given twice, first in run.yaml:3",
        ),
        ("policy: {<<: {path: x}}", "run.yaml:1: need each setting written out, got the merge key <<"),
        ("policy: &p {lora: *p}", "run.yaml: need settings of finite depth, got one that holds itself"),
        ("steps: \x00", "run.yaml: need valid YAML, got an error: unacceptable character #x0000"),
        ("- 1", "run.yaml: need settings at its top, `key: value`, got [1]"),
        (
            "recipe: gropo",
            "unknown recipe gropo (run.yaml:1); the nearest is grpo, and there are cispo, clip_cov, ",
        ),
        ("resolved: 3", "resolved: need true or false, got 3"),
        ("policy.path: x", "need nested keys, got policy.path in one (run.yaml:1); put path under policy"),
        ("policy:", "policy (run.yaml:1): need `key: value` settings, got null"),
    ],
)
def test_a_wrong_file_says_what_must_hold_and_what_came(text, message, write):
    assert message in problems(write(text))


def test_a_source_that_is_not_there_is_named_with_what_there_is(tmp_path):
    assert problems("gppo") == f"unknown recipe gppo; the nearest is ppo, and there are {', '.join(RECIPES)}"
    wanted = f"need a recipe ({', '.join(RECIPES)}) or a YAML file of settings"
    assert f"{wanted}, got missing.yaml: No such file" in problems("missing.yaml")
    assert "Is a directory" in problems(tmp_path)
    assert "steps: need a text, number, list or mapping, got object" in problems({"steps": object()})


@pytest.mark.parametrize(
    ("layout", "message"),
    [("tensor_parallel", None), ("fsdp", "need rollout: tensor_parallel, got fsdp; leave rollout out")],
)
def test_a_file_may_name_the_only_layout_of_generation(layout, message, write):
    path = write(
        f"hybrid_engine: {{actor_repartition: {{enabled: true, strategy_mapping: {{rollout: {layout}}}}}}}"
    )
    if message is None:
        assert load_config(path).hybrid_engine.actor_repartition.enabled
    else:
        assert message in problems(path)


def test_a_fine_tuning_run_has_settings_of_its_own_and_the_shared_rules(write):
    config = load_sft_config({"policy": {"path": "model"}}, ["rows_per_step=4"])
    assert (config.policy.path, config.rows_per_step, load_sft_config().rows_per_step) == ("model", 4, 64)
    assert load_sft_config(write(to_yaml(config))) == config
    for override, message in (
        ("samples=1", "unknown setting samples"),
        ("tracking.project=mine", "would be ignored"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_sft_config(None, [override])


def test_loading_settings_imports_no_torch():
    program = "import sys, verl.config; verl.config.load_config('ppo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.system_prompt=Put the answer after #### and stop.", "system_prompt", None),
        ("data.system_prompt=Answer: yes or no", "system_prompt", None),
        ("data.system_prompt=42", "system_prompt", None),
        ("data.system_prompt=[INST] *", "system_prompt", None),
        ('data.system_prompt="two\\nlines"', "system_prompt", "two\nlines"),
        ("data.system_prompt=null", "system_prompt", "null"),
        ("data.prompt_key=&question", "prompt_key", None),
    ],
)
def test_a_text_on_the_command_line_arrives_as_it_was_typed(override, key, value):
    expected = override.partition("=")[2] if value is None else {"null": None}.get(value, value)
    assert getattr(load_config("grpo", [override]).data, key) == expected


@pytest.mark.parametrize("override", ["steps=3 #small", "rewards.functions=[exact] # one"])
def test_a_value_with_a_comment_is_refused(override):
    assert "need quotes around a value with ' #'" in problems("grpo", override)


def test_a_text_in_a_list_that_yaml_cannot_read_is_refused_with_the_way_out():
    assert "put quotes around the texts of a list" in problems("grpo", "sampling.stop=[*.jsonl]")
    assert load_config("grpo", ["sampling.stop=['*.jsonl']"]).sampling.stop == ("*.jsonl",)


def test_a_text_of_a_file_that_a_hash_would_cut_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: grpo\nsteps: 3 #few\noutput_dir: run #2\n")
    assert "run.yaml:3: need quotes around a text with ' #'" in problems(path)
    path.write_text("recipe: grpo\noutput_dir: 'run #2' # a comment\n")
    assert load_config(path).output_dir == "run #2"


def test_home_and_variables_of_paths_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text("recipe: grpo\noutput_dir: ~/run\npolicy: {path: '${SCRATCH}/model'}\n")
    config = load_config(path, ["checkpoint.resume=$SCRATCH/run/step-1"])
    assert config.output_dir == "/home/ada/run" and config.policy.path == "/scratch/model"
    assert config.checkpoint.resume == "/scratch/run/step-1"
    named = load_config(
        "grpo", ["data.tools=~/t.json", "data.chat_template=$SCRATCH/t.jinja", "data.train=[~/a]"]
    )
    assert named.data.tools == "/home/ada/t.json" and named.data.chat_template == "/scratch/t.jinja"
    assert named.data.train == ("/home/ada/a",)
    own = load_config("grpo", ["rewards.functions=['~/r.py:f']", "algorithm.advantage=$SCRATCH/a.py:f"])
    assert own.rewards.functions[0].name == "/home/ada/r.py:f"
    assert own.algorithm.advantage.name == "/scratch/a.py:f"
    assert load_config("grpo", ["policy.lora.path=~/a"]).policy.lora.path == "/home/ada/a"
    template = "{{ bos_token }}$x ~"
    assert load_config("grpo", [f"data.chat_template={template}"]).data.chat_template == template
    assert "need the environment variable $NOWHERE" in problems("grpo", "output_dir=$NOWHERE/run")


@pytest.mark.parametrize("number", [2**63, -(2**64)])
def test_an_integer_beyond_64_bits_is_refused(number):
    assert f"seed (override): need an integer below 2^63, got {number}" in problems("grpo", f"seed={number}")
