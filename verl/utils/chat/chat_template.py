"""Chat messages to the text that a model reads, as Transformers' `apply_chat_template` writes it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from verl.utils.chat.messages import (
    MARK,
    Chat,
    Message,
    call_name,
    in_call_form,
    joined_text,
    parsed_call,
    renamed_call,
    squeeze,
)
from verl.utils.chat.template_files import GENERATION, parse_template, template_sources
from verl.utils.chat.turn_forms import TurnForms

# What the run itself, Transformers or Jinja gives to a template.
# fmt: off
_OWN_VARIABLES = frozenset([
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
    "chat_template", "conversation", "return_dict", "return_tensors", "return_assistant_tokens_mask",
    "padding", "truncation", "max_length", "tokenizer_kwargs", "raise_exception", "strftime_now", "range",
    "dict", "namespace", "cycler", "joiner", "lipsum",
])
# fmt: on


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template, or several by name; `tool_use` then serves chats with tools.

    Attributes:
        tokenizer: as above.
        turns: forms in which it writes turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.turns = TurnForms(self)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Chat:
        """A conversation in the form that the template takes.

        Parts of text are joined, arguments of tool calls become objects, and `developer` becomes `system`
        where the template does not write it.

        Raises:
            ValueError: a message with content other than text.
        """
        self.check_kwargs(kwargs or {})
        chat = Chat([self._plain(m, i) for i, m in enumerate(messages)], tuple(tools), kwargs or {})
        if any(m["role"] == "developer" for m in chat.messages) and self._missing(chat):
            renamed = [{**m, "role": "system"} if m["role"] == "developer" else m for m in chat.messages]
            chat = chat.with_messages(renamed)
        if any(m.get("tool_calls") for m in chat.messages):
            has_null, has_text = self.turns.call_form
            chat = chat.with_messages([in_call_form(m, has_null, has_text) for m in chat.messages])
        return chat

    def render(self, chat: Chat, *, opens_answer: bool = False) -> str:
        """The text of a conversation, and of the beginning of the next answer.

        Raises:
            ValueError: there is no template, or it does not take the messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the prompt is a list of chat messages, but the tokenizer has no chat template; "
                "use text prompts or an instruct model, or give one as data.chat_template"
            )
        return self._apply(chat, add_generation_prompt=opens_answer)

    def try_render(self, chat: Chat, *, opens_answer: bool = False) -> str | None:
        """As `render`; None if the template does not take the messages."""
        try:
            return self.render(chat, opens_answer=opens_answer)
        except ValueError:
            return None

    def open(self, chat: Chat, *, continues: bool | None = None) -> str:
        """The text that the model reads before it answers.

        Args:
            chat: the conversation so far.
            continues: the answer continues the last message, as Transformers' `continue_final_message`; None:
                if that is the assistant's.

        Raises:
            ValueError: the template does not take the messages, or leaves some of them out.
        """
        if continues is None:
            continues = bool(chat.messages) and chat.messages[-1]["role"] == "assistant"
        text = self._continued(chat) if continues else self.render(chat, opens_answer=True)
        self.check_complete(chat, text)
        return text

    def marked_spans(self, chat: Chat) -> list[tuple[int, int]] | None:
        """First and last character of what the template marks by `{% generation %}`; None without marks."""
        source = self.tokenizer.get_chat_template(tools=list(chat.tools) or None)
        if not GENERATION.search(source):
            return None
        rendered: Any = render_jinja_template(
            conversations=[chat.messages],
            tools=list(chat.tools) or None,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **chat.kwargs},
        )
        return [(int(start), int(end)) for start, end in rendered[1][0]]

    def check_complete(self, chat: Chat, text: str) -> None:
        """Check that a text has all that a conversation says, up to blanks; earlier answers may be shortened.

        Raises:
            ValueError: it has not.
        """
        if missing := self.missing_part(chat, text):
            raise ValueError(
                f"the chat template leaves out {missing}; leave it out of the data, or give a template that "
                "writes it as data.chat_template"
            )
        if chat.tools and text and self._ignores_tools(chat):
            raise ValueError(
                f"the chat template does not write tools, but {len(chat.tools)} are given; leave them out "
                "(data.tools, tools of the row), or give a template that writes them as data.chat_template"
            )

    @property
    def end(self) -> str:
        """The special or added token that closes the last answer, as `<|im_end|>`; "" if there is none."""
        return self._probed_ends[0]

    @property
    def ends(self) -> tuple[str, ...]:
        """Tokens that close answers; some templates close one that is not the last with another token."""
        return tuple(dict.fromkeys(end for end in self._probed_ends if end))

    @cached_property
    def _probed_ends(self) -> tuple[str, str]:
        """The first special or added token behind an answer that is the last message, and one that is not."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        last, middle = (
            self.try_render(Chat(probe)) or "" for probe in ([question, answer], [question, answer, question])
        )
        return self.first_token(last.rpartition(MARK)[2]), self.first_token(middle.rpartition(MARK)[2])

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Names that the template reads, without those that the run gives."""
        known: set[str] = set()
        for source in template_sources(self.tokenizer.chat_template):
            known |= meta.find_undeclared_variables(parse_template(source, "the chat template"))
        own = _OWN_VARIABLES | self.tokenizer.special_tokens_map.keys()
        return tuple(sorted(known - own))

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Check the names of further variables.

        Raises:
            ValueError: one that the template does not read.
        """
        for name in kwargs:
            if name in self.variables:
                continue
            if name in _OWN_VARIABLES:
                raise ValueError(f"chat_template_kwargs cannot set {name}, which the run sets; leave it out")
            near = difflib.get_close_matches(name, self.variables, n=1)
            known = f"did you mean {near[0]}?" if near else f"it reads {', '.join(self.variables) or 'none'}"
            raise ValueError(
                f"chat_template_kwargs has {name}, which the chat template does not read; {known}"
            )

    def _apply(self, chat: Chat, **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages,
                tools=list(chat.tools) or None,
                tokenize=False,
                **chat.kwargs,
                **options,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return str(text)

    def _continued(self, chat: Chat) -> str:
        """The text of a conversation whose last message is not closed."""
        *before, last = chat.messages
        opening = last["content"] or ""
        if last.get("tool_calls"):
            raise ValueError(
                "the last message calls tools, so that the model cannot continue it; need the results of the "
                "tools after it, or an answer as text"
            )
        header = self.try_render(chat.with_messages(before), opens_answer=True)
        if not opening.strip() and header is not None:
            return header + opening
        try:
            text = self._apply(chat, continue_final_message=True)
        except ValueError:
            if header is None:
                raise
            return header + opening  # the template would rewrite the opening
        # A template may write a tag of its own where the opening brings it, such as an empty <think>.
        tag = re.match(r"<[^<>\s]+>", opening.lstrip())
        if header is not None and tag and text[len(header) :].lstrip().count(tag[0]) > opening.count(tag[0]):
            return header + opening
        return text

    def first_token(self, text: str) -> str:
        """The first special or added token in a text; "" if there is none."""
        tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        found = re.search("|".join(map(re.escape, tokens)), text) if tokens and text else None
        return found[0] if found else ""

    def missing_part(self, chat: Chat, text: str) -> str:
        """A part of a conversation that its text does not have, for a message; "" if it has all of them.

        Blanks do not count. Tool results and answers may be written in another form, or without thoughts.
        """
        squeezed = squeeze(text)
        for i, message in enumerate(chat.messages):
            place = f"message {i + 1} ({message['role']})"
            absent = squeeze(message["content"] or "") not in squeezed
            if absent and message["role"] in ("system", "developer", "user"):
                return place
            calls = message.get("tool_calls") or ()
            # Some templates write calls without the text beside them.
            if absent and not calls and not self._writes(chat.with_content(i, MARK)):
                return place
            # The text may have the name of a function elsewhere.
            marked = {**message, "tool_calls": [renamed_call(call, MARK) for call in calls]}
            changed = chat.with_messages([*chat.messages[:i], marked, *chat.messages[i + 1 :]])
            if calls and not self._writes(changed):
                return f"the call of {call_name(calls[0])} in {place}"
        return ""

    def _writes(self, marked: Chat) -> bool:
        """False if the template takes a conversation without writing the `MARK` in it."""
        text = self.try_render(marked)
        return text is None or MARK in text

    def _missing(self, chat: Chat) -> bool:
        """True if the template does not take a conversation, or leaves a part of it out."""
        text = self.try_render(chat)
        return text is None or bool(self.missing_part(chat, text))

    def _ignores_tools(self, chat: Chat) -> bool:
        with_tools, without = (self.try_render(c) for c in (chat, replace(chat, tools=())))
        return with_tools is not None and with_tools == without

    def _plain(self, message: Mapping[str, Any], index: int) -> Message:
        """A message with its text in one piece and its tool calls as objects."""
        plain = dict(message)
        plain["content"] = joined_text(message.get("content"), f"message {index + 1}")
        if plain.get("role") == "assistant" and self.end:
            plain["content"] = plain["content"].removesuffix(self.end)  # the template writes it
        if plain.get("tool_calls"):
            plain["tool_calls"] = [parsed_call(call) for call in plain["tool_calls"]]
        return plain
