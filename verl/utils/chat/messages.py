"""Conversations in the form that chat templates take, and the parts of their messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]
# Stands for the content of a message where its place in the text is looked for.
MARK = "qzxcontentxzq"
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Chat:
    """A conversation as a chat template takes it.

    Attributes:
        messages: with texts as contents.
        tools: schemas of the tools offered.
        kwargs: further variables of the template.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_messages(self, messages: list[Message]) -> Chat:
        """The same tools and variables around other messages."""
        return replace(self, messages=messages)

    def with_content(self, index: int, content: str | None) -> Chat:
        """The same conversation, with another content of one message."""
        changed = {**self.messages[index], "content": content}
        return self.with_messages([*self.messages[:index], changed, *self.messages[index + 1 :]])


def joined_text(content: Any, place: str) -> str:
    """The text of a message, its typed parts joined; nothing is an empty text.

    Raises:
        ValueError: a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if not isinstance(part, str) and (
            part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f"{place} has a part of type {part.get('type')!r}, but the model reads text alone; leave "
                "the row out, or give its text"
            )
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, where OpenAI's format has the text of one."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": parsed_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return dict(call)
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else dict(call)


def in_call_form(message: Message, has_null: bool, has_text: bool) -> Message:
    """A message with its calls as a template takes them.

    Args:
        message: with the arguments of its calls as objects.
        has_null: content is None beside calls where there is none.
        has_text: arguments are the text of a JSON object.
    """
    if not message.get("tool_calls"):
        return message
    changed = dict(message)
    if has_null and not message["content"]:
        changed["content"] = None
    if has_text:
        changed["tool_calls"] = [call_with_text(call) for call in message["tool_calls"]]
    return changed


def call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a text of JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": call_with_text(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return dict(call)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def call_name(call: Mapping[str, Any]) -> str:
    """Name of the function that a tool call is of."""
    return str((call.get("function") or call).get("name", ""))


def renamed_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same tool call of another function."""
    inner = call.get("function")
    return {**call, "function": {**inner, "name": name}} if inner else {**call, "name": name}


def squeeze(text: str) -> str:
    """A text without blanks."""
    return "".join(text.split())
