"""Environment and program for the task `calculator`, and what its runs and those of `search` are called with.

verl train grpo data.train=task:calculator agent.tools=[calculator] ...
verl train grpo data.train=task:calculator agent.environment=lookup.py:Calculator ...
verl train grpo data.train=task:calculator agent.program=lookup.py:compute ...
verl train grpo data.train=task:search 'agent.tools=[{name: search, corpus: documents.jsonl, top_k: 1}]' ...
"""

import json
import re


def product(expression):
    """The product of two numbers that are written as 12*34."""
    left, right = re.fullmatch(r"(\d+)\*(\d+)", expression).groups()
    return str(int(left) * int(right))


class Calculator:
    """A calculator that multiplies two numbers; the answer is rewarded by `exact`."""

    def calculator(self, expression: str) -> str:
        """Compute.

        Args:
            expression: Such as 2*3.
        """
        return product(expression)


CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


async def compute(task, client) -> float:
    """The question about a product as a program: one call of the calculator, and an answer."""
    messages = list(task["prompt"])
    for _ in range(3):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[CALCULATOR])
        message = answer.choices[0].message
        if not message.tool_calls:
            return float(message.content == task["answer"])
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            try:
                text = product(json.loads(call.function.arguments)["expression"])
            except (AttributeError, ValueError, KeyError, TypeError) as error:
                text = f"Error: {error}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    return 0.0
