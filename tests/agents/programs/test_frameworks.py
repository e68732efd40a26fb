"""Agents of other frameworks, unchanged, each with a tool, in the interpreter of `make environments`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.episodes.scripted import CALL, chat_codec, play
from tests.agents.programs.agents import sampled_texts
from verl.agents.programs.program_driver import ProgramDriver
from verl.config.agent import AgentConfig

PYTHON = str(Path(__file__).parents[3] / ".venv-frameworks" / "bin" / "python")
FOLDER = Path(__file__).parent / "frameworks"
END = "<|im_end|>"
FINAL = '<tool_call>{"name": "final_answer", "arguments": {"answer": "5"}}</tool_call>'
ONE = [[f"{CALL}{END}", f"5{END}"]]
# Framework -> words behind Python, texts of the policy, turns of each segment.
FRAMEWORKS = {
    "openai-agents, responses": (["openai_agents.py", "responses"], [CALL, "5"], ONE),
    "openai-agents, chat": (["openai_agents.py", "chat_completions"], [CALL, "5"], ONE),
    "langgraph": (["langgraph_react.py"], [CALL, "5"], ONE),
    "smolagents": (["smolagents_tools.py"], [CALL, FINAL], [[f"{CALL}{END}"], [f"{FINAL}{END}"]]),
}


@pytest.mark.environments
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_agent_of_a_framework_plays_an_episode_with_a_tool(name):
    (file, *words), texts, segments = FRAMEWORKS[name]
    config = AgentConfig(program=(PYTHON, str(FOLDER / file), *words))
    driver = ProgramDriver(config, chat_codec())
    try:
        (trajectory,), engine = play(texts, driver=driver, turn_tokens=4000)
    finally:
        driver.close()
    assert (trajectory.outcome, trajectory.detail) == ("ok", "")
    assert trajectory.episode.reward == {"reward": 1.0}
    assert sampled_texts(trajectory, engine) == segments
    assert trajectory.episode.counts["calls"] == len([text for text in texts if "<tool_call>" in text])
