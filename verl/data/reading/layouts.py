"""Public layouts of rows: chats, ShareGPT, Alpaca, prompts with answers; each gives messages of one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from verl.config.data import DataConfig
from verl.data.reading.row_cells import (
    Content,
    MalformedRow,
    check_encodable,
    checked_content,
    checked_messages,
    checked_tools,
    describe,
    parsed_json,
    required_column,
)

Messages = list[dict[str, Any]]
# Columns that hold a whole chat: its last answer is what the row teaches.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
_SYSTEM_ROLES = ("system", "developer")
# Columns of the prompt, in rows without a column `data.prompt_key`.
_PROMPT_COLUMNS = (*CHAT_COLUMNS, "instruction", "question")
# Columns of the answer, in rows without a column `data.answer_key`.
ANSWER_COLUMNS = ("completion", "response", "output")


class ParsedRow(NamedTuple):
    """Parts of a row.

    Attributes:
        content: text or messages of the prompt.
        answer: reference answer, None if there is none.
        used: columns that are not handed on to reward functions under their own names.
        tools: offered in this prompt.
    """

    content: Content
    answer: Any
    used: set[str]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Chat of one row, in the form that chat templates read.

    Attributes:
        messages: role and content of each, see `checked_message`; further keys, such as `weight`, are kept.
        tools: offered in this chat; empty if the row names none.
        used_columns: columns of the row that messages and tools come from.
        num_prompt: number of messages that are the row's prompt, with nothing to learn in them; 0 where the
            row does not tell the prompt from the rest.
    """

    messages: Messages
    tools: tuple[dict[str, Any], ...]
    used_columns: frozenset[str]
    num_prompt: int = 0


def conversation_of(row: Mapping[str, Any], config: DataConfig) -> Conversation | None:
    """Chat of a row in any layout of messages; None if its prompt is a text, see `prompt_of`.

    Layouts: `messages`; ShareGPT's `conversations`, with `system`; Alpaca's `instruction`, `input`, `output`,
    `system`, `history`; and a prompt of messages with an answer that is a text or messages (TRL's
    `completion`).

    Raises:
        MalformedRow: no layout fits, or two that contradict each other.
    """
    name = prompt_column(row, config)
    answer = _answer_of(row, config)
    if name == "prompt" == config.prompt_key and answer is None and name in row:
        name = _chat_beside(row, name)
    if chat := _whole_chat(row, name, config):
        if answer is None or chat.messages[-1]["role"] == "assistant":
            return chat
        return replace(chat, messages=[*chat.messages, *_answer_messages(answer)])
    content = checked_content(required_column(row, name), name)
    if isinstance(content, str):
        if isinstance(answer, list):
            raise MalformedRow(f"need an answer that is a text to the text in {name!r}, got messages")
        return None
    used = frozenset({name, "tools", config.answer_key, *ANSWER_COLUMNS} & row.keys())
    tools = checked_tools(row.get("tools"))
    if answer is None:
        return Conversation(content, tools, used)
    if content[-1]["role"] == "assistant":
        raise MalformedRow(f"need an answer to a prompt, got a prompt in {name!r} that ends with an answer")
    return Conversation([*content, *_answer_messages(answer)], tools, used, len(content))


def prompt_of(row: Mapping[str, Any], config: DataConfig) -> ParsedRow:
    """Prompt, reference answer and tools of a row.

    In a layout of whole chats the last answer of the assistant is not part of the prompt, and is the
    reference if no column has one. In the prompt's own column it is: the model continues it.

    Raises:
        MalformedRow: no layout fits, or two that contradict each other.
    """
    name, answer = prompt_column(row, config), _answer_of(row, config)
    if chat := _whole_chat(row, name, config):
        messages, last = _before_answer(chat.messages)
        used = set(chat.used_columns) - {"instruction", *ANSWER_COLUMNS}
        return ParsedRow(
            checked_content(messages, name), last if answer is None else answer, used, chat.tools
        )
    content = checked_content(required_column(row, name), name)
    used = {name, config.answer_key} & {"prompt", "answer"}
    if isinstance(answer, list) and answer is row.get("completion"):
        answer = _before_answer(_answer_messages(answer))[1]
    if isinstance(content, str):
        return ParsedRow(content, answer, used)
    return ParsedRow(content, answer, used | {"tools"}, checked_tools(row.get("tools")))


def _whole_chat(row: Mapping[str, Any], name: str, config: DataConfig) -> Conversation | None:
    """Chat of a column that holds one, or of Alpaca's columns; None for a column with the prompt alone."""
    if name in CHAT_COLUMNS:
        return _chat(row, name)
    return _alpaca(row) if name == "instruction" != config.prompt_key else None


def prompt_column(row: Mapping[str, Any], config: DataConfig) -> str:
    """Column of a row's prompt: the one of the settings, else one of a public layout."""
    key = config.prompt_key
    # A name that the user chose is taken literally.
    if key != "prompt" or row.get(key) is not None:
        return key
    found = [name for name in _PROMPT_COLUMNS if row.get(name) is not None]
    for name in found[1:]:
        if not _agree(row, found[0], name):
            raise MalformedRow(
                f"need one prompt in a row, got {found[0]!r} and {name!r}; name one in data.prompt_key"
            )
    return found[0] if found else key


def _chat_beside(row: Mapping[str, Any], name: str) -> str:
    """Column of the whole chat that a prompt without an answer is the beginning of, if there is one."""
    chats = [other for other in CHAT_COLUMNS if row.get(other) is not None and other != name]
    for chat in chats:
        if not _agree(row, chat, name):
            raise MalformedRow(
                f"need one chat in a row, got {name!r} without an answer and {chat!r} that begins otherwise; "
                "name one in data.prompt_key"
            )
    return chats[0] if chats else name


def _agree(row: Mapping[str, Any], chat: str, other: str) -> bool:
    """True if a column holds messages that begin like those of another one, or contain its text."""
    if chat not in CHAT_COLUMNS:
        return False
    messages, content = checked_messages(row[chat], chat), checked_content(row[other], other)
    if isinstance(content, str):
        return any(message["content"] == content for message in messages)
    return messages[: len(content)] == content


def _answer_of(row: Mapping[str, Any], config: DataConfig) -> Any:
    """Reference answer of a row; None if it has none."""
    key = config.answer_key
    truth = _ground_truth(row)
    if row.get(key) is not None:
        if key == "answer" and truth is not None and str(truth) != str(row[key]):
            raise MalformedRow(
                "need one answer in a row, got 'answer' and another one in 'reward_model'; take that of the "
                "reward model with data.answer_key=reward_model.ground_truth, or leave out one of them"
            )
        return row[key]
    if truth is not None:
        return truth
    if key not in row and key not in ("answer", "reward_model.ground_truth"):
        required_column(row, key)
    found = [name for name in ANSWER_COLUMNS if key == "answer" and row.get(name) is not None]
    for name in found[1:]:
        if row[name] != row[found[0]]:
            raise MalformedRow(
                f"need one answer in a row, got {found[0]!r} and {name!r}; name one in data.answer_key"
            )
    return row[found[0]] if found else None


def _ground_truth(row: Mapping[str, Any]) -> Any:
    """Answer of verl's layout, whose `reward_model` may be a JSON text; None if there is none."""
    layout = row.get("reward_model")
    if isinstance(layout, str) and layout.lstrip().startswith("{"):
        layout = parsed_json(layout, "reward_model")
    return layout.get("ground_truth") if isinstance(layout, dict) else None


def _answer_messages(answer: Any) -> Messages:
    """Messages of an answer that is a text or messages."""
    if isinstance(answer, list):
        return checked_messages(answer, "answer")
    if not isinstance(answer, str):
        raise MalformedRow(f"need an answer that is a text and not empty, got {describe(answer)}")
    check_encodable(answer)
    return [{"role": "assistant", "content": answer}]


def _before_answer(messages: Messages) -> tuple[Messages, Any]:
    """Messages without the assistant's last one, and its content; None if another's is the last."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    content = messages[-1]["content"]
    if isinstance(content, list) and all(isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    return messages[:-1], content or None


def _chat(row: Mapping[str, Any], name: str) -> Conversation:
    """Chat of a column, after the system prompt that ShareGPT's rows may have in a column of its own."""
    messages = checked_messages(row[name], name)
    used = frozenset({name, "tools", "system"} & row.keys())
    return Conversation([*_system(row, messages), *messages], checked_tools(row.get("tools")), used)


def _system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """Message of the column `system`, unless the messages have one."""
    system = row.get("system")
    if not system:
        return []
    if not isinstance(system, str):
        raise MalformedRow(f"need a text in 'system', got {describe(system)}")
    own = [message["content"] for message in messages if message["role"] in _SYSTEM_ROLES]
    if own and own != [system]:
        raise MalformedRow("need one system message, got the column 'system' and another one in the messages")
    return [] if own else [{"role": "system", "content": system}]


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    """Chat before the answer of a row in Alpaca's layout; instruction and input are lines of a message."""
    texts = {name: row[name] for name in ("instruction", "input", "context") if row.get(name)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise MalformedRow(f"need a text in {name!r}, got {describe(text)}")
    if "input" in texts and "context" in texts:
        raise MalformedRow(
            "need one input to an instruction, got 'input' and 'context'; name the prompt in data.prompt_key"
        )
    turns = row.get("history") or []
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise MalformedRow(f"need a history of pairs of question and answer, got {describe(turns)}")
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": "\n".join(texts.values())})
    messages = checked_messages(messages, "instruction")
    used = {"instruction", "input", "context", "history", "system", "tools", *ANSWER_COLUMNS}
    return Conversation(
        [*_system(row, messages), *messages],
        checked_tools(row.get("tools")),
        frozenset(used & row.keys()),
    )
