"""Turns parsed by a tokenizer's own `response_template`, which Transformers reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from verl.utils.tool_calls.arguments import arguments_of
from verl.utils.tool_calls.calls import ParsedTurn, ToolCall, ToolCallParser
from verl.utils.tool_calls.form_parser import check_plain, check_text, numbered
from verl.utils.tool_calls.scanning import CallFault

# Raised by content parsers of Transformers for text that they cannot read.
_FAULTS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class ResponseTemplateParser(ToolCallParser):
    """Parses by `PreTrainedTokenizerBase.parse_response`.

    Args:
        tokenizer: with a `response_template`.
        prefix: the text before a turn, whose end may be the beginning of the thoughts.

    Raises:
        ValueError: the tokenizer has none.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str) -> None:
        if not tokenizer.response_template:
            raise ValueError(
                "agent.tool_format is tokenizer, but the tokenizer has no response_template; give auto, or "
                "the name of a form"
            )
        self._tokenizer, self._prefix = tokenizer, prefix

    @override
    def parse(
        self, text: str, tools: Sequence[Mapping[str, Any]] = (), *, taken: Collection[str] = ()
    ) -> ParsedTurn:
        try:
            message = self._tokenizer.parse_response(
                text, prefix=self._prefix, tools=[dict(tool) for tool in tools] or None
            )
            content = str(message.get("content") or "")
            calls = [call_of_message(part) for part in message.get("tool_calls") or ()]
            if tools:
                check_text(content, tools)
            for call in calls:
                check_plain(call)
        except _FAULTS as fault:
            return ParsedTurn(text, "", (), f"{fault}; write a call as the chat template does")
        thoughts = next((str(message[key]) for key in _THOUGHTS if message.get(key)), "")
        return ParsedTurn(content.strip("\n"), thoughts, numbered(calls, taken, call_id))


def call_id(name: str, number: int) -> str:
    """Id of a call that brings none."""
    return f"call_{number}"


def call_of_message(part: Mapping[str, Any]) -> ToolCall:
    """A call of a message in OpenAI's form.

    Raises:
        CallFault: it has no name, or no arguments.
    """
    inner = part.get("function", part)
    name, number = inner.get("name"), part.get("id")
    if not isinstance(name, str) or not name:
        raise CallFault("need the name of a tool in a call")
    return ToolCall(
        name, arguments_of(name, inner.get("arguments")), number if isinstance(number, str) else ""
    )
