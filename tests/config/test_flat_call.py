"""The flat call: every keyword reaches its setting, and a wrong one says what to do."""

from __future__ import annotations

import pytest

from verl.config import ConfigError, load_config, make_trainer_config
from verl.config.algorithm import KLAdaptive, KLSchedule

CASE_STUDY = {
    "actor_micro_batch_size": 4,
    "critic_micro_batch_size": 4,
    "rollouts_per_device": 64,
    "vf_coef": 0.1,
    "clip_eps": 0.2,
}


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
