"""Load, check and write the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from verl.config.checks.contradictions import CONTRADICTIONS
from verl.config.checks.foreign_names import advice_for
from verl.config.checks.inactive import INACTIVE_SETTINGS, InactiveSettings
from verl.config.data import DataSource
from verl.config.layers import (
    Layer,
    Source,
    Stage,
    as_json,
    in_brackets,
    merge,
    nearest_key,
    override_layers,
    shorten,
    source_layers,
    value_at,
)
from verl.config.listing.introspection import fields_by_key, is_section, notes, type_in_words
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.config.yaml_text import ConfigError, dump_yaml

Run = TypeVar("Run", bound=RunConfig)
# Kind of run -> its command.
COMMANDS: dict[type[RunConfig], str] = {
    TrainerConfig: "verl train",
    SFTConfig: "verl sft",
    PreferenceConfig: "verl preference",
    RewardModelConfig: "verl reward-model",
}


def load_config(source: Source, overrides: Sequence[str] = ()) -> TrainerConfig:
    """The configuration of a recipe, YAML file, mapping or other configuration, with overrides on top.

    A file or mapping may start from a recipe with the key `recipe`. If another function is chosen
    (`advantage: gae` over `grpo`), the options of the old one are dropped; options alone, or with the same
    name, are added to those of the old one.

    Args:
        source: name of a recipe (`RECIPES`), path of a YAML file, nested mapping, or a configuration.
        overrides: `dotted.key=value`, the value in YAML.

    Returns:
        All settings, valid one by one and together.

    Raises:
        ConfigError: something cannot be read, is unknown, invalid, contradictory, or would have no effect.
    """
    return load_run(TrainerConfig, source, overrides)


def load_run(kind: type[Run], source: Source | None = None, overrides: Sequence[str] = ()) -> Run:
    """The configuration of any kind of run, as `load_config`; no source: the defaults of that kind."""
    layers = source_layers({} if source is None else source)
    return build_config(kind, [*layers, *override_layers(overrides, stage=Stage.OVERRIDE, kind=kind)])


def load_sft_config(source: Source | None = None, overrides: Sequence[str] = ()) -> SFTConfig:
    """The configuration of a fine-tuning run, as `load_run`."""
    return load_run(SFTConfig, source, overrides)


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML that `load_config` (or `load_sft_config`) reads back to an equal configuration.

    Its key `resolved: true` says that all settings are in it; values without effect are then no error.
    """
    return dump_yaml({"resolved": True, **config.model_dump(mode="json")})


def build_config(kind: type[Run], layers: Sequence[Layer], *, check_relations: bool = True) -> Run:
    """The configuration of layers, later over earlier.

    Args:
        kind: class of the run.
        layers: settings of each origin.
        check_relations: also check settings against each other.

    Raises:
        ConfigError: settings are unknown, invalid, contradictory, or would have no effect.
    """
    # The base is every default written out, so that `critic.optimizer: {eps: 1e-6}` keeps the critic's own
    # default of the learning rate.
    tree: dict[str, Any] = as_json(kind())
    origins: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for layer in layers:
        tree = merge(tree, layer.tree, kind)
        origins |= layer.origins
        stages |= dict.fromkeys(layer.origins, layer.stage)
    if problems := list(_no_number(tree, origins)):
        raise ConfigError(*problems)
    try:
        # From JSON, since strict mode then takes lists for tuples, but neither "5" nor true for a number.
        config = kind.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        fields = fields_by_key(kind)
        errors = [dict(e) for e in error.errors()]
        problems = list(_source_problems(errors, origins))
        problems += [p for e in errors for p in _explain(e, tree, origins, fields)]
        raise ConfigError(*problems) from None
    if check_relations and (problems := list(relation_problems(config, origins, stages))):
        raise ConfigError(*problems)
    return config


def _no_number(tree: Any, origins: Mapping[str, str], key: str = "") -> Iterator[str]:
    """Messages on integers beyond 64 bits, which PyTorch cannot hold, and on NaN."""
    if isinstance(tree, Mapping | list):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in items:
            yield from _no_number(value, origins, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, int) and abs(tree) >= 2**63:
        yield f"{key}{in_brackets(origins.get(key, ''))}: need an integer below 2^63, got {tree}"
    elif isinstance(tree, float) and tree != tree:
        yield f"{key}{in_brackets(origins.get(key, ''))}: need a number, got NaN"


def with_steps(config: Run, steps: int) -> Run:
    """The configuration of a run by epochs, with the number of steps that its data gives.

    Raises:
        ConfigError: settings that contradict this number.
    """
    changed = config.model_copy(update={"steps": steps})
    if problems := list(relation_problems(changed.model_copy(update={"epochs": None}), {}, {})):
        raise ConfigError(*problems)
    return changed


def relation_problems(
    config: RunConfig, origins: Mapping[str, str], stages: Mapping[str, Stage]
) -> Iterator[str]:
    """Messages on settings that are valid one by one, but contradict each other or have no effect."""
    if isinstance(config, TrainerConfig):
        yield from (rule.message(config) for rule in CONTRADICTIONS if rule.condition(config))
    for rule in INACTIVE_SETTINGS:
        if isinstance(config, rule.kind) and rule.condition(config):
            for key in _inactive_keys(rule, stages):
                where = in_brackets(origins[key])
                yield f"{key}{where} would be ignored: {rule.reason}, or leave {key} out"


def _inactive_keys(rule: InactiveSettings, stages: Mapping[str, Stage]) -> Iterator[str]:
    """Keys of a rule that the user wrote, on the same stage as its switch or a later one.

    A switch on the command line turns a feature off, although the file still has the settings of the feature.
    """
    switched = max((stages[key] for key in stages if f"{rule.switch}.".startswith(f"{key}.")), default=0)
    for key in stages:
        is_ruled = any(f"{key}.".startswith(f"{ruled}.") for ruled in rule.keys)
        is_leaf = not any(other.startswith(f"{key}.") for other in stages)
        if is_ruled and is_leaf and stages[key] >= max(Stage.USER, switched):
            yield key


def _source_problems(errors: list[dict[str, Any]], origins: Mapping[str, str]) -> Iterator[str]:
    """Messages on keys of sources of data; takes all errors of their settings out of `errors`.

    A source is one of several forms of its setting, and pydantic names what is wrong with each of them.
    """
    found = []
    for error in errors:
        places = [i for i, part in enumerate(error["loc"][:-1]) if _is_source(part)]
        found += [(error, places[-1])] if places else []
    settings = {error["loc"][:2] for error, _ in found}
    errors[:] = [error for error in errors if error["loc"][:2] not in settings]
    for error, place in found:
        before, own = error["loc"][:place], error["loc"][place + 1 :]
        setting = ".".join(map(str, before[:2]))
        source = ".".join([setting, *(str(part) for part in before[2:] if isinstance(part, int))])
        where, name = in_brackets(origins.get(source, origins.get(setting, ""))), ".".join(map(str, own))
        known = list(DataSource.model_fields)
        if error["type"] == "extra_forbidden":
            yield (
                f"unknown key {source}.{name}{where}; the nearest is {nearest_key(name, known)}, and there "
                f"are {', '.join(known)}"
            )
        elif error["type"] == "missing":
            yield f"{source}{where}: need the key {name!r}, got none"
        else:
            need = error["msg"].removeprefix("Input should be ").replace("greater than", "a number above")
            yield f"{source}.{name}{where}: need {need}, got {shorten(error['input'])}"


def _is_source(part: Any) -> bool:
    """True for pydantic's name of the form {path, ...} of a source."""
    name = DataSource.__name__
    return part == name or (str(part).startswith("function-") and str(part).endswith(f"{name}]"))


def _explain(
    error: Mapping[str, Any], tree: dict[str, Any], origins: dict[str, str], fields: Mapping[str, FieldInfo]
) -> list[str]:
    """Messages of one error of pydantic, with the user's key, its line, and what is needed instead."""
    key, value = "", tree
    for part in map(str, error["loc"]):
        inner = f"{key}.{part}".lstrip(".")
        # pydantic also names the form of a KL coefficient that it tried, which is no key of the user's.
        is_key = isinstance(value, Mapping) and (part in value or error["type"] == "missing")
        if is_key or value_at(tree, inner) is not None:
            key, value = inner, value_at(tree, inner)
    upwards = [key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)]
    where = in_brackets(next((origins[upper] for upper in upwards if upper in origins), ""))
    if error["type"] == "extra_forbidden":
        return [_unknown(name, origins.get(name, where), fields) for name in _leaves(key, value)]
    if error["type"] == "value_error":
        return [f"{key}{where}: {error['ctx']['error']}"]
    place = next(upper for upper in upwards if upper in fields)
    field = fields[place]
    bounds = notes(field)["bounds"]
    need = "`key: value` settings" if is_section(field) else type_in_words(field.annotation)
    if "ge" in error.get("ctx", {}) and not bounds:
        need = f"a number >= {error['ctx']['ge']:g}"  # of one form of several, which `notes` does not know
    return [f"{place}{where}: need {f'{need} {bounds}'.strip()}, got {shorten(value_at(tree, place))}"]


def _leaves(key: str, value: Any) -> Iterator[str]:
    """Keys at and below `key` that hold a value rather than further keys."""
    if not isinstance(value, Mapping) or not value:
        yield key
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _unknown(key: str, origin: str, fields: Mapping[str, FieldInfo]) -> str:
    """Message of a key that is no setting of this kind of run."""
    where = in_brackets(origin.strip(" ()"))
    if key in fields:
        nested = " under ".join(reversed(key.split(".")))
        return f"need nested keys, got {key} in one{where}; put {nested}"
    other = next((command for kind, command in COMMANDS.items() if key in fields_by_key(kind)), None)
    advice = f"it is one of `{other}`" if other else advice_for(key, list(fields))
    return f"unknown setting {key}{where}; {advice}"
