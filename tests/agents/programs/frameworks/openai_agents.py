"""An agent of openai-agents, as its documentation writes one: over the responses API, or chat completions."""

import json
import os
import sys

from agents import Agent, Runner, function_tool, set_default_openai_api, set_tracing_disabled


@function_tool
def add(a: float, b: float) -> str:
    """Sum of two numbers."""
    return f"{a + b:g}"


set_tracing_disabled(True)
set_default_openai_api(sys.argv[1])
task = json.loads(os.environ["TASK_JSON"])
agent = Agent(name="sums", instructions="Be brief.", tools=[add])
result = Runner.run_sync(agent, task["prompt"][-1]["content"])
print(json.dumps({"reward": float(result.final_output == "5")}))
