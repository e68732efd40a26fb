"""Cells of a data set's rows: prompts and chat messages, checked before they become a `Prompt`."""

from __future__ import annotations

from typing import Any

Content = str | list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")


class MalformedRow(ValueError):
    """A row that cannot be used; says why."""


def required_column(row: dict[str, Any], key: str) -> Any:
    """Value of a row by its key; raises `MalformedRow` if it has none."""
    if key not in row:
        raise MalformedRow(f"need a column {key!r}, there are {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def checked_content(value: Any, name: str) -> Content:
    """Prompt of a row: a text or chat messages, checked not to be empty."""
    if isinstance(value, str):
        if not value.strip():
            raise MalformedRow(f"need a {name} that is not empty, got {value!r}")
        check_encodable(value)
        return value
    if not isinstance(value, list):
        raise MalformedRow(f"need a {name} that is a text or a list of chat messages, got {describe(value)}")
    messages = [checked_message(message) for message in value]
    if not any(message["content"] for message in messages):
        raise MalformedRow(f"need a {name} that is not empty, got {len(messages)} messages without content")
    return messages


def checked_message(message: Any) -> dict[str, Any]:
    """Chat message of a row, with its role and content checked, and without nulls."""
    if not isinstance(message, dict):
        raise MalformedRow(f"need messages that are objects with role and content, got {describe(message)}")
    # In a table every row has the same keys: what a message lacks comes as a null, which a chat template
    # would take for a value.
    given = _without_nulls(message)
    if given.get("role") not in ROLES:
        raise MalformedRow(f"need a message role among {', '.join(ROLES)}, got {describe(given.get('role'))}")
    if "content" not in given and given.get("tool_calls"):
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
