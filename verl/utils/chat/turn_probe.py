"""Check at the start of a run that a chat template can write episodes of several turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.chat.messages import Chat, Message
from verl.utils.chat.template_files import fitting_templates
from verl.utils.chat.turn_forms import PROBE_TOOL
from verl.utils.chat.turn_rendering import QUESTION, ChatRenderer
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

# Stand for what is looked for in a text.
_THOUGHT, _SYSTEM, _TOOL = "qzxthoughtxzq", "qzxsystemxzq", "qzxtoolxzq"
ANSWER: Message = {"role": "assistant", "content": "Yes."}


def probe_turns(codec: TextCodec, *, has_tools: bool, tools: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Check that the chat template can write what follows the turns of an episode.

    Args:
        codec: of the policy.
        has_tools: tools are offered, so that results of calls follow turns.
        tools: their schemas, as far as they are known.

    Returns:
        Sentences on what differs between the template and the tape of an episode, which keeps turns as the
        policy wrote them. None without a chat template, as prompts are texts then.

    Raises:
        ValueError: the template cannot write one of these forms; says which, and what to do.
    """
    if not codec.tokenizer.chat_template:
        return []
    offered = (list(tools) or [PROBE_TOOL]) if has_tools else []
    behind = {form: text_behind(codec, offered, form, example=e) for form, e in forms(has_tools).items()}
    return [
        *notes_on_seams(codec, list(behind.values())),
        *notes_on_thoughts(codec, has_tools=has_tools),
        *notes_on_repetition(codec, has_tools=has_tools),
    ]


def probe_calls(count: int) -> tuple[Message, list[Message]]:
    """A turn with calls, and their results."""
    ids = [f"call{number:05}" for number in range(count)]
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": {}}} for i in ids]
    results = [
        {"role": "tool", "name": "f", "tool_call_id": i, "content": f"result{number}"}
        for number, i in enumerate(ids)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}, results


def forms(has_tools: bool) -> dict[str, tuple[Message, list[Message]]]:
    """Turns and the messages that follow them, by the name of the form."""
    questions: dict[str, tuple[Message, list[Message]]] = {"a user message": (ANSWER, [QUESTION])}
    if not has_tools:
        return questions
    return {
        **questions,
        "the result of a call": probe_calls(1),
        "the results of several calls": probe_calls(2),
    }


def text_behind(
    codec: TextCodec,
    tools: Sequence[Mapping[str, Any]],
    form: str,
    *,
    example: tuple[Message, Sequence[Message]],
) -> str:
    """Text that follows a turn.

    Args:
        codec: of the policy.
        tools: schemas of those offered.
        form: name of what follows the turn.
        example: the turn, and the messages behind it.

    Raises:
        ValueError: the template does not write it.
    """
    renderer = ChatRenderer(codec, Prompt([QUESTION]), tools)
    shown = "tools before a user message"
    try:
        renderer.start([QUESTION])
        shown = f"{form} behind a turn of the policy"
        return renderer.text_behind(*example)
    except ValueError as error:
        names = " or ".join(fitting_templates(codec.tokenizer))
        remedy = f"set data.chat_template to {names or 'a file with a template that writes it'}"
        raise ValueError(f"the chat template cannot show {shown}: {error}; {remedy}") from error


def notes_on_seams(codec: TextCodec, behind: Sequence[str]) -> list[str]:
    """Notes on the tokens between turns and what follows them."""
    template, notes = codec.template, []
    tokens = [token for token in codec.tokenizer.get_added_vocab() if token]
    if not all(text.lstrip().startswith(tuple(tokens)) for text in behind):
        ends = ", ".join(codec.token_text(i) for i in codec.stop_ids) or "none"
        notes.append(
            "the chat template writes no special token behind a turn, so that a turn and what follows it are "
            f"tokenized each by itself; a turn ends at a token that the template does not write ({ends})"
        )
    if len(template.ends) > 1:
        notes.append(
            f"the chat template closes an answer with {template.end}, but with {template.ends[1]} before "
            "other messages; the tape keeps the token that was sampled"
        )
    return notes


def notes_on_thoughts(codec: TextCodec, *, has_tools: bool) -> list[str]:
    """Notes on thoughts of earlier turns that the template leaves out."""
    template = codec.template
    turn, results = probe_calls(1)
    thinking = {"reasoning_content": _THOUGHT}
    places = {"user messages": [QUESTION, {**ANSWER, **thinking}, QUESTION]}
    if has_tools:
        places["results of tools"] = [QUESTION, {**turn, **thinking}, *results]
    chats = {
        place: codec.chat(Prompt(chat, tools=(PROBE_TOOL,) * has_tools)) for place, chat in places.items()
    }
    lost = [place for place, chat in chats.items() if _THOUGHT not in rendered(codec, chat)]
    if not lost:
        return []
    switch = "preserve_thinking"
    remedy = (
        f"; with data.chat_template_kwargs.{switch}=true the template writes them too, as it should where "
        "the trained model is used"
        if switch in template.variables
        else ""
    )
    return [
        f"the chat template leaves out the thoughts of turns before {' and '.join(lost)}; the tape is "
        f"append-only and keeps them{remedy}"
    ]


def notes_on_repetition(codec: TextCodec, *, has_tools: bool) -> list[str]:
    """Notes on what the template writes again before later questions."""
    function = {"name": "f", "description": _TOOL, "parameters": {"type": "object", "properties": {}}}
    marked = {"type": "function", "function": function}
    renderer = ChatRenderer(codec, Prompt([QUESTION]), [marked] if has_tools else [])
    try:
        renderer.start([{"role": "system", "content": _SYSTEM}, QUESTION])
    except ValueError:  # it takes no system message
        renderer.start([QUESTION])
    text = renderer.text_behind(ANSWER, [QUESTION])
    again = [name for name, mark in (("the system message", _SYSTEM), ("the tools", _TOOL)) if mark in text]
    if not again:
        return []
    return [f"the chat template writes {' and '.join(again)} again before each later user message"]


def rendered(codec: TextCodec, chat: Chat) -> str:
    """Text of a conversation; "" if the template does not take it."""
    return codec.template.try_render(chat, opens_answer=True) or ""
