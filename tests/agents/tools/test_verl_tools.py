"""Tools of verl: created and released once per episode, rewarded, and killed when they hang."""

from __future__ import annotations

import asyncio

import pytest

from tests.agents.tools.test_tool_set import call
from verl.agents.environments.session import EpisodeFailure, EpisodeStart, ToolResult
from verl.agents.tools.tool_set import build_tools
from verl.config.agent import AgentConfig
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall

CLASS = """
import os, pathlib
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

class Guess(BaseTool):
    def __init__(self, config, tool_schema):
        super().__init__(config, tool_schema)
        self.states = {}

    async def create(self, instance_id=None, ground_truth=None, **kwargs):
        instance_id, response = await super().create(instance_id)
        self.states[instance_id] = {"guesses": 0, "answer": ground_truth, "right": False}
        self.log("create")
        return instance_id, response

    async def execute(self, instance_id, parameters, **kwargs):
        state = self.states[instance_id]
        state["guesses"] += 1
        state["right"] = parameters["number"] == state["answer"]
        if parameters["number"] == -1:
            os._exit(1)
        if parameters["number"] == -2:
            raise KeyError("minus two")
        guesses = state["guesses"]
        return ToolResponse(text=f"guess {guesses}"), -0.1, {"guesses": guesses, "name": "x"}

    async def calc_reward(self, instance_id, **kwargs):
        return float(self.states[instance_id]["right"])

    async def release(self, instance_id, **kwargs):
        self.log("release")
        del self.states[instance_id]

    def log(self, event):
        with open(self.config["log"], "a") as file:
            file.write(event + " ")
"""
YAML = """
tools:
  - class_name: "{folder}/guess_tool.py:Guess"
    config: {{type: native, log: "{folder}/log"}}
    tool_schema:
      type: function
      function:
        name: guess
        description: Guess the number.
        parameters:
          type: object
          properties:
            number: {{type: integer, description: The number., minimum: -5}}
          required: [number]
"""
FUNCTIONS = '''
from verl.tools.function_tool import function_tool
from verl.tools.schemas import ToolResponse

@function_tool
def double(number: int) -> int:
    """Double a number.

    Args:
        number: The number.
    """
    return 2 * number

@function_tool("say", schema={"type": "function", "function": {"name": "say", "description": "Say.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}})
async def speak(word):
    return ToolResponse(text=word, image=["picture"]), 0.5, {"length": len(word)}
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "guess_tool.py").write_text(CLASS)
    (tmp_path / "tools.yaml").write_text(YAML.format(folder=tmp_path))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


@pytest.fixture
def tools(folder):
    built = build_tools(AgentConfig(tools=[f"verl:{folder}/tools.yaml"], call_timeout_s=20.0))
    yield built
    built.close()


ROW = Prompt("q", columns={"extra_info": {"tools_kwargs": {"guess": {"create_kwargs": {"ground_truth": 3}}}}})


def play(tools, *numbers):
    async def run():
        session = await tools.open(EpisodeStart(ROW))
        try:
            results = [(await session.call([ToolCall("guess", {"number": number})]))[0] for number in numbers]
            return results, await session.reward()
        finally:
            await session.close()

    return asyncio.run(run())


def test_a_tool_is_created_and_released_once_per_episode_and_rewards_it(tools, folder):
    assert tools.schemas[0]["function"]["parameters"]["properties"]["number"]["minimum"] == -5
    results, reward = play(tools, 1, 3)
    assert results[0] == ToolResult("guess 1", reward=-0.1, metrics={"guesses": 1.0})
    assert results[1].text == "guess 2" and reward == 1.0
    assert play(tools)[1] == 0.0
    assert (folder / "log").read_text() == "create release create release "


def test_a_tool_that_raises_goes_on_and_one_that_dies_costs_the_episode_its_reward(tools):
    results, reward = play(tools, -2, 3)
    assert (results[0].outcome, results[0].text) == ("error", "Error: KeyError: 'minus two'")
    assert (results[1].text, reward) == ("guess 2", 1.0)
    with pytest.raises(EpisodeFailure, match="exit code 1") as caught:
        play(tools, -1, 3)
    assert caught.value.outcome == "environment_crash"

    async def calls():
        session = await tools.open(EpisodeStart(ROW))
        results = [(await session.call([ToolCall("guess", {"number": n})]))[0] for n in (-1, 3)]
        await session.close()
        return results

    first, second = asyncio.run(calls())
    assert first.outcome == second.outcome == "crash"
    assert second.text == "Error: the tool has ended, and its state is lost"


def test_decorated_functions_of_a_file_are_tools(folder):
    tools = build_tools(AgentConfig(tools=[f"verl:{folder}/functions.py"], call_timeout_s=20.0))
    assert call(tools, "double", number=4).text == "8"
    result = call(tools, "say", word="hi")
    assert (result.text, result.reward, result.metrics) == ("hi", 0.5, {"length": 2.0})
    assert result.content == [{"type": "image", "image": "picture"}, {"type": "text", "text": "hi"}]
    tools.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tools: []", r"need `tools: \[\{class_name, config, tool_schema\}\]`"),
        ("tools: [{config: {}}]", "need entries with class_name"),
        ("tools: [{class_name: a.B, config: {type: mcp}}]", "name an MCP server as mcp:ADDRESS"),
        ("tools: [{class_name: no.such.Tool}]", "the tools of verl cannot be made: ModuleNotFoundError"),
        ("tools: [{class_name: verl.tools.base_tool.BaseTool}]", "need a schema of the tool BaseTool"),
        ("a: [", "need a YAML file with tools of verl"),
    ],
)
def test_files_that_name_no_tools_are_named(tmp_path, text, message):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        build_tools(AgentConfig(tools=[f"verl:{tmp_path}/t.yaml"]))
