"""Settings without effect: a user who sets one gets an error that says which other setting decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl.config.checks.column_readers import may_read, reads
from verl.config.data import DataSource
from verl.config.run import (
    PairsConfig,
    PreferenceConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
    TrainerConfig,
)


@dataclass(frozen=True)
class InactiveSettings:
    """Settings that have no effect under a condition.

    Attributes:
        keys: dotted keys of settings or whole sections.
        switch: the setting that decides.
        condition: True for a configuration in which they have no effect.
        reason: the cause, and what to do.
        kind: the rule holds for runs of this kind only.
    """

    keys: tuple[str, ...]
    switch: str
    condition: Callable[[Any], bool]
    reason: str
    kind: type[RunConfig] = TrainerConfig


_ALGORITHM = (
    InactiveSettings(
        ("algorithm.kl.coef", "algorithm.kl.estimator"),
        "algorithm.kl.where",
        lambda c: c.algorithm.kl.where == "off",
        "algorithm.kl.where is off; set it to loss or reward",
    ),
    InactiveSettings(
        ("reference",),
        "algorithm.kl.where",
        lambda c: c.algorithm.kl.where == "off" and not may_read(c, "ref_logprobs"),
        "algorithm.kl.where is off; set it to loss or reward",
    ),
    InactiveSettings(
        ("teacher",),
        "algorithm.policy_loss",
        lambda c: not may_read(c, "teacher_logprobs", "teacher_top_logprobs"),
        "no chosen function reads a teacher; take the recipe distillation",
    ),
    InactiveSettings(
        ("teacher.top_k",),
        "algorithm.policy_loss",
        lambda c: not may_read(c, "teacher_top_logprobs"),
        "no chosen function reads the teacher's most likely tokens; "
        "take algorithm.policy_loss=forward_kl_topk",
    ),
    InactiveSettings(
        ("algorithm.overlong_penalty",),
        "algorithm.overlong_buffer_tokens",
        lambda c: c.algorithm.overlong_buffer_tokens == 0,
        "algorithm.overlong_buffer_tokens is 0; set how many tokens the penalty is spread over",
    ),
    InactiveSettings(
        ("algorithm.max_resamples",),
        "algorithm.dynamic_sampling",
        lambda c: not c.algorithm.dynamic_sampling,
        "algorithm.dynamic_sampling is false; set it to true",
    ),
    InactiveSettings(
        ("critic", "algorithm.value_loss", "placement.critic"),
        "algorithm.advantage",
        lambda c: not may_read(c, "values", "prm_logprobs"),
        "this algorithm.advantage needs no critic; take gae",
    ),
    InactiveSettings(
        ("critic.vf_coef",),
        "algorithm.advantage",
        lambda c: not may_read(c, "values"),
        "the loss of a process reward model has no weight; it has an optimizer of its own",
    ),
    InactiveSettings(
        ("critic.logits_chunk_tokens",),
        "critic.logits_chunk_tokens",
        lambda c: reads(c, "values"),
        "a critic has values instead of logits; set policy.logits_chunk_tokens",
    ),
)

_OF_ADAPTERS = ("alpha", "targets", "modules_to_save", "dropout", "use_rslora", "use_dora", "quantize")
_MODELS = (
    InactiveSettings(
        tuple(f"policy.lora.{name}" for name in _OF_ADAPTERS),
        "policy.lora.rank",
        lambda c: not c.policy.lora.is_on,
        "policy.lora.rank is 0, all weights are trained; set it above 0",
        RunConfig,
    ),
    InactiveSettings(
        tuple(f"critic.lora.{name}" for name in _OF_ADAPTERS),
        "critic.lora.rank",
        lambda c: not c.critic.lora.is_on,
        "critic.lora.rank is 0, all weights are trained; set it above 0",
    ),
    InactiveSettings(
        ("policy.optimizer.min_lr_ratio",),
        "policy.optimizer.schedule",
        lambda c: c.policy.optimizer.schedule == "constant",
        "policy.optimizer.schedule is constant; set it to linear or cosine",
        RunConfig,
    ),
    InactiveSettings(
        ("critic.optimizer.min_lr_ratio",),
        "critic.optimizer.schedule",
        lambda c: c.critic.optimizer.schedule == "constant",
        "critic.optimizer.schedule is constant; set it to linear or cosine",
    ),
)

_OPTIMIZERS = tuple(
    InactiveSettings(
        (f"{role}.optimizer.betas", f"{role}.optimizer.eps"),
        f"{role}.optimizer.name",
        condition,
        f"only adamw and muon have these settings; set {role}.optimizer.options",
        kind,
    )
    for role, condition, kind in (
        ("policy", lambda c: c.policy.optimizer.name.lower() not in ("adamw", "muon"), RunConfig),
        ("critic", lambda c: c.critic.optimizer.name.lower() not in ("adamw", "muon"), TrainerConfig),
    )
)

_PLACEMENT = (
    InactiveSettings(
        (
            "placement.devices",
            "placement.policy",
            "placement.critic",
            "placement.reference",
            "placement.address",
            "placement.hang_limit_s",
        ),
        "placement.name",
        lambda c: c.placement.name == "local",
        "placement.name is local, one device in this process; set it to colocated, split or standalone",
    ),
    InactiveSettings(
        ("hybrid_engine.actor_repartition.enabled", "hybrid_engine.actor_repartition.tensor"),
        "rollout.engine",
        lambda c: c.rollout.engine != "embedded" or c.rollout.has_servers,
        "other engines have layouts of their own, see their options; "
        "it is for rollout.engine=embedded without servers",
    ),
    InactiveSettings(
        (
            "hybrid_engine.actor_repartition.tensor",
            "hybrid_engine.actor_repartition.communication_overlap",
            "hybrid_engine.actor_repartition.strategy_mapping.training",
        ),
        "hybrid_engine.actor_repartition.enabled",
        # A policy of Megatron always generates in a layout of its own.
        lambda c: not c.hybrid_engine.actor_repartition.enabled and c.placement.policy.engine.name == "fsdp",
        "hybrid_engine.actor_repartition.enabled is false; set it to true",
    ),
)

_ROLLOUT = (
    InactiveSettings(
        ("sampling.top_p", "sampling.top_k", "sampling.min_p"),
        "sampling.temperature",
        lambda c: c.sampling.temperature == 0,
        "sampling.temperature 0 always takes the most likely token",
    ),
    InactiveSettings(
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
        lambda c: c.rollout.engine == "embedded",
        "rollout.engine is embedded, which has neither servers nor options; "
        "set it to vllm, sglang, served or http",
    ),
    InactiveSettings(
        (
            "rollout.python",
            "rollout.weights_via",
            "rollout.on_update",
            "rollout.timeout_s",
            "rollout.servers_sleep",
        ),
        "rollout.servers",
        lambda c: not c.rollout.has_servers,
        "there are no servers; set rollout.servers or rollout.addresses",
    ),
    InactiveSettings(
        ("rollout.python",),
        "rollout.servers",
        lambda c: not c.rollout.servers and bool(c.rollout.addresses),
        "the run starts no server; set rollout.servers",
    ),
    InactiveSettings(
        ("rollout.secret_env",),
        "rollout.addresses",
        lambda c: not c.rollout.addresses,
        "the run joins no server; set rollout.addresses",
    ),
    InactiveSettings(
        ("rollout.weights_via", "rollout.on_update", "rollout.secret_env"),
        "rollout.engine",
        lambda c: c.rollout.engine == "http",
        "servers of rollout.engine http have weights of their own, and a key in engine_options.api_key_env",
    ),
    InactiveSettings(
        ("rollout.prefix_tokens",),
        "rollout.engine",
        lambda c: c.rollout.engine not in ("embedded", "served"),
        "other engines than embedded and served have a prefix cache of their own; set rollout.engine_options",
    ),
    InactiveSettings(
        ("pipeline.oversample", "pipeline.batches"),
        "rollout.servers",
        lambda c: not c.rollout.has_servers,
        "the policy's own processes answer a step's prompts at once; "
        "set rollout.servers or rollout.addresses",
    ),
)

_LENGTH = (
    InactiveSettings(
        ("steps",),
        "epochs",
        lambda c: c.epochs is not None,
        "epochs is set and decides the number of steps; set epochs to null",
        RunConfig,
    ),
)

_REPORTING = (
    InactiveSettings(
        ("evaluation",),
        "data.test",
        lambda c: c.data.test is None,
        "nothing is evaluated without data.test; name the held-out prompts",
    ),
    InactiveSettings(
        ("evaluation.top_p",),
        "evaluation.temperature",
        lambda c: c.evaluation.temperature == 0,
        "evaluation.temperature 0 always takes the most likely token",
    ),
    InactiveSettings(
        ("evaluation.greedy",),
        "evaluation.temperature",
        lambda c: c.evaluation.temperature == 0,
        "with evaluation.temperature 0 the answers are greedy already",
    ),
    InactiveSettings(
        ("evaluation.at_start",),
        "evaluation.every_steps",
        lambda c: c.evaluation.every_steps is None,
        "evaluation.every_steps is null, so a run never evaluates; set it to 0 or more",
    ),
    InactiveSettings(
        ("tracking.num_samples",),
        "tracking.samples_every_steps",
        lambda c: c.tracking.samples_every_steps == 0,
        "tracking.samples_every_steps is 0; set how often to write samples",
        RunConfig,
    ),
    InactiveSettings(
        ("tracking.project",),
        "tracking.sinks",
        lambda c: not {"wandb", "mlflow"} & set(c.tracking.sinks),
        "no sink of tracking.sinks has projects; add wandb or mlflow",
        RunConfig,
    ),
    InactiveSettings(
        ("tracking.name", "tracking.group"),
        "tracking.sinks",
        lambda c: not {"wandb", "mlflow", "tensorboard"} & set(c.tracking.sinks),
        "no sink of tracking.sinks has names of runs; add wandb, mlflow or tensorboard",
        RunConfig,
    ),
)

_OTHER_RUNS = (
    InactiveSettings(
        ("reference",),
        "loss",
        lambda c: c.loss.name == "simpo",
        "this loss has no reference; take dpo or ipo",
        PreferenceConfig,
    ),
    *(
        InactiveSettings(
            ("evaluation", "tracking.samples_every_steps", "tracking.num_samples", "sampling"),
            "data.test",
            lambda c: c.data.test is None,
            "there are no held-out rows to evaluate and to answer; set data.test",
            kind,
        )
        for kind in (SFTConfig, PreferenceConfig)
    ),
    InactiveSettings(
        ("evaluation",),
        "data.test",
        lambda c: c.data.test is None,
        "there are no held-out pairs to evaluate; set data.test",
        RewardModelConfig,
    ),
    *(
        InactiveSettings(
            ("sampling.temperature", "evaluation.samples"),
            "data.test",
            lambda c: True,
            "samples are one answer to each prompt, at evaluation.temperature",
            kind,
        )
        for kind in (SFTConfig, PreferenceConfig)
    ),
    InactiveSettings(
        ("evaluation.pass_at", "evaluation.greedy", "evaluation.by"),
        "data.test",
        lambda c: True,
        "held-out rows are measured by their loss here; verl eval measures answers",
        SFTConfig,
    ),
    InactiveSettings(
        ("evaluation.pass_at", "evaluation.greedy", "evaluation.by"),
        "data.test",
        lambda c: True,
        "held-out rows are measured by their loss here; verl eval measures answers",
        PairsConfig,
    ),
    InactiveSettings(
        ("eval_every_steps",),
        "evaluation.every_steps",
        lambda c: bool(c.evaluation.every_steps),
        "evaluation.every_steps decides",
        PairsConfig,
    ),
    InactiveSettings(
        ("data.answer_key",),
        "data.train",
        lambda c: True,
        "the columns of a run on pairs are data.chosen_key and data.rejected_key",
        PairsConfig,
    ),
    InactiveSettings(
        (
            "tracking.samples_every_steps",
            "tracking.num_samples",
            "evaluation.samples",
            "evaluation.temperature",
            "evaluation.top_p",
            "evaluation.max_tokens",
            "evaluation.repetition_penalty",
        ),
        "data.train",
        lambda c: True,
        "a reward model answers nothing",
        RewardModelConfig,
    ),
)

_DATA = (
    InactiveSettings(
        ("data.shuffle_buffer",),
        "data.train",
        lambda c: not any(map(_may_be_stream, _sources(c))),
        "no source of data.train is a stream; write it as {path: ..., streaming: true}",
    ),
    InactiveSettings(
        ("data.shuffle_buffer",),
        "data.shuffle",
        lambda c: not c.data.shuffle,
        "data.shuffle is false",
    ),
    *(
        InactiveSettings(
            ("data.shuffle_buffer", "data.in_memory_mb"),
            "data.train",
            lambda c: True,
            "all rows of such a run are kept in memory",
            kind,
        )
        for kind in (SFTConfig, PairsConfig)
    ),
    *(
        InactiveSettings(
            ("data.curriculum",),
            "data.train",
            lambda c: c.data.curriculum.name == "pass_rate",
            "no answers are sampled, so there are no pass rates; take easy_to_hard",
            kind,
        )
        for kind in (SFTConfig, PairsConfig)
    ),
)


def _may_be_stream(source: Any) -> bool:
    """True for a stream, and for rows that a program hands over, whose kind is not known here."""
    path = source.path if isinstance(source, DataSource) else source
    return path in (None, "memory") or (isinstance(source, DataSource) and source.streaming)


def _sources(config: RunConfig) -> Sequence[Any]:
    """Sources of the training data."""
    train = config.data.train
    return train if isinstance(train, tuple) else [train]


INACTIVE_SETTINGS: tuple[InactiveSettings, ...] = (
    *_ALGORITHM,
    *_MODELS,
    *_OPTIMIZERS,
    *_PLACEMENT,
    *_ROLLOUT,
    *_LENGTH,
    *_DATA,
    *_REPORTING,
    *_OTHER_RUNS,
)
