"""Rows of one source as a stream: files, a saved data set, a task, or a data set of the hub."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.config.data import DataSource
from verl.data.reading.data_files import Split, files_of, is_hub_name
from verl.data.reading.dataset_rows import DatasetRows, part_of
from verl.data.reading.file_readers import PlacedRow, count_rows, read_file
from verl.data.reading.placed_rows import ListedRows, RowStream
from verl.data.tasks.bfcl_tasks import PREFIX as BFCL
from verl.data.tasks.bfcl_tasks import bfcl_rows
from verl.data.tasks.gym_tasks import PREFIX, gym_rows
from verl.data.tasks.table import TASKS

__all__ = ["FileRows", "ListedRows", "RowStream", "open_rows"]


class FileRows(RowStream):
    """Rows of files, one after the other.

    Args:
        source: its settings.
        files: of one of `READERS`, plain or with gzip.
        split: key of the rows in a JSON file with a list of rows for each split.
    """

    def __init__(self, source: DataSource, files: Sequence[Path], split: str) -> None:
        super().__init__(source)
        self.split = split
        self.files = files

    @property
    @override
    def num_rows(self) -> int | None:
        counts = [count_rows(path) for path in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    @override
    def identity(self) -> dict[str, Any]:
        return {"num_bytes": sum(path.stat().st_size for path in self.files)}

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        return islice(self._rows(), start, None)

    def _rows(self) -> Iterator[PlacedRow]:
        for path in self.files:
            try:
                for place, row in read_file(path, self.split):
                    yield f"{path}, {place}", row
            except (OSError, ValueError, NotImplementedError) as error:
                raise ValueError(f"cannot read {path}: {error}") from error


def open_rows(source: DataSource | RowStream, split: Split) -> RowStream:
    """Rows of a source; rows in memory, which are a stream already, are given back.

    Args:
        source: file of one of `READERS`, plain or with gzip; folder or glob of such files, which are read in
            the order of their names, numbers by value; folder of `datasets.save_to_disk`; task:NAME;
            task:reasoning-gym/NAME with options of `gym_rows`; task:bfcl/NAME with those of `bfcl_rows`; or
            OWNER/NAME or OWNER/NAME:CONFIG, a data set of the hub, unless such a path exists.
        split: for which setting, `data.train` or `data.test`. It chooses a part of the source where
            `source.split` names none: of a task, of a data set with splits, of a folder whose files are named
            by their split. A file and a glob are taken whole.

    Raises:
        ValueError: there is no such source, or it cannot be read.
    """
    if isinstance(source, RowStream):
        return source
    check_keys(source)
    if source.path.startswith("task:"):
        return ListedRows(source, _task_rows(source, split))
    if is_hub_name(source.path):
        hub_data = importlib.import_module("verl.data.reading.hub_data")  # loads the hub's client
        rows: RowStream = hub_data.open_hub_rows(source, split)
        return rows
    files = files_of(source.path, split)
    if files[0].is_dir():
        return _saved_rows(source, files[0], split)
    if source.split is not None:
        raise ValueError(
            f"need a data set with splits for split {source.split!r}, got files: {source.path!r}; name the "
            "files of that split instead"
        )
    return FileRows(source, files, split)


def check_keys(source: DataSource) -> None:
    """Check that a source has no key that says nothing about its kind.

    Raises:
        ValueError: it has one.
    """
    is_task = source.path.startswith("task:")
    if source.options.values and not is_task:
        raise ValueError(
            f"need a task for the options {', '.join(source.options.values)}, got {source.path!r}; leave "
            "them out"
        )
    if source.revision is not None and (is_task or not is_hub_name(source.path)):
        raise ValueError(
            f"need a data set of the hub for revision {source.revision!r}, got {source.path!r}; leave it out"
        )
    if source.split is not None and is_task:
        raise ValueError(
            f"need a data set with splits for split {source.split!r}, got {source.path!r}; leave it out: "
            "data.train and data.test have different rows of a task"
        )


def _task_rows(source: DataSource, split: Split) -> list[dict[str, Any]]:
    name, options = source.path.removeprefix("task:"), source.options.values
    if name.startswith(PREFIX):
        return list(gym_rows(name.removeprefix(PREFIX), options, split))
    if name.startswith(BFCL):
        return bfcl_rows(name.removeprefix(BFCL), options)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean task:{near[0]}? " if near else ""
        raise ValueError(
            f"there is no task {name!r}; {hint}there are {', '.join(TASKS)}, {PREFIX}NAME for the "
            f"generators of reasoning-gym, and {BFCL}NAME"
        )
    if options:
        raise ValueError(f"task:{name} has no options, got {', '.join(options)}; leave them out")
    return TASKS[name].rows(split)


def _saved_rows(source: DataSource, folder: Path, split: Split) -> DatasetRows:
    """Rows of a folder of `datasets.save_to_disk`."""
    try:
        saved = importlib.import_module("datasets").load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder}: {error}") from error
    data, notes = part_of(saved, source, split)
    return DatasetRows(source, data, notes=notes)
