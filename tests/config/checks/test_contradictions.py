"""Settings that contradict each other: each is found, and the message has a remedy."""

from __future__ import annotations

import pytest

from tests.config.problems import problems
from verl.config import load_config
from verl.config.checks.contradictions import CONTRADICTIONS
from verl.config.run import TrainerConfig


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "ppo",
            ["algorithm.minibatches=257"],
            "need an answer for each of the updates of algorithm.minibatches 257, got prompts_per_step 256",
        ),
        (
            "online_dpo",
            ["prompts_per_step=8", "algorithm.minibatches=9"],
            "set algorithm.minibatches to at most 8",
        ),
        ("ppo", ["sampling.top_p=0.9"], "set algorithm.correction=recompute"),
        ("ppo", ["sampling.top_k=5"], "set algorithm.correction=recompute"),
        (
            "ppo",
            ["sampling.repetition_penalty=1.2"],
            "got sampling.repetition_penalty 1.2 with algorithm.correction bypass",
        ),
        (
            "grpo",
            ["rollout.engine=sglang", "rollout.servers=1", "evaluation.repetition_penalty=1.1"],
            "whose penalty leaves the prompt out",
        ),
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
        (
            "grpo",
            [
                "placement={name: colocated, policy: {engine: megatron}}",
                "hybrid_engine.actor_repartition={enabled: true, strategy_mapping: {training: fsdp}}",
            ],
            "got megatron in placement.policy.engine and fsdp in strategy_mapping.training",
        ),
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


def test_the_message_of_every_contradiction_names_settings_that_exist():
    assert all(rule.message(TrainerConfig()).startswith("need ") for rule in CONTRADICTIONS)
