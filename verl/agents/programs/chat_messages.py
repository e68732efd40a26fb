"""Messages as agents send them back, in one form, and the comparison of histories with a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.chat.chat_template import joined_text, parsed_call
from verl.utils.chat.turn_rendering import Message

# What two spellings of one message have in common.
MessageKey = tuple[str, str, tuple[tuple[str, str], ...]]


def template_message(message: Mapping[str, Any], place: str) -> Message:
    """A message as chat templates take it: text in one piece, arguments of calls as objects.

    Raises:
        ValueError: content other than text.
    """
    plain: Message = {"role": message["role"], "content": joined_text(message.get("content"), place)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            plain[name] = message[name]
    if message.get("tool_calls"):
        plain["tool_calls"] = [parsed_call(call) for call in message["tool_calls"]]
    return plain


def message_key(message: Message) -> MessageKey:
    """Content of a message, equal for all its spellings.

    Numbers of calls and thoughts are left out, since agents rename the first and drop the second; so is the
    white space around what the assistant says.
    """
    role, content = message["role"], message["content"]
    if role == "assistant":
        content = content.strip()
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    named = tuple((str(call.get("name")), canonical(call.get("arguments"))) for call in calls)
    return "system" if role == "developer" else role, content, named


def message_keys(messages: Sequence[Message]) -> list[MessageKey]:
    """The key of each message."""
    return [message_key(message) for message in messages]


def canonical(value: Any) -> str:
    """JSON of a value, equal for equal values whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
