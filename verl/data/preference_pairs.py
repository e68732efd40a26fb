"""Pairs of a better and a worse answer to one prompt, made of the rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from verl.config.data import PairsDataConfig
from verl.data.dataset import LoadReport, load_rows
from verl.data.reading.data_files import Split
from verl.data.reading.layouts import Messages, ParsedRow, prompt_of
from verl.data.reading.row_cells import (
    Content,
    MalformedRow,
    check_encodable,
    checked_content,
    checked_messages,
    checked_tools,
    describe,
    is_messages_text,
)
from verl.data.reading.sources import SourceSetting, sources_of
from verl.data.tasks.answer_tasks import near_miss
from verl.utils.sampling_types import Prompt


class Pair(NamedTuple):
    """Two answers to one prompt: each a text, or the messages after the prompt, up to an assistant's."""

    chosen: str | Messages
    rejected: str | Messages


def load_pairs(
    source: SourceSetting, config: PairsDataConfig, *, split: Split
) -> tuple[list[Prompt], LoadReport]:
    """Prompts whose `answer` is a `Pair`, in the order of the source, and a report of what was left out.

    A row has a prompt, a text or chat messages, and two answers, texts or chat messages that end with the
    assistant's. The settings name their columns; all others but `tools` go to `Prompt.columns`. Answers may
    also be whole chats. The messages in which these are alike are the prompt then, and an answer may have
    several turns; a prompt column may be missing, and else must be among them. A task gives its right
    answers, and near misses as the worse ones (`verl.data.tasks.answer_tasks.near_miss`).

    A pair of equal answers has nothing to learn: it is dropped and counted.

    Args:
        source: .jsonl or .json (one object per line), .parquet or .arrow file, folder of
            `datasets.save_to_disk`, or task:NAME.
        config: names of the columns, and what to do with malformed rows.
        split: part of a task or of a saved DatasetDict; a file is taken whole.

    Raises:
        ValueError: the source cannot be read, has no usable row, or has malformed rows and `on_malformed` is
            stop.
    """

    def parse_task(row: dict[str, Any]) -> ParsedRow:
        pair = Pair(row["answer"], near_miss(row["answer"], key=row["prompt"]))
        return ParsedRow(row["prompt"], pair, {"prompt", "answer"})

    def parse(row: dict[str, Any]) -> ParsedRow:
        content, pair, used = _parsed(row, config)
        used |= {config.prompt_key, config.chosen_key, config.rejected_key, "tools"}
        return ParsedRow(content, pair, used, checked_tools(row.get("tools")))

    has_tasks = any(one.path.startswith("task:") for one in sources_of(source))

    def parse_any(row: dict[str, Any]) -> ParsedRow:
        return parse_task(row) if has_tasks and row.keys() == {"prompt", "answer"} else parse(row)

    pairs, report = load_rows(source, config, split, parse_any)
    if all(_repeats_prompt(pair) for pair in pairs):
        raise ValueError(
            f"need answers without their prompts, but in all {len(pairs)} rows of {report.source} both "
            f"answers begin with the prompt; cut it off {config.chosen_key} and {config.rejected_key}"
        )
    different = [pair for pair in pairs if pair.answer.chosen != pair.answer.rejected]
    if not different:
        raise ValueError(
            f"need two different answers in a row, got {len(pairs)} pairs of equal ones in {report.source}"
        )
    if num_equal := len(pairs) - len(different):
        note = f"{num_equal} pairs of equal answers dropped, they have nothing to learn"
        report = replace(report, notes=(*report.notes, note))
    return different, report


def _parsed(row: dict[str, Any], config: PairsDataConfig) -> tuple[Content, Pair, set[str]]:
    """Prompt and pair of answers of a row, and the columns of another layout that the prompt is from."""
    keys = (config.chosen_key, config.rejected_key)
    if missing := [key for key in keys if key not in row]:
        raise MalformedRow(f"need a column {missing[0]!r}, there are {', '.join(map(repr, row))}")
    values = [_answer(row[key], key) for key in keys]
    before, (chosen, rejected) = _split_common(values, keys)
    if config.prompt_key not in row and before:
        return before, Pair(chosen, rejected), set()
    used: set[str] = set()
    if config.prompt_key in row:
        prompt = checked_content(row[config.prompt_key], config.prompt_key)
    elif row.keys() <= {*keys}:
        raise MalformedRow(
            f"need a column {config.prompt_key!r} beside {' and '.join(keys)} that are texts; put what both "
            "begin with there, or give chat messages"
        )
    else:
        prompt, _, used, _ = prompt_of({k: v for k, v in row.items() if k not in keys}, config)
    if not before and isinstance(prompt, str) and any(isinstance(value, list) for value in values):
        raise MalformedRow("need a prompt of chat messages where the answers are chat messages, got a text")
    if before and not _begins_with(before, prompt):
        raise MalformedRow(
            f"need answers to the prompt, but the chats of {config.chosen_key} and {config.rejected_key} "
            "begin otherwise"
        )
    return before or prompt, Pair(chosen, rejected), used


def _answer(value: Any, key: str) -> str | Messages:
    """An answer: a text, or messages that end with the assistant's."""
    if (isinstance(value, list) and value) or (isinstance(value, str) and is_messages_text(value)):
        messages = checked_messages(value, key)
        if messages[-1]["role"] != "assistant":
            raise MalformedRow(
                f"need messages in {key} that end with the assistant's, got one of role "
                f"{messages[-1]['role']!r}"
            )
        return messages
    if not isinstance(value, str) or not value:
        raise MalformedRow(f"need an answer in {key} that is a text and not empty, got {describe(value)}")
    check_encodable(value)
    return value


def _split_common(
    values: Sequence[str | Messages], keys: Sequence[str]
) -> tuple[Messages, list[str | Messages]]:
    """The messages in which two answers are alike, and what follows them in each."""
    chats = [[{"role": "assistant", "content": v}] if isinstance(v, str) else v for v in values]
    alike = 0
    while alike < min(map(len, chats)) - 1 and chats[0][alike] == chats[1][alike]:
        alike += 1
    tails = [chat[alike:] for chat in chats]
    if any(tail[0]["role"] != "assistant" for tail in tails):
        raise MalformedRow(
            f"need two answers to one prompt: chats of {keys[0]} and {keys[1]} that are alike up to an "
            "answer of the assistant, got different messages of role "
            f"{' and '.join(repr(tail[0]['role']) for tail in tails)}"
        )
    for tail, key in zip(tails, keys, strict=True):
        if any(m["role"] == "assistant" and not (m["content"] or m.get("tool_calls")) for m in tail):
            raise MalformedRow(f"need an answer in {key} that is a text and not empty, got an empty message")
    return chats[0][:alike], [_plain(tail) for tail in tails]


def _plain(tail: Messages) -> str | Messages:
    """The text of an answer that is one message with nothing but text."""
    is_text = len(tail) == 1 and tail[0].keys() == {"role", "content"} and isinstance(tail[0]["content"], str)
    return tail[0]["content"] if is_text else tail


def _repeats_prompt(pair: Prompt) -> bool:
    """True if both answers are texts that begin with the prompt, as in rows of whole texts."""
    prompt = pair.content
    return isinstance(prompt, str) and all(
        isinstance(text, str) and text.startswith(prompt) for text in pair.answer
    )


def _begins_with(messages: Messages, prompt: Content) -> bool:
    """True if messages begin with a prompt of messages, or contain a prompt that is a text."""
    if isinstance(prompt, list):
        return messages[: len(prompt)] == prompt
    texts = [message["content"] for message in messages]
    return any(isinstance(text, str) and text.strip() == prompt.strip() for text in texts)
