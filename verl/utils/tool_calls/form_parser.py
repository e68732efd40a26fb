"""The common part of the forms: thoughts, calls, ids, and the words for a fault."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from verl.utils.tool_calls.arguments import names_of
from verl.utils.tool_calls.calls import ParsedTurn, ToolCall, ToolCallParser
from verl.utils.tool_calls.scanning import CallFault, Scanner, behind_space

# Texts that begin or end calls in some form; in the content of a turn they are a call of an unknown shape.
CALL_MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_calls>",
    "<function_call>",
    "<function_calls>",
    "<function=",
    "<invoke name=",
    "<|tool_call|>",
    "<|tool_call>",
    "<|tool_call_start|>",
    "<|tool_call_begin|>",
    "<|tool_calls_section_begin|>",
    "<|python_tag|>",
    "<|python_start|>",
    "<start_function_call>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜DSML｜",
    "[TOOL_CALLS]",
    "to=functions.",
)
_ANY_MARK = re.compile("|".join(map(re.escape, CALL_MARKS)))
_FENCE = re.compile(r"```\w*")


class FormParser(ToolCallParser):
    """A parser of one form of calls.

    Args:
        opens_thoughts: the chat template begins the thoughts, so that a turn has only their end.

    Attributes:
        shape: a call in this form, for messages.
        marks: texts that begin a call.
        needs_mark: every call begins with one of them.
        thought_marks: texts before and behind thoughts.
        opens_thoughts: as above.
    """

    shape: str
    marks: tuple[str, ...] = ()
    needs_mark = True
    thought_marks = ("<think>", "</think>")

    def __init__(self, *, opens_thoughts: bool = False) -> None:
        self.opens_thoughts = opens_thoughts

    @override
    def parse(
        self, text: str, tools: Sequence[Mapping[str, Any]] = (), *, taken: Collection[str] = ()
    ) -> ParsedTurn:
        thoughts, rest = self.split_thoughts(text)
        try:
            if not rest.strip() and any(mark in thoughts for mark in self.marks):
                raise CallFault(f"the call stands in the thoughts; write {self.thought_marks[1]} before it")
            content, calls = self.read(rest, tools)
            if tools:
                check_text(content, tools)
            for call in calls:
                check_plain(call)
        except ValueError as fault:
            return ParsedTurn(rest.strip("\n"), thoughts, (), f"{fault}; write a call as {self.shape}")
        return ParsedTurn(content.strip("\n"), thoughts, numbered(calls, taken, self.call_id))

    @abstractmethod
    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
        """The content and the calls of a turn without its thoughts; a call may lack its id.

        Raises:
            ValueError: a call is malformed.
        """

    def call_id(self, name: str, number: int) -> str:
        """Id of a call that brings none, by the number of calls of the episode before it."""
        return f"call_{number}"

    def split_thoughts(self, text: str) -> tuple[str, str]:
        """The thoughts at the beginning of a turn, and the rest."""
        opening, closing = self.thought_marks
        found, position = [], 0
        place = text.find(closing)
        start = behind_space(text, 0)
        # An end of thoughts alone, unless it is part of an argument.
        first_call = min((i for mark in self.marks if (i := text.find(mark)) >= 0), default=len(text))
        is_end_alone = self.opens_thoughts or (
            self.needs_mark and place < first_call and opening not in text[:place]
        )
        if place >= 0 and not text.startswith(opening, start) and is_end_alone:
            found.append(text[:place])
            position = place + len(closing)
        while text.startswith(opening, start := behind_space(text, position)):
            start += len(opening)
            place = text.find(closing, start)
            found.append(text[start:place] if place >= 0 else text[start:])
            position = place + len(closing) if place >= 0 else len(text)
        return "\n".join(thought.strip("\n") for thought in found), text[position:]


def numbered(
    calls: Sequence[ToolCall], taken: Collection[str], call_id: Callable[[str, int], str]
) -> tuple[ToolCall, ...]:
    """The calls with ids that no other call of the episode has.

    Args:
        calls: with their own ids, or without.
        taken: ids of earlier calls.
        call_id: id of a call of that name, by the number of calls before it.
    """
    known, number, found = set(taken), len(taken), []
    for call in calls:
        own = call.id
        while not own or own in known:
            own = call_id(call.name, number)
            number += 1
        known.add(own)
        found.append(replace(call, id=own))
    return tuple(found)


def check_text(content: str, tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that the content of a turn has no call in another form, which would be taken for an answer.

    Raises:
        CallFault: it has.
    """
    if mark := _ANY_MARK.search(content):
        raise CallFault(f"{mark[0]} in the text is no call that can be read")
    scanner = Scanner(content)
    scanner.skip_space()
    scanner.match(_FENCE)
    scanner.take("[")
    if not scanner.is_next("{"):
        return
    try:
        value = scanner.json()
    except CallFault:
        return  # an answer, whatever it is
    is_call = isinstance(value, dict) and value.keys() & {"arguments", "parameters"}
    if is_call and value.get("name") in names_of(tools):
        raise CallFault(f"the call of {value['name']} has no marks around it")


def check_plain(call: ToolCall) -> None:
    """Check that arguments can be written as JSON and as text, as templates, tools and logs do.

    Raises:
        ValueError: they cannot.
    """
    try:
        json.dumps([call.name, dict(call.arguments)], ensure_ascii=False, allow_nan=False).encode()
    except (RecursionError, TypeError) as error:
        raise CallFault(f"the arguments of {call.name} are nested too deep") from error
    except UnicodeEncodeError as error:
        raise CallFault(f"the arguments of {call.name} have half of a surrogate pair") from error
