"""Readers of data files, one for each form: JSON, tables of texts, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from verl.data.reading.row_cells import STRICT_JSON, MalformedRow, check_once

# Place of a row in its file, in words, and the row: its columns, a line that is still to be parsed, or the
# reason why it cannot be used.
PlacedRow = tuple[str, Any]
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_ROLES = {"role", "from"}
_CHUNK = 1 << 20
_SPACE = re.compile(r"[\s,]*")
# A file that is one object with these keys is one row, not a list of rows with a name.
_ROW_KEYS = {"prompt", "messages", "conversations", "conversation", "instruction", "question", "chosen"}


def read_file(path: Path, split: str) -> Iterator[PlacedRow]:
    """Rows of a file, in its order, each with its line (from 1) or row (from 0).

    Args:
        path: ends with one of `READERS`, or with it and `.gz`.
        split: key of the rows in a JSON file with a list of rows for each split.

    Raises:
        ValueError: the file is not of the form that its name says.
        OSError: it cannot be read.
    """
    try:
        yield from READERS[form_of(path)](path, split)
    except (csv.Error, EOFError) as error:  # EOFError: a gzip file without its end
        raise ValueError(str(error)) from error


def form_of(path: Path) -> str:
    """Suffix of a file that names its form: `.jsonl` of `rows.jsonl.gz`."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def count_rows(path: Path) -> int | None:
    """Rows of a file whose head tells them; None: it would have to be read."""
    if path.is_dir() or form_of(path) != ".parquet" or path.suffix == ".gz":
        return None
    with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def numbered(rows: Iterable[Any]) -> Iterator[PlacedRow]:
    """Rows with their numbers, from 0."""
    return ((f"row {number}", row) for number, row in enumerate(rows))


def without_filler(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table whose messages, tools and variables of the chat template have no nulls.

    In a table all structs of a column have the same keys, so each has nulls for the keys of the others.
    """
    return {name: _without_nulls(cell) if _is_chat(name, cell) else cell for name, cell in row.items()}


def _is_chat(name: str, cell: Any) -> bool:
    """True for messages, tools and variables of the chat template."""
    first = cell[0] if isinstance(cell, list) and cell else None
    has_role = isinstance(first, dict) and not _ROLES.isdisjoint(first)
    return has_role or name in ("tools", "chat_template_kwargs")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="")


def _read_json(path: Path, split: str) -> Iterator[PlacedRow]:
    """One object per line, one array of objects, or one object with a list of rows."""
    with _open(path) as file:
        start = file.read(4096).decode("utf-8-sig", "ignore").lstrip()
    if re.match(r"\[\s*([{\]]|$)", start):
        return _read_array(path)
    is_object = form_of(path) == ".json" and start.startswith("{") and not _has_lines(path)
    return _read_object(path, split) if is_object else _read_lines(path)


def _read_lines(path: Path) -> Iterator[PlacedRow]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line


def _has_lines(path: Path) -> bool:
    """True if the first line is a whole object, and others follow."""
    with _open(path) as file:
        lines = list(islice((line for line in file if line.strip()), 2))
    try:
        STRICT_JSON.decode(lines[0].decode("utf-8-sig"))
    except MalformedRow:
        return len(lines) > 1
    except (ValueError, RecursionError):
        return False
    return len(lines) > 1


def _read_object(path: Path, split: str) -> Iterator[PlacedRow]:
    with _open_text(path) as file:
        text = file.read()
    try:
        value = STRICT_JSON.decode(text)
    except MalformedRow:
        raise
    except (ValueError, RecursionError):  # not one object: the lines say what is wrong
        yield from _read_lines(path)
        return
    del text  # the rows alone are kept while they are read
    lists = {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    if not lists or _ROW_KEYS & value.keys():
        yield "row 0", value
        return
    name = split if split in lists else next(iter(lists))
    if name != split and (len(lists) > 1 or name in SPLITS):
        raise ValueError(f"need one list of rows, or one of the name {split!r}, got {', '.join(lists)}")
    yield from numbered(lists[name])


def _read_array(path: Path) -> Iterator[PlacedRow]:
    with _open_text(path) as file:
        yield from _elements(file)


def _elements(file: IO[str]) -> Iterator[PlacedRow]:
    """Elements of a JSON array, without the whole file in memory."""
    text, at, number = file.read(_CHUNK).lstrip()[1:], 0, 0
    while text[(at := _space_end(text, at)) : at + 1] != "]":
        try:
            row, end = STRICT_JSON.raw_decode(text, at)
        except MalformedRow as error:
            raise ValueError(f"row {number}: {error}") from error
        except (ValueError, RecursionError) as error:
            more = file.read(max(_CHUNK, len(text) - at))
            if not more:
                raise ValueError(f"row {number} of an array: invalid JSON: {error}") from error
            text, at = text[at:] + more, 0
            continue
        yield f"row {number}", row
        number, at = number + 1, end
    if (text[at + 1 :] + file.read(_CHUNK)).strip():
        raise ValueError(f"need one array, got more text behind its {number} rows")


def _space_end(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _read_texts(path: Path, split: str) -> Iterator[PlacedRow]:
    """Rows of a CSV or TSV file: all cells are texts, and an empty one is None."""
    csv.field_size_limit(2**31 - 1)  # of a cell; the default of 128 KiB is less than a long chat
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter="\t" if form_of(path) == ".tsv" else ",", strict=True)
        names = [name.strip() for name in next(reader, [])]
        check_once(names, "column")
        for cells in reader:
            place = f"line {reader.line_num}"
            if len(cells) == len(names):
                yield place, {name: cell or None for name, cell in zip(names, cells, strict=True)}
            elif cells:
                cause = f"need {len(names)} cells, as many as the first line has, got {len(cells)}"
                yield place, MalformedRow(cause)


def _read_parquet(path: Path, split: str) -> Iterator[PlacedRow]:
    with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
        check_once(file.schema_arrow.names, "column")
        batches = file.iter_batches()
        yield from numbered(without_filler(row) for batch in batches for row in batch.to_pylist())


def _read_arrow(path: Path, split: str) -> Iterator[PlacedRow]:
    pyarrow = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(path)) as file:
        # Arrow has two layouts under one suffix: `datasets` writes the stream; the file begins with a name.
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
        check_once(table.schema.names, "column")
        batches = table.to_batches()
        yield from numbered(without_filler(row) for batch in batches for row in batch.to_pylist())


# Form -> reader of such a file.
READERS: dict[str, Callable[[Path, str], Iterator[PlacedRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".csv": _read_texts,
    ".tsv": _read_texts,
    ".ndjson": _read_json,
}
