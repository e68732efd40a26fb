import json

import pytest

from verl.rewards.library.json_answers import check_schema, json_schema, prepare_schema
from verl.utils.sampling_types import Prompt

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"name": "a", "age": 1}', 1.0),
        ('Here:\n```json\n{"name": "x"}\n```\nor\n```\n{"name": "a", "age": 1}\n```\n', 1.0),
        ('{"name": "a", "age": -1}', 0.0),
        ('{"name": "a"}', 0.0),
        ('{"name": "a", "age": 1, "more": 2}', 0.0),
        ('{"name": "a", "age": NaN}', 0.0),
        ("no json", 0.0),
        ('<think>{"name": 1}</think>{"name": "a", "age": 1}', 1.0),
        ('```json {"name": "a", "age": 1} ```', 1.0),
        ('~~~json\r\n{"name": "a", "age": 1}\r\n~~~', 1.0),
        ('```json\n{"name": "a", "age": 1}', 1.0),
        ('\ufeff{"name": "a", "age": 1}', 1.0),
        ('[1]\nThen:\n```\n{"name": "a", "age": 1}\n```', 1.0),
        ('{"name": "a", "age": 1} of course', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_an_answer_or_its_last_block_validates(text, score):
    made = json_schema(text, schema=PERSON)
    assert (made["score"], made["acc"]) == (score, score) and bool(made["json_error"]) != bool(score)


@pytest.mark.parametrize(
    ("value", "share"),
    [
        ({"name": "a", "age": 1}, 1.0),
        ({"name": "a", "age": -1}, 0.5),
        ({"name": "a"}, 0.5),
        ({"name": 1}, 0.0),
        ({"name": "a", "age": 1, "more": 2}, 2 / 3),
        ([1], 0.0),
    ],
)
def test_the_share_of_right_fields(value, share):
    assert json_schema(json.dumps(value), schema=PERSON, partial=True)["score"] == pytest.approx(share)


def test_the_schema_comes_from_an_option_a_file_or_a_column(tmp_path):
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    answer = '{"name": "a", "age": 1}'
    assert json_schema(answer, schema=json.dumps(PERSON))["score"] == 1.0
    assert json_schema(answer, schema_file=str(file))["score"] == 1.0
    assert json_schema(answer, schema_key="form", form=PERSON)["score"] == 1.0
    check_schema(Prompt("q", columns={"schema": PERSON}))
    check_schema(Prompt("q"), schema=PERSON)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "objekt"}}, "not valid: 'objekt'"),
        ({"schema": "{"}, "a text that is no JSON"),
        ({"schema_file": "none.json"}, "'none.json', which cannot be read: No such file"),
        ({"schema_file": "x", "schema": {}}, "got both"),
    ],
)
def test_a_schema_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prepare_schema(**options)


def test_a_row_without_a_schema_is_refused_and_no_reference_is_fetched():
    with pytest.raises(ValueError, match="row 3 of set, column 'schema': need a JSON schema, got none"):
        check_schema(Prompt("q", source="set", index=3))
    with pytest.raises(Exception, match="http://example.com/x.json"):
        json_schema("1", schema={"$ref": "http://example.com/x.json"})
