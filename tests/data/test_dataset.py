"""Tests of reading prompts and drawing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.config.data import DataConfig
from verl.data.dataset import PromptLoader, drop_long_prompts, load_prompts
from verl.data.tasks.table import TASKS
from verl.utils.sampling_types import Prompt

SKIP = DataConfig(on_malformed="skip")
ROWS = [{"prompt": "1+1=", "answer": "2", "level": 3}, {"prompt": "2+2=", "answer": "4", "level": 5}]
EXPECTED = [Prompt("1+1=", "2", "sums", 0, {"level": 3}), Prompt("2+2=", "4", "sums", 1, {"level": 5})]
QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}


def jsonl(folder: Path, *rows: Any) -> str:
    """A file of these rows; a text is a line as it is."""
    path = folder / "sums.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8"
    )
    return str(path)


def arrow(path: Path, *, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "sums.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS))),
    "sums.json": lambda path: path.write_text("\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
    "sums.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "stream/sums.arrow": lambda path: arrow(path, stream=True),
    "file/sums.arrow": lambda path: arrow(path, stream=False),
    "sums": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "split/sums": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_the_same_prompts(tmp_path: Path, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    WRITERS[name](path)
    prompts, report = load_prompts(str(path), DataConfig(), split="train")
    assert prompts == EXPECTED
    assert (report.num_rows, report.num_malformed, report.problems) == (2, 0, ())


def test_a_saved_dataset_of_several_splits_is_taken_by_split(tmp_path: Path):
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[1:])
    )
    splits.save_to_disk(tmp_path / "both")
    assert [p.answer for p in load_prompts(str(tmp_path / "both"), DataConfig(), split="test")[0]] == ["4"]
    datasets.DatasetDict(validation=splits["test"]).save_to_disk(tmp_path / "one")
    assert (
        "so data.test is its 'validation'"
        in load_prompts(str(tmp_path / "one"), DataConfig(), split="test")[1].notes[0]
    )
    with pytest.raises(ValueError, match="need the split 'train' of .* for data.train, it has validation"):
        load_prompts(str(tmp_path / "one"), DataConfig(), split="train")


def test_a_task_gives_its_training_or_its_held_out_prompts():
    for split in ("train", "test"):
        prompts, _ = load_prompts("task:add-2", DataConfig(), split=split)
        assert [{"prompt": p.content, "answer": p.answer} for p in prompts] == TASKS["add-2"].rows(split)
        assert prompts[7].source == "add-2" and prompts[7].index == 7


def test_the_public_parquet_layout_is_read_as_it_is(tmp_path: Path):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [QUESTION],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 40, "split": "train"},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (prompt,), _ = load_prompts(str(tmp_path / "train.parquet"), DataConfig(), split="train")
    assert (prompt.content, prompt.answer, prompt.source, prompt.index) == (
        [QUESTION],
        "2",
        "openai/gsm8k",
        0,
    )
    assert prompt.columns == {name: value for name, value in row.items() if name != "prompt"}


def test_columns_may_have_other_names(tmp_path: Path):
    source = jsonl(tmp_path, {"question": "1+1=", "solution": 2, "prompt": "unused"})
    config = DataConfig(prompt_key="question", answer_key="solution")
    assert load_prompts(source, config, split="train")[0] == [
        Prompt("1+1=", 2, "sums", 0, {"question": "1+1=", "solution": 2, "prompt": "unused"})
    ]


def test_keys_that_a_message_lacks_are_not_there_after_reading_a_table(tmp_path: Path):
    image = {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "which colour?"}],
    }
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    for number, messages in enumerate([[image], [QUESTION, call, {"role": "tool", "content": "red"}]]):
        pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), tmp_path / f"{number}.parquet")
    read = [
        load_prompts(str(tmp_path / f"{number}.parquet"), DataConfig(), split="train")[0][0].content
        for number in (0, 1)
    ]
    assert read == [[image], [QUESTION, {"content": "", **call}, {"role": "tool", "content": "red"}]]


MALFORMED = {
    '{"prompt": "a"': "invalid JSON",
    '{"prompt": "a", "prompt": "b"}': "each key of an object once, got 'prompt' 2 times",
    '{"prompt": "a", "extra": {"x": 1, "x": 1}}': "each key of an object once, got 'x' 2 times",
    "{\"prompt\": \"[{'role': 'user'}]\"}": "Python's spelling of them",
    '{"prompt": NaN}': "NaN, which is not a JSON number",
    '["prompt"]': "rows that are JSON objects, got list",
    '{"quest": "a"}': "column 'prompt', there are 'quest'",
    '{"prompt": " "}': "prompt that is not empty",
    '{"prompt": []}': "prompt that is not empty",
    '{"prompt": null}': "text or a list of chat messages, got nothing",
    '{"prompt": 7}': "text or a list of chat messages, got int 7",
    '{"prompt": ["a"]}': "messages that are objects with role and content, got str 'a'",
    '{"prompt": [{"content": "a"}]}': "role among system, .*, got nothing",
    '{"prompt": [{"role": "usr", "content": "a"}]}': "role among system, .*, got str 'usr'",
    '{"prompt": [{"role": ["user"], "content": "a"}]}': "role among system",
    '{"prompt": [{"role": "user"}]}': "content that is a text or a list of typed parts, got nothing",
    '{"prompt": [{"role": "user", "content": ["a"]}]}': "content that is a text or a list of typed parts",
    '{"prompt": [{"role": "user", "content": ""}]}': "prompt that is not empty",
    '{"prompt": "a \\ud83d"}': "half a surrogate pair at character 2",
    "[" * 100_000: "invalid JSON",
}


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: line[:50])
def test_a_malformed_row_stops_the_start_with_its_place_and_reason(tmp_path: Path, line: str):
    source = jsonl(tmp_path, ROWS[0], "", line)
    with pytest.raises(
        ValueError, match=f"(?s)1 of 2 rows.*sums.jsonl, line 3: .*{MALFORMED[line]}.*on_malformed=skip"
    ):
        load_prompts(source, DataConfig(), split="train")
    prompts, report = load_prompts(source, SKIP, split="train")
    assert prompts == EXPECTED[:1] and (report.num_rows, report.num_malformed) == (2, 1)


def test_many_malformed_rows_are_counted_and_a_few_are_shown(tmp_path: Path):
    with pytest.raises(ValueError, match="(?s)7 of 8 rows.*line 2: .*line 6: .*and 2 more") as stopped:
        load_prompts(jsonl(tmp_path, ROWS[0], *["{}"] * 7), DataConfig(), split="train")
    assert "line 7" not in str(stopped.value)


def test_bytes_that_are_no_text_are_malformed(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert load_prompts(str(tmp_path / "a.jsonl"), SKIP, split="train")[1].num_malformed == 1


def test_a_row_of_a_table_is_named_by_its_number(tmp_path: Path):
    table = pa.table({"prompt": ["a", "b", None], "answer": [1.0, float("nan"), 2.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    prompts, report = load_prompts(str(tmp_path / "a.parquet"), SKIP, split="train")
    assert [(p.content, p.answer) for p in prompts] == [("a", 1.0)]
    assert "a.parquet, row 1: need an answer, got NaN" in report.problems[0]
    assert "a.parquet, row 2: " in report.problems[1]


def test_rows_keep_their_numbers_when_others_are_skipped(tmp_path: Path):
    prompts, _ = load_prompts(jsonl(tmp_path, ROWS[0], "{}", ROWS[1]), SKIP, split="train")
    assert [p.index for p in prompts] == [0, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "existing file or folder"),
        ("table.xls", "ends with .jsonl, .json, .parquet, .arrow, .csv, .tsv"),
        ("task:ad-2", r"no task 'ad-2'; did you mean task:add-2\? there are copy-8"),
        ("empty.jsonl", "at least one usable row, .* has none among 0"),
        (
            "useless.jsonl",
            "(?s)at least one usable row, .* has none among 1:.*line 1: need a column 'prompt'",
        ),
        ("broken.parquet", "cannot read .*broken.parquet: "),
        ("broken.arrow", "cannot read .*broken.arrow: "),
        ("folder", "cannot read .*folder: .*got no data files"),
    ],
)
def test_a_source_that_cannot_be_read_is_an_error_that_says_why(tmp_path: Path, source: str, message: str):
    (tmp_path / "folder").mkdir()
    files = {
        "table.xls": "a,b",
        "empty.jsonl": "\n",
        "useless.jsonl": "{}",
        "broken.parquet": "PAR1",
        "broken.arrow": "x",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(source if source.startswith("task:") else str(tmp_path / source), SKIP, split="test")


def test_prompts_over_the_limit_are_dropped_and_counted():
    kept, fields = drop_long_prompts(EXPECTED, [4, 9], 8)
    assert kept == EXPECTED[:1] and fields == {"num_too_long": 1, "longest": 9}
    with pytest.raises(
        ValueError, match="at most 3 tokens, but the shortest of 2 has 4; raise data.max_prompt_tokens"
    ):
        drop_long_prompts(EXPECTED, [4, 9], 3)
    with pytest.raises(ValueError, match="one length per prompt, got 2 prompts and 1 lengths"):
        drop_long_prompts(EXPECTED, [4], 3)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(str(i), index=i) for i in range(count)]


def indices(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


@given(
    st.integers(1, 20),
    st.lists(st.integers(1, 30), min_size=1, max_size=10),
    st.booleans(),
    st.integers(0, 2**63),
)
def test_each_epoch_has_every_prompt_once_whatever_is_taken_at_a_time(count, sizes, shuffle, seed):
    loader = PromptLoader(numbered(count), seed=seed, shuffle=shuffle)
    drawn = [i for size in sizes for i in indices(loader.take(size))]
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


@given(st.integers(1, 20), st.integers(0, 50), st.booleans())
def test_a_restored_loader_goes_on_with_the_same_prompts(count, before, shuffle):
    loader, restored = (PromptLoader(numbered(count), seed=3, shuffle=shuffle) for _ in range(2))
    for _ in range(before):
        loader.take(1)
    restored.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert indices(restored.take(45)) == indices(loader.take(45))


def test_the_order_changes_with_the_epoch_and_with_the_seed():
    first, second = (PromptLoader(numbered(50), seed=seed, shuffle=True) for seed in (0, 1))
    orders = [indices(loader.take(50)) for loader in (first, first, second, second)]
    assert len(set(map(tuple, orders))) == 4 and list(range(50)) not in orders
    assert first.epochs == 2


def test_the_order_is_the_same_in_every_version():
    assert indices(PromptLoader(numbered(8), seed=0, shuffle=True).take(12)) == [
        0,
        2,
        1,
        5,
        4,
        3,
        6,
        7,
        5,
        3,
        7,
        2,
    ]


def test_without_shuffling_prompts_come_in_the_order_given():
    assert indices(PromptLoader(numbered(3), seed=0, shuffle=False).take(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptLoader(numbered(4), seed=0, shuffle=True), "num_prompts was 3 and is 4"),
        (PromptLoader([*numbered(2), Prompt("changed", index=2)], seed=0, shuffle=True), "fingerprint was"),
        (PromptLoader(numbered(3)[::-1], seed=0, shuffle=True), "fingerprint was"),
        (PromptLoader(numbered(3), seed=1, shuffle=True), "seed was 0 and is 1"),
        (PromptLoader(numbered(3), seed=0, shuffle=False), "shuffle was True and is False"),
    ],
)
def test_a_state_of_other_prompts_or_another_order_is_refused(other: PromptLoader, message: str):
    state = PromptLoader(numbered(3), seed=0, shuffle=True).state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


@pytest.mark.parametrize("changed", [{"position": 4}, {"position": -1}, {"epoch": None}])
def test_a_state_that_cannot_be_is_refused(changed: dict[str, Any]):
    loader = PromptLoader(numbered(3), seed=0, shuffle=True)
    with pytest.raises(ValueError, match="epoch from 0 and a position from 0 to 3"):
        loader.load_state_dict({**loader.state_dict(), **changed})


def test_a_loader_needs_prompts_and_takes_at_least_one():
    with pytest.raises(ValueError, match="at least one prompt to draw from"):
        PromptLoader([], seed=0, shuffle=True)
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        PromptLoader(numbered(3), seed=0, shuffle=True).take(0)


def test_prompts_with_images_have_a_fingerprint_that_sees_their_bytes():
    def fingerprint(image: bytes) -> str:
        content = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        return PromptLoader([Prompt(content)], seed=0, shuffle=False).state_dict()["fingerprint"]

    assert fingerprint(b"red") == fingerprint(b"red") != fingerprint(b"blue")
