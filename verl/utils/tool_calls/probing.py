"""The form in which a chat template writes calls, found by a conversation with a call in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.utils.chat.chat_template import MARK, Chat, ChatTemplate
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ParsedTurn
from verl.utils.tool_calls.form_parser import FormParser

_NAME = "qzx_tool"
_ARGUMENTS = {"word": "qzx value", "count": 3}
_QUESTION = {"role": "user", "content": "Hi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "description": "A word."},
                "count": {"type": "integer", "description": "A number."},
            },
            "required": ["word", "count"],
        },
    },
}


def written_call(template: ChatTemplate, call_id: str) -> str | None:
    """The text of a turn with a call, without what the template writes before and behind an answer.

    Args:
        template: of the tokenizer.
        call_id: id of the call.

    Returns:
        None: the template does not write calls.
    """
    function = {"name": _NAME, "arguments": _ARGUMENTS}
    call = {"id": call_id, "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    chat = template.chat([_QUESTION, turn], tools=(TOOL,))
    # The name of the tool is also in the list of tools.
    texts = [template.try_render(c) or "" for c in (chat, chat.with_messages([_QUESTION]))]
    return answer_part(template, chat) if texts[0].count(_NAME) > texts[1].count(_NAME) else None


def answer_part(template: ChatTemplate, chat: Chat) -> str:
    """The text of the answer in a conversation with one question and one answer.

    Raises:
        ValueError: the template does not take it.
    """
    whole, asked = template.render(chat), chat.with_messages(chat.messages[:1])
    for opens in (True, False):
        before = template.try_render(asked, opens_answer=opens)
        if before and whole.startswith(before):
            whole = whole[len(before) :]
            break
    else:
        whole = whole.rpartition(str(chat.messages[0]["content"]))[2]
    plain = chat.with_messages([chat.messages[0], {"role": "assistant", "content": MARK}])
    closing = (template.try_render(plain) or "").rpartition(MARK)[2]
    whole = whole.removesuffix(closing) if closing else whole
    for end in template.turns.closers:
        whole = whole.rstrip().removesuffix(end)
    return whole


def reads_back(turn: ParsedTurn) -> bool:
    """True if the call of the probe was read, and nothing else."""
    return [(call.name, dict(call.arguments)) for call in turn.calls] == [(_NAME, _ARGUMENTS)]


def matching_forms(codec: TextCodec, forms: Sequence[type[FormParser]]) -> tuple[list[type[FormParser]], str]:
    """The forms that read what a chat template writes for a call.

    Args:
        codec: with the chat template.
        forms: to be tried.

    Returns:
        Those that read the call back, and the text of the turn; "": the template writes no calls.
    """
    found, written = [], ""
    for form in forms:
        parser = form()
        text = written_call(codec.template, parser.call_id(_NAME, 0))
        if text is None:
            continue
        written = text
        if reads_back(parser.parse(text, [TOOL])):
            found.append(form)
    return found, written
