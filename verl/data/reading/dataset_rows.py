"""Rows of data sets of the library `datasets`: whole ones, streams, and parts of their splits."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from verl.config.data import DataSource
from verl.data.reading.data_files import Split
from verl.data.reading.file_readers import PlacedRow, without_filler
from verl.data.reading.placed_rows import ListedRows, RowStream

# Length of a split whose rows are not counted: more than any has.
_UNKNOWN = 2**62


class DatasetRows(ListedRows):
    """Rows of a `datasets.Dataset`.

    Args:
        source: its settings.
        rows: the data set. A transform of the user is applied; another format, such as tensors of some
            columns, is not used.
        notes: on how the source was understood.
    """

    def __init__(self, source: DataSource, rows: Any, *, notes: tuple[str, ...] = ()) -> None:
        is_transformed = rows.format["type"] == "custom"
        super().__init__(source, rows if is_transformed else rows.with_format(None))
        self.notes = notes

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        # A whole one is iterated, which is many times faster than to index each row.
        rows: Any = self.rows
        later = rows.skip(start) if start else rows
        for number, row in enumerate(later, start):
            yield f"{self.label}, row {number}", without_filler(row)


class StreamedRows(RowStream):
    """Rows of a `datasets.IterableDataset`, which are read while the run goes on.

    Args:
        source: its settings.
        rows: the data set.
        num_rows: rows of a pass, if they are known.
        notes: on how the source was understood.
    """

    def __init__(
        self,
        source: DataSource,
        rows: Any,
        *,
        num_rows: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(source, is_streamed=True)
        self.rows, self.notes = rows.with_format(None), notes
        self._num_rows = num_rows

    @property
    @override
    def num_rows(self) -> int | None:
        return self._num_rows

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        """Rows from `start` on; those before it are read again, which is exact after a shuffle, too."""
        self.rows.set_epoch(self.passes)
        for number, row in enumerate(self.rows):
            if number >= start:
                yield f"{self.label}, row {number}", without_filler(row)


def choose_part(
    splits: Mapping[str, Any], source: DataSource, split: Split, *, lengths: Mapping[str, int | None] = {}
) -> tuple[Any, tuple[str, ...]]:
    """Part of a data set that a source means, and notes on the choice.

    Args:
        splits: data of each split, all whole ones or all streams.
        source: `split` is the name of a split, or a slice or sum as in train[:10%]; none: see `split`.
        split: for which setting: train, or test, which validation stands in for.
        lengths: rows of splits that are streams, as far as they are known.

    Raises:
        ValueError: there is no such split, or a slice needs the number of rows of a stream.
    """
    wanted, notes = source.split, tuple[str, ...]()
    listed = ", ".join(splits)
    if wanted is None:
        wanted = next((name for name in _STAND_INS[split] if name in splits), None)
        if wanted is None:
            raise ValueError(
                f"need the split {split!r} of {source.path} for data.{split}, it has {listed}; name one: "
                f"data.{split}='{{path: {source.path}, split: {next(iter(splits), 'NAME')}}}'"
            )
        if wanted != split:
            notes = (f"{source.path} has no split {split!r}, so data.{split} is its {wanted!r}",)
    elif unknown := [name for name in _names(wanted) if name not in splits]:
        raise ValueError(
            f"need a split of {source.path} for data.{split}, got {unknown[0]!r}; it has {listed}"
        )
    if wanted in splits:
        return splits[wanted], notes
    counts = {
        name: len(data) if hasattr(data, "__len__") else lengths.get(name) for name, data in splits.items()
    }
    return _sliced(splits, wanted, source, counts), notes


def part_of(
    data: Any, source: DataSource, split: Split, *, lengths: Mapping[str, int | None] = {}
) -> tuple[Any, tuple[str, ...]]:
    """Part of a data set with splits, or of one without, which is taken whole unless `source.split` is given.

    Args:
        data: a data set, or a dict with one for each split.
        source: see `choose_part`.
        split: see `choose_part`.
        lengths: see `choose_part`.

    Raises:
        ValueError: see `choose_part`.
    """
    if not isinstance(data, Mapping):
        if source.split is None:
            return data, ()
        data = {str(data.split or split): data}
    return choose_part(data, source, split, lengths=lengths)


# Setting -> splits that are taken for it, the first that there is.
_STAND_INS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation")}


def _names(wanted: str) -> list[str]:
    """Splits in a sum of slices, such as train[:10%]+test."""
    return [re.split(r"[\[(]", part)[0].strip() for part in wanted.split("+")]


def _sliced(
    splits: Mapping[str, Any], wanted: str, source: DataSource, counts: Mapping[str, int | None]
) -> Any:
    """Data of a sum of slices."""
    datasets = importlib.import_module("datasets")
    unknown = any(counts[name] is None for name in _names(wanted))
    if unknown and re.search(r"%|\[-|:-", wanted):
        raise ValueError(
            f"need a slice such as train[:1000] of a stream whose length is not known, got {wanted!r}; write "
            f"numbers of rows from its start, or read all of {source.path} with streaming: false"
        )
    lengths = {name: _UNKNOWN if count is None else count for name, count in counts.items()}
    try:
        slices = datasets.ReadInstruction.from_spec(wanted).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"need a split of {source.path} such as train[:10%] or train[100:200], got {wanted!r}: {error}"
        ) from error
    parts = [_rows_between(splits[s.splitname], s.from_, s.to, lengths[s.splitname]) for s in slices]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _rows_between(data: Any, start: int, end: int, length: int) -> Any:
    later = data.skip(start) if start else data
    return later if end == length else later.take(end - start)
