"""Calls as FunctionGemma and Gemma 4 write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.literals import LiteralReader
from verl.utils.tool_calls.scanning import CallFault, Scanner

_CALL = re.compile(r"\s*call:\s*([\w.-]+)\s*\{")


class GemmaParser(FormParser):
    """Parses `<start_function_call>call:NAME{KEY:<escape>TEXT<escape>,KEY:5}<end_function_call>`.

    Attributes:
        opening: stands before a call.
        closing: stands behind it; may be missing at the end of the turn.
        quote: stands before and behind a text.
        ends: begin the results, and are no part of the turn.
    """

    name = "gemma"
    opening, closing, quote = "<start_function_call>", "<end_function_call>", "<escape>"
    shape = "<start_function_call>call:TOOL{KEY:<escape>TEXT<escape>,KEY:NUMBER}<end_function_call>"
    marks = (opening,)
    ends: tuple[str, ...] = ("<start_function_response>",)

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        text = text.rstrip().removesuffix(self.ends[0])
        scanner, content, calls = Scanner(text), [], []
        while (before := scanner.until(self.opening)) is not None:
            content.append(before.strip() and before)
            named = scanner.match(_CALL)
            if named is None:
                raise CallFault(f"need call:TOOL{{...}} behind {self.opening}, got {scanner.shown}")
            calls.append(ToolCall(named[1], LiteralReader(scanner, self.quote).pairs()))
            if not scanner.take(self.closing) and not scanner.is_done:
                raise CallFault(f"need {self.closing} behind a call, got {scanner.shown}")
        return "".join([*content, scanner.rest.strip() and scanner.rest]), calls


class Gemma4Parser(GemmaParser):
    """Parses `<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>,KEY:5}<tool_call|>`."""

    name = "gemma4"
    opening, closing, quote = "<|tool_call>", "<tool_call|>", '<|"|>'
    shape = '<|tool_call>call:TOOL{KEY:<|"|>TEXT<|"|>,KEY:NUMBER}<tool_call|>'
    marks = (opening,)
    ends = ("<|tool_response>",)
    thought_marks = ("<|channel>thought", "<channel|>")
