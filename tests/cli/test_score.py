"""`verl score`: rewards of a file of answers."""

import json

import pytest

from verl.cli.main import main
from verl.cli.score import score_settings

ROWS = [
    {"prompt": "1+1=", "response": "Answer: 2", "reference": "2"},
    {"prompt": "1+2=", "response": "4", "reference": "3"},
]


@pytest.fixture
def answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return "answers.jsonl"


def test_a_file_is_scored_printed_and_written(answers, tmp_path, capsys):
    functions = ["--with", "contains", "--with", "repetition", "weight=0.5", "ngram=1"]
    assert main(["score", answers, *functions, "--output", "scored.jsonl", "--json", "figures.json"]) == 0
    shown = capsys.readouterr().out
    assert "columns: prompt: prompt; response: response; reference: reference" in shown
    assert "row 1: '4'" in shown and "reference 3; reward 0" in shown
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [(row["reward"], row["scores"]["accuracy"]) for row in scored] == [(1.0, 1.0), (0.0, 0.0)]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["accuracy"], figures["functions"]["repetition"]["mean"]) == (0.5, 0.0)


def test_the_functions_are_listed(capsys):
    assert main(["score", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("similarity") and "threshold=1.0" in line for line in lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "need a file of answers"),
        (["answers.jsonl"], "need at least one reward function"),
        (["answers.jsonl", "--with", "exakt"], "the nearest is exact"),
        (["answers.jsonl", "--with", "exact", "normalise=loose"], "the nearest is normalize"),
        (["answers.jsonl", "--with", "exact", "--output", "no/x.jsonl"], "need an existing folder"),
    ],
)
def test_mistakes_are_one_message(answers, argv, message, capsys):
    assert main(["score", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_text_is_taken_as_it_was_typed_and_other_values_as_yaml():
    (choice,) = score_settings([["regex", r"pattern=#### (\d+) #", "group=1", "flags=[dotall]"]]).functions
    assert choice.options == {"pattern": r"#### (\d+) #", "group": 1, "flags": ["dotall"]}
    with pytest.raises(ValueError, match="the file of answers comes before --with"):
        score_settings([["exact", "answers.jsonl"]])
