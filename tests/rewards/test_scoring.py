"""Scores of answers outside of training."""

import json

import pytest

from verl.config.data import RewardsConfig
from verl.data.reading.row_cells import MalformedRow
from verl.rewards.answer_files import AnswerColumns, answer_texts
from verl.rewards.scoring import score_answers

ROWS = [
    {"question": "1+1", "response": ["2", "3"], "ground_truth": "2", "data_source": "sums"},
    {
        "question": "capital",
        "response": ["**Paris**.", "Rome"],
        "ground_truth": ["Paris"],
        "data_source": "cities",
    },
]


def test_a_file_with_several_answers_per_row_is_scored_with_figures_by_source(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    report = score_answers(str(file), [{"name": "exact", "normalize": "loose"}, "repetition"])
    figures = report.figures()
    assert (figures["rows"], figures["answers"], figures["reward"], figures["failed"]) == (2, 4, 0.5, 0)
    assert (figures["accuracy"], figures["pass"], figures["outcomes"]) == (0.5, 1.0, {})
    assert figures["functions"]["exact"] == {"mean": 0.5, "answers": 4, "accuracy": 0.5}
    assert "accuracy" not in figures["functions"]["repetition"]
    assert {source: f["accuracy"] for source, f in figures["sources"].items()} == {"sums": 0.5, "cities": 0.5}
    assert [row["reward"] for row in report.rows()] == [1.0, 0.0, 1.0, 0.0]
    assert [answer.text for answer in report.worst(2)] == ["3", "Rome"]
    assert report.columns == AnswerColumns("question", "response", "ground_truth")


def test_each_function_has_its_own_accuracy_whatever_its_place():
    rows = [{"response": "Answer: 2", "reference": "2"}, {"response": "3", "reference": "3"}]
    figures = score_answers(rows, ["repetition", "exact", "contains"]).figures()
    assert figures["accuracy"] == 0.5
    assert {name: f.get("accuracy") for name, f in figures["functions"].items()} == {
        "repetition": None,
        "exact": 0.5,
        "contains": 1.0,
    }


def test_rows_that_an_evaluation_writes_are_read_with_their_columns():
    row = {
        "prompt": "q",
        "response": "B",
        "reference": 1,
        "columns": {"choices": ["x", "y"], "data_source": "mc"},
    }
    report = score_answers([row], ["choice"])
    assert (report.answers[0].reward, report.answers[0].prompt.source) == (1.0, "mc")


def test_answers_of_an_evaluation_to_one_prompt_are_a_group():
    row = {"set": "a", "index": 4, "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
    row |= {"reference": "b", "columns": {}, "greedy": False, "source": "mine"}
    report = score_answers([row | {"response": "a"}, row | {"response": "b"}], ["exact"])
    assert report.figures()["pass"] == 1.0 and report.figures()["rows"] == 1
    assert report.answers[0].prompt.content == row["messages"] and report.notes == []


def test_greedy_answers_of_an_evaluation_beside_sampled_ones_are_said():
    row = {"set": "a", "index": 4, "prompt": "hi", "reference": "b", "columns": {}, "response": "b"}
    report = score_answers([row | {"sample": 0, "greedy": greedy} for greedy in (False, True)], ["exact"])
    assert report.notes == ["1 of 2 answers are greedy ones, which count as the sampled ones do"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "q", "answer": "a", "reference": "r"}, ("question", "answer", "reference")),
        ({"prompt": "q", "completion": "a", "answer": "r"}, ("prompt", "completion", "answer")),
        ({"output": "a"}, (None, "output", None)),
    ],
)
def test_columns_are_found_by_known_names(row, columns):
    assert AnswerColumns().found_in(row) == AnswerColumns(*columns)


def test_columns_can_be_named_and_a_file_without_answers_is_refused():
    row = {"a": "x", "b": "x"}
    report = score_answers([row], ["exact"], columns=AnswerColumns(response="a", reference="b"))
    assert report.answers[0].reward == 1.0
    with pytest.raises(ValueError, match="need a column with the answers .* the file has prompt, answer"):
        score_answers([{"prompt": "q", "answer": "a"}], ["exact"])
    with pytest.raises(ValueError, match="need a column 'c' for the response, the file has a, b"):
        score_answers([row], ["exact"], columns=AnswerColumns(response="c"))


def test_answers_are_texts_or_messages():
    assert answer_texts([{"role": "assistant", "content": "a"}]) == ["a"]
    assert answer_texts([[{"role": "assistant", "content": "a"}], "b"]) == ["a", "b"]
    for cell in (None, [], 5, [{"role": "assistant"}]):
        with pytest.raises(MalformedRow):
            answer_texts(cell)


def test_the_checks_and_the_failures_are_those_of_training():
    with pytest.raises(ValueError, match="'exact': row 0 of rows, .*got none"):
        score_answers([{"response": "a"}], ["exact"])
    report = score_answers(
        [{"response": "a"}, {"response": ""}], reward_fn=lambda response: 1 / len(response)
    )
    figures = report.figures()
    assert (figures["reward"], figures["failed"], figures["outcomes"]) == (1.0, 1, {"reward_error": 1})
    with pytest.raises(ValueError, match="needs the tokens of an answer"):
        score_answers([{"response": "a"}], reward_fn=lambda completion_ids: [0.0])


def test_a_row_may_name_its_function_and_a_public_data_set_chooses_one():
    rows = [{"response": "a", "reference": "A", "by": '{"name": "exact", "normalize": "loose"}'}]
    assert score_answers(rows, settings=RewardsConfig(column="by")).answers[0].reward == 1.0
    known = {
        "response": "<answer>The a</answer>",
        "reference": {"target": ["A", "a"]},
        "data_source": "searchR1_nq",
    }
    report = score_answers([known])
    assert report.notes == [
        "no reward function is named, so they are chosen by the data set (searchR1_nq: exact)"
    ]
