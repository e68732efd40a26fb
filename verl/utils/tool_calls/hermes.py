"""Calls as JSON: between tags, as Hermes, Qwen2.5 and Qwen3 write them, or as a list behind a mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import call_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.scanning import CallFault, Scanner


class HermesParser(FormParser):
    """Parses `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Attributes:
        opening: stands before a call.
        closing: stands behind it; may be missing at the end of the turn.
    """

    name = "hermes"
    shape = '<tool_call>{"name": "TOOL", "arguments": {"KEY": VALUE}}</tool_call>'
    opening, closing = "<tool_call>", "</tool_call>"
    marks = (opening,)
    ends = (closing,)

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner, content, calls = Scanner(text), [], []
        while (before := scanner.until(self.opening)) is not None:
            content.append(before.strip() and before)
            calls.append(call_of(scanner.json()))
            if not scanner.take(self.closing) and not scanner.is_done:
                raise CallFault(f"need {self.closing} behind the JSON of a call, got {scanner.shown}")
        return "".join([*content, scanner.rest.strip() and scanner.rest]), calls


class GraniteParser(FormParser):
    """Parses `<|tool_call|>[{"name": ..., "arguments": {...}}]`, as Granite 3 and Phi-4-mini write it."""

    name = "granite"
    shape = '<|tool_call|>[{"name": "TOOL", "arguments": {"KEY": VALUE}}]'
    marks = ("<|tool_call|>",)

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner = Scanner(text)
        content = scanner.until(self.marks[0])
        if content is None:
            return text, []
        calls = listed_calls(scanner.json())
        scanner.take("<|/tool_call|>")
        return content + scanner.rest, calls


def listed_calls(value: Any) -> list[ToolCall]:
    """The calls of a JSON list.

    Raises:
        CallFault: it is no list of calls.
    """
    if not isinstance(value, list) or not value:
        raise CallFault(f"need a list of calls, got {str(value)[:60]!r}")
    return [call_of(item) for item in value]
