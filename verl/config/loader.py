"""Load, check and write the settings of a run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from verl.config.algorithm import KLAdaptive
from verl.config.checks import IGNORED, WRONG, may_read, reads
from verl.config.introspection import is_section, merged, notes_of, places, type_text
from verl.config.run import RunConfig, SFTConfig, TrainerConfig
from verl.config.yaml_text import ConfigError, dumped, parsed

_RECIPES_DIR = Path(__file__).parent / "recipes"

RECIPES: tuple[str, ...] = tuple(sorted(path.stem for path in _RECIPES_DIR.glob("*.yaml")))

Source = str | Path | Mapping[str, Any] | RunConfig

Run = TypeVar("Run", bound=RunConfig)


def nearest(key: str, candidates: Sequence[str]) -> str:
    """The candidate most alike as a whole and in its last part, or its initials: `lr` and `learning_rate`
    mean `policy.optimizer.lr`.
    """
    last = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_"))

    def likeness(other: str) -> float:
        other_last = other.rpartition(".")[2]
        same_last = 1.0 if other_last == initials else difflib.SequenceMatcher(None, last, other_last).ratio()
        return same_last + difflib.SequenceMatcher(None, key, other).ratio()

    return max(candidates, key=likeness)


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key (a number counts into a list); None where there is none."""
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


# Layers: settings of different origins, later over earlier
# -----------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """Settings of one origin.

    Attributes:
        tree: nested settings.
        origins: where each dotted key was written, for messages; "" where that is plain.
        stage: 0 for what the project wrote (recipes), 1 for the user's file or call, 2 for overrides of a
            file.
    """

    tree: dict[str, Any]
    origins: dict[str, str]
    stage: int


def plain(value: Any, key: str = "") -> Any:
    """`value` as JSON has it: dicts with text keys, lists, texts, numbers, true, false and null."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): plain(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, key) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(f"{key}: need a text, number, list or mapping, got {type(value).__name__}")


def _paths(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        yield f"{prefix}{name}"
        yield from _paths(value, f"{prefix}{name}.")


def _key_layer(key: str, value: Any, *, origin: str, stage: int) -> _Layer:
    """One dotted key with its value."""
    tree = plain(value, key)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return _Layer(tree, dict.fromkeys(_paths(tree), origin), stage)


def _source_layers(source: Source) -> list[_Layer]:
    if isinstance(source, RunConfig):
        return [_Layer(plain(source), {}, 0)]
    if isinstance(source, Mapping):
        tree = plain(source)
        return _file_layers(tree, dict.fromkeys(_paths(tree), ""))
    path = Path(source)
    if isinstance(source, str) and (
        source in RECIPES or path.name == source and not path.suffix and not path.exists()
    ):
        return _recipe_layers(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise ConfigError(
            f"need a recipe ({', '.join(RECIPES)}) or a YAML file of settings, got {path}: {reason}"
        ) from None
    tree, origins = parsed(text, path.name)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path.name}: need settings at its top, `key: value`, got {_shown(tree)}")
    return _file_layers(plain(tree or {}), origins)


def _recipe_layers(name: str, where: str = "") -> list[_Layer]:
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name}{where}; the nearest is {nearest(name, RECIPES)}, and there are {', '.join(RECIPES)}"
        )
    tree, origins = parsed((_RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}")
    own = plain(tree)
    return [*(_recipe_layers(base) if (base := own.pop("recipe", "")) else ()), _Layer(own, origins, 0)]


def _file_layers(tree: dict[str, Any], origins: dict[str, str]) -> list[_Layer]:
    """The layers of a file or mapping, whose keys `recipe` and `resolved` are about the others."""
    head = {name: tree.pop(name) for name in ("recipe", "resolved") if name in tree}
    if not isinstance(resolved := head.get("resolved", False), bool):
        raise ConfigError(f"resolved: need true or false, got {_shown(resolved)}")
    layer = _Layer(
        tree, {key: origin for key, origin in origins.items() if key not in head}, stage=0 if resolved else 1
    )
    if "recipe" not in head:
        return [layer]
    name = head["recipe"] if isinstance(head["recipe"], str) else _shown(head["recipe"])
    return [*_recipe_layers(name, _in_brackets(origins["recipe"])), layer]


def _override_layers(overrides: Sequence[str], *, stage: int) -> list[_Layer]:
    if isinstance(overrides, str):
        raise ConfigError(f'need a list of overrides, got the text "{overrides}"; put it in brackets')
    layers, problems = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(f'need overrides like key=value, got "{override}"')
            continue
        try:
            value, _ = parsed(text, f'override "{override}"')
            layers.append(_key_layer(key.strip(), value, origin="override", stage=stage))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(*problems)
    return layers


# Errors
# ------------------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _in_brackets(origin: str) -> str:
    return f" ({origin})" if origin else ""


def _upwards(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _problem(
    error: Mapping[str, Any], tree: dict[str, Any], origins: dict[str, str], fields: Mapping[str, FieldInfo]
) -> str:
    """One problem that pydantic found, in our words."""
    key, value = "", tree
    for part in map(str, error["loc"]):
        inner = f"{key}.{part}".lstrip(".")
        # pydantic also names which form of a setting it tried: no key of the user's.
        if (
            at(tree, inner) is not None
            or isinstance(value, Mapping)
            and (part in value or error["type"] == "missing")
        ):
            key, value = inner, at(tree, inner)
    where = _in_brackets(next((origins[upper] for upper in _upwards(key) if upper in origins), ""))
    if error["type"] == "extra_forbidden":
        if key in fields:
            return (
                f"need nested keys, got {key} in one{where}; put {' under '.join(reversed(key.split('.')))}"
            )
        return f"unknown setting {key}{where}; the nearest is {nearest(key, list(fields))}"
    if error["type"] == "value_error":
        return f"{key}{where}: {error['ctx']['error']}"
    place = next(upper for upper in _upwards(key) if upper in fields)
    field = fields[place]
    need = (
        "`key: value` settings"
        if is_section(field)
        else f"{type_text(field.annotation)} {notes_of(field)['bounds']}".strip()
    )
    if "ge" in error.get("ctx", {}) and not notes_of(field)["bounds"]:
        need = f"a number >= {error['ctx']['ge']:g}"  # One form of several.
    return f"{place}{where}: need {need}, got {_shown(at(tree, place))}"


def _relation_problems(config: RunConfig, stages: dict[str, int], origins: dict[str, str]) -> Iterator[str]:
    """What does not hold between settings that are valid one by one."""
    for claim, message in WRONG if isinstance(config, TrainerConfig) else ():
        if claim(config):
            yield message.format(c=config)
    for place, switch, claim, reason in IGNORED:
        keys = [
            key
            for key in stages
            if f"{key}.".startswith(f"{place}.") and not any(other.startswith(f"{key}.") for other in stages)
        ]
        for key in keys if place in places(type(config)) and claim(config) else ():
            # Whoever turns a thing off on the command line need not clear the settings of it in the file.
            switched = max(
                (stages[other] for other in stages if f"{switch}.".startswith(f"{other}.")), default=0
            )
            if stages[key] >= max(1, switched):
                yield f"{key}{_in_brackets(origins[key])} would be ignored: {reason}, or leave {key} out"


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML that `load_config` (or `load_sft_config`) reads back to an equal configuration.

    `resolved: true` says that the file was written whole: a value in it without effect is not an error then.
    """
    tree = {"resolved": True, **config.model_dump(mode="json")}
    return dumped(tree)


# Loading
# -----------------------------------------------------------------------------------------------------------------


def _built(kind: type[Run], layers: Sequence[_Layer], *, check_relations: bool = True) -> Run:
    # The base is every default written out, so that `critic.optimizer: {eps: 1e-6}` keeps the critic's
    # learning rate.
    tree: dict[str, Any] = plain(kind())
    origins: dict[str, str] = {}
    stages: dict[str, int] = {}
    for layer in layers:
        tree = merged(tree, layer.tree, kind)
        origins |= layer.origins
        stages |= dict.fromkeys(layer.origins, layer.stage)
    try:
        # As JSON and strict: lists are tuples, and neither "5" nor true is a number.
        config = kind.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(
            *(_problem(dict(found), tree, origins, places(kind)) for found in error.errors())
        ) from None
    if check_relations and (problems := list(_relation_problems(config, stages, origins))):
        raise ConfigError(*problems)
    return config


def load_config(source: Source, overrides: Sequence[str] = ()) -> TrainerConfig:
    """The configuration of a recipe, YAML file, mapping or other configuration, with overrides on top.

    A file or mapping may start from a recipe with the key `recipe`. A function chosen anew (`advantage: gae`
    over `grpo`) loses the options of the old one; options given alone, or with the same name, are added to
    those that are there.

    Args:
        source: name of a recipe (`RECIPES`), path of a YAML file, nested mapping, or a configuration.
        overrides: `dotted.key=value`, the value in YAML.

    Returns:
        All settings, valid one by one and together.

    Raises:
        ConfigError: something cannot be read, is unknown, invalid, contradictory, or would have no effect.
    """
    return _built(TrainerConfig, [*_source_layers(source), *_override_layers(overrides, stage=2)])


def load_run(kind: type[Run], source: Source | None = None, overrides: Sequence[str] = ()) -> Run:
    """The configuration of any kind of run, as `load_config`; no source: the defaults of that kind."""
    return _built(
        kind, [*_source_layers({} if source is None else source), *_override_layers(overrides, stage=2)]
    )


def load_sft_config(source: Source | None = None, overrides: Sequence[str] = ()) -> SFTConfig:
    """The configuration of a fine-tuning run, see `load_run`."""
    return load_run(SFTConfig, source, overrides)


# The flat call
# -----------------------------------------------------------------------------------------------------------

# Keyword of `make_trainer_config` -> the setting that it is. Settings of the run itself go by their own
# names.
FLAT: dict[str, str] = {
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
    **{key: key for key, field in places().items() if "." not in key and not is_section(field)},
}


def _rollouts(value: Any, config: TrainerConfig) -> dict[str, Any]:
    samples = config.samples_per_prompt
    if not isinstance(value, int) or value < 1 or value % samples:
        raise ConfigError(
            f"need a multiple of samples_per_prompt ({samples}), got {value!r}; change it, or set samples_per_prompt"
        )
    return {"prompts_per_step": value // samples}


def _precision(value: Any, config: TrainerConfig) -> dict[str, Any]:
    has_critic = may_read(config, "values", "prm_logprobs")
    return {"policy.precision": value} | ({"critic.precision": value} if has_critic else {})


def _option(place: str, name: str, *options: str) -> Callable[[Any, TrainerConfig], dict[str, Any]]:
    """A keyword for options of one function, which must be the chosen one."""

    def settings(value: Any, config: TrainerConfig) -> dict[str, Any]:
        chosen = at(plain(config), f"{place}.name")
        if chosen != name:
            raise ConfigError(
                f"need {place} {name}, got {chosen}, which has no {' and '.join(options)}; leave the keyword out"
            )
        return {f"{place}.{option}": value for option in options}

    return settings


def _kl_coef(value: Any, config: TrainerConfig) -> dict[str, Any]:
    """A number (0: no KL), {start, end, steps}, {initial, target, horizon}, "adaptive", or (start, end) over
    the run's steps.
    """
    if value == 0 and not isinstance(value, bool):
        return {"algorithm.kl.where": "off"}
    if value == "adaptive":
        value = KLAdaptive()
    elif isinstance(value, list | tuple):
        if len(value) != 2:
            raise ConfigError(f"need kl_coef as (start, end), got {_shown(plain(value))}; give two numbers")
        value = {"start": value[0], "end": value[1], "steps": config.steps}
    if config.algorithm.kl.where != "off":
        return {"algorithm.kl.coef": value}
    # The method of the siblings has the KL in its loss, PPO with a critic in its reward; distillation has no
    # reward.
    where = "loss" if reads(config, "group_ids", "teacher_logprobs", "teacher_top_logprobs") else "reward"
    return {"algorithm.kl.where": where, "algorithm.kl.coef": value}


# Keyword -> settings that follow from its value and from the configuration so far.
FLAT_DERIVED: dict[str, Callable[[Any, TrainerConfig], dict[str, Any]]] = {
    "rollouts_per_device": _rollouts,
    "mixed_precision": _precision,
    "kl_coef": _kl_coef,
    "clip_eps": _option("algorithm.policy_loss", "ppo_clip", "clip_low", "clip_high"),
    "gamma": _option("algorithm.advantage", "gae", "gamma"),
    "lam": _option("algorithm.advantage", "gae", "lam"),
}


def make_trainer_config(
    algo: str = "ppo", *, overrides: Sequence[str] = (), **keywords: Any
) -> TrainerConfig:
    """A whole configuration in one flat call: a recipe, then keywords (`FLAT`, `FLAT_DERIVED`), then
    overrides.

    `rollouts_per_device` is the answers of a step; `kl_coef` is a number (0: no KL), {start, end, steps},
    {initial, target, horizon}, "adaptive", or (start, end) over the steps of the run.

    Raises:
        ConfigError: as `load_config`; and for a keyword that is unknown, or set twice under two names.
    """
    known = [*FLAT, *FLAT_DERIVED]
    if unknown := [name for name in keywords if name not in known]:
        raise ConfigError(
            *(
                f"unknown keyword {name}; the nearest is {nearest(name, known)}; there are {', '.join(known)}"
                for name in unknown
            )
        )
    start, end = _source_layers(algo), _override_layers(overrides, stage=1)
    given = [(name, FLAT[name], value) for name, value in keywords.items() if name in FLAT]
    direct = [_key_layer(key, value, origin=f"keyword {name}", stage=1) for name, key, value in given]
    so_far = _built(TrainerConfig, [*start, *direct, *end], check_relations=False)
    for name in [name for name in keywords if name in FLAT_DERIVED]:
        try:
            given += [(name, key, value) for key, value in FLAT_DERIVED[name](keywords[name], so_far).items()]
        except ConfigError as error:
            raise ConfigError(f"keyword {name}: {error}") from None
    for name, key, _ in given:
        if twins := [other for other, same, _ in given if same == key and other != name]:
            raise ConfigError(
                f"need one keyword per setting, got {name} and {twins[0]}, which both set {key}; leave one out"
            )
    return _built(
        TrainerConfig,
        [
            *start,
            *(_key_layer(key, value, origin=f"keyword {name}", stage=1) for name, key, value in given),
            *end,
        ],
    )
