"""Tools of a run: schemas, checked arguments, results, failures, and rows that choose some of them."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from dataclasses import dataclass

import pytest

from verl.agents.environments.session import EpisodeFailure, EpisodeStart, ToolResult
from verl.agents.tools.tool_set import build_tools
from verl.config.agent import AgentConfig
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall

FILE = '''
import asyncio, os, sys, time
from verl.agents.environments.session import ToolResult
from verl.agents.tools.tool_source import ToolEpisode

def add(a: int, b: int = 2, note: str | None = None) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
        note: A remark.
    """
    return a + b

async def later(text: str) -> dict:
    """Give a text back.

    Args:
        text: The text.
    """
    await asyncio.sleep(0)
    return {"text": text, "pid": os.getpid()}

def who(question: str, episode: ToolEpisode) -> list:
    """Say whose episode it is.

    Args:
        question: Anything.
    """
    return [episode.id, episode.columns["city"], episode.answer]

def misbehaves(how: str) -> object:
    """Misbehave.

    Args:
        how: The way.
    """
    if how == "raises":
        raise ValueError("not today")
    if how == "hangs":
        while True:
            pass
    if how == "exits":
        os._exit(7)
    if how == "object":
        return object()
    if how == "long":
        return "a" * 600 + "b" * 600
    if how == "floods":
        for _ in range(20_000):
            print("x" * 100)
    if how == "rewards":
        return ToolResult("well done", reward=0.5, metrics={"size": 3})
    return how

def scale(number: float, factor: float) -> float:
    """Multiply.

    Args:
        number: The number.
    """
    return number * factor

class Lookup:
    """Look words up."""
    name = "lookup"
    def __init__(self, table: dict):
        self.table = table
    def __call__(self, word: str) -> str:
        """Look a word up.

        Args:
            word: The word.
        """
        return self.table.get(word, "unknown")

def silent(x):
    return x
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "my_tools.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def tools(file):
    names = [f"{file}:{name}" for name in ("add", "later", "who", "misbehaves")]
    bound = [
        {"name": f"{file}:scale", "factor": 3},
        {"name": f"{file}:Lookup", "table": {"tree": "arbor"}},
    ]
    config = AgentConfig(tools=[*names, *bound], call_timeout_s=20.0, max_result_chars=1000)
    built = build_tools(config)
    yield built
    built.close()


def call_all(tools, *calls, prompt=None):
    async def run():
        session = await tools.open(EpisodeStart(prompt or Prompt("q"), episode_id="e1"))
        try:
            return await session.call([ToolCall(name, arguments) for name, arguments in calls])
        finally:
            await session.close()

    return asyncio.run(run())


def call(tools, name, /, **arguments):
    return call_all(tools, (name, arguments))[0]


def test_types_and_docstring_make_the_schema_and_a_process_runs_the_function(tools):
    (schema,) = [each["function"] for each in tools.schemas if each["function"]["name"] == "add"]
    assert schema["description"] == "Add two numbers."
    assert schema["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first one."}
    assert schema["parameters"]["required"] == ["a"] and "return" not in schema
    assert call(tools, "add", a=3, b=4) == ToolResult("7")
    result = json.loads(call(tools, "later", text="ü").text)
    assert result["text"] == "ü" and result["pid"] != os.getpid()


def test_results_are_in_the_order_of_the_calls_which_run_at_once(tools):
    results = call_all(
        tools, ("later", {"text": "first"}), ("add", {"a": 1}), ("none", {}), ("add", {"a": 5})
    )
    assert [result.outcome for result in results] == ["ok", "ok", "unknown_tool", "ok"]
    assert json.loads(results[0].text)["text"] == "first" and [results[1].text, results[3].text] == ["3", "7"]


def test_a_tool_hears_of_its_episode_and_the_policy_does_not(tools):
    (schema,) = [each["function"] for each in tools.schemas if each["function"]["name"] == "who"]
    assert list(schema["parameters"]["properties"]) == ["question"]
    prompt = Prompt("q", answer="42", columns={"city": "Bonn"})
    (result,) = call_all(tools, ("who", {"question": "?"}), prompt=prompt)
    assert json.loads(result.text) == ["e1", "Bonn", "42"]


def test_options_are_bound_and_hidden(tools):
    assert call(tools, "scale", number=2).text == "6"
    assert call(tools, "lookup", word="tree").text == "arbor"
    result = call(tools, "scale", number=2, factor=5)
    assert result.outcome == "bad_arguments"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"a": "3", "b": "4.0"},
            "Error: add: b: '4.0' is not of type 'integer'; its arguments are a (integer)",
        ),
        (
            {"b": 1},
            "Error: add: the argument 'a' is missing; its arguments are a (integer), b (integer, optional)",
        ),
        ({"a": 1, "c": 2}, "Error: add: there is no argument 'c'; its arguments are a (integer)"),
        ({"a": [1]}, "Error: add: a: [1] is not of type 'integer'"),
        ({"a": True}, "Error: add: a: True is not of type 'integer'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tools, arguments, text):
    result = call(tools, "add", **arguments)
    assert result.outcome == "bad_arguments" and result.text.startswith(text)


def test_texts_that_mean_a_value_of_the_right_type_are_converted(tools):
    assert call(tools, "add", a="3", b=4.0).text == "7"
    assert call(tools, "add", a=3, note=None).text == "5"
    assert json.loads(call(tools, "later", text=5).text)["text"] == "5"


@pytest.mark.parametrize(
    ("how", "outcome", "text"),
    [
        ("raises", "error", "Error: ValueError: not today"),
        ("exits", "crash", "Error: its process ended with exit code 7"),
        ("object", "error", "Error: need a result that is a text or can be written as JSON, got object"),
    ],
)
def test_a_call_that_fails_is_told_to_the_policy_and_its_neighbour_succeeds(tools, file, how, outcome, text):
    failed, fine = call_all(tools, ("misbehaves", {"how": how}), ("add", {"a": 1}))
    assert (failed.outcome, failed.text[: len(text)], fine.text) == (outcome, text, "3")
    assert "my_tools.py" not in failed.text
    assert how != "raises" or f"{file}:" in failed.detail


def test_a_call_that_hangs_is_ended(file):
    tools = build_tools(AgentConfig(tools=[f"{file}:misbehaves", f"{file}:add"], call_timeout_s=0.3))
    failed, fine = call_all(tools, ("misbehaves", {"how": "hangs"}), ("add", {"a": 1}))
    assert (failed.outcome, failed.text, fine.text) == ("timeout", "Error: no result within 0.3 s", "3")
    tools.close()


def test_long_results_are_cut_in_their_middle_and_floods_go_elsewhere(tools):
    text = call(tools, "misbehaves", how="long").text
    assert text == "a" * 500 + "\n... [200 characters left out] ...\n" + "b" * 500
    assert call(tools, "misbehaves", how="floods").text == "floods"


def test_a_result_may_have_a_reward_and_metrics(tools):
    assert call(tools, "misbehaves", how="rewards") == ToolResult(
        "well done", reward=0.5, metrics={"size": 3}
    )


def test_an_unknown_tool_is_answered_with_the_known_ones(tools):
    result = call(tools, "ad", a=1)
    assert result.text.startswith(
        "Error: there is no tool 'ad'; the tools are add, later, who, misbehaves, scale"
    )
    assert result.text.endswith("did you mean add?")


def test_a_row_chooses_tools_by_its_schemas(tools):
    row = Prompt("q", tools=({"type": "function", "function": {"name": "add"}},))

    async def names(prompt):
        session = await tools.open(EpisodeStart(prompt))
        (result,) = await session.call([ToolCall("later", {"text": "x"})])
        await session.close()
        return [schema["function"]["name"] for schema in session.schemas], result.outcome

    assert asyncio.run(names(row)) == (["add"], "unknown_tool")
    tools.check_data([row, Prompt("q")])
    bad = Prompt("q", index=7, tools=({"name": "fly"},))
    with pytest.raises(ValueError, match="row 7 names tools that the run does not have: fly; it has add"):
        tools.check_data([bad])
    with pytest.raises(EpisodeFailure, match="row 7"):
        asyncio.run(names(bad))


def test_a_function_that_shares_state_runs_in_the_trainer_with_a_note():
    seen, notes = [], []

    def remember(word: str) -> int:
        """Remember a word.

        Args:
            word: The word.
        """
        seen.append((word, threading.current_thread() is threading.main_thread()))
        if word == "bad":
            raise SystemExit(1)
        return len(seen)

    async def slow(word: str) -> str:
        """Wait.

        Args:
            word: The word.
        """
        seen.append(word)
        await asyncio.Event().wait()
        return word

    tools = build_tools(AgentConfig(call_timeout_s=0.3), [remember, slow], note=notes.append)
    results = call_all(tools, ("remember", {"word": "a"}))
    results += call_all(tools, ("remember", {"word": "bad"}), ("slow", {"word": "b"}))
    assert [each.outcome for each in results] == ["ok", "error", "timeout"] and results[0].text == "1"
    assert seen[0] == ("a", False) and len(seen) == 3
    assert (
        len(notes) == 2
        and "tool remember: it runs on a thread of the trainer, since it shares seen" in notes[0]
    )
    assert "in agent.tools to run it in a process" in notes[0]
    tools.close()


def test_too_many_calls_in_the_trainer_that_never_return_end_the_run():
    held = [threading.Event()]

    def hang(word: str) -> None:
        """Hang.

        Args:
            word: The word.
        """
        held[0].wait()

    tools = build_tools(AgentConfig(call_timeout_s=0.01), [hang], note=lambda text: None)
    with pytest.raises(RuntimeError, match="need at most 16 calls of tools in the trainer that never return"):
        call_all(tools, *[("hang", {"word": "x"})] * 17)
    held[0].set()
    tools.close()


@dataclass
class Point:
    x: int


def test_results_that_are_no_texts_become_json():
    values = {"dataclass": Point(1), "set": {1}, "none": None, "tuple": (1, "a"), "parts": 0}

    def give(name: str) -> object:
        """Give a value.

        Args:
            name: Of the value.
        """
        if name == "parts":
            return [{"type": "text", "text": "seen"}, {"type": "image", "image": "..."}]
        return values[name]

    tools = build_tools(AgentConfig(), [give], note=lambda text: None)
    texts = {name: call(tools, "give", name=name) for name in values}
    assert {name: each.text for name, each in texts.items()} == {
        "dataclass": '{"x": 1}',
        "set": "[1]",
        "none": "null",
        "tuple": '[1, "a"]',
        "parts": "seen",
    }
    assert texts["parts"].content[1]["type"] == "image" and texts["none"].content is None
    tools.close()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["calculater"],
            "need a tool among calculator, search, python, .* got 'calculater'; did you mean calculator",
        ),
        (["{file}:silent"], "need types and a docstring with an Args section for the tool"),
        (["{file}:missing"], "tool .*:missing: need a function 'missing'"),
        (["{file}:add", "{file}:add"], "need tools with different names, got several of the name add"),
        (
            [{"name": "{file}:add", "c": 1}],
            r"need options of the tool .* that are its parameters \(a, b, note\), got c",
        ),
        ([{"name": "{file}:Lookup"}], "the tool .* cannot be made with {}: .*missing 1 required positional"),
        (["python"], "runs code that the policy writes, .* without a sandbox"),
        (["search"], "need either a corpus or a url for the tool search, got no options"),
    ],
)
def test_tools_that_cannot_be_built_are_named(file, names, message):
    def filled(each):
        return (
            {**each, "name": each["name"].format(file=file)}
            if isinstance(each, dict)
            else each.format(file=file)
        )

    with pytest.raises(ValueError, match=message):
        build_tools(AgentConfig(tools=[filled(each) for each in names]))


def test_python_runs_code_within_limits_where_the_user_allows_it():
    config = AgentConfig(
        tools=[{"name": "python", "unsafe": True, "cpu_s": 1, "memory_mb": 300}], call_timeout_s=20.0
    )
    tools = build_tools(config)
    assert list(tools.schemas[0]["function"]["parameters"]["properties"]) == ["code"]
    codes = [
        "print(2 ** 10)",
        "1 / 0",
        "pass",
        "x = ' ' * (1 << 30)",
        "while True: pass",
        "import sys; sys.exit(3)",
    ]
    results = call_all(tools, *[("python", {"code": code}) for code in codes])
    assert [result.outcome for result in results] == ["ok"] * 6
    assert results[0].text == "1024\n" and results[2].text == "(the program printed nothing)"
    assert "ZeroDivisionError" in results[1].text and 'File "program.py", line 1' in results[1].text
    assert "MemoryError" in results[3].text and "used up its processor time" in results[4].text
    assert results[5].text == "(the program ended with exit code 3)"
    tools.close()
