"""`verl data`: what a run would read, in every kind of run, and a sentence for each oddity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl.cli.main import main
from verl.engines.hf.pretrained import make_tiny_model


def answered(text: str) -> list[dict[str, str]]:
    return [*CHAT, {"role": "assistant", "content": text}]


CHAT = [{"role": "user", "content": "What is 6*7? (42)"}]
ODD = [
    {"prompt": CHAT, "answer": "42", "images": ["a.png"]},
    {"prompt": " 1+1=", "answer": 2.0},
    {"prompt": "3+3=", "answer": {"a": 1, "b": 2}},
    {"prompt": "3+3=", "answer": " x "},
    {"prompt": [{"role": "system", "content": "be kind"}], "answer": "['a', 'b']"},
    {"question": "q?", "response": None},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder, hidden=32, layers=1)
    return folder


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_report_has_columns_lengths_references_and_samples(model, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", *({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)))
    found = str(tmp_path / "found.json")
    assert main(["data", source, "--model", str(model), "--json", found, "data.max_prompt_tokens=4"]) == 0
    text, report = capsys.readouterr().out, json.loads(Path(found).read_text())
    assert report["rows"] == {"read": 20, "usable": 20, "all": 20}
    assert report["layouts"] == {"prompt (text), answer": 20}
    assert report["columns"]["answer"] == {"types": {"text": 20}, "empty": 0, "example": "1"}
    assert report["tokens"]["prompt"] == {"min": 4, "median": 4.5, "p95": 5, "max": 5, "over": 10}
    references = report["references"]
    assert (references["none"], references["different"], references["comparable"]["exact"]) == (0, 20, 20)
    assert report["samples"][0] == {"prompt": "0+1=", "reference": "1"}
    assert "prompt     0+1=" in text
    assert "10 of 20 rows have more than 4 tokens in the prompt, data.max_prompt_tokens" in text


ODDITIES = [
    "the rows have several layouts: ",
    "1 of 6 rows repeat an earlier prompt",
    "1 prompts occur with different answers",
    "1 of 6 texts begin or end with white space",
    "4 prompts are texts and 2 chats",
    "1 of 2 chats have no message of the user",
    "1 of 6 rows have no reference answer",
    "1 of 5 reference answers begin or end with white space",
    "1 of 5 reference answers occur in their prompts",
    "1 of 5 reference answers can be compared by no built-in reward: row 2 of odd",
    "2 of 2 prompts of data.test are in data.train",
    "the model does not see the columns images (1 rows)",
    "1 reference answers are the text of a list",
    "1 of 6 rows repeat",
]


def test_every_oddity_is_a_sentence(tmp_path, capsys):
    source, held_out = write(tmp_path / "odd.jsonl", *ODD), write(tmp_path / "test.jsonl", *ODD[:2])
    assert main(["data", source, f"data.test={held_out}"]) == 0
    text = capsys.readouterr().out
    assert [line for line in ODDITIES if line not in text] == []
    assert "tokens are not counted: name a model with --model" in text


def test_what_only_a_tokenizer_sees_is_said(model, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", {"prompt": "<bos><bos><bos>a<eos>", "answer": "a"})
    assert main(["data", source, f"policy.path={model}"]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 prompts begin with two start tokens <bos>" in text
    assert "prompts contain the text of special tokens, which the model reads as such: <bos> (1 rows)" in text


@pytest.mark.parametrize(
    ("kind", "row", "parts"),
    [
        ("sft", {"messages": answered("42")}, {"prompt", "answer", "row"}),
        ("sft", {"prompt": "a", "completion": "b"}, {"prompt", "answer", "row"}),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt", "chosen", "rejected"}),
        (
            "reward-model",
            {"chosen": answered("42"), "rejected": answered("41")},
            {"prompt", "chosen", "rejected"},
        ),
    ],
)
def test_every_kind_of_run_is_shown(kind, row, parts, model, tmp_path, capsys):
    found = tmp_path / "found.json"
    source = write(tmp_path / "rows.jsonl", row)
    assert main(["data", source, "--for", kind, "--model", str(model), "--json", str(found)]) == 0
    report = json.loads(found.read_text())
    assert report["tokens"].keys() == parts
    assert report["samples"][0].keys() == parts - {"row"}
    assert main(["data", source, "--for", kind]) == 0


def test_sources_of_every_kind_are_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *ODD[:1])
    assert main(["data", "task:add-2", "--rows", "3"]) == 0
    assert "rows: 3 read of 7500, 3 usable" in capsys.readouterr().out
    assert main(["data", "[rows.jsonl, {path: task:add-2, name: sums}]", "--split", "test"]) == 0
    assert "source: rows.jsonl, task:add-2" in capsys.readouterr().out
    assert main(["data", "data.train=rows.jsonl"]) == 0
    capsys.readouterr()
    for kind in ("train", "sft"):  # a stream is shown by its first rows
        assert main(["data", "{path: rows.jsonl, streaming: true}", "--for", kind]) == 0
        assert "rows: 1 read, 1 usable" in capsys.readouterr().out


def test_what_cannot_be_read_is_an_error(tmp_path, capsys):
    assert main(["data", str(tmp_path / "none.jsonl")]) == 1
    assert "which does not exist" in capsys.readouterr().err
    source = write(tmp_path / "rows.jsonl", ODD[0], {"text": "a"})
    assert main(["data", source]) == 1
    assert "1 rows cannot be used, and stop a run" in capsys.readouterr().out
    assert main(["data", source, "data.on_malformed=skip"]) == 0
    assert "1 rows cannot be used, and are skipped, as data.on_malformed says" in capsys.readouterr().out


def test_what_no_run_could_use_is_an_error(tmp_path, model, capsys):
    source = write(tmp_path / "rows.jsonl", ODD[1])
    limit = "data.max_prompt_tokens=1"
    assert main(["data", source, "--model", str(model), limit]) == 1
    assert "1 of 1 rows have more than 1 tokens in the prompt" in capsys.readouterr().out
    for given, message in {
        (source, "--rows", "-1"): "need --rows of at least 1, got -1",
        (source, "--rows", "0"): "need --rows of at least 1, got 0",
        (source, "--samples", "-1"): "need --samples of at least 0, got -1",
        ("memory",): "need train_dataset of the trainer for data.train=memory, got none",
    }.items():
        assert main(["data", *given]) == 1
        assert message in capsys.readouterr().err
