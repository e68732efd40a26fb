"""Layers of settings: a recipe, a file, overrides; a later layer replaces settings of an earlier one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

from pydantic import BaseModel

from verl.config.data import DataSource
from verl.config.fields import Choice, Section
from verl.config.listing.introspection import fields_by_key, is_subclass, union_members
from verl.config.placement import PlacementConfig
from verl.config.run import RunConfig, TrainerConfig
from verl.config.yaml_text import ConfigError, parse_override, parse_yaml

_RECIPES_DIR = Path(__file__).parent / "recipes"

RECIPES: tuple[str, ...] = tuple(sorted(path.stem for path in _RECIPES_DIR.glob("*.yaml")))

Source = str | Path | Mapping[str, Any] | RunConfig


class Stage(IntEnum):
    """Author of a layer. A setting without effect is an error only if the user wrote it."""

    PROJECT = 0
    USER = 1
    OVERRIDE = 2  # of the user's own file


@dataclass(frozen=True)
class Layer:
    """Settings of one origin.

    Attributes:
        tree: nested settings.
        origins: dotted key -> file and line for messages; "" if the user needs no hint.
        stage: author of the settings.
    """

    tree: dict[str, Any]
    origins: dict[str, str]
    stage: Stage


def nearest_key(key: str, candidates: Sequence[str]) -> str:
    """The candidate most similar as a whole, in its last part, or in the initials of that part.

    `lr` and `learning_rate` both give `policy.optimizer.lr`.
    """
    last = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_"))

    def similarity(other: str) -> float:
        other_last = other.rpartition(".")[2]
        same_last = 1.0 if other_last == initials else difflib.SequenceMatcher(None, last, other_last).ratio()
        return same_last + difflib.SequenceMatcher(None, key, other).ratio()

    return max(candidates, key=similarity)


def value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key, in which a number is an index of a list; None if there is none."""
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def as_json(value: Any, key: str = "") -> Any:
    """`value` in the types of JSON: dicts with text keys, lists, texts, numbers, true, false and null.

    Raises:
        ConfigError: it has another type; the message names the dotted `key`.
    """
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): as_json(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, key) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(f"{key}: need a text, number, list or mapping, got {type(value).__name__}")


def shorten(value: Any) -> str:
    """The JSON text of a value, cut to 80 characters for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_brackets(origin: str) -> str:
    """An origin for messages; nothing if there is none."""
    return f" ({origin})" if origin else ""


def merge(base: Any, over: Any, annotation: Any) -> Any:
    """Settings `over` on top of `base`, both nested mappings, for a field with this annotation.

    A `Choice` with another name replaces the old one and its options; one with the same name, or none, adds
    its options. A text stands for the name of a choice or a placement.
    """
    if isinstance(over, str) and (
        is_subclass(annotation, Choice) or is_subclass(annotation, PlacementConfig)
    ):
        over = {"name": over}
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if is_subclass(annotation, Choice):
        return over if over.get("name", base.get("name")) != base.get("name") else {**base, **over}
    if any(is_subclass(member, DataSource) for member in union_members(annotation)):
        return over
    sections = [member for member in union_members(annotation) if is_subclass(member, Section)]
    if len(sections) > 1 and not any({*base, *over} <= section.model_fields.keys() for section in sections):
        return over  # another form of the same setting, such as a schedule instead of an adaptive coefficient
    fields = {name: field.annotation for section in sections for name, field in section.model_fields.items()}
    return {**base, **{name: merge(base.get(name), value, fields.get(name)) for name, value in over.items()}}


def key_layer(key: str, value: Any, *, origin: str, stage: Stage) -> Layer:
    """One dotted key with its value."""
    tree = as_json(value, key)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return Layer(tree, dict.fromkeys(_dotted_keys(tree), origin), stage)


def source_layers(source: Source) -> list[Layer]:
    """The layers of a recipe, YAML file, mapping or configuration, the recipe that it starts from first.

    Raises:
        ConfigError: it cannot be read, or names a recipe that does not exist.
    """
    if isinstance(source, RunConfig):
        return [Layer(as_json(source), {}, Stage.PROJECT)]
    if isinstance(source, Mapping):
        tree = as_json(source)
        return _layers_of_tree(tree, dict.fromkeys(_dotted_keys(tree), ""))
    path = Path(source)
    is_name = isinstance(source, str) and path.name == source and not path.suffix and not path.exists()
    if isinstance(source, str) and (source in RECIPES or is_name):
        return _recipe_layers(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise ConfigError(
            f"need a recipe ({', '.join(RECIPES)}) or a YAML file of settings, got {path}: {reason}"
        ) from None
    tree, origins = parse_yaml(text, path.name)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path.name}: need settings at its top, `key: value`, got {shorten(tree)}")
    return _layers_of_tree(as_json(tree or {}), origins)


def override_layers(
    overrides: Sequence[str], *, stage: Stage, kind: type[RunConfig] = TrainerConfig
) -> list[Layer]:
    """A layer for each `dotted.key=value`, with the value in YAML; texts arrive as they were typed.

    Args:
        overrides: in the order in which they apply.
        stage: author of the overrides.
        kind: class of the run, whose settings say what is a text.

    Raises:
        ConfigError: one of them has another form; the message names all that have.
    """
    if isinstance(overrides, str):
        raise ConfigError(f'need a list of overrides, got the text "{overrides}"; put it in brackets')
    layers, problems = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(f'need overrides like key=value, got "{override}"')
            continue
        if not text.strip():  # mostly of a shell's variable that is not set
            problems.append(
                f"need a value behind the = of \"{override}\", got none; write null for none, or '' for an "
                "empty text"
            )
            continue
        try:
            field = fields_by_key(kind).get(key.strip())
            members = union_members(field.annotation) if field else []
            is_list = any(get_origin(member) is tuple for member in members)
            is_text = str in members and all(
                member in (str, NoneType) or get_origin(member) is tuple for member in members
            )
            value = parse_override(text, f'override "{override}"', is_text=is_text, is_list=is_list)
            layers.append(key_layer(key.strip(), value, origin="override", stage=stage))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(*problems)
    return layers


def _dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        yield f"{prefix}{name}"
        yield from _dotted_keys(value, f"{prefix}{name}.")


def _recipe_layers(name: str, origin: str = "") -> list[Layer]:
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name}{in_brackets(origin)}; the nearest is {nearest_key(name, RECIPES)}, "
            f"and there are {', '.join(RECIPES)}"
        )
    tree, origins = parse_yaml((_RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}")
    own = as_json(tree)
    base = own.pop("recipe", "")
    return [*(_recipe_layers(base) if base else ()), Layer(own, origins, Stage.PROJECT)]


def _layers_of_tree(tree: dict[str, Any], origins: dict[str, str]) -> list[Layer]:
    """The layers of a file or mapping; its keys `recipe` and `resolved` are no settings."""
    head = {name: tree.pop(name) for name in ("recipe", "resolved") if name in tree}
    if not isinstance(resolved := head.get("resolved", False), bool):
        raise ConfigError(f"resolved: need true or false, got {shorten(resolved)}")
    # A resolved file was written by a run with every setting: values without effect are no mistakes in it.
    stage = Stage.PROJECT if resolved else Stage.USER
    layer = Layer(tree, {key: origin for key, origin in origins.items() if key not in head}, stage)
    if "recipe" not in head:
        return [layer]
    name = head["recipe"] if isinstance(head["recipe"], str) else shorten(head["recipe"])
    return [*_recipe_layers(name, origins["recipe"]), layer]
