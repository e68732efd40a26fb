"""Rows of prompt sources: files, folders that `datasets` saved, and built-in tasks."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from verl.data.tasks import TASKS

Split = Literal["train", "test"]
# Where a row is, in words, and the row: its columns, or a line that is still to be parsed.
PlacedRow = tuple[str, Any]


def read_rows(source: str, split: Split) -> Iterator[PlacedRow]:
    """Rows of a source, in its order, each with the line (from 1) or row (from 0) that it comes from.

    Args:
        source: .jsonl or .json (one object per line), .parquet or .arrow file, folder of
            `datasets.save_to_disk`, or task:NAME.
        split: part of a task or of a saved DatasetDict; a file is taken whole.

    Raises:
        ValueError: the source cannot be read.
    """
    if source.startswith("task:"):
        yield from _read_task(source.removeprefix("task:"), split)
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"need an existing file or folder, or task:NAME, got {source!r}, which does not exist in "
            f"{Path.cwd()}"
        )
    if not path.is_dir() and path.suffix not in READERS:
        raise ValueError(
            f"need a file that ends with {', '.join(READERS)}, a folder saved by `datasets`, or task:NAME, "
            f"got {source!r}"
        )
    try:
        yield from _read_saved(path, split) if path.is_dir() else READERS[path.suffix](path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot read {source}: {error}") from error


def _read_task(name: str, split: Split) -> Iterator[PlacedRow]:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean task:{near[0]}? " if near else ""
        raise ValueError(f"there is no task {name!r}; {hint}there are {', '.join(TASKS)}")
    return _numbered(TASKS[name].rows(split))


def _read_lines(path: Path) -> Iterator[PlacedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    with importlib.import_module("pyarrow.parquet").ParquetFile(path) as file:
        yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())


def _read_arrow(path: Path) -> Iterator[PlacedRow]:
    pyarrow = importlib.import_module("pyarrow")
    with pyarrow.memory_map(str(path)) as file:
        # Arrow has two layouts under one suffix: `datasets` writes the stream; the file begins with a name.
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
        yield from _numbered(row for batch in table.to_batches() for row in batch.to_pylist())


def _read_saved(path: Path, split: Split) -> Iterator[PlacedRow]:
    saved = importlib.import_module("datasets").load_from_disk(str(path))
    if isinstance(saved, dict):  # a DatasetDict
        if split not in saved:
            raise ValueError(
                f"it has no split {split!r}; it has {', '.join(saved)}; give the folder of one of them"
            )
        saved = saved[split]
    return _numbered(saved)


def _numbered(rows: Iterable[Any]) -> Iterator[PlacedRow]:
    return ((f"row {number}", row) for number, row in enumerate(rows))


# Suffix -> reader of such a file.
READERS: dict[str, Callable[[Path], Iterator[PlacedRow]]] = {
    ".jsonl": _read_lines,
    ".json": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
