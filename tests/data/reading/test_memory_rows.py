"""Rows in memory: every form gives the prompts that a file gives, and other values are refused by name."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from verl.config.data import DataConfig, DataSource, SFTDataConfig, WeightedChoice
from verl.data import dataset
from verl.data.dataset import load_prompts
from verl.data.examples import load_examples
from verl.data.reading.memory_rows import rows_in_memory, with_memory
from verl.utils.sampling_types import Prompt

CHAT = [{"role": "user", "content": "1+1=?"}]
ROWS = [{"prompt": CHAT, "answer": 2, "level": 1}, {"prompt": "2+2=", "answer": 4, "level": None}]
TEXTS = [{"prompt": f"{i}+1=", "answer": i + 1, "tags": ["a", "b"]} for i in range(5)]


def prompts_of(data: object, name: str = "train_dataset", **settings: object) -> list[Prompt]:
    return load_prompts(rows_in_memory(data, name, "train"), DataConfig(**settings), split="train")[0]


def generated():
    yield from TEXTS


def endless():
    while True:
        yield {"prompt": "a"}


FORMS = {
    "list": TEXTS,
    "dataset": datasets.Dataset.from_list(TEXTS),
    "formatted": datasets.Dataset.from_list(TEXTS).with_format("numpy"),
    "splits": datasets.DatasetDict(train=datasets.Dataset.from_list(TEXTS)),
    "stream": datasets.IterableDataset.from_generator(generated),
    "pandas": pd.DataFrame(TEXTS, index=range(7, 12)),
    "arrow": pa.Table.from_pylist(TEXTS),
    "prompts": [Prompt(row["prompt"], row["answer"], columns={"tags": row["tags"]}) for row in TEXTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompts(form):
    assert prompts_of(FORMS[form]) == prompts_of(FORMS["list"])
    assert [(p.content, p.answer, p.index, p.source) for p in prompts_of(FORMS[form])][-1] == (
        "4+1=",
        5,
        4,
        "memory",
    )


def test_texts_chats_and_prompts_are_rows_without_columns():
    given = Prompt("3", answer="4", source="mine", reward=WeightedChoice(name="exact"), sampling={"top_k": 2})
    text, chat, prompt = prompts_of(["1+1=", CHAT, given])
    assert (text.content, chat.content, text.answer) == ("1+1=", CHAT, None)
    assert (prompt.source, prompt.reward, prompt.sampling, prompt.index) == (
        "mine",
        given.reward,
        {"top_k": 2},
        2,
    )


def test_a_list_of_whole_chats_is_learned():
    chat = [*CHAT, {"role": "assistant", "content": "2"}]
    (example,), _ = load_examples(
        rows_in_memory([chat], "train_dataset", "train"), SFTDataConfig(), split="train"
    )
    assert (example.content, example.answer.indices) == (chat, (1,))


def test_cells_of_pandas_become_plain_values():
    frame = pd.DataFrame(
        {
            "prompt": [np.array(CHAT, dtype=object), "b"],
            "answer": [1, None],
            "when": [pd.NaT, pd.NaT],
            "kind": pd.Series(["x", None], dtype="string"),
            "size": np.array([3, 4]),
        }
    )
    chat, text = prompts_of(frame)
    assert (chat.content, chat.answer, chat.columns) == (CHAT, 1.0, {"when": None, "kind": "x", "size": 3})
    assert (text.answer, text.columns["kind"], type(text.columns["size"])) == (None, None, int)


def test_a_malformed_row_is_named_by_its_number():
    with pytest.raises(
        ValueError, match=r"1 of 3 rows cannot be used:\n  train_dataset, row 1: need a column 'pr"
    ):
        prompts_of([TEXTS[0], {"text": "a"}, TEXTS[1]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.jsonl", "the path of a file goes to data.train"),
        ({"prompt": ["a"]}, "datasets.Dataset.from_dict"),
        (CHAT, r"need a list of chats as train_dataset, got one chat"),
        (generated(), "make it a list"),
        (pd.Series(["a", "b"]), r"make it a list: train_dataset=list\(...\)"),
        (3, "need a datasets.Dataset or IterableDataset, a pandas DataFrame, .* got int 3"),
        (["a", 3], "got row 1: int 3"),
        (datasets.DatasetDict(dev=datasets.Dataset.from_list(TEXTS)), "need the split 'train' .* it has dev"),
        (
            pd.DataFrame([[1, 2]], columns=["a", "a"]),
            "need each column of train_dataset once, got 'a' 2 times",
        ),
    ],
)
def test_another_value_is_refused_with_the_way_out(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rows_in_memory(data, "train_dataset", "train")


def test_a_stream_without_an_end_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(dataset, "_MAX_STREAMED", 5)
    ended = datasets.IterableDataset.from_generator(generated)
    assert len(prompts_of(ended)) == 5
    message = r"need rows that end for data.train, got more than 5 of the stream .*train_dataset.take\(1000\)"
    with pytest.raises(ValueError, match=message):
        prompts_of(datasets.IterableDataset.from_generator(endless))


def test_rows_in_memory_stand_in_for_a_source_of_the_settings():
    assert with_memory("a.jsonl", None, "train") == "a.jsonl"
    mixed = [DataSource(path="task:add-2"), DataSource(path="memory", name="mine", weight=2)]
    _, rows = with_memory(mixed, TEXTS, "train")
    assert (rows.source.weight, rows.label, len(list(rows))) == (2, "train_dataset", 5)
    with pytest.raises(ValueError, match="need train_dataset or data.train, got both"):
        with_memory("a.jsonl", TEXTS, "train")
    with pytest.raises(ValueError, match="need test_dataset of the trainer for data.test=memory, got none"):
        with_memory("memory", None, "test")


@pytest.mark.parametrize("form", ["list", "stream", "dataset"])
def test_a_pass_over_rows_in_memory_goes_on_in_the_middle(form):
    stream = rows_in_memory(FORMS[form], "train_dataset", "train")
    rows = iter(stream)
    first = [next(rows) for _ in range(2)]
    other = rows_in_memory(FORMS[form], "train_dataset", "train")
    other.load_state_dict(stream.state_dict())
    assert first + list(other) == list(rows_in_memory(FORMS[form], "train_dataset", "train"))
    assert stream.is_streamed == (form == "stream")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.datetime64("2024-05-01"), date(2024, 5, 1)),
        (np.datetime64("2024-05-01T09:30", "ns"), datetime(2024, 5, 1, 9, 30)),
        (np.array(["2024-05-01"], dtype="datetime64[ns]"), [datetime(2024, 5, 1)]),
        (np.timedelta64(90, "s").astype("timedelta64[ns]"), timedelta(seconds=90)),
        (pd.Timestamp("2024-05-01 09:30"), datetime(2024, 5, 1, 9, 30)),
        (pd.Timestamp("2024-05-01 09:30", tz="UTC"), datetime(2024, 5, 1, 9, 30, tzinfo=timezone.utc)),
        (torch.tensor([1, 2]), [1, 2]),
        (np.str_("a"), "a"),
        (pd.NA, None),
    ],
)
def test_times_and_tensors_become_pythons_own(value, expected):
    (prompt,) = prompts_of([{"prompt": "a", "answer": value}])
    assert prompt.answer == expected and type(prompt.answer) is type(expected)


def test_values_that_would_lose_a_part_are_malformed():
    rows = [
        {"prompt": "a", "answer": np.datetime64("2024-05-01T00:00:00.000000001")},
        {"prompt": "a", "answer": pd.Timestamp(1)},
        {"prompt": "a", "answer": "1", 1: "x", "1": "y"},
    ]
    with pytest.raises(ValueError, match=r"3 of 3 rows") as error:
        prompts_of(rows)
    assert str(error.value).count("need times of whole microseconds") == 2
    assert "row 2: need each column once, got '1' 2 times" in str(error.value)


def test_a_split_is_taken_of_data_sets_and_refused_for_other_rows():
    whole = FORMS["dataset"]
    source = DataSource(path="memory", split="train[1:3]")
    for data in (whole, datasets.DatasetDict(train=whole)):
        rows = rows_in_memory(data, "train_dataset", "train", source=source)
        assert [row["prompt"] for _, row in rows] == ["1+1=", "2+1="]
    with pytest.raises(ValueError, match="as train_dataset for split 'train.1:3.', got list"):
        rows_in_memory(TEXTS, "train_dataset", "train", source=source)
    stood_in = rows_in_memory(datasets.DatasetDict(validation=whole), "test_dataset", "test")
    assert stood_in.notes == ("memory has no split 'test', so data.test is its 'validation'",)
    with pytest.raises(ValueError, match="need the source 'memory' once in data.train, got it 2 times"):
        with_memory(["memory", "memory"], TEXTS, "train")


def test_reward_and_sampling_of_prompts_are_checked_as_those_of_rows():
    (prompt,) = prompts_of([Prompt("a", reward="exact", sampling={"max_tokens": 3})])
    assert (prompt.reward, prompt.sampling) == (WeightedChoice(name="exact"), {"max_tokens": 3})
    with pytest.raises(ValueError, match="row 0: .* got 'max_token'; did you mean max_tokens"):
        prompts_of([Prompt("a", sampling={"max_token": 3})])
    with pytest.raises(ValueError, match="row 0: need a reward function by name"):
        prompts_of([Prompt("a", reward=3)])


def test_a_transform_of_a_data_set_is_applied():
    shouted = FORMS["dataset"].with_transform(lambda rows: {"prompt": [f"{p}!" for p in rows["prompt"]]})
    assert [prompt.content for prompt in prompts_of(shouted)][:2] == ["0+1=!", "1+1=!"]
    later = rows_in_memory(shouted, "train_dataset", "train").rows_from(4)
    assert [row for _, row in later] == [{"prompt": "4+1=!"}]
