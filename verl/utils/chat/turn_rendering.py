"""Tokens of a conversation turn by turn: only what is new is rendered, and nothing is tokenized again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.chat.chat_template import MARK
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, is_text

Message = dict[str, Any]


class TurnRenderer(ABC):
    """Renders the beginning of a conversation, and what follows each turn of the policy."""

    @abstractmethod
    def start(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the model reads before its first turn.

        Raises:
            ValueError: the chat template does not take the messages.
        """

    @abstractmethod
    def follow(self, turn: Message, messages: Sequence[Message], *, is_closed: bool) -> list[int]:
        """Token ids between a sampled turn and the next one.

        Args:
            turn: the message of the sampled turn, as it was parsed.
            messages: results of tools, or of the user, that follow it; at least one.
            is_closed: the sampled turn ends with the token that closes a turn; else that token comes first.

        Returns:
            What closes the turn, the messages, and the opening of the next turn.

        Raises:
            ValueError: the chat template does not take the messages, or writes them so that it cannot be told
                what is new.
        """

    def close(self, turn: Message) -> list[int]:
        """Token ids that end a conversation behind its last sampled turn; here none."""
        return []


class TextRenderer(TurnRenderer):
    """Continues a prompt that is a text: contents of messages follow each other as they are."""

    def __init__(self, codec: TextCodec, prompt: Prompt) -> None:
        self._codec, self._prompt = codec, prompt

    @override
    def start(self, messages: Sequence[Message]) -> list[int]:
        ids = self._codec.encode_prompt(self._prompt)
        return [*ids, *self._codec.encode("".join(m["content"] for m in messages))]

    @override
    def follow(self, turn: Message, messages: Sequence[Message], *, is_closed: bool) -> list[int]:
        return self._codec.encode("".join(m["content"] for m in messages))


class ChatRenderer(TurnRenderer):
    """Renders chats by the template of the tokenizer, new messages behind a synthetic conversation.

    Args:
        codec: of the policy.
        tools: schemas of the tools that are offered.
        prompt: its columns bring further variables of the template.
    """

    def __init__(self, codec: TextCodec, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._codec, self._prompt, self._tools = codec, prompt, tuple(dict(tool) for tool in tools)

    @override
    def start(self, messages: Sequence[Message]) -> list[int]:
        prompt = Prompt(list(messages), tools=self._tools, columns=self._prompt.columns)
        return self._codec.encode(self._codec.prompt_text(prompt))

    @override
    def follow(self, turn: Message, messages: Sequence[Message], *, is_closed: bool) -> list[int]:
        template = self._codec.template
        before = [{"role": "user", "content": "Hi"}, {**turn, "content": MARK}]
        before[-1].pop("reasoning_content", None)
        chat = self._codec.chat(Prompt([*before, *messages], tools=self._tools, columns=self._prompt.columns))
        whole = template.render(chat, opens_answer=True)
        _, found, rest = whole.partition(MARK)
        if not found:
            raise ValueError("the chat template leaves out the text of a turn before others")
        closing = template.end
        if closing and closing in rest:
            behind = rest.index(closing) + (len(closing) if is_closed else 0)
            rest = rest[behind:]
        return self._codec.encode(rest)


def renderer_for(codec: TextCodec, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> TurnRenderer:
    """The renderer of a prompt: by the chat template for messages, as it stands for a text."""
    return TextRenderer(codec, prompt) if is_text(prompt) else ChatRenderer(codec, prompt, tools)
