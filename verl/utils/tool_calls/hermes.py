"""Calls as JSON between tags, as Hermes, Qwen2.5 and Qwen3 write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.calls import ParsedTurn, ToolCall, ToolCallParser

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_THOUGHTS = re.compile(r"^\s*(?:<think>)?(.*?)</think>", re.DOTALL)


class HermesParser(ToolCallParser):
    """Parses `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    name = "hermes"
    ends = ("</tool_call>",)

    @override
    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> ParsedTurn:
        thoughts = ""
        if found := _THOUGHTS.match(text):
            thoughts, text = found[1].strip("\n"), text[found.end() :]
        calls, error = [], ""
        for number, body in enumerate(_CALL.findall(text)):
            try:
                call = json.loads(body)
                calls.append(ToolCall(call["name"], dict(call.get("arguments") or {}), f"call_{number}"))
            except (ValueError, KeyError, TypeError) as fault:
                error = (
                    f'need a call as {{"name": ..., "arguments": {{...}}}}, got {body.strip()[:200]}: {fault}'
                )
        return ParsedTurn(_CALL.sub("", text).strip("\n"), thoughts, tuple(calls), error)
