"""Calls as Llama writes them: JSON with `parameters`, and lists of calls in Python's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import call_of, names_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.literals import read_call, read_calls
from verl.utils.tool_calls.scanning import CallFault, Scanner

_KEYS = ("parameters", "arguments")
_OBJECT = re.compile(r'\{\s*"(?:name|type|function|parameters|arguments)"\s*:')
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
_LIST = re.compile(r"(?:^|\n)[ \t]*(?=\[\s*([A-Za-z_][\w.-]*)\s*\()")
_OPENING = re.compile(r"<\|(?:python_start|tool_call_start)\|>")
_CLOSING = re.compile(r"\s*<\|(?:python_end|tool_call_end)\|>")


class Llama3Parser(FormParser):
    """Parses `{"name": ..., "parameters": {...}}`, several separated by `;`, maybe behind `<|python_tag|>`.

    Behind the mark may also stand a call of a built-in tool, `brave_search.call(query="...")`.
    """

    name = "llama3"
    shape = '{"name": "TOOL", "parameters": {"KEY": VALUE}}'
    marks = ("<|python_tag|>",)
    needs_mark = False
    ends = ("<|eom_id|>",)

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner = Scanner(text)
        content = scanner.until(self.marks[0])
        if content is None:
            found = _OBJECT.search(text) if tools else None
            if found is None or not is_attempt(text[found.start() :], names_of(tools)):
                return text, []
            content, scanner.position = text[: found.start()], found.start()
        calls: list[ToolCall] = []
        while not calls or scanner.take(";") or not scanner.is_done:
            calls.append(self.read_one(scanner, tools))
        return content, calls

    def read_one(self, scanner: Scanner, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
        """The next call, as JSON or of a built-in tool."""
        if scanner.is_next("{"):
            return call_of(scanner.json(), _KEYS)
        call = read_call(scanner, tools)
        if not call.name.endswith(".call"):
            raise CallFault(f"need a call as JSON, got {call.name}(...)")
        return ToolCall(call.name.removesuffix(".call"), call.arguments)


class PythonicParser(FormParser):
    """Parses `[f(a=1), g()]`, as Llama 3.2, Llama 4 and LFM2 write it, with or without marks around it."""

    name = "pythonic"
    shape = "[TOOL(KEY=VALUE)]"
    marks = ("<|python_start|>", "<|tool_call_start|>")
    needs_mark = False
    ends = ("<|python_end|>", "<|tool_call_end|>")

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner = Scanner(text)
        if mark := _OPENING.search(text):
            scanner.position = mark.end()
            calls = read_calls(scanner, tools)
            scanner.match(_CLOSING)
            return text[: mark.start()] + scanner.rest, calls
        found = _LIST.search(text) if tools else None
        if found is None:
            return text, []
        scanner.position = found.end()
        try:
            calls = read_calls(scanner, tools)
            if not scanner.is_done:
                raise CallFault(f"need the calls at the end of the turn, got behind them {scanner.shown}")
        except CallFault:
            if found[1] in names_of(tools):
                raise
            return text, []  # a formula or a link
        return text[: found.start()], calls


def is_attempt(text: str, names: set[str]) -> bool:
    """True if a text that begins like the JSON of a call is one, well-formed or not; else it is an answer."""
    named = _NAME.search(text)
    if named is not None and named[1] in names:
        return True
    try:
        value = Scanner(text).json()
    except CallFault:
        return False
    return isinstance(value, dict) and any(key in value for key in _KEYS)
