"""Rows of one source as a stream, which can stop in the middle and go on there."""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.config.data import DataSource
from verl.data.gym_tasks import PREFIX, gym_rows
from verl.data.reading.data_files import Split, files_of
from verl.data.reading.file_readers import PlacedRow, count_rows, numbered, read_file, without_filler
from verl.data.tasks import TASKS


class RowStream(ABC):
    """Rows of one source, pass after pass.

    An iteration begins behind the last row that was given out, or that the loaded state names, and ends with
    the pass; the next one then begins at the first row.

    Attributes:
        source: where the rows are from.
        is_streamed: rows are meant to be read while the run goes on, and never all of them kept.
        position: rows of the current pass that were given out.
        passes: passes that came to their end.
        notes: sentences on how the source was understood, for the user.
    """

    def __init__(self, source: DataSource, *, is_streamed: bool | None = None) -> None:
        self.source = source
        self.is_streamed = source.streaming if is_streamed is None else is_streamed
        self.position = self.passes = 0
        self.notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Rows of a pass, malformed ones included; None: not known before they are read."""

    @abstractmethod
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        """Rows of a pass from row `start` on, counted from 0.

        Raises:
            ValueError: the source cannot be read.
        """

    def identity(self) -> dict[str, Any]:
        """Facts that differ where the rows are not those of an earlier state; JSON values."""
        return {} if self.num_rows is None else {"num_rows": self.num_rows}

    def __iter__(self) -> Iterator[PlacedRow]:
        for row in self.rows_from(self.position):
            self.position += 1
            yield row
        self.position, self.passes = 0, self.passes + 1

    def state_dict(self) -> dict[str, Any]:
        """Position, and facts of the source to check it by; JSON values."""
        return {"position": self.position, "passes": self.passes, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the position of `state`, behind the last row that was given out there.

        Raises:
            ValueError: the state is of other rows.
        """
        if state["identity"] != self.identity():
            raise ValueError(
                f"need the rows of {self.source.path} with which the run began: {state['identity']}, got "
                f"{self.identity()}; restore the data, or start afresh with checkpoint.resume=never"
            )
        self.position, self.passes = state["position"], state["passes"]


class ListedRows(RowStream):
    """Rows of a sequence: a list, or a data set that is indexed by row.

    Args:
        source: name of the rows, for messages.
        rows: of any values that `load_rows` understands.
    """

    def __init__(self, source: DataSource, rows: Sequence[Any]) -> None:
        super().__init__(source)
        self.rows = rows

    @property
    @override
    def num_rows(self) -> int:
        return len(self.rows)

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        for number in range(start, len(self.rows)):
            yield f"{self.source.path}, row {number}", self.rows[number]


class FileRows(RowStream):
    """Rows of files, or of a folder of `datasets.save_to_disk`, one after the other.

    Args:
        source: file of one of `READERS`, plain or with gzip, or folder or glob of such files, which are read
            in the order of their names, numbers by value.
        split: part of a saved DatasetDict, or of a folder whose files are named by their split; a file and a
            glob are taken whole.

    Raises:
        ValueError: there are no such files.
    """

    def __init__(self, source: DataSource, split: Split) -> None:
        super().__init__(source)
        self.split = split
        self.files = files_of(source.path, split)

    @property
    @override
    def num_rows(self) -> int | None:
        counts = [count_rows(path) for path in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    @override
    def identity(self) -> dict[str, Any]:
        sizes = [sum(part.stat().st_size for part in _parts(path)) for path in self.files]
        return {"num_bytes": sum(sizes)}

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        return islice(self._rows(), start, None)

    def _rows(self) -> Iterator[PlacedRow]:
        for path in self.files:
            try:
                rows = _read_saved(path, self.split) if path.is_dir() else read_file(path, self.split)
                for place, row in rows:
                    yield f"{path}, {place}", row
            except (OSError, ValueError, NotImplementedError) as error:
                raise ValueError(f"cannot read {path}: {error}") from error


def open_rows(source: DataSource | RowStream, split: Split) -> RowStream:
    """Rows of a source; rows in memory, which are a stream already, are given back.

    Args:
        source: files as in `FileRows`, task:NAME, or task:reasoning-gym/NAME with options of `gym_rows`.
        split: for which setting, `data.train` or `data.test`; it chooses a part of the source where
            `source.split` names none.

    Raises:
        ValueError: there is no such source.
    """
    if isinstance(source, RowStream):
        return source
    if source.path.startswith("task:"):
        return ListedRows(source, _task_rows(source, split))
    return FileRows(source, split)


def _task_rows(source: DataSource, split: Split) -> list[dict[str, Any]]:
    name, options = source.path.removeprefix("task:"), source.options.values
    if name.startswith(PREFIX):
        return list(gym_rows(name.removeprefix(PREFIX), options, split))
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean task:{near[0]}? " if near else ""
        raise ValueError(
            f"there is no task {name!r}; {hint}there are {', '.join(TASKS)}, and {PREFIX}NAME for the "
            "generators of reasoning-gym"
        )
    if options:
        raise ValueError(f"task:{name} has no options, got {', '.join(options)}; leave them out")
    return TASKS[name].rows(split)


def _read_saved(path: Path, split: Split) -> Iterator[PlacedRow]:
    saved = importlib.import_module("datasets").load_from_disk(str(path))
    if isinstance(saved, dict):  # a DatasetDict
        if split not in saved:
            raise ValueError(
                f"it has no split {split!r}; it has {', '.join(saved)}; give the folder of one of them"
            )
        saved = saved[split]
    # The form in which it was last used is saved with it, such as tensors of some of the columns.
    return numbered(map(without_filler, saved.with_format(None)))


def _parts(path: Path) -> Iterator[Path]:
    """A file, or the files below a folder."""
    return (part for part in path.rglob("*") if part.is_file()) if path.is_dir() else iter([path])
