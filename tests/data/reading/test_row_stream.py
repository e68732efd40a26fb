"""Streams of rows: they go on in the middle, pass after pass, and refuse a state of other rows."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config.data import DataSource
from verl.data.reading.row_stream import RowStream, open_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(7)]


def written(folder: Path, kind: str) -> str:
    """Rows in one form of source; the path of it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        for part, rows in {"a": ROWS[:3], "b": ROWS[3:]}.items():
            (folder / f"{part}.json").write_text(json.dumps(rows))
        path = folder
    return str(path)


def opened(path: str, **settings: object) -> RowStream:
    return open_rows(DataSource(path=path, **settings), "train")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("taken", [0, 3, 7])
def test_a_stream_goes_on_behind_the_last_row_that_was_given_out(tmp_path, kind, taken):
    path = written(tmp_path / "data", kind)
    stream, all_rows = opened(path), list(opened(path))
    assert list(islice(stream, taken)) == all_rows[:taken]
    state = json.loads(json.dumps(stream.state_dict()))
    other = opened(path)
    other.load_state_dict(state)
    # A pass that was read to its last row has its end still before it.
    assert list(other) == all_rows[taken:] == list(stream)
    assert (other.passes, other.position) == (1, 0)
    assert list(islice(other, 2)) == all_rows[:2]


def test_the_number_of_rows_is_known_where_no_row_has_to_be_read(tmp_path):
    counts = {kind: opened(written(tmp_path / kind, kind)).num_rows for kind in ("jsonl", "parquet")}
    assert counts == {"jsonl": None, "parquet": 7}
    assert opened("task:add-2").num_rows == len(list(opened("task:add-2")))
    assert not opened("task:add-2").is_streamed
    assert opened(written(tmp_path / "c", "jsonl"), streaming=True).is_streamed


def test_a_state_of_other_rows_is_refused(tmp_path):
    stream = opened(written(tmp_path, "jsonl"))
    list(islice(stream, 2))
    state = stream.state_dict()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n{}")
    with pytest.raises(ValueError, match=r"need the rows of .*rows\.jsonl with which the run began"):
        opened(str(tmp_path / "rows.jsonl")).load_state_dict(state)


def test_a_source_that_is_not_there_is_an_error_when_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        opened(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("rows.jsonl", {"options": {"size": 3}}, "need a task for the options size, got 'rows.jsonl'"),
        ("rows.jsonl", {"revision": "main"}, "need a data set of the hub for revision 'main'"),
        ("task:add-2", {"revision": "main"}, "need a data set of the hub for revision 'main'"),
        ("task:add-2", {"split": "test"}, "need a data set with splits for split 'test', got 'task:add-2'"),
    ],
)
def test_keys_that_say_nothing_about_a_kind_of_source_are_refused(path, settings, message):
    with pytest.raises(ValueError, match=message):
        opened(path, **settings)


def test_a_part_of_a_saved_data_set_without_splits_is_taken(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    taken = opened(str(tmp_path), split="train[2:4]")
    assert [row["prompt"] for _, row in taken] == ["2+1=", "3+1="]
    with pytest.raises(ValueError, match="got 'dev'; it has train"):
        opened(str(tmp_path), split="dev")
