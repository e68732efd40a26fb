"""Turns of gpt-oss: messages in the channels analysis, commentary and final (OpenAI's Harmony format)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import arguments_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.scanning import CallFault, read_json

_BORDER = re.compile(r"<\|(?:start|end|call|return)\|>")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class HarmonyParser(FormParser):
    """Parses the messages of a turn: analysis is thoughts, a message to a function is a call."""

    name = "harmony"
    shape = '<|channel|>commentary to=functions.TOOL <|constrain|>json<|message|>{"KEY": VALUE}<|call|>'
    ends = ("<|call|>",)

    @override
    def split_thoughts(self, text: str) -> tuple[str, str]:
        thoughts: list[str] = []
        others: list[str] = []
        for part in _BORDER.split(text):
            header, _, body = part.partition("<|message|>")
            channel = _CHANNEL.search(header)
            is_thought = channel is not None and channel[1] == "analysis" and not _RECIPIENT.search(header)
            (thoughts if is_thought else others).append(body if is_thought else part)
        return "\n".join(thoughts), "<|end|>".join(others)

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        content, calls = [], []
        for part in text.split("<|end|>"):
            header, found, body = part.partition("<|message|>")
            recipient = _RECIPIENT.search(header) if found or "<|channel|>" in header else None
            if recipient is None:
                content.append(body if found else header)
            elif not found:
                raise CallFault(f"need <|message|> behind the header of a call to {recipient[1]}")
            else:
                name = recipient[1].removeprefix("functions.")
                calls.append(ToolCall(name, arguments_of(name, read_json(body))))
        return "".join(content), calls
