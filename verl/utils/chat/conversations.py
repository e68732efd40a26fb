"""Token ids of whole conversations, and the tokens in them that are the assistant's."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from verl.utils.chat.chat_template import ChatTemplate
from verl.utils.chat.messages import MARK, Chat, squeeze
from verl.utils.chat.template_files import template_sources

Span = tuple[int, int]
# Keys under which messages have the thoughts before an answer.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class EncodedConversation(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: of all that the chat template writes.
        mask: [len(ids)], True for the tokens that are learned: the text of the assistant's turns and the
            token that ends each, not the header before it nor blanks behind it.
        turn_starts: first token of each message.
    """

    ids: list[int]
    mask: list[bool]
    turn_starts: list[int]


class RenderedConversation:
    """The text of a conversation, and the places of its messages.

    Args:
        template: that writes it.
        chat: at least one message.

    Attributes:
        text: as the template writes it.

    Raises:
        ValueError: the template does not take the messages, or leaves a part of them out.
    """

    def __init__(self, template: ChatTemplate, chat: Chat) -> None:
        self.template, self.chat = template, chat
        self.text = template.render(chat)
        template.check_complete(chat, self.text)
        # Length of the text of the first i messages, None if the whole does not begin with it.
        self._lengths = [0] + [self._prefix(i) for i in range(1, len(chat.messages))] + [len(self.text)]

    def starts(self) -> list[int]:
        """Character at which each message begins, its header included."""
        starts = [0]
        for i in range(1, len(self.chat.messages)):
            length = self._lengths[i]
            starts.append(self._start_behind(i, starts[-1]) if length is None else length)
        return starts

    def answer(self, index: int) -> Span:
        """First and last character of what the assistant writes in a message, its end token included.

        Raises:
            ValueError: it cannot be told.
        """
        header = self._prefix(index, opens_answer=True) if index else None
        start = self._content_start(index) if header is None else header
        limit = self._lengths[index + 1]
        if limit is None and index + 1 < len(self.chat.messages):
            # The template writes this turn otherwise when others follow.
            limit = self._content_start(index + 1)
        if start is None or limit is None:
            raise ValueError(self._refusal(index))
        if not self._is_stable(index) and not any(
            end in self.text[start:limit] for end in self.template.ends
        ):
            raise ValueError(self._refusal(index))
        content = self.chat.messages[index]["content"] or ""
        return start, start + answer_length(self.text[start:limit], content, self.template.ends)

    def _is_stable(self, index: int) -> bool:
        """True if the template writes the messages up to one as if no others followed."""
        return self._lengths[index + 1] is not None

    def _prefix(self, count: int, *, opens_answer: bool = False) -> int | None:
        """Length of the text of the first messages, if the whole text begins with it."""
        first = self.chat.with_messages(self.chat.messages[:count])
        text = self.template.try_render(first, opens_answer=opens_answer)
        return len(text) if text is not None and self.text.startswith(text) else None

    def _content_start(self, index: int) -> int | None:
        """Character at which the content of a message begins, if it can be told."""
        marked = self.template.try_render(self.chat.with_content(index, MARK)) or ""
        before, found, _ = marked.partition(MARK)
        return len(before) if found and self.text.startswith(before) else None

    def _start_behind(self, index: int, last_start: int) -> int:
        """Start of a message behind one that the template writes otherwise when it is the last."""
        content = self._content_start(index)
        if content is None:
            raise ValueError(self._refusal(index))
        ends = self.template.ends
        closed = [i + len(end) for end in ends if (i := self.text.rfind(end, last_start, content)) >= 0]
        start = max(closed, default=content)
        return content - len(self.text[start:content].lstrip())

    def _refusal(self, index: int) -> str:
        return (
            f"the chat template writes message {index + 1} ({self.chat.messages[index]['role']}) otherwise "
            "when other messages follow, so that it cannot be told which tokens are its own; learn the last "
            "answer alone, or give a template with {% generation %} marks as data.chat_template"
        )


def answer_length(text: str, content: str, ends: Sequence[str]) -> int:
    """Characters of an answer at the beginning of a text, with the token that closes it.

    Args:
        text: the answer and what the template writes behind it.
        content: of the message.
        ends: tokens that close an answer; without one in the text, blanks behind the answer are not its own.
    """
    closed = [text.rfind(end) + len(end) for end in ends if end in text]
    # Blanks at the end of the content are the answer's.
    own = text.find(content) + len(content) if content in text else 0
    return max(closed, default=max(own, len(text.rstrip())))


def answer_text(template: ChatTemplate, chat: Chat, answer: str) -> str:
    """Text that the template writes behind the prompt for an answer, with the token that closes it.

    Where it would change the answer or what it wrote before, as templates that drop thoughts do, that is the
    answer as it stands.
    """
    answer = answer.removesuffix(template.end)
    opened, before, opening = template.open(chat), chat.messages, ""
    if before and before[-1]["role"] == "assistant":
        *before, last = before
        opening = last["content"] or ""
    whole = template.try_render(
        chat.with_messages([*before, {"role": "assistant", "content": opening + answer}])
    )
    if whole is not None and whole.startswith(opened):
        rest = whole[len(opened) :]
        rest = rest[: answer_length(rest, answer, template.ends)]
        # Before a whole answer a template may write something, such as an empty thought.
        added = squeeze(rest.removesuffix(template.end)).removesuffix(squeeze(answer))
        if squeeze(answer) in squeeze(rest) and not (opening and added):
            return rest
    return answer + template.end


def encode_conversation(
    template: ChatTemplate, chat: Chat, *, learned: Collection[int] | None = None
) -> EncodedConversation:
    """Tokens of a conversation, those of the whole text, and which of them are learned.

    The places of answers are those that the template marks by `{% generation %}`, else they are found by
    rendering parts of the conversation. If the template has no token that closes an answer, the tokenizer's
    end token follows the last one.

    Args:
        template: of the tokenizer.
        chat: at least one message.
        learned: indices of the assistant messages to learn; None: all.

    Raises:
        ValueError: the template does not take the messages, leaves a part of them out, or writes them so that
            the tokens of one cannot be told.
    """
    tokenizer = template.tokenizer
    rendered = RenderedConversation(template, chat)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    wanted = answers if learned is None else sorted(learned)
    if wrong := set(wanted) - set(answers):
        raise ValueError(f"need messages of the assistant to learn, got message {min(wrong) + 1}")
    for i in wanted:
        check_thoughts(template, chat, i)
    starts = rendered.starts()
    spans = answer_spans(template, rendered, answers, starts)
    text, last = rendered.text, len(chat.messages) - 1
    is_open = last in spans and not template.end
    text = text[: spans[last][-1][1]] if is_open else text
    if last in wanted and squeeze(chat.messages[last]["content"] or "") not in squeeze(
        "".join(text[start:end] for start, end in spans[last])
    ):
        raise ValueError(
            f"the chat template leaves out a part of message {last + 1}, the answer to learn; give a "
            "template that writes it as data.chat_template"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    chosen = [span for i in wanted for span in spans[i]]
    mask = [any(start < end_of and begin < end for start, end in chosen) for begin, end_of in offsets]
    if is_open and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
        mask.append(last in wanted)
    ends = [end for _, end in offsets]
    return EncodedConversation(ids, mask, [bisect_right(ends, start) for start in starts])


def check_thoughts(template: ChatTemplate, chat: Chat, index: int) -> None:
    """Check that a template knows the key of the thoughts of an answer to learn.

    Raises:
        ValueError: it does not, so that the thoughts would not be learned.
    """
    sources = template_sources(template.tokenizer.chat_template)
    for key in _THOUGHTS:
        is_read = any(re.search(rf"\b{key}\b", source) for source in sources)
        if isinstance(chat.messages[index].get(key), str) and chat.messages[index][key] and not is_read:
            raise ValueError(
                f"the chat template leaves out the {key} of message {index + 1}, an answer to learn; write "
                "it into the content, or give a template that writes it as data.chat_template"
            )


def answer_spans(
    template: ChatTemplate, rendered: RenderedConversation, answers: Sequence[int], starts: Sequence[int]
) -> dict[int, list[Span]]:
    """Characters of each answer, by the index of its message."""
    marked = template.marked_spans(rendered.chat)
    if marked is None:
        return {i: [rendered.answer(i)] for i in answers}
    if len(marked) == len(answers):
        return {i: [span] for i, span in zip(answers, marked, strict=True)}
    return {
        i: [span for span in marked if bisect_right(starts, span[0]) - 1 == i] or [(starts[i], starts[i])]
        for i in answers
    }
