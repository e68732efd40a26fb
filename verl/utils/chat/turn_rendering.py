"""Tokens of a conversation turn by turn: only what is new is rendered, and nothing is tokenized again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.chat.chat_template import ChatTemplate
from verl.utils.chat.messages import MARK, Chat, Message, squeeze
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec, is_text, without_added_space

# Question of the synthetic conversation.
QUESTION: Message = {"role": "user", "content": "Hi"}
# Tokens that close a message of Llama and harmony, also where the template would write another one.
ALSO_CLOSE = ("<|eom_id|>", "<|call|>", "<|return|>")


class TurnRenderer(ABC):
    """Renders the beginning of a conversation, and what follows each turn of the policy."""

    @abstractmethod
    def start(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the model reads before its first turn.

        Raises:
            ValueError: the chat template does not take the messages.
        """

    @abstractmethod
    def follow(self, turn: Message, messages: Sequence[Message], *, sampled: Sequence[int]) -> list[int]:
        """Token ids between a sampled turn and the next one.

        Args:
            turn: the message of the sampled turn, as it was parsed.
            messages: results of tools, or of the user, that follow it; at least one. Results are put in the
                order of the calls.
            sampled: ids of the turn; the last one tells if the turn is closed, or if it is the mark of the
                next role already.

        Returns:
            What closes the turn if it is not closed, the messages, and the opening of the next turn. A blank
            behind a closed turn belongs to it.

        Raises:
            ValueError: the chat template does not take the messages, leaves one out, or writes them so that
                it cannot be told what is new.
        """


class TextRenderer(TurnRenderer):
    """Continues a prompt that is a text: contents of messages follow each other as they are."""

    def __init__(self, codec: TextCodec, prompt: Prompt) -> None:
        self._codec, self._prompt = codec, prompt

    @override
    def start(self, messages: Sequence[Message]) -> list[int]:
        ids = self._codec.encode_prompt(self._prompt)
        return [*ids, *encode_behind(self._codec, ids, "".join(m["content"] for m in messages))]

    @override
    def follow(self, turn: Message, messages: Sequence[Message], *, sampled: Sequence[int]) -> list[int]:
        return encode_behind(self._codec, sampled, "".join(m["content"] for m in messages))


class ChatRenderer(TurnRenderer):
    """Renders chats by the template of the tokenizer, new messages behind a synthetic conversation.

    That conversation is a question and a turn that calls the same tools under the same ids, without what was
    said. So the characters that are rendered for a turn do not grow with the number of turns, and sampled
    text never goes through the template.

    Args:
        codec: of the policy.
        prompt: its columns bring further variables of the template.
        tools: schemas of the tools that are offered.
    """

    def __init__(self, codec: TextCodec, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._codec, self._prompt, self._tools = codec, prompt, tuple(dict(tool) for tool in tools)
        # Some templates write the system message before a later question.
        self._head: list[Message] = []

    @override
    def start(self, messages: Sequence[Message]) -> list[int]:
        self._head = [m for m in messages[:1] if m["role"] in ("system", "developer")]
        prompt = Prompt(list(messages), tools=self._tools, columns=self._prompt.columns)
        return self._codec.encode(self._codec.prompt_text(prompt))

    @override
    def follow(self, turn: Message, messages: Sequence[Message], *, sampled: Sequence[int]) -> list[int]:
        text = self.text_behind(turn, messages)
        text = without_sampled_end(self._codec, text, sampled, has_calls=bool(turn.get("tool_calls")))
        return encode_behind(self._codec, sampled, text)

    def text_behind(self, turn: Message, messages: Sequence[Message]) -> str:
        """Text behind a turn, from the token on that closes it to the opening of the next turn.

        Raises:
            ValueError: as `follow`.
        """
        ordered = in_call_order(turn, messages)
        for synthetic in skeletons(turn):
            before = [*self._head, QUESTION, synthetic]
            prompt = Prompt([*before, *ordered], tools=self._tools, columns=self._prompt.columns)
            chat = self._codec.chat(prompt)
            whole = self._codec.template.render(chat, opens_answer=True)
            if MARK in whole:
                return behind_turn(self._codec, chat, len(chat.messages) - len(ordered) - 1, whole)
        raise ValueError("the chat template leaves out a turn that other messages follow")


def renderer_for(codec: TextCodec, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> TurnRenderer:
    """The renderer of a prompt: by the chat template for messages, as it stands for a text."""
    return TextRenderer(codec, prompt) if is_text(prompt) else ChatRenderer(codec, prompt, tools)


def skeletons(turn: Message) -> list[Message]:
    """Turns with the calls of another, for templates that look up their names, but without what it says.

    Their last text is `MARK`: in the last call, or in the content, for templates that do not write calls.
    """
    calls = [dict(call) for call in turn.get("tool_calls") or ()]
    said = {"role": "assistant", "content": MARK}
    if not calls:
        return [said]
    bare = [with_arguments(call, {}) for call in calls]
    marked = [*bare[:-1], with_arguments(calls[-1], {"value": MARK})]
    content = MARK if turn.get("content") else ""
    return [{**said, "content": content, "tool_calls": marked}, {**said, "tool_calls": bare}]


def with_arguments(call: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same call with other arguments."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": with_arguments(call["function"], arguments)}
    return {**call, "arguments": dict(arguments)}


def in_call_order(turn: Message, messages: Sequence[Message]) -> list[Message]:
    """Messages with results of tools in the order of the calls, each with the name of its tool.

    Results whose ids are not those of the calls stay where they are.
    """
    calls = {call.get("id"): call for call in turn.get("tool_calls") or ()}
    places = [i for i, m in enumerate(messages) if m["role"] == "tool" and m.get("tool_call_id") in calls]
    order = list(calls)
    results = sorted((messages[i] for i in places), key=lambda m: order.index(m["tool_call_id"]))
    ordered = list(messages)
    for place, result in zip(places, results, strict=True):
        call = calls[result["tool_call_id"]]
        name = result.get("name") or (call.get("function") or call).get("name", "")
        ordered[place] = {**result, "name": name}
    return ordered


def behind_turn(codec: TextCodec, chat: Chat, index: int, whole: str) -> str:
    """Text that the template writes behind a turn, from the tokens on that close it, and the next opening.

    Args:
        codec: of the policy.
        chat: in which `MARK` is the last text of the turn.
        index: of its message.
        whole: text of the conversation.

    Raises:
        ValueError: the template leaves a message out, or writes the turn so that its end cannot be told.
    """
    template = codec.template
    rest = whole.rpartition(MARK)[2]
    ended = template.try_render(chat.with_messages(chat.messages[: index + 1]))
    rest = rest[turn_length(codec, rest, ended or "") :]
    squeezed = squeeze(rest)
    for i, message in enumerate(chat.messages[index + 1 :], index + 1):
        if squeeze(message["content"] or "") not in squeezed and not is_written(template, chat, i, whole):
            raise ValueError(f"the chat template leaves out a message of the role {message['role']}")
    return rest


def turn_length(codec: TextCodec, rest: str, ended: str) -> int:
    """Characters behind the mark of a turn that are still the turn's own, the tokens at its end apart.

    Args:
        codec: of the policy.
        rest: text behind the mark, if other messages follow.
        ended: the conversation, if the turn is the last message.

    Raises:
        ValueError: it cannot be told.
    """
    template = codec.template
    _, found, tail = ended.rpartition(MARK)
    # A turn may end with several tokens, such as those behind its last call.
    starts = (i for i in range(len(tail)) if template.turns.token_run.fullmatch(tail.rstrip(), i))
    own = tail[: next(starts, len(tail.rstrip()))]
    if found and rest.startswith(own):
        return len(own)
    # It is written otherwise before others: it ends at the first token at which the policy stops.
    stops = {*template.turns.closers, *(codec.token_text(i) for i in codec.stop_ids)}
    places = [rest.index(stop) for stop in stops if stop and stop in rest]
    if not places:
        raise ValueError(
            "the chat template writes a turn that other messages follow otherwise than the last one, so that "
            "it cannot be told where it ends"
        )
    return min(places)


def is_written(template: ChatTemplate, chat: Chat, index: int, text: str) -> bool:
    """True if the text of a conversation depends on the content of a message, which it may escape or trim."""
    marked = template.try_render(chat.with_content(index, MARK), opens_answer=True)
    return marked is None or marked.count(MARK) > text.count(MARK)


def without_sampled_end(codec: TextCodec, text: str, sampled: Sequence[int], *, has_calls: bool) -> str:
    """A text behind a turn without those of the tokens at its beginning that were sampled.

    Args:
        codec: of the policy.
        text: begins with the tokens at the end of the turn, and the mark of the next role.
        sampled: ids of the turn. If the last one is among these tokens, what is before it was sampled too. If
            it is another one that closes such turns, the turn is closed. Else the closing token is missing.
        has_calls: the turn calls tools.
    """
    template = codec.template
    last = codec.token_text(sampled[-1]) if sampled else ""
    run = template.turns.token_run.match(text)
    assert run, "a run of tokens may be empty"
    if last and last in run[0]:
        return text[run[0].index(last) + len(last) :]
    closers = template.turns.closers_of(has_calls=has_calls)
    ends = (*closers, *template.turns.stops)
    place = min((run[0].index(end) for end in ends if end in run[0]), default=0)
    closer = next((end for end in closers if text.startswith(end, place)), "")
    is_closed = closer and last in (*closers, *ALSO_CLOSE)
    return text[place + len(closer) * bool(is_closed) :]


def encode_behind(codec: TextCodec, ids: Sequence[int], text: str) -> list[int]:
    """Token ids of a text that follows others, as if both were encoded at once.

    That is exact behind a special or added token, at which tokenizers split texts; behind others the text is
    encoded by itself.
    """
    if not text:
        return []
    anchor = codec.token_text(ids[-1]) if ids else ""
    if anchor:
        encoded = codec.encode(anchor + text)
        if encoded[0] == ids[-1]:
            return encoded[1:]
    return without_added_space(codec.tokenizer, ids, codec.encode(text), text)
