"""Cells of a data set's rows: prompts, chat messages and tools, checked and brought to one form."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Content = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Names that data sets give to the roles (ShareGPT, the older functions of OpenAI's API), without case.
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_PYTHON_MESSAGES = re.compile(r"(array\()?\[\{'(role|from|content|value|weight)':")
_CALL_ROLES = ("function_call", "tool_call")


class MalformedRow(ValueError):
    """A row that cannot be used; says why."""


def check_once(names: Iterable[str], kind: str) -> None:
    """Raises `MalformedRow` for a name that is given twice: one of its two values would be lost."""
    counts = Counter(names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise MalformedRow(f"need each {kind} once, got {twice[0]!r} {counts[twice[0]]} times")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        check_once((name for name, _ in pairs), "key of an object")
    return made


def _reject_constant(name: str) -> None:
    raise MalformedRow(f"need JSON, got {name}, which is not a JSON number")


# Decoder of JSON that raises `MalformedRow` for a key given twice and for NaN.
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_reject_constant)


def required_column(row: Mapping[str, Any], key: str) -> Any:
    """Value of a row by its key; raises `MalformedRow` if it has none."""
    if key not in row:
        raise MalformedRow(f"need a column {key!r}, there are {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def checked_content(value: Any, name: str) -> Content:
    """Prompt of a row: a text or chat messages, checked not to be empty.

    A text that is the JSON of chat messages, as tables of texts hold them, is read as these messages.
    """
    if isinstance(value, str) and not is_messages_text(value):
        if not value.strip():
            raise MalformedRow(f"need a {name} that is not empty, got {value!r}")
        check_encodable(value)
        return value
    return checked_messages(value, name)


def checked_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Chat messages of a cell, a list or its JSON text, each as `checked_message` gives it."""
    if isinstance(value, str):
        value = parsed_json(value, name)
    if not isinstance(value, list):
        raise MalformedRow(f"need a {name} that is a text or a list of chat messages, got {describe(value)}")
    messages = [checked_message(message) for message in value]
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise MalformedRow(f"need a {name} that is not empty, got {len(messages)} messages without content")
    return messages


def is_messages_text(text: str) -> bool:
    """True for the JSON text of a list of chat messages.

    Raises:
        MalformedRow: the text is Python's spelling of such a list, which is not data.
    """
    start = "".join(text[:40].split())
    if _PYTHON_MESSAGES.match(start):
        raise MalformedRow(
            f"need chat messages as a list or as its JSON text, got Python's spelling of them, "
            f"{describe(text)}; write them with json.dumps"
        )
    if not start.startswith("[{"):
        return False
    try:
        messages = json.loads(text)
    except ValueError:
        return False
    return all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in messages)


def checked_message(message: Any) -> dict[str, Any]:
    """Chat message of a row with `role` and `content`, both checked, and without nulls.

    ShareGPT's `from` and `value` become `role` and `content`, and each name of a role one of `ROLES`. The
    arguments of tool calls become objects, as chat templates read them. Further keys are kept.
    """
    if not isinstance(message, dict):
        raise MalformedRow(f"need messages that are objects with role and content, got {describe(message)}")
    # In a table every row has the same keys: what a message lacks comes as a null, which a chat template
    # would take for a value.
    given = _without_nulls(message)
    if "value" in given and given.get("content", given["value"]) != given["value"]:
        raise MalformedRow("need one text in a message, got content and another value; leave one of them out")
    for other, key in (("from", "role"), ("value", "content")):
        if other in given and key not in given:
            given[key] = given.pop(other)
    name = given.get("role")
    if isinstance(name, str) and name.lower() in _CALL_ROLES:
        calls = parsed_json(given.pop("content", None), name)
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"type": "function", "function": call} for call in calls]
        given |= {"role": "assistant", "tool_calls": calls}
    elif isinstance(name, str) and name.lower() in _ROLE_NAMES:
        given["role"] = _ROLE_NAMES[name.lower()]
    else:
        raise MalformedRow(f"need a message role among {', '.join(ROLES)}, got {describe(name)}")
    if "function_call" in given and "tool_calls" not in given:
        given["tool_calls"] = [{"type": "function", "function": given.pop("function_call")}]
    if "tool_calls" in given:
        given["tool_calls"] = _checked_calls(given["tool_calls"])
    if "content" not in given and (given.get("tool_calls") or given.get("reasoning_content")):
        given["content"] = ""  # an assistant that only calls tools says nothing
    content = given.get("content")
    if isinstance(content, str):
        check_encodable(content)
    elif isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        given["content"] = [_without_nulls(part) for part in content]
    else:
        raise MalformedRow(
            f"need message content that is a text or a list of typed parts, got {describe(content)}"
        )
    return given


def checked_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools of a row: a list of objects, or its JSON text (TRL's advice for Parquet files)."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = parsed_json(value, "tools")
    tools = tools if isinstance(tools, list) else [tools]
    tools = [parsed_json(tool, "tools") for tool in tools]
    for tool in tools:
        if not isinstance(tool, dict):
            raise MalformedRow(f"need tools that are objects, the schemas of functions, got {describe(tool)}")
    return tuple(tools)


def parsed_json(value: Any, name: str) -> Any:
    """Value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return STRICT_JSON.decode(value)
    except MalformedRow:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"need {name} as JSON, got {describe(value)}: {error}") from error


def _checked_calls(value: Any) -> list[dict[str, Any]]:
    calls = parsed_json(value, "tool_calls")
    if not isinstance(calls, list):
        raise MalformedRow(f"need tool_calls that are a list, got {describe(calls)}")
    return [_checked_call(call) for call in calls]


def _checked_call(call: Any) -> dict[str, Any]:
    """Tool call `{"type", "function": {"name", "arguments"}}`, or the inner object alone, as it was given."""
    if not isinstance(call, dict):
        raise MalformedRow(f"need tool calls that are objects, got {describe(call)}")
    if "function" in call:
        return {**_without_nulls(call), "function": _checked_call(call["function"])}
    call = _without_nulls(call)
    if not isinstance(call.get("name"), str):
        raise MalformedRow(f"need tool calls with the name of a function, got {describe(call)}")
    if "arguments" in call:
        arguments = call["arguments"]
        # OpenAI's API writes arguments as a JSON text, which is empty for a function without parameters.
        call["arguments"] = {} if arguments == "" else parsed_json(arguments, "arguments of a tool call")
        if not isinstance(call["arguments"], dict):
            raise MalformedRow(f"need arguments of a tool call as an object, got {describe(arguments)}")
    return call


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def check_encodable(text: str) -> None:
    """Raises `MalformedRow` for a text that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedRow(
            f"need text that UTF-8 can encode, got half a surrogate pair at character {error.start}"
        ) from error


def describe(value: Any) -> str:
    """Type and value, short enough for a message."""
    text = repr(value)
    short = text if len(text) <= 60 else text[:57] + "..."
    return "nothing" if value is None else f"{type(value).__name__} {short}"
