"""Calls of tools that the policy writes, and its turns parsed into text, thoughts and calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool.

    Attributes:
        name: of the tool.
        arguments: by name.
        id: of the call, which its result names; unique within an episode.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def as_message_part(self) -> dict[str, Any]:
        """The call in OpenAI's form, with its arguments as an object, as chat templates read it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": dict(self.arguments)},
        }

    def as_openai(self) -> dict[str, Any]:
        """The call in OpenAI's form, with the text of its arguments."""
        arguments = json.dumps(dict(self.arguments), ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ParsedTurn:
    """One turn of the policy, parsed.

    Attributes:
        content: the text beside thoughts and calls.
        thoughts: text of the reasoning before it; "": none.
        calls: in the order in which they were written; none if there is an error.
        error: fault of a call that cannot be parsed, in words that are told to the policy; "": none.
    """

    content: str
    thoughts: str = ""
    calls: tuple[ToolCall, ...] = ()
    error: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The turn as a chat message, as chat templates read it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thoughts:
            message["reasoning_content"] = self.thoughts
        if self.calls:
            message["tool_calls"] = [call.as_message_part() for call in self.calls]
        return message


class ToolCallParser(ABC):
    """Parses what the policy wrote in one turn.

    Attributes:
        name: of the form, as in `agent.tool_format`.
        ends: texts after which a turn with a call may stop; the policy then writes no further call in it.
            Empty: the turn ends with its closing token alone.
    """

    name: str
    ends: tuple[str, ...] = ()

    @abstractmethod
    def parse(
        self, text: str, tools: Sequence[Mapping[str, Any]] = (), *, taken: Collection[str] = ()
    ) -> ParsedTurn:
        """Parse a turn; never raises for what a policy may write.

        Args:
            text: as it was sampled, with special tokens, without the one that closes the turn.
            tools: schemas of the tools offered, for the types of arguments that are written as texts. Without
                any, forms without a mark in front of a call are read as text.
            taken: ids of earlier calls of the episode, which no new call gets.

        Returns:
            The turn; with an `error` it has no calls, and its content is all that follows the thoughts.
        """

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Check that calls of these tools can be parsed; here nothing.

        Raises:
            ValueError: they cannot; says what to do.
        """
        return
