"""What the settings are, for programs that list, describe and merge them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from verl.config.fields import Choice, Options, Section
from verl.config.placement import PlacementConfig
from verl.config.run import TrainerConfig

_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def is_a(annotation: Any, base: type[BaseModel]) -> bool:
    """Whether an annotation is that class, or a subclass of it, and not a union."""
    return isinstance(annotation, type) and issubclass(annotation, base)


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union; of an annotation without one, itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in alternatives(member)]
    return [annotation]


def type_text(annotation: Any) -> str:
    """The type of a setting in words."""
    members, parts = alternatives(annotation), get_args(annotation)
    if len(members) > 1:
        return " or ".join(type_text(member) for member in members)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(parts)
    if get_origin(annotation) is tuple:
        return (
            "a list" if parts[1] is Ellipsis else f"a list of {len(parts)}"
        ) + f", each {type_text(parts[0])}"
    if get_origin(annotation) is dict:
        return "{" + ", ".join(get_args(parts[0])) + f"}}, each {type_text(parts[1])}"
    if is_a(annotation, Options):
        return "{name: value}"
    if is_a(annotation, Choice):
        return "a name or {" + ", ".join([*annotation.model_fields, "options"]) + "}"
    if is_a(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _TYPES[members[0]]


@cache
def places(kind: type[Section] = TrainerConfig) -> dict[str, FieldInfo]:
    """Every dotted key of a kind of run, sections and the parts of a KL coefficient too, in the order of this
    file.
    """

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in model.model_fields.items():
            yield prefix + name, field
            for member in alternatives(field.annotation):
                if is_a(member, Section):
                    yield from walk(member, f"{prefix}{name}.")

    return dict(walk(kind, ""))


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds other settings and has no value of its own."""
    return is_a(field.annotation, Section)


def notes_of(field: FieldInfo) -> dict[str, Any]:
    """Unit, bounds and source of a field that `setting` made."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def merged(base: Any, over: Any, annotation: Any) -> Any:
    """Settings `over` on top of `base`, both nested mappings, at a place with this annotation.

    A `Choice` with another name replaces the old one and its options; one with the same name, or none, adds
    its options. A text stands for the name of a choice or a placement.
    """
    if isinstance(over, str) and (is_a(annotation, Choice) or is_a(annotation, PlacementConfig)):
        over = {"name": over}
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if is_a(annotation, Choice):
        return over if over.get("name", base.get("name")) != base.get("name") else {**base, **over}
    sections = [member for member in alternatives(annotation) if is_a(member, Section)]
    if len(sections) > 1 and not any({*base, *over} <= section.model_fields.keys() for section in sections):
        return over  # Another form of the same setting.
    fields = {name: field.annotation for section in sections for name, field in section.model_fields.items()}
    return {**base, **{name: merged(base.get(name), value, fields.get(name)) for name, value in over.items()}}
