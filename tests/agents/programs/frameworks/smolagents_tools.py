"""A tool-calling agent of smolagents, which asks for a call in each turn and writes its history anew."""

import json
import os

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def add(a: float, b: float) -> str:
    """Sum of two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return f"{a + b:g}"


model = OpenAIModel("policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
agent = ToolCallingAgent(tools=[add], model=model, max_steps=4, verbosity_level=0)
result = agent.run(json.loads(os.environ["TASK_JSON"])["prompt"][-1]["content"])
print(json.dumps({"reward": float(str(result) == "5")}))
