"""Rows that a program has in memory, as a stream like that of a file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from typing_extensions import override

from verl.config.data import DataSource
from verl.config.run import RunConfig
from verl.data.reading.data_files import Split
from verl.data.reading.dataset_rows import DatasetRows, StreamedRows, part_of
from verl.data.reading.file_readers import PlacedRow, without_filler
from verl.data.reading.placed_rows import ListedRows, RowStream
from verl.data.reading.row_cells import MalformedRow, check_once, describe
from verl.data.reading.row_stream import check_keys
from verl.data.reading.sources import SourceSetting, listed
from verl.utils.sampling_types import Prompt

_FORMS = (
    "a datasets.Dataset or IterableDataset, a pandas DataFrame, a pyarrow Table, or a list of rows (dicts of "
    "columns), of texts, of chats (lists of messages) or of Prompts"
)


# Path of a source that stands for the rows that a program hands over.
MEMORY = "memory"
# Path of a source that stands for the rows of the environment of the episodes.
ENVIRONMENT = "environment"
Run = TypeVar("Run", bound=RunConfig)
_ANY = DataSource(path=MEMORY)
# Rows of a split of the environment's own data, with options of the source.
EnvironmentRows = Callable[[Split, Mapping[str, Any]], list[dict[str, Any]]]
_DATASETS = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")


class ConvertedRows(ListedRows):
    """Rows of a list: dicts of columns, or prompts, of plain Python values."""

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        for place, row in super().rows_from(start):
            try:
                yield place, row if isinstance(row, Prompt) else plain_row(row)
            except MalformedRow as problem:
                yield place, problem


def rows_in_memory(data: Any, name: str, split: Split, *, source: DataSource = _ANY) -> RowStream:
    """Rows of a value that a program hands over.

    Args:
        data: a `datasets.Dataset`, an `IterableDataset`, which is read while the run goes on, or a dict with
            one of them for each split; a pandas DataFrame; a pyarrow Table or another table with Arrow's
            interface; or a list of rows (dicts of columns), texts, chats (lists of messages) or `Prompt`s.
        name: of the value, for messages; its rows are numbered from 0.
        split: of a dict with splits.
        source: name, weight, reward and sampling parameters of the rows.

    Raises:
        TypeError: it is none of these.
        ValueError: a table has two columns of one name, or no such split.
    """
    stream = _opened(data, name, split, source)
    stream.label = name
    return stream


def _opened(data: Any, name: str, split: Split, source: DataSource) -> RowStream:
    if isinstance(data, RowStream):
        return data
    if any(_is(data, "datasets", kind) for kind in _DATASETS):
        return _opened_part(data, source, split)
    if source.split is not None:
        raise ValueError(
            f"need a datasets.Dataset or DatasetDict as {name} for split {source.split!r}, got "
            f"{type(data).__name__}; leave the split out"
        )
    if _is(data, "pandas", "DataFrame"):
        check_once(map(str, data.columns), f"column of {name}")
        return ConvertedRows(source, _FrameRows(data))
    if hasattr(data, "__arrow_c_stream__") and not hasattr(data, "to_list"):  # no column alone
        table = importlib.import_module("pyarrow").table(data)
        check_once(table.column_names, f"column of {name}")
        return ConvertedRows(source, [without_filler(row) for row in table.to_pylist()])
    if not isinstance(data, list | tuple):
        raise TypeError(f"need {_FORMS} as {name}, got {describe(data)}{_hint(data, name)}")
    if data and isinstance(data[0], dict) and data[0].keys() >= {"role", "content"}:
        raise TypeError(f"need a list of chats as {name}, got one chat: put it into a list, [[{{...}}, ...]]")
    for number, row in enumerate(data):
        if not isinstance(row, Mapping | str | list | tuple | Prompt):
            raise TypeError(f"need {_FORMS} as {name}, got row {number}: {describe(row)}")
    return ConvertedRows(source, data)


def _opened_part(data: Any, source: DataSource, split: Split) -> RowStream:
    """Rows of a data set of `datasets`, or of one of its splits."""
    part, notes = part_of(data, source, split)
    is_stream = _is(part, "datasets", "IterableDataset")
    return (StreamedRows if is_stream else DatasetRows)(source, part, notes=notes)


def with_memory(setting: SourceSetting | None, data: Any, split: Split) -> SourceSetting | None:
    """Value of `data.train` or `data.test` with the rows of a program in place of the source `memory`.

    Args:
        setting: the value; none: the rows alone.
        data: given as train_dataset or test_dataset; none: nothing.
        split: train or test.

    Raises:
        ValueError: data is given and the setting names other data, or the setting names `memory` and no data
            is given.
        TypeError: as `rows_in_memory`.
    """
    name, sources = f"{split}_dataset", listed(setting)
    named = [one for one in sources if isinstance(one, DataSource) and one.path == MEMORY]
    if data is None:
        if named and not Path(MEMORY).exists():
            raise ValueError(
                f"need {name} of the trainer for data.{split}={MEMORY}, got none; a command has no such rows"
            )
        return setting
    if len(named) > 1:
        raise ValueError(f"need the source {MEMORY!r} once in data.{split}, got it {len(named)} times")
    if sources and not named:
        raise ValueError(
            f"need {name} or data.{split}, got both; leave one of them out, or name the source {MEMORY!r} "
            f"among those of data.{split}"
        )
    if not sources:
        return rows_in_memory(data, name, split)
    check_keys(named[0])
    rows = rows_in_memory(data, name, split, source=named[0])
    return [rows if one is named[0] else one for one in sources]


def no_rows(split: Split, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an environment where there is none.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"need agent.environment for data.{split}={ENVIRONMENT}, got none; name files instead")


def with_environment(
    setting: SourceSetting | None, rows: EnvironmentRows, split: Split
) -> SourceSetting | None:
    """Value of `data.train` or `data.test` with the rows of the environment for the source `environment`.

    Args:
        setting: the value.
        rows: gives the environment's own rows of a split, with the options of the source.
        split: train or test.

    Raises:
        ValueError: the environment has none, or no such option.
    """
    sources = listed(setting)
    if not any(isinstance(one, DataSource) and one.path == ENVIRONMENT for one in sources):
        return setting
    return [
        rows_in_memory(rows(split, one.options.values), f"data.{split}", split, source=one)
        if isinstance(one, DataSource) and one.path == ENVIRONMENT
        else one
        for one in sources
    ]


def name_memory(config: Run, given: Mapping[Split, Any]) -> Run:
    """Settings of a run that name the source `memory` where rows are given and no data is named."""
    settings = {"train": config.data.train, "test": config.data.test}
    named = {
        str(split): MEMORY for split, data in given.items() if data is not None and settings[split] is None
    }
    return config.model_copy(update={"data": config.data.model_copy(update=named)}) if named else config


class _FrameRows(Sequence[Any]):
    """Rows of a pandas DataFrame by their positions; a missing value is None."""

    def __init__(self, frame: Any) -> None:
        self.names = [str(name) for name in frame.columns]
        self.columns = [frame.iloc[:, i].tolist() for i in range(len(self.names))]
        self.length = len(frame)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        cells = (column[number] for column in self.columns)
        return {name: None if _is_missing(c) else c for name, c in zip(self.names, cells, strict=True)}


def _is(value: Any, module: str, name: str) -> bool:
    """True for a value of a class of a library, which is loaded then."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))


def _is_missing(cell: Any) -> bool:
    """True for NaN, and for pandas's own signs of nothing."""
    return _is_sign_of_nothing(cell) or (isinstance(cell, float) and cell != cell)


def _is_sign_of_nothing(cell: Any) -> bool:
    return type(cell).__name__ in ("NAType", "NaTType")


def plain_row(row: Any) -> Any:
    """A row of columns with plain Python values, or a prompt of a text or a chat."""
    if isinstance(row, Mapping):
        check_once(map(str, row), "column")
        return without_filler({str(name): plain(cell) for name, cell in row.items()})
    return Prompt(plain(row))


def plain(value: Any) -> Any:
    """Value with lists and dicts in place of arrays, tuples and mappings, and numbers of Python's own.

    Raises:
        MalformedRow: a time is finer than Python's, which ends at microseconds.
    """
    if _is_sign_of_nothing(value):
        return None
    if isinstance(value, np.datetime64 | np.timedelta64):
        exact = value.item()  # an int, if it counts nanoseconds
        return _whole_microseconds(value) if isinstance(exact, int) else exact
    if isinstance(value, np.ndarray) and value.dtype.kind in "mM":
        return [plain(item) for item in value] if value.ndim else plain(value[()])
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if type(value).__name__ in ("Timestamp", "Timedelta") and hasattr(value, "as_unit"):  # of pandas
        return _whole_microseconds(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return [plain(item) for item in value]
    return value


def _whole_microseconds(value: Any) -> Any:
    """A time of NumPy or pandas in nanoseconds as one of Python; raises `MalformedRow` if it is finer."""
    rounded: Any
    if isinstance(value, np.generic):
        rounded = value.astype(f"{value.dtype.kind}8[us]")
        made, is_exact = rounded.item(), bool(rounded == value)
    else:
        rounded = value.as_unit("us")
        made = rounded.to_pydatetime() if hasattr(rounded, "to_pydatetime") else rounded.to_pytimedelta()
        is_exact = rounded == value
    if not is_exact:
        raise MalformedRow(f"need times of whole microseconds, got {value}; write it as a text")
    return made


def _hint(data: Any, name: str) -> str:
    """Way out for values that are close to the right ones."""
    if isinstance(data, str):
        setting = f"data.{name.removesuffix('_dataset')}" if name.endswith("_dataset") else "load_prompts"
        return f"; one text is a list of one, [text]; the path of a file goes to {setting}"
    if isinstance(data, Mapping):
        return (
            "; a dict of columns becomes rows with datasets.Dataset.from_dict, and a dict of data sets goes "
            "into a datasets.DatasetDict"
        )
    if hasattr(data, "__iter__") or hasattr(data, "__getitem__"):
        return f"; make it a list: {name}=list(...), or datasets.IterableDataset.from_generator(...)"
    return ""
