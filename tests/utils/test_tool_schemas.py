"""Tools of the setting `data.tools`: schemas in JSON, and Python functions."""

from __future__ import annotations

import json

import pytest

from verl.utils.tool_schemas import load_tools

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
SOURCE = '''
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def untyped(a):
    """Do nothing."""


both = [add, {"name": "flat"}]
'''


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "my_tools.py"
    path.write_text(SOURCE)
    return path


def test_schemas_in_json_are_taken_as_they_are(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([ADD]))
    assert load_tools(str(tmp_path / "tools.json")) == (ADD,)


def test_functions_become_schemas(module, monkeypatch):
    monkeypatch.syspath_prepend(module.parent)
    for place in (str(module), "my_tools"):
        (schema,) = load_tools(f"{place}:add")
        assert schema["function"]["name"] == "add" and schema["function"]["description"] == "Add two numbers."
        assert schema["function"]["parameters"]["properties"]["b"] == {
            "type": "integer",
            "description": "the second.",
        }
    assert [tool.get("name") for tool in load_tools(f"{module}:both")] == [None, "flat"]


def test_what_is_no_tool_is_refused(module, tmp_path):
    for text, message in (
        ("{}", "need a list of schemas"),
        ('[{"a": 1}]', "need tools as"),
        ("[", "JSON file"),
    ):
        (tmp_path / "tools.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tools(str(tmp_path / "tools.json"))
    for name, message in (("nothing", "has no attribute"), ("untyped", "need types and a docstring")):
        with pytest.raises(ValueError, match=message):
            load_tools(f"{module}:{name}")
    with pytest.raises(ValueError, match=r"there is no file nowhere.py"):
        load_tools("nowhere.py:add")
