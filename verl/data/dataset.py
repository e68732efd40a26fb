"""Prompts made of the rows of a data set, and the loader that draws prompts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from verl.config.data import DataConfig
from verl.data.reading.data_files import Split
from verl.data.reading.layouts import CHAT_COLUMNS, ParsedRow, prompt_of
from verl.data.reading.row_cells import STRICT_JSON, MalformedRow, describe, parsed_json
from verl.data.reading.sources import SourceSetting, name_of, sources_of, streams_of
from verl.utils.sampling_types import Prompt

_MAX_PROBLEMS = 5
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
    """

    source: str
    num_rows: int
    num_malformed: int = 0
    problems: tuple[str, ...] = ()
    num_too_long: int = 0
    longest: int = 0
    notes: tuple[str, ...] = ()


def load_prompts(
    source: SourceSetting, config: DataConfig, *, split: Split
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

    Raises:
        ValueError: the source cannot be read, has no usable row, or has malformed rows and `on_malformed` is
            stop.
    """
    return load_rows(source, config, split, partial(prompt_of, config=config))


def drop_long_prompts(
    prompts: Sequence[Prompt], lengths: Sequence[int], max_prompt_tokens: int
) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of at most `max_prompt_tokens`, and the fields of the `LoadReport` about the dropped ones.

    Args:
        prompts: any number of prompts.
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


class PromptLoader:
    """Endless stream of prompts, epoch after epoch, each prompt once per epoch.

    Two loaders with the same prompts, seed and state give the same prompts.

    Args:
        prompts: at least one.
        seed: of the order, at least 0.
        shuffle: draw a new random order in each epoch; else the given order.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ValueError("need at least one prompt to draw from, got none")
        self.prompts = list(prompts)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, across the end of an epoch if need be."""
        if n < 1:
            raise ValueError(f"need to take at least one prompt, got {n}")
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
            upcoming = self._order[self.position : self.position + n - len(taken)]
            taken += [self.prompts[i] for i in upcoming]
            self.position += len(upcoming)
        return taken

    @property
    def epochs(self) -> float:
        """Passes over the prompts so far, such as 1.5 in the middle of the second."""
        return self.epoch + self.position / len(self)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and everything that the order depends on; JSON values only."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the position at which `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts, another seed or another order, so that prompts would be
                repeated or left out.
        """
        for key, own in self._identity.items():
            if state.get(key) != own:
                raise ValueError(
                    f"need the prompts and the order that the run began with: {key} was {state.get(key)!r} "
                    f"and is {own!r}; restore the data, data.shuffle and seed, or start afresh with "
                    "checkpoint.resume=never"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position <= len(self)
        ):
            raise ValueError(
                f"need an epoch from 0 and a position from 0 to {len(self)}, got {epoch!r} and {position!r}"
            )
        self.epoch, self.position = epoch, position
        self._order = self._epoch_order()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for prompt in self.prompts:
            tools = [prompt.tools] if prompt.tools else []
            facts = [prompt.content, prompt.answer, prompt.source, *tools]
            digest.update(json.dumps(facts, default=_stable_text).encode() + b"\n")
        return {
            "num_prompts": len(self.prompts),
            "fingerprint": digest.hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _epoch_order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        # NumPy promises that the raw bits of a generator never change; of its permutations it does not.
        generator = np.random.Philox(key=np.array([self.seed, self.epoch], dtype=np.uint64))
        order: list[int] = np.argsort(generator.random_raw(len(self.prompts)), kind="stable").tolist()
        return order


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
    problems: list[str] = []
    number = 0
    for stream in streams_of(source, split):
        name = name_of(stream.source)
        for place, raw in stream:
            try:
                row = _as_row(raw)
                prompts.append(_prompt(row, number, parsed=parse(row), default_source=name))
            except MalformedRow as problem:
                problems.append(f"{place}: {problem}")
            number += 1
    label = ", ".join(one.path for one in sources_of(source)) or "an empty list"
    report = LoadReport(label, number, len(problems), tuple(problems[:_MAX_PROBLEMS]))
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
    return prompts, replace(report, notes=_notes(prompts))


def _as_row(raw: Any) -> dict[str, Any]:
    if isinstance(raw, MalformedRow):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = STRICT_JSON.decode(raw.decode("utf-8-sig"))
        except MalformedRow:
            raise
        except (ValueError, RecursionError) as error:
            raise MalformedRow(f"need one JSON object per line, got invalid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise MalformedRow(f"need rows that are JSON objects, got {describe(raw)}")
    return raw


def _notes(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Sentences on what looks like something else than it is read as: columns, and answers."""
    listed_texts = sum(isinstance(p.answer, str) and bool(_LIST_TEXT.fullmatch(p.answer)) for p in prompts)
    notes = []
    if listed_texts:
        notes.append(
            f"{listed_texts} reference answers are the text of a list, such as \"['a', 'b']\", and are "
            "compared as that text; write them as JSON lists if any of the elements is right"
        )
    counts = Counter(name for p in prompts for name in _UNSEEN & p.columns.keys() if p.columns[name])
    if counts:
        listed = ", ".join(f"{name} ({count} rows)" for name, count in sorted(counts.items()))
        notes.append(f"the model does not see the columns {listed}")
    return tuple(notes)


def _prompt(row: dict[str, Any], number: int, *, parsed: ParsedRow, default_source: str) -> Prompt:
    if isinstance(parsed.answer, float) and parsed.answer != parsed.answer:
        raise MalformedRow("need an answer, got NaN")
    columns = {name: value for name, value in row.items() if name not in parsed.used}
    if variables := columns.get("chat_template_kwargs"):
        variables = columns["chat_template_kwargs"] = parsed_json(variables, "chat_template_kwargs")
        if not isinstance(variables, dict):
            raise MalformedRow(f"need chat_template_kwargs that are an object, got {describe(variables)}")
    named = row.get("data_source")
    source = default_source if named is None else str(named)
    return Prompt(parsed.content, parsed.answer, source, number, columns, parsed.tools)


def _stable_text(value: Any) -> str:
    """Stand-in for a value that JSON does not know: a hash of bytes, else the name of the type."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__
