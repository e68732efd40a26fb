"""Names of settings in other trainers."""

from __future__ import annotations

import pytest

from tests.config.problems import problems
from verl.config import ConfigError, load_run, make_trainer_config
from verl.config.checks.foreign_names import FOREIGN_NAMES, name_here
from verl.config.listing.introspection import fields_by_key
from verl.config.run import PreferenceConfig, SFTConfig

KNOWN = list(fields_by_key() | fields_by_key(SFTConfig))


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_every_name_leads_to_a_setting(name):
    here = name_here(name, KNOWN)
    assert here is not None and here[0] in KNOWN
    assert name not in KNOWN


@pytest.mark.parametrize(
    ("key", "setting"),
    {
        "data.train_batch_size": "prompts_per_step",
        "data.max_response_length": "sampling.max_tokens",
        "actor_rollout_ref.model.path": "policy.path",
        "actor_rollout_ref.rollout.n": "samples_per_prompt",
        "actor_rollout_ref.actor.optim.lr": "policy.optimizer.lr",
        "critic.optim.lr": "critic.optimizer.lr",
        "trainer.save_freq": "checkpoint.every_steps",
        "num_generations": "samples_per_prompt",
        "learning_rate": "policy.optimizer.lr",
    }.items(),
)
def test_the_message_of_a_foreign_name_has_the_setting_here(key, setting):
    assert f"unknown setting {key} (override); here it is {setting}" in problems("grpo", f"{key}=1")


def test_every_foreign_name_of_a_section_has_a_message_of_its_own():
    text = problems("grpo", "trainer.save_freq=1", "trainer.test_freq=2")
    assert "checkpoint.every_steps" in text and "evaluation.every_steps" in text


def test_the_batch_of_another_kind_of_run_has_its_own_name():
    with pytest.raises(ConfigError, match="train_batch_size .override.; here it is rows_per_step"):
        load_run(SFTConfig, None, ["train_batch_size=8"])


def test_a_name_that_means_another_thing_in_runs_on_pairs_has_the_setting_of_those():
    with pytest.raises(
        ConfigError, match=r"unknown setting beta .override.; here it is loss; its option beta"
    ):
        load_run(PreferenceConfig, None, ["beta=0.1"])
    assert "here it is algorithm.kl.coef" in problems("grpo", "beta=0.1")


def test_a_setting_of_another_kind_of_run_names_its_command():
    assert "unknown setting rows_per_step (override); it is one of `verl sft`" in problems(
        "grpo", "rows_per_step=8"
    )


def test_a_setting_of_what_is_not_there_names_the_capability():
    assert "models that read images are not supported" in problems("grpo", "data.image_key=images")


def test_a_foreign_keyword_has_the_keyword_here():
    with pytest.raises(ConfigError, match="unknown keyword learning_rate; here it is lr"):
        make_trainer_config("grpo", learning_rate=1e-5)
    with pytest.raises(ConfigError, match=r"here it is checkpoint\.every_steps, in overrides"):
        make_trainer_config("grpo", save_freq=5)
