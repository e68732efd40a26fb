"""Tests of the forms of data files and of sources of several files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config import load_config
from verl.config.data import DataConfig, DataSource
from verl.data.dataset import load_prompts
from verl.data.reading import file_readers
from verl.data.reading.sources import name_of, reward_of_tasks, sources_of

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "say\n\u2028é, [", "answer": 'a "quote"'}]
LINES = "\n".join(map(json.dumps, ROWS))
SKIP = DataConfig(on_malformed="skip")


def read(source: Any, split: str = "train") -> list[tuple[Any, Any]]:
    return [(p.content, p.answer) for p in load_prompts(str(source), DataConfig(), split=split)[0]]


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def shard(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": list(prompts)}), path)
    return path


CSV = 'prompt,answer\n1+1=,2\n"say\n\u2028é, [","a ""quote"""\n'
FILES = {
    "array.json": json.dumps(ROWS),
    "pretty.json": "\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
    "array.jsonl": json.dumps(ROWS),
    "data.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "line.json": json.dumps({"data": ROWS}),
    "split.json": json.dumps({"train": ROWS, "test": ROWS[:1]}),
    "lines.json": LINES,
    "blank.json": "\n\n\n" + LINES,
    "lines.ndjson": LINES,
    "lines.jsonl.gz": LINES,
    "array.json.gz": json.dumps(ROWS),
    "rows.csv": CSV,
    "spaced.csv": CSV.replace("prompt,", " prompt, "),
    "rows.csv.gz": "\ufeff" + CSV,
    "rows.tsv": CSV.replace("prompt,", "prompt\t").replace("1+1=,", "1+1=\t").replace('","', '"\t"'),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_a_file_gives_the_same_rows(tmp_path: Path, monkeypatch: Any, name: str):
    path = written(tmp_path / name, FILES[name])
    expected = [(row["prompt"], row["answer"]) for row in ROWS]
    assert read(path) == expected
    monkeypatch.setattr(file_readers, "_CHUNK", 7)  # rows across the ends of what is read at a time
    assert read(path) == expected


def test_an_object_with_the_columns_of_a_row_is_one_row(tmp_path: Path):
    row = {"prompt": "q", "parts": [{"a": 1}], "answer": "x"}
    assert read(written(tmp_path / "a.json", json.dumps(row, indent=1))) == [("q", "x")]


def test_texts_of_a_table_stay_texts_and_an_empty_cell_is_none(tmp_path: Path):
    path = written(tmp_path / "a.csv", "prompt,answer,level\n007,1.50,\ntrue,1e3,NA\n")
    prompts, _ = load_prompts(str(path), DataConfig(), split="train")
    assert [(p.content, p.answer, p.columns["level"]) for p in prompts] == [
        ("007", "1.50", None),
        ("true", "1e3", "NA"),
    ]


def test_the_text_of_a_list_as_reference_is_said(tmp_path: Path):
    path = written(tmp_path / "a.csv", "prompt,answer\nq,\"['a', 'b']\"\nq,[1]\nq,['x\n")
    _, report = load_prompts(str(path), DataConfig(), split="train")
    assert [note.partition(",")[0] for note in report.notes] == ["1 reference answers are the text of a list"]


BROKEN = {
    "twice.csv": ("prompt,answer,answer\n1,2,3\n", "column once, got 'answer' 2 times"),
    "short.csv": ("prompt,answer\n1\n", "short.csv, line 2: need 2 cells, .* got 1"),
    "twice.jsonl": ('{"prompt": "1", "prompt": "2"}', "twice.jsonl, line 1: .*got 'prompt' 2 times"),
    "twice.json": ('[{"prompt": "1"},\n {"a": 1, "a": 2}]', "twice.json: row 1: .*got 'a' 2 times"),
    "object.json": ('{"data": [{"a": 1,\n "a": 2}]}', "object.json: .*got 'a' 2 times"),
    "cut.json": ('[{"prompt": "1"}, {"prom', "row 1 of an array: invalid JSON"),
    "open.json": ('[{"prompt": "1"}', "row 1 of an array: invalid JSON"),
    "more.json": ("[]\n[]", "more text behind its 0 rows"),
    "nan.json": ('[{"prompt": NaN}]', "row 0: .*NaN, which is not a JSON number"),
    "lists.json": ('{"a": [{"x": 1}], "b": [{"x": 1}]}', "one of the name 'train', got a, b"),
    "other.json": ('{"test": [{"prompt": "1"}]}', "one of the name 'train', got test"),
    "bad.jsonl.gz": (b"\x1f\x8b\x08\x00", "bad.jsonl.gz"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, name: str):
    text, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read(path)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, form: str):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=f"a.{form}: need each column once, got 'prompt' 2 times"):
        read(path)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path, monkeypatch: Any):
    for i in (10, 2, 1):
        shard(tmp_path / "shards" / f"part-{i}.parquet", f"{i}")
    written(tmp_path / "shards" / "README.md", "text")
    monkeypatch.chdir(tmp_path)
    for source in ("shards", "shards/*.parquet", "*/part-*.parquet", str(tmp_path)):
        assert [content for content, _ in read(source)] == ["1", "2", "10"], source
    prompts, report = load_prompts(["shards/part-2.parquet", "task:add-2"], DataConfig(), split="train")
    assert [(p.source, p.index) for p in prompts[:2]] == [("part-2", 0), ("add-2", 1)]
    assert report.source == "shards/part-2.parquet, task:add-2" and report.num_rows == 1 + 7500


def test_of_a_folder_whose_files_are_named_by_split_only_one_split_is_read(tmp_path: Path):
    for split in ("train", "test"):
        shard(tmp_path / "files" / f"{split}-00000-of-00001.parquet", split)
        shard(tmp_path / "folders" / split / "0.parquet", split)
        for folder in ("files", "folders"):
            (tmp_path / folder).mkdir(exist_ok=True)
    for folder in ("files", "folders"):
        assert read(tmp_path / folder, "test") == [("test", None)]
        assert read(tmp_path / folder, "train") == [("train", None)]


def test_words_of_names_stand_for_their_split(tmp_path: Path):
    for name in ("training", "testing"):
        shard(tmp_path / f"{name}.parquet", name)
    assert read(tmp_path, "train") == [("training", None)] and read(tmp_path, "test") == [("testing", None)]


def test_all_shards_are_there_whether_they_count_from_0_or_from_1(tmp_path: Path):
    for first in (0, 1):
        for i in range(first, first + 3):
            shard(tmp_path / f"{first}" / f"rows-{i}-of-3.parquet", f"{i}")
        assert len(read(tmp_path / f"{first}")) == 3


def test_a_glob_that_fits_more_than_files_is_refused(tmp_path: Path):
    broken_link(tmp_path / "x" / "sub")
    written(tmp_path / "x" / "a.jsonl", LINES)
    with pytest.raises(ValueError, match="also fits .*x/sub, a folder; write a glob that fits files"):
        read(tmp_path / "x" / "*")
    with pytest.raises(ValueError, match="also fits .*x/sub/b.jsonl, a link to nothing"):
        read(tmp_path / "x" / "**" / "*.jsonl")


def mixed_forms(folder: Path) -> None:
    shard(folder / "a.parquet", "1")
    written(folder / "a.jsonl", LINES)


def partly_named(folder: Path) -> None:
    shard(folder / "train.parquet", "1")
    shard(folder / "more.parquet", "1")


def two_parts(folder: Path) -> None:
    for name in ("main", "socratic"):
        shard(folder / name / "train.parquet", "1")


def other_split(folder: Path) -> None:
    shard(folder / "test-0.parquet", "1")


def more_below(folder: Path) -> None:
    shard(folder / "a.parquet", "1")
    shard(folder / "more" / "b.parquet", "1")


def packed(folder: Path) -> None:
    written(folder / "a.jsonl", LINES)
    written(folder / "b.jsonl.zst", "x")
    written(folder / "a.jsonl.md5", "x")


def plain_and_packed(folder: Path) -> None:
    written(folder / "a.jsonl", LINES)
    written(folder / "a.jsonl.gz", LINES)


def broken_link(folder: Path) -> None:
    written(folder / "a.jsonl", LINES)
    (folder / "b.jsonl").symlink_to(folder / "gone")


def lacking(folder: Path) -> None:
    for i in (1, 3):
        shard(folder / f"train-0000{i}-of-00003.parquet", "1")


FOLDERS = {
    more_below: "there are files in more, too; give a glob of those meant, such as .*/[*][*]/[*].parquet'",
    packed: "b.jsonl.zst has no form that is read",
    plain_and_packed: "a.jsonl and a.jsonl.gz are one file",
    broken_link: "b.jsonl is a link to nothing",
    lacking: "need all shards, but train-00002-of-00003.parquet is missing",
    mixed_forms: "files of one form .* got a.jsonl, a.parquet",
    partly_named: "all or none of them named by their split, got more.parquet, train.parquet",
    two_parts: "got folders main, socratic; give the path",
    other_split: "for data.train, .* got test-0.parquet",
}


@pytest.mark.parametrize("write", FOLDERS, ids=lambda write: write.__name__)
def test_a_folder_that_may_mean_several_things_is_refused(tmp_path: Path, write: Callable[[Path], None]):
    write(tmp_path)
    with pytest.raises(ValueError, match=FOLDERS[write]):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.jsonl", "data.test, got 'trian.jsonl', .* in /.*; the nearest name is 'train.jsonl'"),
        ("openai/gsm8k", r"load_dataset\('openai/gsm8k'\).save_to_disk\('FOLDER'\)\", then data.test=FOLDER"),
        ("https://a.org/b.jsonl", "which is an address; download it"),
        ("a.jsonl,b.jsonl", r"write several sources as data.test='\[A, B\]'"),
        ("none/*.jsonl", "files for data.test, got 'none/"),
        ("void", "got no data files"),
    ],
)
def test_a_source_that_is_not_there_is_answered_with_the_way_out(
    tmp_path: Path, monkeypatch: Any, source: str, message: str
):
    written(tmp_path / "train.jsonl", LINES)
    (tmp_path / "void").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(source, "test")


def test_settings_name_one_source_or_several(monkeypatch: Any):
    monkeypatch.setenv("DATA", "/data")
    assert load_config("grpo", ["data.train=$DATA/a.jsonl"]).data.train == "/data/a.jsonl"
    several = load_config("grpo", ["data.train=[$DATA/a.jsonl,b.parquet]"]).data.train
    assert several == ("/data/a.jsonl", "b.parquet")


def test_a_source_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "shards").mkdir(parents=True)
    names = {"a/rows.jsonl.gz": "rows", "a/shards": "shards", "a/shards/*.parquet": "shards", "task:x": "x"}
    names |= {"me/numbers": "me/numbers", "me/numbers:main": "me/numbers"}  # of the hub
    assert {source: name_of(DataSource(path=source)) for source in names} == names
    assert name_of(DataSource(path="a/rows.jsonl", name="mine")) == "mine"


def test_several_tasks_have_a_reward_if_it_is_the_same():
    assert reward_of_tasks(sources_of(["task:add-2", "task:sort-6"])) == "exact"
    assert reward_of_tasks(sources_of(["task:add-2", "task:digits"])) is None
    assert reward_of_tasks(sources_of(["task:add-2", "rows.jsonl"])) is None
    assert reward_of_tasks(sources_of([])) is None


def test_malformed_rows_of_a_table_of_texts_are_skipped_and_counted(tmp_path: Path):
    path = written(tmp_path / "a.csv", "prompt,answer\nq,1\nq\nr,2\n")
    prompts, report = load_prompts(str(path), SKIP, split="train")
    assert [p.index for p in prompts] == [0, 2] and report.num_malformed == 1
