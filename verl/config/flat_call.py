"""A whole configuration from one flat call: `make_trainer_config("ppo", lr=1e-6, kl_coef=0.1)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl.config.algorithm import KLAdaptive
from verl.config.checks.column_readers import may_read, reads
from verl.config.checks.foreign_names import name_here
from verl.config.layers import (
    Stage,
    as_json,
    key_layer,
    nearest_key,
    override_layers,
    shorten,
    source_layers,
    value_at,
)
from verl.config.listing.introspection import fields_by_key, is_section
from verl.config.loader import build_config
from verl.config.run import TrainerConfig
from verl.config.yaml_text import ConfigError

# Keyword of `make_trainer_config` -> its setting. Settings of the run itself keep their names.
KEYWORD_SETTINGS: dict[str, str] = {
    "actor_micro_batch_size": "policy.micro_batch_rows",
    "critic_micro_batch_size": "critic.micro_batch_rows",
    "model_name": "policy.path",
    "lr": "policy.optimizer.lr",
    "actor_lr": "policy.optimizer.lr",
    "critic_lr": "critic.optimizer.lr",
    "vf_coef": "critic.vf_coef",
    "group_size": "samples_per_prompt",
    "max_tokens": "sampling.max_tokens",
    "max_response_length": "sampling.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "temperature": "sampling.temperature",
    **{key: key for key, field in fields_by_key().items() if "." not in key and not is_section(field)},
}

# Settings of a keyword's value, given the configuration so far.
DeriveSettings = Callable[[Any, TrainerConfig], dict[str, Any]]


def prompts_of_rollouts(value: Any, config: TrainerConfig) -> dict[str, Any]:
    """Prompts of a step from its number of answers."""
    samples = config.samples_per_prompt
    if not isinstance(value, int) or value < 1 or value % samples:
        raise ConfigError(
            f"need a multiple of samples_per_prompt ({samples}), got {value!r}; "
            "change it, or set samples_per_prompt"
        )
    return {"prompts_per_step": value // samples}


def precision_of_models(value: Any, config: TrainerConfig) -> dict[str, Any]:
    """Precision of the policy, and of the critic if there is one."""
    has_critic = may_read(config, "values", "prm_logprobs")
    return {"policy.precision": value} | ({"critic.precision": value} if has_critic else {})


def options_of_choice(place: str, name: str, *options: str) -> DeriveSettings:
    """Options of the function `name`, which must be the one chosen at `place`."""

    def settings(value: Any, config: TrainerConfig) -> dict[str, Any]:
        chosen = value_at(as_json(config), f"{place}.name")
        if chosen != name:
            raise ConfigError(
                f"need {place} {name}, got {chosen}, which has no {' and '.join(options)}; "
                "leave the keyword out"
            )
        return {f"{place}.{option}": value for option in options}

    return settings


def kl_of_coef(value: Any, config: TrainerConfig) -> dict[str, Any]:
    """Coefficient of the KL, and the place of the KL if the recipe has none; 0 turns it off."""
    if value == 0 and not isinstance(value, bool):
        return {"algorithm.kl.where": "off"}
    if value == "adaptive":
        value = KLAdaptive()
    elif isinstance(value, list | tuple):
        if len(value) != 2:
            raise ConfigError(
                f"need kl_coef as (start, end), got {shorten(as_json(value))}; give two numbers"
            )
        if config.epochs is not None:
            raise ConfigError(
                "need a number of steps for kl_coef (start, end), got epochs, whose steps are not known yet; "
                "give {start, end, steps}"
            )
        value = {"start": value[0], "end": value[1], "steps": config.steps}
    if config.algorithm.kl.where != "off":
        return {"algorithm.kl.coef": value}
    # GRPO has the KL in its loss, PPO with a critic in its reward; distillation has no reward.
    in_loss = reads(config, "group_ids", "teacher_logprobs", "teacher_top_logprobs")
    return {"algorithm.kl.where": "loss" if in_loss else "reward", "algorithm.kl.coef": value}


# Keyword -> function that derives settings from its value.
DERIVED_KEYWORDS: dict[str, DeriveSettings] = {
    "rollouts_per_device": prompts_of_rollouts,
    "mixed_precision": precision_of_models,
    "kl_coef": kl_of_coef,
    "clip_eps": options_of_choice("algorithm.policy_loss", "ppo_clip", "clip_low", "clip_high"),
    "gamma": options_of_choice("algorithm.advantage", "gae", "gamma"),
    "lam": options_of_choice("algorithm.advantage", "gae", "lam"),
}


def keyword_advice(name: str) -> str:
    """The way out of an unknown keyword: its name here, an override, or the nearest keyword."""
    here = name_here(name, list(fields_by_key()))
    keyword = next((k for k, key in KEYWORD_SETTINGS.items() if here and key == here[0]), None)
    if keyword:
        return f"here it is {keyword}"
    if here:
        return f"here it is {here[1]}, in overrides"
    return f"the nearest is {nearest_key(name, [*KEYWORD_SETTINGS, *DERIVED_KEYWORDS])}"


def make_trainer_config(
    algo: str = "ppo", *, overrides: Sequence[str] = (), **keywords: Any
) -> TrainerConfig:
    """A whole configuration in one call: a recipe, then keywords, then overrides.

    The keywords are those of `KEYWORD_SETTINGS` and `DERIVED_KEYWORDS`. `rollouts_per_device` is the number
    of answers of a step. `kl_coef` is a number (0: no KL), {start, end, steps}, {initial, target, horizon},
    "adaptive", or (start, end) over the steps of the run.

    Args:
        algo: name of the recipe.
        overrides: `dotted.key=value`, the value in YAML.
        **keywords: values of keywords.

    Raises:
        ConfigError: as `load_config`; and for a keyword that is unknown, or set twice under two names.
    """
    known = [*KEYWORD_SETTINGS, *DERIVED_KEYWORDS]
    if unknown := [name for name in keywords if name not in known]:
        raise ConfigError(
            *(
                f"unknown keyword {name}; {keyword_advice(name)}; there are {', '.join(known)}"
                for name in unknown
            )
        )
    base, last = source_layers(algo), override_layers(overrides, stage=Stage.USER)
    given = [
        (name, KEYWORD_SETTINGS[name], value) for name, value in keywords.items() if name in KEYWORD_SETTINGS
    ]
    direct = [key_layer(key, value, origin=f"keyword {name}", stage=Stage.USER) for name, key, value in given]
    # The settings of the derived keywords depend on all others, overrides too.
    so_far = build_config(TrainerConfig, [*base, *direct, *last], check_relations=False)
    for name in [name for name in keywords if name in DERIVED_KEYWORDS]:
        try:
            derived = DERIVED_KEYWORDS[name](keywords[name], so_far)
        except ConfigError as error:
            raise ConfigError(f"keyword {name}: {error}") from None
        given += [(name, key, value) for key, value in derived.items()]
    for name, key, _ in given:
        if twins := [other for other, same, _ in given if same == key and other != name]:
            raise ConfigError(
                f"need one keyword per setting, got {name} and {twins[0]}, which both set {key}; "
                "leave one out"
            )
    keyword_layers = [
        key_layer(key, value, origin=f"keyword {name}", stage=Stage.USER) for name, key, value in given
    ]
    return build_config(TrainerConfig, [*base, *keyword_layers, *last])
