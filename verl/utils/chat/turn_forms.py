"""Forms in which a chat template writes turns: calls of tools, and the tokens at which turns end."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from verl.utils.chat.messages import MARK, Chat, Message, in_call_form

if TYPE_CHECKING:
    from verl.utils.chat.chat_template import ChatTemplate

# A tool for templates that write calls only where tools are offered.
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}
# Content None beside calls, arguments as a text: the first that a template takes.
_CALL_FORMS = ((False, False), (True, False), (False, True), (True, True))


class TurnForms:
    """Forms in which a chat template writes turns, found by rendering short conversations.

    Args:
        template: as it is at the first use.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @property
    def closers(self) -> tuple[str, ...]:
        """Tokens that close turns, with calls and without, as the last message and before others."""
        return tuple(dict.fromkeys((*self.closers_of(has_calls=False), *self.closers_of(has_calls=True))))

    def closers_of(self, *, has_calls: bool) -> tuple[str, ...]:
        """Tokens that close turns with calls, or without, as the last message and before others."""
        return self._turn_ends[has_calls]

    @property
    def stops(self) -> tuple[str, ...]:
        """Tokens besides `end` at which the policy ends a turn.

        The one that closes a last turn with calls, as `<|call|>`, and marks of the next role where no token
        closes turns, as `<|observation|>`.
        """
        return self._turn_ends[2]

    @cached_property
    def token_run(self) -> re.Pattern[str]:
        """Matches special and added tokens with the blanks between them; may be empty."""
        tokens = sorted(
            (t for t in self._template.tokenizer.get_added_vocab() if t.strip()), key=len, reverse=True
        )
        return re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, tokens))}))*" if tokens else "")

    @cached_property
    def _turn_ends(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Tokens that close answers, those that close calls, and those besides `end` that end turns."""
        question, call = {"role": "user", "content": "Hi"}, self.probe_call
        result = {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": "1"}
        closers: list[tuple[str, ...]] = []
        stops: list[str] = []
        for chat in (call.with_messages([question, {"role": "assistant", "content": MARK}]), call):
            tail = self._behind_mark(chat).rstrip()
            known = {*self._template.tokenizer.all_special_tokens, *self._template.ends}
            last = max((token for token in known if tail.endswith(token)), key=len, default="")
            own = tail.removesuffix(last)
            # Before others a turn may be closed by another token; one that depends on what follows is a mark.
            behind = [self._behind_mark(chat, follower) for follower in (question, result)]
            starts = {
                last if last and text.startswith(tail) else self._leading_token(text, own) for text in behind
            }
            found = tuple(dict.fromkeys(token for token in (last, *sorted(starts)) if token))
            is_closed = bool(last) and len(starts - {""}) <= 1
            closers.append(found if is_closed else ())
            stops += [last] if is_closed else found
        first = self._template.ends if closers[0] else ()
        stops = [token for token in dict.fromkeys(stops) if token not in ("", self._template.end)]
        return tuple(dict.fromkeys((*first, *closers[0]))), closers[1], tuple(stops)

    def _behind_mark(self, chat: Chat, *more: Message) -> str:
        """Text behind the last `MARK` of a conversation and further messages; "" if there is none."""
        _, found, rest = (
            self._template.try_render(chat.with_messages([*chat.messages, *more])) or ""
        ).rpartition(MARK)
        return rest if found else ""

    def _leading_token(self, text: str, own: str) -> str:
        """The token that follows the own text of a turn, apart from blanks; "" if there is none."""
        rest = text.removeprefix(own).lstrip()
        token = self._template.first_token(rest)
        return token if text.startswith(own) and rest.startswith(token) else ""

    @property
    def probe_call(self) -> Chat:
        """A question and a turn with a call whose argument is `MARK`, as the template takes calls."""
        function = {"name": "f", "arguments": {"value": MARK}}
        call = {"id": "call12345", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        chat = Chat([{"role": "user", "content": "Hi"}, in_call_form(turn, *self.call_form)])
        return replace(chat, tools=(PROBE_TOOL,) if self._template.try_render(chat) is None else ())

    @cached_property
    def call_form(self) -> tuple[bool, bool]:
        """Form in which the template takes calls: beside no content as None, with arguments as a text."""
        function = {"name": MARK, "arguments": {"value": "text"}}
        call = {"id": "call12345", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        for tools, form in itertools.product(((), (PROBE_TOOL,)), _CALL_FORMS):
            chat = Chat([{"role": "user", "content": "Hi"}, in_call_form(turn, *form)], tools)
            text = self._template.try_render(chat) or ""
            # A template for texts would write an object as Python does.
            if MARK in text and "{'value'" not in text:
                return form
        return _CALL_FORMS[0]
