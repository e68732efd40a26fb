"""Prompts from files, saved data sets and tasks of our own, and the loader that draws them; tokens are
counted elsewhere.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from verl.config.data import DataConfig
from verl.data.tasks import TASKS
from verl.utils.sampling_types import Prompt

Split = Literal["train", "test"]
Content = str | list[dict[str, Any]]
Parsed = tuple[Content, Any, set[str]]  # prompt, answer, and the columns that they are from
ROLES = ("system", "developer", "user", "assistant", "tool")
PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What was read and what was left out.

    Attributes:
        source: as in the settings.
        num_rows: rows read, malformed ones included.
        num_malformed: rows that could not be used, and were skipped.
        problems: where and why, of the first few.
        num_too_long: prompts dropped for their length.
        longest: tokens of the longest prompt before any was dropped, 0 if they were not counted.
    """

    source: str
    num_rows: int
    num_malformed: int = 0
    problems: tuple[str, ...] = ()
    num_too_long: int = 0
    longest: int = 0


class MalformedRow(ValueError):
    """Why a row cannot be used."""


def load_prompts(source: str, config: DataConfig, *, split: Split) -> tuple[list[Prompt], LoadReport]:
    """Prompts of a source, in its order, and what was left out.

    A row has the prompt and the answer in the columns that the settings name; `data_source` is its source,
    and all else goes to `Prompt.columns`. Without an answer column, the answer is
    `reward_model["ground_truth"]`, so that verl's Parquet files are read as they are. The index of a prompt
    is the number of its row, from 0, blank lines not counted.

    Args:
        source: .jsonl or .json (one object per line), .parquet or .arrow file, folder of
            `datasets.save_to_disk`, or task:NAME.
        config: names of the columns, and what to do with malformed rows. The system prompt is left to the
            tokenizer's side.
        split: which part of a task or of a saved DatasetDict; a file is taken whole.

    Raises:
        ValueError: the source cannot be read, has no usable row, or has malformed rows and `on_malformed` is
            stop.
    """
    used = {config.prompt_key, config.answer_key}

    def parse(row: dict[str, Any]) -> Parsed:
        return as_content(column_of(row, config.prompt_key), config.prompt_key), _answer(row, config), used

    return load_rows(source, config, split, parse)


def load_examples(source: str, config: DataConfig, *, split: Split) -> tuple[list[Prompt], LoadReport]:
    """Examples for supervised fine-tuning: prompts whose `answer` is the text to learn, and what was left
    out.

    A row has a prompt and an answer as for `load_prompts`, or `messages` that end with the assistant's: all
    but the last are the prompt. Arguments and errors are those of `load_prompts`; an answer that is not a
    text, or is empty, is malformed.
    """
    used = {config.prompt_key, config.answer_key}

    def parse(row: dict[str, Any]) -> Parsed:
        if config.prompt_key in row or "messages" not in row:
            parsed = (
                as_content(column_of(row, config.prompt_key), config.prompt_key),
                _answer(row, config),
                used,
            )
        else:
            parsed = *_conversation(row["messages"]), {"messages"}
        answer = parsed[1]
        if not isinstance(answer, str) or not answer:
            raise MalformedRow(f"need an answer that is a text and not empty, got {shown(answer)}")
        check_encodable(answer)
        return parsed

    return load_rows(source, config, split, parse)


def drop_long_prompts(
    prompts: Sequence[Prompt], lengths: Sequence[int], max_prompt_tokens: int
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of at most so many tokens, and the fields of the `LoadReport` that say how many were
    dropped.

    Args:
        prompts: any number of prompts.
        lengths: tokens of each.
        max_prompt_tokens: longest prompt kept.

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
            f"need a prompt of at most {max_prompt_tokens} tokens, but the shortest of {len(prompts)} has {min(lengths, default=0)}; "
            "raise data.max_prompt_tokens"
        )
    return kept, {"num_too_long": len(prompts) - len(kept), "longest": max(lengths)}


class PromptLoader:
    """Prompts without end, epoch after epoch, each prompt once per epoch.

    Two loaders with the same prompts, seed and state go on with the same prompts.

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
        """The next n prompts; an epoch may end and the next begin among them."""
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

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what the order depends on; JSON values only."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts, another seed or another order, so that prompts would be
                repeated or left out.
        """
        for key, own in self._identity.items():
            if state.get(key) != own:
                raise ValueError(
                    f"need the prompts and the order that the run began with: {key} was {state.get(key)!r} and is {own!r}; "
                    "restore the data, data.shuffle and seed, or start afresh with checkpoint.resume=never"
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
            digest.update(
                json.dumps([prompt.content, prompt.answer, prompt.source], default=_stable_text).encode()
                + b"\n"
            )
        return {
            "num_prompts": len(self.prompts),
            "fingerprint": digest.hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _epoch_order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        # numpy promises the raw bits of a bit generator for ever, but not the permutations that it makes of
        # them.
        bits = np.random.Philox(key=np.array([self.seed, self.epoch], dtype=np.uint64)).random_raw(
            len(self.prompts)
        )
        order: list[int] = np.argsort(bits, kind="stable").tolist()
        return order


def load_rows(
    source: str, config: DataConfig, split: Split, parse: Callable[[dict[str, Any]], Parsed]
) -> tuple[list[Prompt], LoadReport]:
    """The rows of a data set as `parse` makes prompts of them; a malformed one stops the start, or is skipped
    and counted.
    """
    default_source = source.removeprefix("task:") if source.startswith("task:") else Path(source).stem
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, (place, raw) in enumerate(_read(source, split)):
        try:
            row = _as_row(raw)
            prompts.append(_prompt(row, number, parsed=parse(row), default_source=default_source))
        except MalformedRow as problem:
            problems.append(f"{place}: {problem}")
    report = LoadReport(source, len(prompts) + len(problems), len(problems), tuple(problems[:PROBLEMS_SHOWN]))
    listed = "".join(f"\n  {source}, {problem}" for problem in report.problems)
    if problems and config.on_malformed == "stop":
        more = f"\n  and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(
            f"{len(problems)} of {report.num_rows} rows cannot be used:{listed}{more}\n"
            "correct them, name other columns (data.prompt_key, data.answer_key), or leave them out with data.on_malformed=skip"
        )
    if not prompts:
        raise ValueError(
            f"need at least one usable row, {source} has none among {report.num_rows}{':' if listed else ''}{listed}"
        )
    return prompts, report


# Sources: each reader yields (where a row is, the row as it came), and `_as_row` turns it into columns.


def _read(source: str, split: Split) -> Iterator[tuple[str, Any]]:
    """Rows of a source with the line (from 1) or row (from 0) that they are from."""
    if source.startswith("task:"):
        yield from _read_task(source.removeprefix("task:"), split)
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"need an existing file or folder, or task:NAME, got {source!r}, which does not exist in {Path.cwd()}"
        )
    if not path.is_dir() and path.suffix not in READERS:
        raise ValueError(
            f"need a file that ends with {', '.join(READERS)}, a folder saved by `datasets`, or task:NAME, got {source!r}"
        )
    try:
        yield from _read_saved(path, split) if path.is_dir() else READERS[path.suffix](path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot read {source}: {error}") from error


def _read_task(name: str, split: Split) -> Iterator[tuple[str, Any]]:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean task:{near[0]}? " if near else ""
        raise ValueError(f"there is no task {name!r}; {hint}there are {', '.join(TASKS)}")
    return _numbered(TASKS[name].rows(split))


def _read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
        yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())


def _read_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(path)) as file:
        # Arrow has two layouts under one suffix; `datasets` writes the stream, others mostly the file, which
        # begins with its name.
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
        yield from _numbered(row for batch in table.to_batches() for row in batch.to_pylist())


def _read_saved(path: Path, split: Split) -> Iterator[tuple[str, Any]]:
    saved = importlib.import_module("datasets").load_from_disk(str(path))
    if isinstance(saved, dict):  # a DatasetDict
        if split not in saved:
            raise ValueError(
                f"it has no split {split!r}; it has {', '.join(saved)}; give the folder of one of them"
            )
        saved = saved[split]
    return _numbered(saved)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_lines,
    ".json": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# Rows: columns to a `Prompt`, or `MalformedRow` with the reason.


def _as_row(raw: Any) -> dict[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"), parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            raise MalformedRow(f"need one JSON object per line, got invalid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise MalformedRow(f"need one JSON object per line, got {shown(raw)}")
    return raw


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _prompt(row: dict[str, Any], number: int, *, parsed: Parsed, default_source: str) -> Prompt:
    content, answer, used = parsed
    if isinstance(answer, float) and answer != answer:
        raise MalformedRow("need an answer, got NaN")
    columns = dict(row)
    for name in used:
        columns.pop(name, None)
    return Prompt(content, answer, str(columns.pop("data_source", default_source)), number, columns)


def column_of(row: dict[str, Any], key: str) -> Any:
    """A value of a row by its key."""
    if key not in row:
        raise MalformedRow(f"need a column {key!r}, there are {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def _answer(row: dict[str, Any], config: DataConfig) -> Any:
    reward_model = row.get("reward_model")
    if config.answer_key not in row and isinstance(reward_model, dict):
        return reward_model.get("ground_truth")
    return row.get(config.answer_key)


def as_content(value: Any, name: str) -> Content:
    """A prompt, checked: a text or chat messages, not empty."""
    if isinstance(value, str):
        if not value.strip():
            raise MalformedRow(f"need a {name} that is not empty, got {value!r}")
        check_encodable(value)
        return value
    if not isinstance(value, list):
        raise MalformedRow(f"need a {name} that is a text or a list of chat messages, got {shown(value)}")
    messages = [as_message(message) for message in value]
    if not any(message["content"] for message in messages):
        raise MalformedRow(f"need a {name} that is not empty, got {len(messages)} messages without content")
    return messages


def _conversation(value: Any) -> tuple[Content, Any]:
    """The messages before the assistant's last one, and that one's content."""
    if not isinstance(value, list) or len(value) < 2:
        raise MalformedRow(f"need messages with a question and an answer, got {shown(value)}")
    last = as_message(value[-1])
    if last["role"] != "assistant":
        raise MalformedRow(f"need messages that end with the assistant's, got one of role {last['role']!r}")
    return as_content(value[:-1], "messages"), last["content"]


def as_message(message: Any) -> dict[str, Any]:
    """A chat message, checked: role and content."""
    if not isinstance(message, dict):
        raise MalformedRow(f"need messages that are objects with role and content, got {shown(message)}")
    # A table has the same keys in every row: those that a message lacks come as nulls, which chat templates
    # would take for values.
    given = _without_nulls(message)
    if given.get("role") not in ROLES:
        raise MalformedRow(f"need a message role among {', '.join(ROLES)}, got {shown(given.get('role'))}")
    if "content" not in given and given.get("tool_calls"):
        given["content"] = ""  # an assistant that only calls tools says nothing
    content = given.get("content")
    if isinstance(content, str):
        check_encodable(content)
    elif isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        given["content"] = [_without_nulls(part) for part in content]
    else:
        raise MalformedRow(
            f"need message content that is a text or a list of typed parts, got {shown(content)}"
        )
    return given


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def check_encodable(text: str) -> None:
    """Refuses a text that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedRow(
            f"need text that UTF-8 can encode, got half a surrogate pair at character {error.start}"
        ) from error


def shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    text = repr(value)
    return (
        "nothing"
        if value is None
        else f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    )


def _stable_text(value: Any) -> str:
    """What a value that JSON does not know adds to a fingerprint: its contents if they are bytes, else its
    type alone.
    """
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__
