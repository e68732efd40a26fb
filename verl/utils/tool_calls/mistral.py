"""Calls as Mistral writes them, behind `[TOOL_CALLS]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import arguments_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.hermes import listed_calls
from verl.utils.tool_calls.scanning import CallFault, Scanner

_NAME = re.compile(r"\s*([\w.-]+)")
_ID = re.compile(r"\s*\[CALL_ID\]\s*(\w+)")


class MistralParser(FormParser):
    """Parses `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` and `[TOOL_CALLS]name[ARGS]{...}`.

    Ids have nine letters and digits, as its chat templates require.
    """

    name = "mistral"
    shape = (
        '[TOOL_CALLS][{"name": "TOOL", "arguments": {"KEY": VALUE}}] or [TOOL_CALLS]TOOL[ARGS]{"KEY": VALUE}'
    )
    marks = ("[TOOL_CALLS]",)
    thought_marks = ("[THINK]", "[/THINK]")

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner = Scanner(text)
        calls: list[ToolCall] = []
        content = scanner.until(self.marks[0])
        if content is None:
            return text, []
        while not calls or scanner.take(self.marks[0]):
            calls += self.read_section(scanner)
        if not scanner.is_done:
            raise CallFault(f"need the calls at the end of the turn, got behind them {scanner.shown}")
        return content, calls

    def read_section(self, scanner: Scanner) -> list[ToolCall]:
        """The calls behind one mark."""
        if named := scanner.match(_NAME):
            number = scanner.match(_ID)
            scanner.take("[ARGS]")
            arguments = arguments_of(named[1], scanner.json())
            return [ToolCall(named[1], arguments, "" if number is None else number[1])]
        return listed_calls(scanner.json())

    @override
    def call_id(self, name: str, number: int) -> str:
        return f"call{number:05}"
