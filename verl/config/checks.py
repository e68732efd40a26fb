"""What must hold between settings: which would be ignored, and which contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.config.fields import Choice
from verl.config.run import PairsConfig, PreferenceConfig, SFTConfig, TrainerConfig

# Columns that decide what exists -> the built-in functions that read them. Settings load without PyTorch, so
# the functions themselves cannot be asked here; a test compares.
READERS: dict[str, tuple[str, ...]] = {
    "group_ids": (
        "grpo",
        "grpo_batch_std",
        "rloo",
        "opo",
        "gpg",
        "maxrl",
        "grpo_passk",
        "gdpo",
        "reinforce_pp_baseline",
        "optimal_token_baseline",
        "grpo_turns",
        "prime",
        "online_dpo",
    ),
    "values": ("gae", "vapo_gae"),
    "ref_logprobs": ("prime", "online_dpo"),
    "prm_logprobs": ("prime",),
    "teacher_logprobs": ("reverse_kl",),
    "teacher_top_logprobs": ("forward_kl_topk",),
    "greedy_rewards": ("remax",),
}


def may_read(config: TrainerConfig, *columns: str) -> bool:
    """Whether the advantage, the policy loss or the correction reads one of the columns, as far as can be
    known: a user's function may.
    """
    a = config.algorithm
    chosen = [choice.name for choice in (a.advantage, a.policy_loss, a.correction)]
    return any(":" in name for name in chosen) or reads(config, *columns)


def reads(config: TrainerConfig, *columns: str) -> bool:
    """Whether a built-in advantage, policy loss or correction that was chosen reads one of the columns."""
    a = config.algorithm
    chosen = {choice.name for choice in (a.advantage, a.policy_loss, a.correction)}
    return any(chosen & set(READERS[column]) for column in columns)


def _is_off(choice: Choice) -> bool:
    return choice.name == "off"


def _compares_with_sampler(config: TrainerConfig) -> bool:
    """Whether the ratio of the policy loss is to the sampler's own probabilities."""
    a = config.algorithm
    return a.correction.name in ("bypass", "loglinear", "off_policy_mask") or a.policy_loss.name == "dppo"


# Where the sampler's distribution is not the policy's.
_RECOMPUTE = "set algorithm.correction=recompute and a policy loss other than dppo"

Claim = Callable[[Any], bool]

Ignored = tuple[str, str, Claim, str]


def _each(keys: tuple[str, ...], switch: str, claim: Claim, reason: str) -> tuple[Ignored, ...]:
    return tuple((key, switch, claim, reason) for key in keys)


# Settings (or whole sections) | the one that decides | ignored when | why, and what to do.
IGNORED: tuple[Ignored, ...] = (
    *_each(
        ("algorithm.kl.coef", "algorithm.kl.estimator"),
        "algorithm.kl.where",
        lambda c: c.algorithm.kl.where == "off",
        "algorithm.kl.where is off; set it to loss or reward",
    ),
    (
        "reference",
        "algorithm.kl.where",
        lambda c: (
            isinstance(c, TrainerConfig) and c.algorithm.kl.where == "off" and not may_read(c, "ref_logprobs")
        ),
        "algorithm.kl.where is off; set it to loss or reward",
    ),
    (
        "reference",
        "loss",
        lambda c: isinstance(c, PreferenceConfig) and c.loss.name == "simpo",
        "this loss has no reference; take dpo or ipo",
    ),
    (
        "teacher",
        "algorithm.policy_loss",
        lambda c: not may_read(c, "teacher_logprobs", "teacher_top_logprobs"),
        "no chosen function reads a teacher; take the recipe distillation",
    ),
    (
        "teacher.top_k",
        "algorithm.policy_loss",
        lambda c: not may_read(c, "teacher_top_logprobs"),
        "no chosen function reads the teacher's most likely tokens; take algorithm.policy_loss=forward_kl_topk",
    ),
    (
        "algorithm.overlong_penalty",
        "algorithm.overlong_buffer_tokens",
        lambda c: c.algorithm.overlong_buffer_tokens == 0,
        "algorithm.overlong_buffer_tokens is 0; set how many tokens the penalty is spread over",
    ),
    (
        "algorithm.max_resamples",
        "algorithm.dynamic_sampling",
        lambda c: not c.algorithm.dynamic_sampling,
        "algorithm.dynamic_sampling is false; set it to true",
    ),
    *_each(
        ("critic", "algorithm.value_loss"),
        "algorithm.advantage",
        lambda c: not may_read(c, "values", "prm_logprobs"),
        "this algorithm.advantage needs no critic; take gae",
    ),
    *_each(
        (
            "placement.devices",
            "placement.policy",
            "placement.critic",
            "placement.reference",
            "placement.address",
            "placement.hang_limit_s",
        ),
        "placement.name",
        lambda c: isinstance(c, TrainerConfig) and c.placement.name == "local",
        "placement.name is local, one device in this process; set it to colocated, split or standalone",
    ),
    (
        "placement.critic",
        "algorithm.advantage",
        lambda c: isinstance(c, TrainerConfig) and not may_read(c, "values", "prm_logprobs"),
        "this algorithm.advantage needs no critic; take gae",
    ),
    *_each(
        ("hybrid_engine.actor_repartition.enabled", "hybrid_engine.actor_repartition.tensor"),
        "rollout.engine",
        lambda c: (
            isinstance(c, TrainerConfig)
            and bool(c.rollout.engine != "embedded" or c.rollout.servers or c.rollout.addresses)
        ),
        "other engines have layouts of their own, see their options; it is for rollout.engine=embedded without servers",
    ),
    *_each(
        (
            "hybrid_engine.actor_repartition.tensor",
            "hybrid_engine.actor_repartition.communication_overlap",
            "hybrid_engine.actor_repartition.strategy_mapping.training",
        ),
        "hybrid_engine.actor_repartition.enabled",
        lambda c: (
            isinstance(c, TrainerConfig)
            and not c.hybrid_engine.actor_repartition.enabled
            and c.placement.policy.engine.name == "fsdp"
        ),
        "hybrid_engine.actor_repartition.enabled is false; set it to true",
    ),
    *_each(
        ("policy.lora.alpha", "policy.lora.targets"),
        "policy.lora.rank",
        lambda c: c.policy.lora.rank == 0,
        "policy.lora.rank is 0, all weights are trained; set it above 0",
    ),
    *_each(
        ("critic.lora.alpha", "critic.lora.targets"),
        "critic.lora.rank",
        lambda c: c.critic.lora.rank == 0,
        "critic.lora.rank is 0, all weights are trained; set it above 0",
    ),
    (
        "critic.vf_coef",
        "algorithm.advantage",
        lambda c: not may_read(c, "values"),
        "the loss of a process reward model has no weight; it has an optimizer of its own",
    ),
    (
        "critic.logits_chunk_tokens",
        "critic.logits_chunk_tokens",
        lambda c: reads(c, "values"),
        "a critic has values instead of logits; set policy.logits_chunk_tokens",
    ),
    (
        "policy.optimizer.min_lr_ratio",
        "policy.optimizer.schedule",
        lambda c: c.policy.optimizer.schedule == "constant",
        "policy.optimizer.schedule is constant; set it to linear or cosine",
    ),
    (
        "critic.optimizer.min_lr_ratio",
        "critic.optimizer.schedule",
        lambda c: c.critic.optimizer.schedule == "constant",
        "critic.optimizer.schedule is constant; set it to linear or cosine",
    ),
    *_each(
        ("sampling.top_p", "sampling.top_k", "sampling.min_p"),
        "sampling.temperature",
        lambda c: c.sampling.temperature == 0,
        "sampling.temperature 0 always takes the most likely token",
    ),
    *_each(
        (
            "rollout.servers",
            "rollout.addresses",
            "rollout.engine_options",
            "rollout.python",
            "rollout.weights_via",
            "rollout.on_update",
            "rollout.timeout_s",
            "rollout.secret_env",
            "rollout.servers_sleep",
        ),
        "rollout.engine",
        lambda c: isinstance(c, TrainerConfig) and c.rollout.engine == "embedded",
        "rollout.engine is embedded, which has neither servers nor options; set it to vllm, sglang, served or http",
    ),
    *_each(
        (
            "rollout.python",
            "rollout.weights_via",
            "rollout.on_update",
            "rollout.timeout_s",
            "rollout.servers_sleep",
        ),
        "rollout.servers",
        lambda c: isinstance(c, TrainerConfig) and not c.rollout.servers and not c.rollout.addresses,
        "there are no servers; set rollout.servers or rollout.addresses",
    ),
    (
        "rollout.python",
        "rollout.servers",
        lambda c: isinstance(c, TrainerConfig) and not c.rollout.servers and bool(c.rollout.addresses),
        "the run starts no server; set rollout.servers",
    ),
    (
        "rollout.secret_env",
        "rollout.addresses",
        lambda c: isinstance(c, TrainerConfig) and not c.rollout.addresses,
        "the run joins no server; set rollout.addresses",
    ),
    *_each(
        ("rollout.weights_via", "rollout.on_update", "rollout.secret_env"),
        "rollout.engine",
        lambda c: isinstance(c, TrainerConfig) and c.rollout.engine == "http",
        "servers of rollout.engine http have weights of their own, and a key in engine_options.api_key_env",
    ),
    *_each(
        ("pipeline.oversample", "pipeline.batches"),
        "rollout.servers",
        lambda c: isinstance(c, TrainerConfig) and not c.rollout.servers and not c.rollout.addresses,
        "the policy's own processes answer a step's prompts at once; set rollout.servers or rollout.addresses",
    ),
    (
        "evaluation.at_start",
        "evaluation.every_steps",
        lambda c: c.evaluation.every_steps == 0,
        "evaluation.every_steps is 0; set how often to evaluate",
    ),
    *_each(
        ("evaluation.prompts", "evaluation.samples", "evaluation.temperature"),
        "evaluation.every_steps",
        lambda c: c.evaluation.every_steps == 0 and c.data.test is None,
        "nothing is evaluated; set evaluation.every_steps and data.test",
    ),
    (
        "tracking.num_samples",
        "tracking.samples_every_steps",
        lambda c: c.tracking.samples_every_steps == 0,
        "tracking.samples_every_steps is 0; set how often to write samples",
    ),
    (
        "tracking.project",
        "tracking.sinks",
        lambda c: not {"wandb", "mlflow"} & set(c.tracking.sinks),
        "no sink of tracking.sinks has projects; add wandb or mlflow",
    ),
    *_each(
        ("data.test", "tracking.samples_every_steps", "tracking.num_samples"),
        "data.test",
        lambda c: isinstance(c, SFTConfig),
        "fine-tuning samples and evaluates nothing; use verl eval",
    ),
    *_each(
        ("tracking.samples_every_steps", "tracking.num_samples", "data.answer_key"),
        "data.train",
        lambda c: isinstance(c, PairsConfig),
        "a run on pairs samples no answers; its columns are data.chosen_key and data.rejected_key",
    ),
)

# Of a run of reinforcement learning: wrong when | what must hold, what came, what to do. `c` is the whole
# configuration.
WRONG: tuple[tuple[Claim, str], ...] = (
    (
        lambda c: c.prompts_per_step * c.samples_per_prompt % c.algorithm.minibatches != 0,
        "need prompts_per_step * samples_per_prompt divisible by algorithm.minibatches, got {c.prompts_per_step} * {c.samples_per_prompt} and {c.algorithm.minibatches}; change one of the three",
    ),
    (
        lambda c: (
            _compares_with_sampler(c)
            and (c.sampling.top_p < 1 or c.sampling.top_k > 0 or c.sampling.min_p > 0)
        ),
        "need logprobs of the whole distribution, got truncated sampling (top_p {c.sampling.top_p}, top_k {c.sampling.top_k}, min_p {c.sampling.min_p}) with algorithm.correction {c.algorithm.correction.name} and algorithm.policy_loss {c.algorithm.policy_loss.name}; "
        + _RECOMPUTE,
    ),
    (
        lambda c: _compares_with_sampler(c) and c.sampling.temperature == 0,
        "need logprobs of the distribution that was sampled, got sampling.temperature 0 with algorithm.correction {c.algorithm.correction.name} and algorithm.policy_loss {c.algorithm.policy_loss.name}; set a temperature above 0, or "
        + _RECOMPUTE.removeprefix("set "),
    ),
    (
        lambda c: c.samples_per_prompt > 1 and c.sampling.temperature == 0,
        "need different answers in a group, got samples_per_prompt {c.samples_per_prompt} with sampling.temperature 0; set a temperature above 0",
    ),
    (
        lambda c: c.sampling.temperature == 0 and reads(c, "greedy_rewards"),
        "need answers other than the most likely one for algorithm.advantage {c.algorithm.advantage.name}, got sampling.temperature 0, where every advantage is 0; set a temperature above 0",
    ),
    (
        lambda c: (
            c.algorithm.kl.where == "reward"
            and c.algorithm.kl.estimator.name
            in ("k1_straight_through", "k3_straight_through", "k3_importance")
        ),
        "need a KL estimator that has a meaning without a gradient for algorithm.kl.where reward, got {c.algorithm.kl.estimator.name}; set algorithm.kl.estimator to k1 or k3, whose value is the same",
    ),
    (
        lambda c: c.samples_per_prompt == 1 and reads(c, "group_ids"),
        "need siblings to compare with, got samples_per_prompt 1 with algorithm.policy_loss {c.algorithm.policy_loss.name} and algorithm.advantage {c.algorithm.advantage.name}, which would learn nothing; set samples_per_prompt above 1",
    ),
    (
        lambda c: c.samples_per_prompt == 1 and c.algorithm.dynamic_sampling,
        "need groups for algorithm.dynamic_sampling, got samples_per_prompt 1, whose rewards are always equal; set samples_per_prompt above 1 or dynamic_sampling to false",
    ),
    (
        lambda c: c.algorithm.overlong_buffer_tokens >= c.sampling.max_tokens,
        "need algorithm.overlong_buffer_tokens below sampling.max_tokens, got {c.algorithm.overlong_buffer_tokens} and {c.sampling.max_tokens}; a fifth of it is usual (DAPO, 2503.14476)",
    ),
    (
        lambda c: c.algorithm.kl.where == "loss" and c.algorithm.kl.estimator.name == "k1",
        "need a KL estimator whose gradient is not zero on average for algorithm.kl.where loss, got k1; set algorithm.kl.estimator to k2 or k3",
    ),
    (
        lambda c: c.critic.warmup_steps >= c.steps and may_read(c, "values", "prm_logprobs"),
        "need critic.warmup_steps below steps, got {c.critic.warmup_steps} and {c.steps}: the policy would never learn; lower it",
    ),
    (
        lambda c: c.evaluation.samples > 1 and c.evaluation.temperature == 0,
        "need different answers to a prompt, got evaluation.samples {c.evaluation.samples} with evaluation.temperature 0; set one answer or a temperature above 0",
    ),
    (
        lambda c: (
            c.algorithm.skip_zero_advantages
            and (c.algorithm.kl.where == "loss" or c.algorithm.entropy_coef or c.algorithm.likelihood_coef)
        ),
        "need a loss that is the policy loss alone for algorithm.skip_zero_advantages, got algorithm.kl.where {c.algorithm.kl.where}, entropy_coef {c.algorithm.entropy_coef} and likelihood_coef {c.algorithm.likelihood_coef}, which also act on rows without advantage; turn them off, or skip_zero_advantages",
    ),
    (
        lambda c: (
            c.algorithm.policy_loss.name == "online_dpo" and c.prompts_per_step % c.algorithm.minibatches != 0
        ),
        "need whole groups in each update for algorithm.policy_loss online_dpo, got prompts_per_step {c.prompts_per_step} and algorithm.minibatches {c.algorithm.minibatches}; make the first divisible by the second",
    ),
    (
        lambda c: (
            reads(c, "prm_logprobs")
            and c.algorithm.advantage.options.get("beta", 0.05)
            != c.algorithm.value_loss.options.get("beta", 0.05)
        ),
        "need one beta for the process reward and for the loss that teaches it, got algorithm.advantage {c.algorithm.advantage.options} and algorithm.value_loss {c.algorithm.value_loss.options}; set both to the same",
    ),
    (
        lambda c: c.samples_per_prompt == 1 and not _is_off(c.algorithm.length_penalty),
        "need siblings to compare lengths with, got samples_per_prompt 1 with algorithm.length_penalty {c.algorithm.length_penalty.name}; set samples_per_prompt above 1, or use algorithm.overlong_buffer_tokens",
    ),
    (
        lambda c: (
            c.rollout.engine in ("sglang", "served", "http")
            and not c.rollout.servers
            and not c.rollout.addresses
        ),
        "need servers for rollout.engine {c.rollout.engine}, got rollout.servers 0 and no rollout.addresses; set one of them",
    ),
    (
        lambda c: (
            c.rollout.servers_sleep and (c.rollout.engine in ("served", "http") or c.policy.lora.rank > 0)
        ),
        "need servers of vllm or sglang that follow all weights for rollout.servers_sleep, got rollout.engine {c.rollout.engine} and policy.lora.rank {c.policy.lora.rank}: a sleeping server forgets the weights that low-rank additions belong to; set it to false",
    ),
    (
        lambda c: (
            c.rollout.servers_sleep and (c.pipeline.max_staleness > 0 or c.pipeline.batches == "streamed")
        ),
        "need servers that are awake while the policy learns for pipeline.max_staleness {c.pipeline.max_staleness} and batches {c.pipeline.batches}, got rollout.servers_sleep; set it to false",
    ),
    (
        lambda c: c.pipeline.survivors.options.get("least", 1) > c.samples_per_prompt,
        "need pipeline.survivors.least of at most samples_per_prompt {c.samples_per_prompt}, got {c.pipeline.survivors.options}; lower it",
    ),
    (
        lambda c: c.pipeline.oversample > 0 and c.pipeline.batches == "deterministic",
        "need pipeline.oversample 0 for pipeline.batches deterministic, got {c.pipeline.oversample}: which answers are the slowest differs from run to run; change one of the two",
    ),
    (
        lambda c: c.rollout.engine == "http" and c.rollout.servers > 0,
        "need servers that run already for rollout.engine http, got rollout.servers {c.rollout.servers}; name them in rollout.addresses",
    ),
)
