"""Chat messages to the text that a model reads, as Transformers' `apply_chat_template` writes it."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from verl.utils.chat.template_files import GENERATION, parse_template, template_sources

Message = dict[str, Any]
# Stands for the content of a message where its place in the text is looked for.
MARK = "qzxcontentxzq"
# A tool for templates that write calls only where tools are offered.
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}
# Content None beside calls, arguments as a text: the first that a template takes.
_CALL_FORMS = ((False, False), (True, False), (False, True), (True, True))
_TEXT_PARTS = ("text", "input_text", "output_text")
# What the run itself, Transformers or Jinja gives to a template.
# fmt: off
_OWN_VARIABLES = frozenset([
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
    "chat_template", "conversation", "return_dict", "return_tensors", "return_assistant_tokens_mask",
    "padding", "truncation", "max_length", "tokenizer_kwargs", "raise_exception", "strftime_now", "range",
    "dict", "namespace", "cycler", "joiner", "lipsum",
])
# fmt: on


@dataclass(frozen=True)
class Chat:
    """A conversation as a chat template takes it.

    Attributes:
        messages: with texts as contents.
        tools: schemas of the tools offered.
        kwargs: further variables of the template.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_messages(self, messages: list[Message]) -> Chat:
        """The same tools and variables around other messages."""
        return replace(self, messages=messages)

    def with_content(self, index: int, content: str | None) -> Chat:
        """The same conversation, with another content of one message."""
        changed = {**self.messages[index], "content": content}
        return self.with_messages([*self.messages[:index], changed, *self.messages[index + 1 :]])


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template, or several by name; `tool_use` then serves chats with tools.

    Attributes:
        tokenizer: as above.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

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
            has_null, has_text = self._call_form
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

    @property
    def closers(self) -> tuple[str, ...]:
        """Tokens that close turns, with calls and without, as the last message and before others.

        Empty if no token closes the last turn, as where a turn ends with the mark of the next role.
        """
        return tuple(dict.fromkeys(end for end in (*self.ends, self.call_end) if end)) if self.end else ()

    @cached_property
    def call_end(self) -> str:
        """The special token that closes a last turn with calls, as `<|call|>`; "" if none does."""
        if not self.end:
            return ""
        _, found, tail = (self.try_render(self.probe_call) or "").rpartition(MARK)
        tail = tail.rstrip() if found else ""
        return max((t for t in self.tokenizer.all_special_tokens if tail.endswith(t)), key=len, default="")

    @cached_property
    def role_marks(self) -> tuple[str, ...]:
        """Marks of the next role, at which turns end that no token closes, as `<|observation|>`."""
        if self.end:
            return ()
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        called = self.probe_call
        result = {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": "1"}
        asked = Chat([question, answer, question])
        marks = []
        for chat in (asked, called.with_messages([*called.messages, result])):
            last = self.try_render(chat.with_messages(chat.messages[:2])) or ""
            own = last.rpartition(MARK)[2].rstrip()
            text = (self.try_render(chat) or "").rpartition(MARK)[2]
            token = self._first_token(text.removeprefix(own))
            if token and text.removeprefix(own).lstrip().startswith(token):
                marks.append(token)
        return tuple(dict.fromkeys(marks))

    @property
    def probe_call(self) -> Chat:
        """A question and a turn with a call whose argument is `MARK`, as the template takes calls."""
        function = {"name": "f", "arguments": {"value": MARK}}
        call = {"id": "call12345", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        chat = Chat([{"role": "user", "content": "Hi"}, in_call_form(turn, *self._call_form)])
        return replace(chat, tools=(PROBE_TOOL,) if self.try_render(chat) is None else ())

    @cached_property
    def _call_form(self) -> tuple[bool, bool]:
        """Form in which the template takes calls: beside no content as None, with arguments as a text."""
        function = {"name": MARK, "arguments": {"value": "text"}}
        call = {"id": "call12345", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        for tools, form in itertools.product(((), (PROBE_TOOL,)), _CALL_FORMS):
            chat = Chat([{"role": "user", "content": "Hi"}, in_call_form(turn, *form)], tools)
            text = self.try_render(chat) or ""
            # A template for texts would write an object as Python does.
            if MARK in text and "{'value'" not in text:
                return form
        return _CALL_FORMS[0]

    @cached_property
    def _probed_ends(self) -> tuple[str, str]:
        """The first special or added token behind an answer that is the last message, and one that is not."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        last, middle = (
            self.try_render(Chat(probe)) or "" for probe in ([question, answer], [question, answer, question])
        )
        return self._first_token(last.rpartition(MARK)[2]), self._first_token(middle.rpartition(MARK)[2])

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
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
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

    def _first_token(self, text: str) -> str:
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


def joined_text(content: Any, place: str) -> str:
    """The text of a message, its typed parts joined; nothing is an empty text.

    Raises:
        ValueError: a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if not isinstance(part, str) and (
            part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f"{place} has a part of type {part.get('type')!r}, but the model reads text alone; leave "
                "the row out, or give its text"
            )
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, where OpenAI's format has the text of one."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": parsed_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return dict(call)
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else dict(call)


def in_call_form(message: Message, has_null: bool, has_text: bool) -> Message:
    """A message with its calls as a template takes them.

    Args:
        message: with the arguments of its calls as objects.
        has_null: content is None beside calls where there is none.
        has_text: arguments are the text of a JSON object.
    """
    if not message.get("tool_calls"):
        return message
    changed = dict(message)
    if has_null and not message["content"]:
        changed["content"] = None
    if has_text:
        changed["tool_calls"] = [call_with_text(call) for call in message["tool_calls"]]
    return changed


def call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a text of JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": call_with_text(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return dict(call)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def call_name(call: Mapping[str, Any]) -> str:
    """Name of the function that a tool call is of."""
    return str((call.get("function") or call).get("name", ""))


def renamed_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same tool call of another function."""
    inner = call.get("function")
    return {**call, "function": {**inner, "name": name}} if inner else {**call, "name": name}


def squeeze(text: str) -> str:
    """A text without blanks."""
    return "".join(text.split())
