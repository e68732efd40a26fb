"""Prompts made of the rows of a data set, and the loader that draws prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from verl.config.data import DataConfig, RewardsConfig
from verl.data.loading.prompt_loader import PromptLoader
from verl.data.loading.prompt_store import PromptStore
from verl.data.loading.row_prompts import RowPrompts
from verl.data.reading.data_files import Split
from verl.data.reading.file_readers import PlacedRow
from verl.data.reading.layouts import CHAT_COLUMNS, ParsedRow, prompt_of
from verl.data.reading.row_cells import MalformedRow
from verl.data.reading.row_stream import RowStream
from verl.data.reading.sources import SourceSetting, streams_of
from verl.utils.sampling_types import Prompt

__all__ = ["LoadReport", "PromptLoader", "drop_long_prompts", "load_prompts", "load_rows", "read_prompts"]
T = TypeVar("T")
_MAX_PROBLEMS = 5
# Rows of a stream without a known end, where all are kept in memory.
_MAX_STREAMED = 100_000
_NO_REWARDS = RewardsConfig()
# Columns whose names say that a model reads them, where they are not part of the prompt.
_UNSEEN = {"images", "image", "videos", "video", "audios", "audio", "tools", "system", "system_prompt"}
_UNSEEN |= {"input", "context", *CHAT_COLUMNS}
# A list of texts as a table of texts holds it, in JSON's spelling, Python's or NumPy's.
_LIST_TEXT = re.compile(r"\s*\[\s*(['\"]).*\1\s*\]\s*", re.DOTALL)


@dataclass(frozen=True)
class LoadReport:
    """Counts of the rows that were read and left out.

    Attributes:
        source: as in the settings; several are joined by commas.
        num_rows: rows read, malformed ones included.
        num_malformed: malformed rows, which were skipped.
        problems: place and cause of the first malformed rows.
        num_too_long: prompts dropped for their length.
        longest: tokens of the longest prompt before any was dropped; 0 if tokens were not counted.
        notes: human-readable lines on what else was left out, cut or counted.
        ends: for each source, the first `Prompt.index` behind it.
    """

    source: str
    num_rows: int
    num_malformed: int = 0
    problems: tuple[str, ...] = ()
    num_too_long: int = 0
    longest: int = 0
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


def load_prompts(
    source: SourceSetting, config: DataConfig, *, split: Split, rewards: RewardsConfig = _NO_REWARDS
) -> tuple[list[Prompt], LoadReport]:
    """Prompts of a source, in its order, and a report of what was left out.

    The settings name the columns of prompt and answer; without a prompt column a row may have any layout of
    `verl.data.reading.layouts`. The column `data_source` is the prompt's source, and all others go to
    `Prompt.columns`. Without an answer column, the answer is `reward_model["ground_truth"]`, so that Parquet
    files in verl's layout are read as they are. The index of a prompt is the number of its row among all
    sources, from 0; blank lines are not counted.

    Args:
        source: file, folder or glob of files, folder of `datasets.save_to_disk`, or task:NAME, see
            `verl.data.reading.sources.read_rows`; or several of them, read one after the other.
        config: names of the columns, and what to do with malformed rows. The system prompt is added later,
            when the prompt becomes tokens.
        split: part of a task or of a saved DatasetDict; a file is taken whole.
        rewards: column of the reward functions of rows, and the functions that they may name.

    Raises:
        ValueError: the source cannot be read, has no usable row, or has malformed rows and `on_malformed` is
            stop.
    """
    prompts: list[Prompt] = []
    return prompts, read_prompts(prompts, source, config, split=split, rewards=rewards)


def read_prompts(
    into: list[Prompt] | PromptStore,
    source: SourceSetting,
    config: DataConfig,
    *,
    split: Split,
    rewards: RewardsConfig = _NO_REWARDS,
) -> LoadReport:
    """Add the prompts of a source to a list or a store, as `load_prompts` reads them."""
    parse = partial(prompt_of, config=config)
    return _read_rows(into, source, config, split=split, parse=parse, rewards=rewards)


def drop_long_prompts(
    prompts: Sequence[T], lengths: Sequence[int], max_prompt_tokens: int
) -> tuple[list[T], dict[str, int]]:
    """Prompts of at most `max_prompt_tokens`, and the fields of the `LoadReport` about the dropped ones.

    Args:
        prompts: any number of prompts, or their positions.
        lengths: tokens of each prompt.
        max_prompt_tokens: tokens of the longest prompt that is kept.

    Returns:
        The prompts kept, in order, and {"num_too_long", "longest"}, for `dataclasses.replace(report,
        **fields)`.

    Raises:
        ValueError: not one length per prompt, or no prompt is short enough.
    """
    if len(prompts) != len(lengths):
        raise ValueError(f"need one length per prompt, got {len(prompts)} prompts and {len(lengths)} lengths")
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"need a prompt of at most {max_prompt_tokens} tokens, but the shortest of {len(prompts)} has "
            f"{min(lengths, default=0)}; raise data.max_prompt_tokens"
        )
    return kept, {"num_too_long": len(prompts) - len(kept), "longest": max(lengths)}


def load_rows(
    source: SourceSetting,
    config: DataConfig,
    split: Split,
    parse: Callable[[dict[str, Any]], ParsedRow],
) -> tuple[list[Prompt], LoadReport]:
    """Prompts that `parse` makes of the rows of a source, and a report of what was left out.

    A malformed row, for which `parse` raises `MalformedRow`, is an error or is skipped, as the settings say.

    Raises:
        ValueError: as `load_prompts`.
    """
    prompts: list[Prompt] = []
    return prompts, _read_rows(prompts, source, config, split=split, parse=parse, rewards=_NO_REWARDS)


def _read_rows(
    prompts: list[Prompt] | PromptStore,
    source: SourceSetting,
    config: DataConfig,
    *,
    split: Split,
    parse: Callable[[dict[str, Any]], ParsedRow],
    rewards: RewardsConfig,
) -> LoadReport:
    problems: list[str] = []
    ends, labels, notes = list[int](), list[str](), list[str]()
    missing: list[set[str]] = []
    number, seen = 0, RowNotes()
    for stream in streams_of(source, split):
        made = RowPrompts(stream.source, config, parse, rewards=rewards)
        for place, raw in rows_that_end(stream, split):
            try:
                prompt = made(raw, number)
                prompts.append(prompt)
                seen.add(prompt)
            except MalformedRow as problem:
                problems.append(f"{place}: {problem}")
            number += 1
        labels.append(stream.label)
        notes += stream.notes
        missing.append(made.missing_columns)
        ends.append(number)
    label = ", ".join(labels) or "an empty list"
    report = LoadReport(label, number, len(problems), tuple(problems[:_MAX_PROBLEMS]), ends=tuple(ends))
    listed = "".join(f"\n  {problem}" for problem in report.problems)
    if problems and config.on_malformed == "stop":
        more = f"\n  and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        # With no usable row, to leave out the others would leave nothing.
        skip = ", or leave them out with data.on_malformed=skip" if prompts else ""
        raise ValueError(
            f"{len(problems)} of {number} rows cannot be used:{listed}{more}\ncorrect them, name other "
            f"columns (data.prompt_key, data.answer_key){skip}"
        )
    if not prompts:
        raise ValueError(
            f"need at least one usable row, {label} has none among {number}{':' if listed else ''}{listed}"
        )
    # Held-out rows may do without.
    if split == "train" and (absent := sorted(set.intersection(*missing))):
        raise ValueError(
            f"need the column {absent[0]!r}, which rewards.column or data.sampling_key names, in a row of "
            f"data.{split}, {label} has none; correct the name or leave the setting out"
        )
    return replace(report, notes=(*notes, *seen.lines()))


def rows_that_end(stream: RowStream, split: Split) -> Iterator[PlacedRow]:
    """Rows of a source that is read as a whole.

    Raises:
        ValueError: it is never to be read as a whole, or it is a stream of a program that seems to have no
            end.
    """
    if stream.source.streaming:
        raise ValueError(
            f"need all rows of {stream.source.path} for data.{split}, got a stream; leave streaming out, or "
            f"take a part of it, as its split {split}[:1000] (prompts of `verl train` may be streamed)"
        )
    for number, row in enumerate(stream):
        if stream.is_streamed and number == _MAX_STREAMED:
            raise ValueError(
                f"need rows that end for data.{split}, got more than {_MAX_STREAMED:,} of the stream "
                f"{stream.label}; take a part of it, {stream.label}.take(1000), or give a datasets.Dataset"
            )
        yield row


class RowNotes:
    """Collects what looks like something else than it is read as: columns, and answers."""

    def __init__(self) -> None:
        self._num_list_texts, self._unseen = 0, Counter[str]()

    def add(self, prompt: Prompt) -> None:
        """Take up a prompt."""
        answer, columns = prompt.answer, prompt.columns
        self._num_list_texts += isinstance(answer, str) and bool(_LIST_TEXT.fullmatch(answer))
        self._unseen.update(name for name in _UNSEEN & columns.keys() if columns[name])

    def lines(self) -> tuple[str, ...]:
        """Sentences about it."""
        notes = []
        if self._num_list_texts:
            notes.append(
                f"{self._num_list_texts} reference answers are the text of a list, such as \"['a', 'b']\", "
                "and are compared as that text; write them as JSON lists if any of the elements is right"
            )
        if self._unseen:
            listed = ", ".join(f"{name} ({count} rows)" for name, count in sorted(self._unseen.items()))
            notes.append(f"the model does not see the columns {listed}")
        return tuple(notes)
