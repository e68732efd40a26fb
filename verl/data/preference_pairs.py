"""Pairs of a better and a worse answer to one prompt, made of the rows of a data set."""

from __future__ import annotations

from typing import Any, NamedTuple

from verl.config.data import PairsDataConfig
from verl.data.dataset import LoadReport, load_rows
from verl.data.layouts import ParsedRow
from verl.data.row_cells import (
    Content,
    MalformedRow,
    check_encodable,
    checked_content,
    checked_message,
    describe,
    required_column,
)
from verl.data.sources import Split
from verl.data.tasks import near_miss
from verl.utils.sampling_types import Prompt

Messages = list[dict[str, Any]]


class Pair(NamedTuple):
    """Two answers to one prompt, as texts."""

    chosen: str
    rejected: str


def load_pairs(source: str, config: PairsDataConfig, *, split: Split) -> tuple[list[Prompt], LoadReport]:
    """Prompts whose `answer` is a `Pair`, in the order of the source, and a report of what was left out.

    A row has a prompt, a text or chat messages, and two answers, texts or chat messages that end with the
    assistant's. The settings name their columns; all others go to `Prompt.columns`. Answers may also be whole
    chats that differ in their last message alone. The messages before it are the prompt then; a prompt column
    may be missing, and else must be among them. A task gives its right answers, and near misses as the worse
    ones (`verl.data.tasks.near_miss`).

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
        return ParsedRow(*_parsed(row, config), {config.prompt_key, config.chosen_key, config.rejected_key})

    return load_rows(source, config, split, parse_task if source.startswith("task:") else parse)


def _parsed(row: dict[str, Any], config: PairsDataConfig) -> tuple[Content, Pair]:
    """Prompt and pair of answers of a row."""
    values = [required_column(row, key) for key in (config.chosen_key, config.rejected_key)]
    (before, chosen), (other, rejected) = (
        _answer(v, key) for v, key in zip(values, (config.chosen_key, config.rejected_key), strict=True)
    )
    if before != other:
        raise MalformedRow(
            f"need two answers to one prompt: chats of {config.chosen_key} and {config.rejected_key} that "
            "differ in the last message alone"
        )
    if chosen == rejected:
        raise MalformedRow(f"need two different answers, got twice {describe(chosen)}")
    if config.prompt_key not in row and before:
        return checked_content(before, config.chosen_key), Pair(chosen, rejected)
    prompt = checked_content(required_column(row, config.prompt_key), config.prompt_key)
    if not before and isinstance(prompt, str) and any(isinstance(value, list) for value in values):
        raise MalformedRow("need a prompt of chat messages where the answers are chat messages, got a text")
    if before and prompt != before and prompt not in [message["content"] for message in before]:
        raise MalformedRow(
            f"need answers to the prompt, but the chats of {config.chosen_key} and {config.rejected_key} "
            "begin otherwise"
        )
    return before or prompt, Pair(chosen, rejected)


def _answer(value: Any, key: str) -> tuple[Messages, str]:
    """The messages before an answer, and the answer."""
    before: Messages = []
    if isinstance(value, list) and value:
        *before, last = (checked_message(message) for message in value)
        if last["role"] != "assistant":
            raise MalformedRow(
                f"need messages in {key} that end with the assistant's, got one of role {last['role']!r}"
            )
        value = last["content"]
    if not isinstance(value, str) or not value:
        raise MalformedRow(f"need an answer in {key} that is a text and not empty, got {describe(value)}")
    check_encodable(value)
    return before, value
