"""Calls with a tag for each parameter: Qwen3-Coder, Seed-OSS, MiniMax, DeepSeek V3.2 and GLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import parameters_of, typed
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.literals import literal
from verl.utils.tool_calls.scanning import CallFault, Scanner, read_json, unique_keys


class TaggedParser(FormParser):
    """Parses calls whose parameters have a tag each, with values as texts that the tool's schema types.

    Attributes:
        opening: begins a section of calls, or a call.
        closing: ends the section; may be missing at the end of the turn.
        call: begins a call, with a group for its name.
        call_end: ends it.
        parameter: begins a parameter, with a group `key`, and maybe `string`, true for a text.
        parameter_end: ends it.
        is_call: `opening` and `closing` stand around each call, not around several.
    """

    opening: re.Pattern[str]
    closing: re.Pattern[str]
    call: re.Pattern[str]
    call_end: str
    parameter: re.Pattern[str]
    parameter_end: str
    is_call = False

    @override
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        scanner, content, calls = Scanner(text), [], []
        while found := self.opening.search(text, scanner.position):
            before = text[scanner.position : found.start()]
            content.append(before.strip() and before)
            scanner.position = found.end() if found[0].strip() else found.start()
            calls += self.read_section(scanner, tools)
        return "".join([*content, scanner.rest.strip() and scanner.rest]), calls

    def read_section(self, scanner: Scanner, tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
        """The calls of a section whose beginning is read.

        Raises:
            CallFault: it has none, or a malformed one.
        """
        calls = []
        while named := scanner.match(self.call):
            calls.append(
                self.read_arguments(scanner, named[1].strip(), parameters_of(tools, named[1].strip()))
            )
            if self.is_call:
                return calls
        if not calls:
            raise CallFault(f"need the name of a tool behind {self.marks[0]}, got {scanner.shown}")
        if scanner.match(self.closing) is None and not scanner.is_done:
            raise CallFault(f"need the end of the calls behind {self.call_end}, got {scanner.shown}")
        return calls

    def read_arguments(self, scanner: Scanner, name: str, schemas: Mapping[str, Any]) -> ToolCall:
        """The call of that name, up to its end."""
        found: list[tuple[str, Any]] = []
        while not scanner.take(self.call_end):
            parameter = scanner.match(self.parameter)
            if parameter is None:
                scanner.skip_space()
                raise CallFault(f"need a parameter of {name} or {self.call_end}, got {scanner.shown}")
            key = parameter["key"].strip()
            text = self.read_value(scanner, key)
            if "string" in parameter.groupdict():
                found.append((key, text if parameter["string"] == "true" else read_json(text)))
            else:
                found.append((key, typed(text, schemas.get(key), literal)))
        return ToolCall(name, unique_keys(found))

    def read_value(self, scanner: Scanner, key: str) -> str:
        """The text of a parameter; a closing tag in it counts only if a parameter or the end follows."""
        start = scanner.position
        while scanner.until(self.parameter_end) is not None:
            end, behind = scanner.position - len(self.parameter_end), scanner.position
            if scanner.is_done or scanner.is_next(self.call_end) or scanner.match(self.parameter):
                scanner.position = behind
                return self.trimmed(scanner.text[start:end])
        raise CallFault(f"need {self.parameter_end} behind the parameter {key}")

    def trimmed(self, value: str) -> str:
        """A value without what the form puts around it; here nothing."""
        return value


class Qwen3CoderParser(TaggedParser):
    """Parses `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""

    name = "qwen3_coder"
    shape = "<tool_call>\n<function=TOOL>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
    opening, closing = re.compile(r"<tool_call>|(?=<function=)"), re.compile(r"\s*</tool_call>")
    call, call_end = re.compile(r"\s*<function=([^>\n]+)>"), "</function>"
    parameter, parameter_end = re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>"), "</parameter>"
    marks: tuple[str, ...] = ("<tool_call>", "<function=")
    ends: tuple[str, ...] = ("</tool_call>",)

    @override
    def trimmed(self, value: str) -> str:
        return value.removeprefix("\n").removesuffix("\n")


class SeedParser(Qwen3CoderParser):
    """Parses the calls of Seed-OSS, which differ in the outer tag."""

    name = "seed_oss"
    shape = (
        "<seed:tool_call>\n<function=TOOL>\n<parameter=KEY>VALUE</parameter>\n</function>\n</seed:tool_call>"
    )
    opening, closing = re.compile(r"<seed:tool_call>"), re.compile(r"\s*</seed:tool_call>")
    marks = ("<seed:tool_call>",)
    ends = ("</seed:tool_call>",)
    thought_marks = ("<seed:think>", "</seed:think>")


class MiniMaxParser(TaggedParser):
    """Parses `<minimax:tool_call><invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>...`."""

    name = "minimax"
    shape = (
        '<minimax:tool_call>\n<invoke name="TOOL">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n'
        "</minimax:tool_call>"
    )
    opening, closing = re.compile(r"<minimax:tool_call>"), re.compile(r"\s*</minimax:tool_call>")
    call, call_end = re.compile(r'\s*<invoke name="([^">\n]+)">'), "</invoke>"
    parameter, parameter_end = re.compile(r'\s*<parameter name="(?P<key>[^">\n]+)">'), "</parameter>"
    marks = ("<minimax:tool_call>",)
    ends = ("</minimax:tool_call>",)


class DeepSeekTaggedParser(TaggedParser):
    """Parses the calls of DeepSeek V3.2 and later; each parameter says whether it is a text or JSON."""

    name = "deepseek_v32"
    shape = (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="TOOL">\n<｜DSML｜parameter name="KEY" string="true">'
        "TEXT</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    )
    opening = re.compile(r"<｜DSML｜(?:function_calls|tool_calls)>")
    closing = re.compile(r"\s*</｜DSML｜(?:function_calls|tool_calls)>")
    call, call_end = re.compile(r'\s*<｜DSML｜invoke name="([^">\n]+)">'), "</｜DSML｜invoke>"
    parameter = re.compile(r'\s*<｜DSML｜parameter name="(?P<key>[^">\n]+)" string="(?P<string>true|false)">')
    parameter_end = "</｜DSML｜parameter>"
    marks = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>")
    ends = ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>")


class GlmParser(TaggedParser):
    """Parses `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`, as GLM 4.5."""

    name = "glm"
    shape = "<tool_call>TOOL\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>"
    opening, closing = re.compile("<tool_call>"), re.compile("")
    call, call_end = re.compile(r"\s*([\w.-]+)(?=\s*(?:<arg_key>|</tool_call>))"), "</tool_call>"
    parameter = re.compile(r"\s*<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>")
    parameter_end = "</arg_value>"
    marks = ("<tool_call>",)
    is_call = True
