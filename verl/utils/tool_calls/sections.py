"""Calls with a name and JSON between special tokens, as DeepSeek and Kimi write them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import arguments_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.scanning import CallFault, Scanner

_KIMI_ID = re.compile(r"(?:functions\.)?([\w.-]+):(\d+)")


class SectionParser(FormParser):
    """Parses a section of calls at the end of a turn.

    Attributes:
        section: texts before and behind all calls.
        call: texts before and behind each.
        between: text behind the name.
    """

    section: tuple[str, str]
    call: tuple[str, str]
    between: str

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner, calls = Scanner(text), []
        content = scanner.until(self.section[0])
        if content is None:
            return text, []
        while scanner.take(self.call[0]):
            calls.append(self.read_one(scanner))
            scanner.need(self.call[1])
        if not scanner.take(self.section[1]) and not scanner.is_done:
            raise CallFault(f"need {self.call[0]} or {self.section[1]}, got {scanner.shown}")
        if not calls:
            raise CallFault(f"need {self.call[0]} behind {self.section[0]}")
        return content + (scanner.rest.strip() and scanner.rest), calls

    def read_one(self, scanner: Scanner) -> ToolCall:
        """The call at the cursor, whose closing text stays."""
        head = scanner.until(self.between)
        if head is None:
            raise CallFault(f"need {self.between} behind the name of a call, got {scanner.shown}")
        return self.named(head.strip(), scanner)

    @abstractmethod
    def named(self, head: str, scanner: Scanner) -> ToolCall:
        """The call with the text before `between`; its arguments are next."""


class DeepSeekParser(SectionParser):
    """Parses the calls of DeepSeek V3, R1 (with a fence around the JSON) and V3.1 (without)."""

    name = "deepseek"
    shape = (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>TOOL<｜tool▁sep｜>{"KEY": VALUE}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>"
    )
    section = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    call = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    between = "<｜tool▁sep｜>"
    marks, ends = section[:1], section[1:]

    @override
    def named(self, head: str, scanner: Scanner) -> ToolCall:
        is_fenced = head == "function" and not scanner.is_next("{")
        name = head
        if is_fenced:
            behind = scanner.until("```json")
            if behind is None:
                raise CallFault(f"need ```json behind the name of a call, got {scanner.shown}")
            name = behind.strip()
        if not name or len(name.split()) > 1:
            raise CallFault(f"need the name of a tool, got {name[:60]!r}")
        call = ToolCall(name, arguments_of(name, scanner.json()))
        if is_fenced:
            scanner.need("```")
        return call


class KimiParser(SectionParser):
    """Parses the calls of Kimi K2, whose ids, `functions.TOOL:NUMBER`, count the calls of the episode."""

    name = "kimi_k2"
    shape = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.TOOL:NUMBER<|tool_call_argument_begin|>"
        '{"KEY": VALUE}<|tool_call_end|><|tool_calls_section_end|>'
    )
    section = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    call = ("<|tool_call_begin|>", "<|tool_call_end|>")
    between = "<|tool_call_argument_begin|>"
    marks, ends = section[:1], section[1:]

    @override
    def named(self, head: str, scanner: Scanner) -> ToolCall:
        found = _KIMI_ID.fullmatch(head)
        if found is None:
            raise CallFault(f"need the id of a call as functions.TOOL:NUMBER, got {head[:60]!r}")
        return ToolCall(found[1], arguments_of(found[1], scanner.json()), head)

    @override
    def call_id(self, name: str, number: int) -> str:
        return f"functions.{name}:{number}"
