"""Arguments of calls: of JSON objects, and of texts by the schema of the tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.scanning import CallFault, read_json, shown

# Keys of a call beside its name and its arguments.
_FURTHER_KEYS = {"id", "type"}
_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
    "string": (str,),
}


def call_of(value: Any, keys: Sequence[str] = ("arguments",)) -> ToolCall:
    """The call of a JSON object.

    Args:
        value: {name, arguments}, and maybe an id.
        keys: names that the arguments may have.

    Raises:
        CallFault: it has another shape.
    """
    if not isinstance(value, dict):
        raise CallFault(f"need a call as a JSON object, got {shown(str(value))}")
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise CallFault(f'need the tool of a call as "name", got the keys {", ".join(value) or "none"}')
    given = [key for key in keys if key in value]
    if further := sorted(value.keys() - {"name", *given[:1]} - _FURTHER_KEYS):
        raise CallFault(f'need the arguments of {name} under "{keys[0]}", got the keys {", ".join(further)}')
    arguments = value[given[0]] if given else {}
    number = value.get("id")
    return ToolCall(name.strip(), arguments_of(name, arguments), number if isinstance(number, str) else "")


def arguments_of(name: str, value: Any) -> dict[str, Any]:
    """Arguments of a call as JSON has them: an object, the text of one, or null for none.

    Raises:
        CallFault: they are something else.
    """
    if isinstance(value, str) and value.strip():
        value = read_json(value)
    if not value and not isinstance(value, (bool, int, float, list)):
        return {}
    if not isinstance(value, dict):
        raise CallFault(f"need the arguments of {name} as a JSON object, got {shown(str(value))}")
    return value


def name_of(tool: Mapping[str, Any]) -> str:
    """Name of the tool of a schema, in OpenAI's form or without its frame."""
    return str((tool.get("function") or tool).get("name", ""))


def names_of(tools: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the tools of schemas."""
    return {name_of(tool) for tool in tools}


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Schemas of the parameters of a tool, by name; none if it is not offered."""
    tool = next((tool for tool in tools if name_of(tool) == name), None)
    if tool is None:
        return {}
    parameters = (tool.get("function") or tool).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def types_of(schema: Any) -> set[str]:
    """Names of the types that a schema of JSON allows; none: any."""
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    found = {declared} if isinstance(declared, str) else set(declared or ())
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            found |= types_of(choice)
    return found | {"null"} if schema.get("nullable") else found


def typed(text: str, schema: Any, literal: Callable[[str], Any] = read_json) -> Any:
    """An argument that was written as a text, by its schema; the text itself if it has none of the types.

    Args:
        text: as it was written.
        schema: of the parameter; without types, JSON is read as such.
        literal: reads lists and objects that are no JSON; raises ValueError.
    """
    types, word = types_of(schema), text.strip().lower()
    if types == {"string"}:
        return text
    if "null" in types and word in ("null", "none"):
        return None
    if "boolean" in types and word in ("true", "false"):
        return word == "true"
    try:
        value = read_json(text)
    except ValueError:
        value = text if types and not types & {"object", "array"} else _or_text(text, literal)
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return int(value)
    fits = any(type(value) in _KINDS.get(kind, ()) for kind in types)
    return value if fits or not types else text


def _or_text(text: str, literal: Callable[[str], Any]) -> Any:
    try:
        return literal(text)
    except ValueError:
        return text
