"""The settings as data: dotted keys, types in words, units, bounds and sources."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from verl.config.data import DataSource
from verl.config.fields import Choice, Options, Section
from verl.config.run import TrainerConfig

_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def is_subclass(annotation: Any, base: type[BaseModel]) -> bool:
    """True if an annotation is that class or a subclass of it; a union is not."""
    return isinstance(annotation, type) and issubclass(annotation, base)


def union_members(annotation: Any) -> list[Any]:
    """The members of a union, nested ones too; an annotation that is no union is the only one."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in union_members(member)]
    return [annotation]


def type_in_words(annotation: Any) -> str:
    """The type of a setting for messages, such as "one of fp32, bf16"."""
    members, parts = union_members(annotation), get_args(annotation)
    if len(members) > 1:
        return " or ".join(type_in_words(member) for member in members)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(parts)
    if get_origin(annotation) is tuple:
        length = "a list" if parts[1] is Ellipsis else f"a list of {len(parts)}"
        return f"{length}, each {type_in_words(parts[0])}"
    if get_origin(annotation) is dict:
        return "{" + ", ".join(get_args(parts[0])) + f"}}, each {type_in_words(parts[1])}"
    if is_subclass(annotation, Options):
        return "{name: value}"
    if is_subclass(annotation, Choice):
        return "a name or {" + ", ".join([*annotation.model_fields, "options"]) + "}"
    if is_subclass(annotation, Section) or is_subclass(annotation, DataSource):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _TYPES[members[0]]


@cache
def fields_by_key(kind: type[Section] = TrainerConfig) -> dict[str, FieldInfo]:
    """Dotted key -> field of every setting and section of a kind of run, in the order of the classes.

    The parts of every form of a KL coefficient have keys too.
    """

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in model.model_fields.items():
            yield prefix + name, field
            for member in union_members(field.annotation):
                if is_subclass(member, Section):
                    yield from walk(member, f"{prefix}{name}.")

    return dict(walk(kind, ""))


def is_section(field: FieldInfo) -> bool:
    """True if a field holds other settings and has no value of its own."""
    return is_subclass(field.annotation, Section)


def notes(field: FieldInfo) -> dict[str, Any]:
    """Unit, bounds and source of a field that `verl.config.fields.setting` made."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
