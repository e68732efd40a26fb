"""Tests of reading pairs in every form, and of the wrong answers of our own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.config.data import PairsDataConfig
from verl.data.dataset import PromptLoader
from verl.data.preference_pairs import Pair, load_pairs
from verl.data.tasks.answer_tasks import ANSWER_TASKS as TASKS
from verl.data.tasks.answer_tasks import near_miss
from verl.data.tasks.table import write_jsonl
from verl.utils.sampling_types import Prompt

ASKED = {"role": "user", "content": "1+1?"}
RIGHT, WRONG = ({"role": "assistant", "content": text} for text in ("2", "3"))
BEFORE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, ASKED]

FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "texts": ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1="),
    "a chat and texts": ({"prompt": [ASKED], "chosen": "2", "rejected": "3"}, [ASKED]),
    "a chat and messages": ({"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}, [ASKED]),
    "whole chats": ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}, [ASKED]),
    "whole chats of several turns": ({"chosen": [*BEFORE, RIGHT], "rejected": [*BEFORE, WRONG]}, BEFORE),
    "whole chats beside their prompt": (
        {"prompt": [ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        [ASKED],
    ),
    "whole chats beside its first question": (
        {"prompt": "hi", "chosen": [*BEFORE, RIGHT], "rejected": [*BEFORE, WRONG]},
        BEFORE,
    ),
}


def jsonl(folder: Path, *rows: Any) -> str:
    """A file of these rows."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_a_prompt_and_two_texts(form: str, tmp_path: Path):
    row, content = FORMS[form]
    pairs, report = load_pairs(jsonl(tmp_path, {**row, "level": 3}), PairsDataConfig(), split="train")
    assert pairs == [Prompt(content, Pair("2", "3"), "pairs", 0, {"level": 3})]
    assert (report.num_rows, report.num_malformed) == (1, 0)


def test_tables_and_saved_data_sets_are_read_as_files_are(tmp_path: Path):
    rows = [FORMS["whole chats"][0]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    for source in (tmp_path / "a.parquet", tmp_path / "a"):
        assert load_pairs(str(source), PairsDataConfig(), split="train")[0][0].answer == ("2", "3")


def test_columns_of_pairs_may_have_other_names(tmp_path: Path):
    config = PairsDataConfig(prompt_key="question", chosen_key="better", rejected_key="worse")
    row = {"question": "1+1=", "better": "2", "worse": "3", "chosen": "unused"}
    assert load_pairs(jsonl(tmp_path, row), config, split="train")[0] == [
        Prompt("1+1=", Pair("2", "3"), "pairs", 0, {"chosen": "unused"})
    ]


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}


def test_answers_may_have_several_turns_and_calls_of_tools(tmp_path: Path):
    tool = {"type": "function", "function": {"name": "add"}}
    result = {"role": "tool", "content": "2"}
    row = {"chosen": [ASKED, CALL, result, RIGHT], "rejected": [ASKED, WRONG], "tools": [tool]}
    pairs, _ = load_pairs(jsonl(tmp_path, row), PairsDataConfig(), split="train")
    assert pairs == [Prompt([ASKED], Pair([CALL, result, RIGHT], "3"), "pairs", 0, tools=(tool,))]


def test_pairs_of_other_layouts_have_the_prompt_of_their_layout(tmp_path: Path):
    rows = [
        {"question": "1+1=", "chosen": "2", "rejected": "3"},
        {"instruction": "add", "input": "1+1", "chosen": "2", "rejected": "3"},
        {"prompt": " 1+1? ", "chosen": json.dumps([ASKED, RIGHT]), "rejected": json.dumps([ASKED, WRONG])},
    ]
    pairs, _ = load_pairs(jsonl(tmp_path, *rows), PairsDataConfig(), split="train")
    contents = ["1+1=", [{"role": "user", "content": "add\n1+1"}], [ASKED]]
    assert [(p.content, p.answer) for p in pairs] == [(c, ("2", "3")) for c in contents]


def test_columns_that_the_prompt_is_from_are_not_named_as_unseen(tmp_path: Path):
    row = {"instruction": "add", "input": "1+1", "chosen": "2", "rejected": "3"}
    assert load_pairs(jsonl(tmp_path, row), PairsDataConfig(), split="train")[1].notes == ()


def test_answers_that_repeat_their_prompts_in_all_rows_are_refused(tmp_path: Path):
    asked = "\n\nHuman: 1+1?\n\nAssistant:"
    rows = [{"prompt": asked, "chosen": f"{asked} 2", "rejected": f"{asked} 3"}] * 2
    with pytest.raises(ValueError, match="in all 2 rows .* both answers begin with the prompt"):
        load_pairs(jsonl(tmp_path, *rows), PairsDataConfig(), split="train")
    once = [*rows, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert len(load_pairs(jsonl(tmp_path, *once), PairsDataConfig(), split="train")[0]) == 3


MALFORMED = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "need a column 'rejected', there are 'prompt', 'chosen'"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "need a column 'prompt' beside chosen and rejected"),
    "empty": (
        {"prompt": "a", "chosen": "", "rejected": "c"},
        "need an answer in chosen that is a text and not empty, got str ''",
    ),
    "number": (
        {"prompt": "a", "chosen": "b", "rejected": 3},
        "need an answer in rejected that is a text and not empty, got int 3",
    ),
    "no messages": (
        {"chosen": [], "rejected": [WRONG]},
        "need an answer in chosen that is a text and not empty, got list",
    ),
    "no answer": (
        {"chosen": [ASKED], "rejected": [ASKED, WRONG]},
        "messages in chosen that end with the assistant's, got one of role 'user'",
    ),
    "apart": (
        {"chosen": [ASKED, RIGHT], "rejected": [*BEFORE, WRONG]},
        "different messages of role .user. and .user.",
    ),
    "another prompt": (
        {"prompt": "2+2?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
        "but the chats of chosen and rejected begin",
    ),
    "mixed": (
        {"prompt": "a", "chosen": [RIGHT], "rejected": [WRONG]},
        "need a prompt of chat messages where the answers are",
    ),
    "surrogate": ({"prompt": "a", "chosen": "\ud83d", "rejected": "c"}, "half a surrogate pair"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_pair_stops_the_start_or_is_skipped(name: str, tmp_path: Path):
    row, message = MALFORMED[name]
    source = jsonl(tmp_path, FORMS["texts"][0], row)
    with pytest.raises(ValueError, match=f"(?s)1 of 2 rows.*line 2: .*{message}"):
        load_pairs(source, PairsDataConfig(), split="train")
    pairs, report = load_pairs(source, PairsDataConfig(on_malformed="skip"), split="train")
    assert len(pairs) == 1 and report.num_malformed == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_right_answers_and_near_misses(name: str, tmp_path: Path):
    pairs, _ = load_pairs(f"task:{name}", PairsDataConfig(), split="test")
    rows = TASKS[name].rows("test")
    assert [(p.content, p.answer.chosen) for p in pairs] == [(row["prompt"], row["answer"]) for row in rows]
    for prompt in pairs:
        chosen, rejected = prompt.answer
        assert rejected and rejected != chosen
        assert len(rejected) in (len(chosen) - 1, len(chosen))
        assert len(rejected) < len(chosen) or sum(a != b for a, b in zip(chosen, rejected, strict=True)) <= 2
    assert write_jsonl(TASKS[name], "test", tmp_path / "pairs.jsonl", form="pairs") == len(rows)
    written, _ = load_pairs(str(tmp_path / "pairs.jsonl"), PairsDataConfig(), split="train")
    assert [p.answer for p in written] == [p.answer for p in pairs]


@given(
    st.text("0123456789abcdefgh,", min_size=1, max_size=9).filter(lambda text: text.strip(",")),
    st.text(max_size=5),
)
def test_a_near_miss_is_never_the_answer_nor_empty_and_always_the_same(answer: str, key: str):
    wrong = near_miss(answer, key=key)
    assert wrong and wrong != answer
    assert wrong == near_miss(answer, key=key)


def test_near_misses_are_of_every_kind_and_stay_the_same_in_every_version():
    wrong = [near_miss("0123", key=str(i)) for i in range(200)]
    differences = [
        sum(a != b for a, b in zip("0123", w, strict=True)) if len(w) == 4 else "missing" for w in wrong
    ]
    assert {1, 2, "missing"} <= set(differences)
    assert any(sorted(w) == list("0123") for w in wrong)
    assert wrong[:6] == ["013", "012", "0322", "012", "1023", "1023"]


def test_a_loader_of_pairs_notices_other_answers(tmp_path: Path):
    loaders = []
    for rejected in ("3", "4"):
        pairs, _ = load_pairs(
            jsonl(tmp_path, {"prompt": "1+1=", "chosen": "2", "rejected": rejected}),
            PairsDataConfig(),
            split="train",
        )
        loaders.append(PromptLoader(pairs, seed=0, shuffle=True))
    with pytest.raises(ValueError, match="fingerprint was"):
        loaders[1].load_state_dict(loaders[0].state_dict())
