"""Loading, checking, describing and writing settings."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.losses import POLICY_LOSSES
from verl.config import (
    RECIPES,
    ConfigError,
    load_config,
    load_sft_config,
    make_trainer_config,
    to_yaml,
)
from verl.config.algorithm import KLAdaptive, KLSchedule
from verl.config.checks.columns import COLUMN_READERS
from verl.config.checks.contradictions import CONTRADICTIONS
from verl.config.checks.inactive import INACTIVE_SETTINGS
from verl.config.introspection import fields_by_key
from verl.config.reference import describe_settings, settings_markdown
from verl.config.run import TrainerConfig

CASE_STUDY = {
    "actor_micro_batch_size": 4,
    "critic_micro_batch_size": 4,
    "rollouts_per_device": 64,
    "vf_coef": 0.1,
    "clip_eps": 0.2,
}


@pytest.fixture
def write(tmp_path):
    def file(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def problems(source, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


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


def test_values_without_effect_do_not_stop_a_written_configuration_from_being_read(write):
    config = load_config("grpo", ["algorithm.kl.where=off"])
    assert config.algorithm.kl.coef == 0.04
    assert load_config(write(to_yaml(config))) == load_config(config) == config


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
        "unknown setting policy.optimizer.learning_rate (run.yaml:5); the nearest is policy.optimizer.lr\n"
        in message + "\n"
    )
    assert "policy.optimizer.lr (run.yaml:6): need a number > 0, got -1" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "unknown setting lr (override); the nearest is policy.optimizer.lr"),
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
        ("steps", 'need overrides like key=value, got "steps"'),
        ("steps=[1", 'override "steps=[1":1: need valid YAML'),
    ],
)
def test_a_wrong_override_says_what_must_hold_and_what_came(override, message):
    assert message in problems("ppo", override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\nseed: 2", "run.yaml:2: need valid YAML"),
        ("steps: 1\nsteps: 2", "run.yaml:2: steps is given twice, first in run.yaml:1"),
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
    ("recipe", "overrides", "message"),
    [
        ("ppo", ["algorithm.minibatches=3"], "divisible by algorithm.minibatches, got 256 * 1 and 3"),
        ("ppo", ["sampling.top_p=0.9"], "set algorithm.correction=recompute"),
        ("ppo", ["sampling.top_k=5"], "set algorithm.correction=recompute"),
        ("ppo", ["sampling.min_p=0.1"], "set algorithm.correction=recompute"),
        ("ppo", ["sampling.temperature=0"], "set a temperature above 0, or algorithm.correction=recompute"),
        (
            "grpo",
            ["sampling.top_p=0.9", "algorithm.correction=loglinear"],
            "with algorithm.correction loglinear",
        ),
        (
            "grpo",
            ["sampling.top_p=0.9", "algorithm.correction=off_policy_mask"],
            "with algorithm.correction off_policy_mask",
        ),
        (
            "dppo",
            ["sampling.top_p=0.9", "algorithm.correction=recompute"],
            "algorithm.policy_loss dppo; set algorithm.correction=recompute",
        ),
        (
            "remax",
            ["sampling.temperature=0", "algorithm.correction=recompute"],
            "where every advantage is 0; set a temperature above 0",
        ),
        (
            "ppo",
            ["algorithm.kl.estimator=k1_straight_through"],
            "got k1_straight_through; set algorithm.kl.estimator to k1 or k3",
        ),
        (
            "grpo",
            ["sampling.temperature=0", "algorithm.correction=recompute"],
            "need different answers in a group, got samples_per_prompt 8",
        ),
        (
            "grpo",
            ["samples_per_prompt=1"],
            "algorithm.advantage grpo, which would learn nothing; set samples_per_prompt above 1",
        ),
        (
            "ppo",
            ["algorithm.dynamic_sampling=true"],
            "need groups for algorithm.dynamic_sampling, got samples_per_prompt 1",
        ),
        (
            "dapo",
            ["sampling.max_tokens=512"],
            "need algorithm.overlong_buffer_tokens below sampling.max_tokens, got 512 and 512",
        ),
        ("ppo", ["algorithm.kl.where=loss"], "got k1; set algorithm.kl.estimator to k2 or k3"),
        ("ppo", ["critic.warmup_steps=100"], "got 100 and 100: the policy would never learn"),
        (
            "ppo",
            ["evaluation.samples=4", "evaluation.temperature=0", "evaluation.every_steps=1"],
            "need different answers to a prompt",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_an_error_with_a_remedy(recipe, overrides, message):
    assert message in problems(recipe, *overrides)


def test_truncated_sampling_is_fine_when_the_logprobs_are_recomputed():
    assert load_config("ppo", ["sampling.top_p=0.9", "algorithm.correction=recompute"]).sampling.top_p == 0.9


@pytest.mark.parametrize(
    ("recipe", "overrides", "key"),
    [
        ("dapo", ["algorithm.kl.coef=0.1"], "algorithm.kl.coef"),
        ("dapo", ["algorithm.kl.estimator=k2"], "algorithm.kl.estimator"),
        ("grpo", ["algorithm.overlong_penalty=2.0"], "algorithm.overlong_penalty"),
        ("grpo", ["algorithm.max_resamples=3"], "algorithm.max_resamples"),
        ("grpo", ["critic.optimizer.lr=1e-4"], "critic.optimizer.lr"),
        ("grpo", ["algorithm.value_loss=value_mse"], "algorithm.value_loss"),
        ("grpo", ["policy.optimizer.min_lr_ratio=0.1"], "policy.optimizer.min_lr_ratio"),
        ("ppo", ["critic.optimizer.min_lr_ratio=0.1"], "critic.optimizer.min_lr_ratio"),
        (
            "ppo",
            ["sampling.temperature=0", "algorithm.correction=recompute", "sampling.top_p=0.9"],
            "sampling.top_p",
        ),
        ("grpo", ["evaluation.at_start=false"], "evaluation.at_start"),
        ("grpo", ["evaluation.samples=4"], "evaluation.samples"),
        ("grpo", ["tracking.samples_every_steps=0", "tracking.num_samples=3"], "tracking.num_samples"),
        ("grpo", ["tracking.project=mine"], "tracking.project"),
        ("dapo", ["reference=other"], "reference"),
        ("ppo", ["critic.logits_chunk_tokens=64"], "critic.logits_chunk_tokens"),
        ("ppo", ["placement.devices=[4]"], "placement.devices"),
        ("ppo", ["placement.policy.tensor=2"], "placement.policy.tensor"),
        ("grpo", ["placement=split", "placement.critic.tensor=2"], "placement.critic.tensor"),
        ("grpo", ["policy.lora.alpha=8"], "policy.lora.alpha"),
    ],
)
def test_a_setting_without_effect_is_an_error_that_names_it(recipe, overrides, key):
    assert problems(recipe, *overrides).startswith(f"{key} (override) would be ignored: ")


def test_a_reference_may_be_set_where_a_function_of_the_users_may_read_it():
    assert load_config("dapo", ["reference=other", "algorithm.policy_loss=mine:loss"]).reference == "other"


def test_fine_tuning_refuses_what_only_reinforcement_learning_reads():
    for key, value in (("data.test", "x.jsonl"), ("tracking.num_samples", 3)):
        with pytest.raises(ConfigError, match=f"{key} .override. would be ignored: fine-tuning"):
            load_sft_config(None, [f"{key}={value}"])


def test_the_readers_of_a_column_are_those_whose_signature_names_it():
    functions = {**ADVANTAGES, **POLICY_LOSSES, **CORRECTIONS}
    for column, readers in COLUMN_READERS.items():
        assert {
            name for name, function in functions.items() if column in inspect.signature(function).parameters
        } == set(readers)


def test_the_rules_name_settings_that_exist():
    for rule in INACTIVE_SETTINGS:
        # RunConfig itself is no run: each kind of run has what it has.
        assert {*rule.keys, rule.switch} <= fields_by_key(rule.kind).keys()


def test_the_message_of_every_contradiction_names_settings_that_exist():
    assert all(rule.message(TrainerConfig()).startswith("need ") for rule in CONTRADICTIONS)


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


def test_turning_a_thing_off_on_the_command_line_does_not_ask_to_edit_the_file(write):
    path = write("recipe: grpo\nalgorithm: {kl: {coef: 0.1}}\n")
    assert load_config(path, ["algorithm.kl.where=off"]).algorithm.kl.where == "off"
    spread = write("recipe: ppo\nplacement: {name: split, devices: [4, 2], policy: {tensor: 2}}\n")
    assert load_config(spread).placement.devices == (4, 2)
    assert (
        load_config(spread, ["placement=local"]).placement.name
        == load_config(spread, ["placement.name=local"]).placement.name
        == "local"
    )
    assert "algorithm.kl.coef (run.yaml:2) would be ignored" in problems(
        write("algorithm:\n  kl: {where: off, coef: 0.1}\n")
    )


def test_the_flat_call_of_the_case_study_sets_what_it_names():
    config = make_trainer_config(algo="ppo", **CASE_STUDY, mixed_precision="bf16", kl_coef=0.01)
    assert (config.policy.micro_batch_rows, config.critic.micro_batch_rows) == (4, 4)
    assert (config.prompts_per_step, config.samples_per_prompt, config.critic.vf_coef) == (64, 1, 0.1)
    assert (config.policy.precision, config.critic.precision) == ("bf16", "bf16")
    assert config.algorithm.policy_loss.options == {"clip_low": 0.2, "clip_high": 0.2}
    assert (config.algorithm.kl.where, config.algorithm.kl.coef) == ("reward", 0.01)


def test_the_flat_call_without_precision_and_kl_keeps_those_of_the_recipe():
    config, recipe = make_trainer_config(algo="ppo", **CASE_STUDY), load_config("ppo")
    assert config.policy.precision == "fp32" and config.algorithm.kl == recipe.algorithm.kl


@pytest.mark.parametrize(
    ("value", "coef"),
    [
        ((0.01, 0.1), KLSchedule(start=0.01, end=0.1, steps=7)),
        ({"start": 0.01, "end": 0.1, "steps": 3}, KLSchedule(start=0.01, end=0.1, steps=3)),
        ({"initial": 0.2, "target": 0.3, "horizon": 5}, KLAdaptive(initial=0.2, target=0.3, horizon=5)),
        ("adaptive", KLAdaptive()),
        (0.5, 0.5),
    ],
)
def test_a_kl_coefficient_takes_every_form_and_turns_the_kl_on(value, coef):
    kl = make_trainer_config("dapo", kl_coef=value, steps=7).algorithm.kl
    assert (kl.where, kl.coef) == ("loss", coef)


def test_a_kl_coefficient_of_zero_turns_the_kl_off():
    assert make_trainer_config("ppo", kl_coef=0).algorithm.kl.where == "off"


def test_a_kl_to_a_reference_beside_a_teacher_is_in_the_loss():
    assert make_trainer_config("distillation", kl_coef=0.1).algorithm.kl.where == "loss"


def test_flat_keywords_reach_their_settings():
    config = make_trainer_config(
        "ppo", actor_lr=2e-6, critic_lr=3e-6, gamma=0.9, lam=0.8, temperature=0.7, seed=3, output_dir="out"
    )
    assert (config.policy.optimizer.lr, config.critic.optimizer.lr) == (2e-6, 3e-6)
    assert config.algorithm.advantage.options == {"gamma": 0.9, "lam": 0.8, "whiten": True}
    assert (config.sampling.temperature, config.seed, config.output_dir) == (0.7, 3, "out")
    config = make_trainer_config(
        "grpo", group_size=4, rollouts_per_device=8, max_tokens=9, max_prompt_length=5, overrides=["steps=2"]
    )
    assert (config.prompts_per_step, config.samples_per_prompt, config.steps) == (2, 4, 2)
    assert (config.sampling.max_tokens, config.data.max_prompt_tokens) == (9, 5)


@pytest.mark.parametrize(
    ("algo", "keywords", "message"),
    [
        (
            "ppo",
            {"clip": 0.2},
            "unknown keyword clip; the nearest is clip_eps; there are actor_micro_batch_size, ",
        ),
        (
            "grpo",
            {"rollouts_per_device": 65},
            "keyword rollouts_per_device: need a multiple of samples_per_prompt (8), got 65; change it",
        ),
        (
            "grpo",
            {"lam": 0.9},
            "keyword lam: need algorithm.advantage gae, got grpo, which has no lam; leave the keyword out",
        ),
        ("grpo", {"vf_coef": 0.1}, "critic.vf_coef (keyword vf_coef) would be ignored"),
        (
            "ppo",
            {"lr": 1e-5, "actor_lr": 1e-6},
            "need one keyword per setting, got lr and actor_lr, which both set policy.optimizer.lr",
        ),
        (
            "ppo",
            {"mixed_precision": "bf8"},
            'policy.precision (keyword mixed_precision): need one of fp32, bf16, fp16, got "bf8"',
        ),
        ("ppo", {"kl_coef": (1, 2, 3)}, "keyword kl_coef: need kl_coef as (start, end), got [1, 2, 3]"),
        (
            "ppo",
            {"kl_coef": 0.1, "overrides": ["algorithm.kl.where=off"]},
            "algorithm.kl.coef (keyword kl_coef) would be ignored",
        ),
        ("ppo", {"overrides": "steps=1"}, 'need a list of overrides, got the text "steps=1"'),
    ],
)
def test_a_wrong_keyword_says_what_to_do(algo, keywords, message):
    with pytest.raises(ConfigError) as caught:
        make_trainer_config(algo, **keywords)
    assert message in str(caught.value)


def test_every_setting_is_described_with_value_default_and_source():
    docs = {doc.key: doc for doc in describe_settings(load_config("dapo"))}
    # The other two forms of a KL coefficient have six keys of their own.
    assert 90 < len(docs) <= 220 + 6 and all(doc.meaning for doc in docs.values())
    lr = docs["critic.optimizer.lr"]
    assert (lr.default, lr.type, lr.bounds, lr.source) == (1e-5, "a number", "> 0", "verl")
    assert docs["policy.optimizer.lr"].source == "GRPO, 2402.03300, 4.2"
    assert (
        docs["sampling.max_tokens"].value,
        docs["sampling.max_tokens"].default,
        docs["sampling.max_tokens"].unit,
    ) == (
        2560,
        128,
        "tokens",
    )
    assert (docs["algorithm.kl.coef.end"].value, docs["algorithm.kl.coef.end"].default) == (None, 0.1)


def test_a_prefix_selects_one_setting_or_a_section():
    assert [doc.key for doc in describe_settings(prefix="algorithm.kl.where")] == ["algorithm.kl.where"]
    assert {doc.key.split(".")[0] for doc in describe_settings(prefix="sampling")} == {"sampling"}
    with pytest.raises(ConfigError, match=r"unknown setting optimizer; the nearest is policy\.optimizer"):
        describe_settings(prefix="optimizer")


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


def test_the_reference_page_has_a_row_per_setting():
    page = settings_markdown()
    assert "\n| `rows_per_step` | `64` |" in page
    assert all(page.count(f"\n| `{doc.key}` |") == 1 for doc in describe_settings())
    assert "\n## `policy.optimizer`\n" in page


def test_loading_settings_imports_no_torch():
    program = "import sys, verl.config; verl.config.load_config('ppo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
