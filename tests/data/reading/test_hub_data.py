"""Data sets of the hub, read from a stand-in in a process of its own: whole, as streams, and all refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_stand_in import StandIn, hub_stand_in
from verl.config.data import DataSource
from verl.data.reading.data_files import is_hub_name
from verl.data.reading.row_stream import open_rows
from verl.engines.hf.pretrained import load_language_model, make_tiny_model
from verl.utils.tokens import TextCodec

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(12)]
CONFIGS = """---
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: hard.jsonl
---
"""
# Reads one request per line, and answers each with what was read or with the message.
PROGRAM = """
import json, sys
from itertools import islice
from verl.config.data import DataSource
from verl.data.reading.row_stream import open_rows

for line in sys.stdin:
    asked = json.loads(line)
    try:
        if "model" in asked["source"]:
            from verl.engines.hf.pretrained import load_language_model
            from verl.utils.tokens import TextCodec

            name = asked["source"]["model"]
            sizes = [p.numel() for p in load_language_model(name).parameters()]
            answer = {"ids": TextCodec.load(name).encode("1+1="), "sizes": sizes}
            print(json.dumps(answer), flush=True)
            continue
        stream = open_rows(DataSource(**asked["source"]), asked.get("split", "train"))
        if "state" in asked:
            stream.load_state_dict(asked["state"])
        rows = [row["prompt"] for _, row in islice(stream, asked.get("take"))]
        answer = {
            "rows": rows, "num_rows": stream.num_rows, "notes": stream.notes, "state": stream.state_dict(),
            "streamed": stream.is_streamed,
        }
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""
OFFLINE = {"HF_HUB_OFFLINE": "1"}
Ask = Callable[..., dict[str, Any]]


def parquet(rows: list[dict[str, str]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder, hidden=32, layers=1)
    return folder


@pytest.fixture(scope="module")
def hub(tiny) -> Iterator[StandIn]:
    with hub_stand_in() as stand_in:
        files = {path.name: path.read_bytes() for path in tiny.iterdir()}
        stand_in.publish("models/me/tiny", files)
        first = {
            "data/train-00000-of-00002.parquet": parquet(ROWS[:5]),
            "data/train-00001-of-00002.parquet": parquet(ROWS[5:9]),
            "data/validation-00000-of-00001.parquet": parquet(ROWS[9:]),
        }
        stand_in.publish("datasets/me/numbers", {"README.md": b"# Numbers\n", **first}, "v1")
        stand_in.publish("datasets/me/numbers", {"data/train.parquet": parquet(ROWS[::-1])})
        both = {"easy.jsonl": jsonl(ROWS[:3]), "hard.jsonl": jsonl(ROWS[3:])}
        stand_in.publish("datasets/me/levels", {"README.md": CONFIGS.encode(), **both})
        stand_in.publish("datasets/me/gated", {"train.jsonl": jsonl(ROWS)})
        stand_in.published["datasets/me/gated"].is_gated = True
        stand_in.publish("datasets/me/secret", {"train.jsonl": jsonl(ROWS)})
        stand_in.published["datasets/me/secret"].is_private = True
        stand_in.publish("datasets/me/script", {"script.py": b"raise SystemExit"})
        yield stand_in


def environment(url: str, cache: Path) -> dict[str, str]:
    """Variables of a process whose hub is at an address, with caches of its own."""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")} | own


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ask(hub, cache, tmp_path_factory) -> Iterator[Ask]:
    """Opens sources in a process that knows the stand-in."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(hub.url, cache) | {"PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path_factory.mktemp("here"),
    )
    assert process.stdin and process.stdout

    def ask(path: str, *, request: dict[str, Any] | None = None, **source: Any) -> dict[str, Any]:
        named = source if "model" in source else {"path": path, **source}
        asked = {"source": named, **(request or {})}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait() == 0


def offline(cache: Path, url: str, *requests: dict[str, Any], **variables: str) -> list[dict[str, Any]]:
    """Answers in a process whose hub cannot be reached."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="".join(json.dumps(one) + "\n" for one in requests),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(url, cache) | variables,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def numbers(rows: list[dict[str, str]]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_a_whole_data_set_is_read_at_its_revision_and_split(ask):
    newest = ask("me/numbers")
    assert (newest["rows"], newest["num_rows"], newest["streamed"]) == (numbers(ROWS[::-1]), 12, False)
    assert ask("me/numbers", revision="v1")["rows"] == numbers(ROWS[:9])
    assert ask("me/numbers", revision="v1", split="train[:2]+validation")["rows"] == numbers(
        ROWS[:2] + ROWS[9:]
    )
    assert ask("me/numbers", split="train[50%:]")["num_rows"] == 6
    held_out = ask("me/numbers", revision="v1", request={"split": "test"})
    assert held_out["rows"] == numbers(ROWS[9:])
    assert held_out["notes"] == ["me/numbers has no split 'test', so data.test is its 'validation'"]


@pytest.mark.parametrize("taken", [0, 4, 5, 9])
def test_a_stream_goes_on_in_the_middle_pass_after_pass(ask, taken):
    source = {"revision": "v1", "streaming": True}
    begun = ask("me/numbers", request={"take": taken}, **source)
    assert begun["streamed"]
    assert begun["rows"] == numbers(ROWS[:taken])
    rest = ask("me/numbers", request={"state": begun["state"]}, **source)
    assert rest["rows"] == numbers(ROWS[taken:9])
    assert ask("me/numbers", request={"state": rest["state"]}, **source)["rows"] == numbers(ROWS[:9])


def test_a_stream_goes_on_with_the_commit_with_which_it_began(ask, hub):
    repo = hub.published["datasets/me/numbers"]
    begun = ask("me/numbers", request={"take": 2}, streaming=True)
    before = repo.refs["main"]
    repo.commit({"data/train.parquet": parquet(ROWS[:1])})
    assert ask("me/numbers", request={"take": 2}, streaming=True)["rows"] == numbers(ROWS[:1])
    rest = ask("me/numbers", request={"state": begun["state"]}, streaming=True)
    assert rest["rows"] == numbers(ROWS[::-1][2:])
    repo.refs["main"] = before


def test_a_stream_is_cut_by_numbers_of_rows(ask):
    parts = ask("me/numbers", streaming=True, split="train[3:5]+train[10:]")
    assert parts["rows"] == numbers([*ROWS[::-1][3:5], *ROWS[::-1][10:]])
    shares = ask("me/levels:hard", streaming=True, split="train[:10%]")["error"]
    assert "need a slice such as train[:1000] of a stream" in shares


def test_configurations_are_named(ask):
    assert ask("me/levels:easy")["rows"] == numbers(ROWS[:3])
    several = ask("me/levels")["error"]
    assert several == (
        "need a configuration of the data set me/levels, got none; it has easy, hard; write "
        "data.train=me/levels:easy"
    )
    assert "got 'hrd'; it has easy, hard; write data.train=me/levels:hard" in ask("me/levels:hrd")["error"]


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "me/numbers",
            {"split": "trian"},
            "need a split of me/numbers for data.train, got 'trian'; it has train",
        ),
        ("me/numbers", {"split": "train[a]"}, "need a split of me/numbers such as"),
        ("me/numbers", {"revision": "v9"}, "has no revision 'v9' of it"),
        ("me/nothing", {}, "has none that you may read (status 401); check the name, or log in"),
        ("me/secret", {}, "has none that you may read (status 401)"),
        ("me/gated", {}, "need access to the data set me/gated, which is gated: accept its terms at http"),
        ("me/script", {}, "cannot read the data set me/script of the hub"),
    ],
)
def test_what_cannot_be_read_is_one_message(ask, path, source, message):
    error = ask(path, **source)["error"]
    assert message in error
    assert "\n" not in error


def test_without_a_split_for_evaluation_the_others_are_listed(ask):
    error = ask("me/numbers", request={"split": "test"})["error"]
    assert error.startswith(
        "need the split 'test' of me/numbers for data.test, it has train; name one: data.test="
    )


def test_without_connection_the_cache_is_read_or_there_is_one_message(ask, cache):
    expected = {revision: ask("me/numbers", revision=revision)["rows"] for revision in (None, "v1")}
    closed = "http://127.0.0.1:9"
    sources = [{"path": "me/numbers", "revision": revision} for revision in (None, "v1", "v9")]
    requests = [{"source": source} for source in (*sources, {"path": "me/x"})]
    for variables, cause in (
        ({}, "the hub http://127.0.0.1:9 cannot be reached"),
        (OFFLINE, "HF_HUB_OFFLINE is set"),
    ):
        newest, first, other, missing = offline(cache, closed, *requests, **variables)
        assert [newest["rows"], first["rows"]] == list(expected.values())
        assert newest["notes"][0].startswith("me/numbers is read from the cache, commit ")
        assert cause in newest["notes"][0]
        assert cause in other["error"]
        assert "need the data set me/x of the hub for data.train" in missing["error"]
        assert "load_dataset('me/x').save_to_disk('FOLDER')" in missing["error"]


def test_a_model_of_the_hub_is_loaded_by_its_name(ask, tiny):
    loaded = ask("", model="me/tiny")
    own = load_language_model(str(tiny))
    assert loaded["sizes"] == [parameter.numel() for parameter in own.parameters()]
    assert loaded["ids"] == TextCodec.load(str(tiny)).encode("1+1=")
    assert "has none that you may read (status 401)" in ask("", model="me/none")["error"]


def test_an_existing_path_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("me/numbers") and is_hub_name("me/numbers:main")
    assert not any(map(is_hub_name, ["me/rows.jsonl", "rows", "a/b/c", "./a", "a/*"]))
    (tmp_path / "me" / "numbers").mkdir(parents=True)
    (tmp_path / "me" / "numbers" / "rows.jsonl").write_bytes(jsonl(ROWS))
    assert len(list(open_rows(DataSource(path="me/numbers"), "train"))) == 12
    with pytest.raises(ValueError, match="need a data set of the hub for revision 'v1'"):
        open_rows(DataSource(path="me/numbers", revision="v1"), "train")
    with pytest.raises(ValueError, match="need a data set with splits for split 'dev'"):
        open_rows(DataSource(path="me/numbers", split="dev"), "train")
