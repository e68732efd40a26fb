"""Settings without effect: each is found if the user wrote it, and only then."""

from __future__ import annotations

import pytest

from tests.config.problems import problems
from verl.config import ConfigError, load_config, load_run, load_sft_config, to_yaml
from verl.config.checks.inactive import INACTIVE_SETTINGS
from verl.config.listing.introspection import fields_by_key
from verl.config.run import PreferenceConfig, RewardModelConfig, SFTConfig


def test_values_without_effect_do_not_stop_a_written_configuration_from_being_read(write):
    config = load_config("grpo", ["algorithm.kl.where=off"])
    assert config.algorithm.kl.coef == 0.04
    assert load_config(write(to_yaml(config))) == load_config(config) == config


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


def test_without_held_out_rows_fine_tuning_evaluates_and_samples_nothing():
    for key, value in (("evaluation.every_steps", 5), ("tracking.num_samples", 3), ("sampling.top_k", 3)):
        with pytest.raises(ConfigError, match=f"{key} .override. would be ignored: there are no held-out"):
            load_sft_config(None, [f"{key}={value}"])
        assert load_sft_config(None, [f"{key}={value}", "data.test=x.jsonl"]).data.test == "x.jsonl"


def test_settings_of_answers_have_no_effect_on_what_gives_none():
    test = "data.test=x.jsonl"
    for kind, key in (
        (SFTConfig, "evaluation.samples=2"),
        (PreferenceConfig, "sampling.temperature=0.5"),
        (RewardModelConfig, "evaluation.temperature=0"),
        (RewardModelConfig, "tracking.num_samples=3"),
    ):
        with pytest.raises(ConfigError, match="would be ignored"):
            load_run(kind, None, [test, key])
    with pytest.raises(
        ConfigError, match="eval_every_steps .* would be ignored: evaluation.every_steps decides"
    ):
        load_run(RewardModelConfig, None, [test, "eval_every_steps=2", "evaluation.every_steps=3"])


def test_the_rules_name_settings_that_exist():
    for rule in INACTIVE_SETTINGS:
        # RunConfig itself is no run: each kind of run has what it has.
        assert {*rule.keys, rule.switch} <= fields_by_key(rule.kind).keys()


def test_a_feature_turned_off_on_the_command_line_does_not_need_an_edit_of_the_file(write):
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
