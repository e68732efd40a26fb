"""Random conversations with tools, and the turns of the assistant in their text, found without verl."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

from tests.utils.chat.conversation import TOOLS
from verl.utils.chat.chat_template import Chat
from verl.utils.tokens import TextCodec

Message = dict[str, Any]
_EOS = "<｜end▁of▁sentence｜>"
# Turns in the text of a conversation: from the opening of the assistant to the end of its turn.
TURNS = {
    "chatml": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "mistral": r"(?:\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\]|\[INST\]))(.*?<eos>)",
    "gemma3": r"<start_of_turn>model\n(.*?<end_of_turn>)",
    "glm4.5": r"<\|assistant\|>(.*?(?:<\|user\|>|<\|observation\|>))",
    "deepseek-v3": rf"(?:<｜Assistant｜>|<｜tool▁outputs▁end｜>(?!<｜User｜>))(.*?{_EOS})",
    "deepseek-v3.1": (
        r"(?:<｜Assistant｜></think>|<｜tool▁output▁end｜>(?!<｜tool▁output▁begin｜>|<｜User｜>))"
        rf"(.*?{_EOS})"
    ),
    "kimi-k2": r"<\|im_assistant\|>assistant<\|im_middle\|>(.*?<\|im_end\|>)",
    # Thoughts and texts beside calls are messages of their own, within a turn.
    "gpt-oss": r"<\|start\|>assistant(<\|channel\|>.*?(?:<\|call\|>|<\|return\|>))",
}


@dataclass(frozen=True)
class Family:
    """What a family of models writes.

    Attributes:
        name: of its template.
        turns: key of `TURNS`.
        thinks: thoughts are written.
        max_calls: calls in one turn.
        kwargs: variables of the template with which it writes all thoughts.
        call_id: of the n-th call of the episode.
        speaks: text may stand beside calls.
    """

    name: str
    turns: str
    thinks: bool = True
    max_calls: int = 3
    kwargs: dict[str, Any] = field(default_factory=dict)
    call_id: str = "call{n:05}"
    speaks: bool = True


_KEEP = {"preserve_thinking": True}
FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", "chatml"),
        Family("qwen2.5", "chatml"),
        Family("qwen3", "chatml", kwargs=_KEEP),
        Family("llama3", "llama3", thinks=False, speaks=False),
        Family("mistral-v3", "mistral", thinks=False),
        Family("mistral-v7", "mistral", thinks=False),
        Family("mistral-v13", "mistral"),
        Family("gemma3", "gemma3", thinks=False, speaks=False),
        Family("glm4.5", "glm4.5", kwargs=_KEEP),
        Family("deepseek-v3", "deepseek-v3", kwargs=_KEEP),
        Family("deepseek-v3.1", "deepseek-v3.1", thinks=False),
        Family("kimi-k2", "kimi-k2", call_id="functions.add:{n}"),
        Family("gpt-oss", "gpt-oss", kwargs=_KEEP, max_calls=1),
    )
}
_WORDS = [
    "3",
    "user",
    "the sum",
    "\n\n",
    "{",
    '"a"',
    "é😀",
    "assistant\n",
    "```",
    "<b>",
    ".\n",
    "  ",
    "]",
    "end",
]


def words(generator: random.Random, count: int) -> str:
    """A text without blanks at its ends, as templates may trim them."""
    text = " ".join(generator.choice(_WORDS) for _ in range(generator.randint(1, count))).strip()
    return text if text[:1] not in ("{", "[", "`", "") else "So " + text


class RandomEpisode:
    """A conversation, drawn from a seed.

    Attributes:
        family: as it is written.
        first: messages before the first turn.
        turns: of the assistant, as messages.
        replies: messages behind each turn but the last one.
    """

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self._random, self._calls = family, random.Random(f"{family.name} {seed}"), 0
        question = {"role": "user", "content": words(self._random, 5)}
        system = {"role": "system", "content": "Be brief."}
        self.first: list[Message] = [system, question] if self._random.random() < 0.5 else [question]
        self.turns: list[Message] = []
        self.replies: list[list[Message]] = []
        for _ in range(self._random.randint(1, 4)):
            self._add_turn(calls=self._random.random() < 0.6)
        self.replies.pop()

    def messages(self) -> list[Message]:
        """The whole conversation."""
        pairs = zip(self.turns, [*self.replies, []], strict=True)
        return [*self.first, *(m for turn, reply in pairs for m in (turn, *reply))]

    def text(self, codec: TextCodec) -> str:
        """The whole conversation by the template, with the end of its last turn as the policy samples it."""
        text = codec.template.render(Chat(self.messages(), TOOLS, self.family.kwargs))
        if self.family.name == "gpt-oss":  # it closes answers before others with another token
            text = re.sub(
                r"(<\|channel\|>final<\|message\|>(?:(?!<\|).)*)<\|end\|>", r"\1<|return|>", text, flags=re.S
            )
        if self.family.name == "glm4.5":  # turns end with the mark of what comes next
            text += "<|observation|>" if self.turns[-1].get("tool_calls") else "<|user|>"
        return text.rstrip("\n")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """First and last character of each turn of the assistant in a text."""
        return [m.span(1) for m in re.finditer(TURNS[self.family.turns], text, re.DOTALL)]

    def _add_turn(self, *, calls: bool) -> None:
        draw = self._random
        turn: Message = {"role": "assistant", "content": words(draw, 8)}
        if self.family.thinks and draw.random() < 0.6:
            turn["reasoning_content"] = words(draw, 8)
        reply: list[Message] = [{"role": "user", "content": words(draw, 5)}]
        if calls:
            if not self.family.speaks or draw.random() < 0.5:
                turn["content"] = ""
            turn["tool_calls"] = [self._call() for _ in range(draw.randint(1, self.family.max_calls))]
            reply = [self._result(call["id"]) for call in turn["tool_calls"]]
        self.turns.append(turn)
        self.replies.append(reply)

    def _call(self) -> Message:
        draw = self._random
        arguments = {"a": draw.choice([draw.randint(-9, 99), 2.5]), "b": draw.randint(0, 9)}
        chosen = {name: arguments[name] for name in ("a", "b") if name == "a" or draw.random() < 0.5}
        function = {"name": "add", "arguments": chosen}
        self._calls += 1
        call_id = self.family.call_id.format(n=self._calls - 1)
        return {"id": call_id, "type": "function", "function": function}

    def _result(self, call_id: str) -> Message:
        text = "Error: no such tool" if self._random.random() < 0.3 else words(self._random, 6)
        return {"role": "tool", "name": "add", "tool_call_id": call_id, "content": text}
