"""Arguments of a call, checked against the schema of its tool, with a message that the policy can act on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

_BOOLEANS = {"true": True, "false": False}


class ArgumentCheck:
    """Checks the arguments of one tool, and converts those that were written as another type.

    Args:
        schema: of the tool, in OpenAI's form.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        parameters = schema.get("function", schema).get("parameters") or {}
        self._schema: dict[str, Any] = with_null(parameters)
        self._properties: dict[str, Any] = self._schema.get("properties") or {}
        self._required = list(self._schema.get("required") or ())
        self._is_open = bool(self._schema.get("additionalProperties")) or not self._properties
        self._validator = Draft202012Validator(self._schema)

    def checked(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The arguments, and their fault in words; "": none.

        A text is converted where the schema wants a number, a boolean, an array or an object and the text is
        exactly that; a whole number with a point to an integer; a number to a text.
        """
        converted = {
            name: converted_value(value, self._properties.get(name, {})) for name, value in arguments.items()
        }
        unknown = [] if self._is_open else [name for name in converted if name not in self._properties]
        missing = [name for name in self._required if name not in converted]
        faults = [f"there is no argument {name!r}" for name in unknown]
        faults += [f"the argument {name!r} is missing" for name in missing]
        if not faults:
            errors = sorted(self._validator.iter_errors(converted), key=lambda error: str(error.path))
            faults = [f"{'.'.join(map(str, e.path)) or 'the call'}: {e.message[:300]}" for e in errors[:3]]
        return converted, f"{'; '.join(faults)}; {self._described()}" if faults else ""

    def _described(self) -> str:
        if not self._properties:
            return "it takes no arguments"
        listed = [
            f"{name} ({described_type(property_)}{'' if name in self._required else ', optional'})"
            for name, property_ in self._properties.items()
        ]
        return f"its arguments are {', '.join(listed)}"


def types_of(schema: Any) -> list[str]:
    """Types that a schema names."""
    if not isinstance(schema, Mapping):
        return []
    given = schema.get("type", [])
    named = [given] if isinstance(given, str) else list(given)
    return named + [each for part in schema.get("anyOf", ()) for each in types_of(part)]


def described_type(schema: Any) -> str:
    """The type of an argument in words."""
    if isinstance(schema, Mapping) and "enum" in schema:
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    return " or ".join(types_of(schema)) or "any type"


def converted_value(value: Any, schema: Any) -> Any:
    """A value in a type of its schema, if it is written in another one and means exactly that."""
    types = types_of(schema)
    if not types or "string" in types and isinstance(value, str):
        return value
    if isinstance(value, str):
        return converted_text(value, types)
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and types == ["string"]:
        return json.dumps(value)
    return value


def converted_text(text: str, types: list[str]) -> Any:
    """The value that a text is in JSON, if it has one of the types; else the text."""
    if "boolean" in types and text.strip().lower() in _BOOLEANS:
        return _BOOLEANS[text.strip().lower()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    kinds = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
    }
    return value if any(kinds.get(name, False) for name in types) else text


def with_null(schema: Any) -> Any:
    """A schema in which `nullable`, as Transformers writes it, is the type null of JSON Schema."""
    if isinstance(schema, list):
        return [with_null(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {key: with_null(value) for key, value in schema.items()}
    if copied.pop("nullable", False) and "type" in copied:
        own = copied["type"]
        copied["type"] = [*(own if isinstance(own, list) else [own]), "null"]
        if "enum" in copied:
            copied["enum"] = [*copied["enum"], None]
    return copied
