"""Environments of the contract of verifiers up to 0.1, as its packages have them."""

from __future__ import annotations

import verifiers as vf
from datasets import Dataset


def load_environment(kind: str = "tools") -> vf.Environment:
    if kind == "reasoning-gym":
        return vf.ReasoningGymEnv(gym="chain_sum", num_train_examples=4, num_eval_examples=2)
    data = Dataset.from_list([{"question": f"{a}+{a}", "answer": str(2 * a)} for a in range(4)])
    rubric = vf.Rubric(funcs=[right])
    return vf.ToolEnv(tools=[add], dataset=data, eval_dataset=data, rubric=rubric)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def right(completion, answer) -> float:
    return float((completion[-1].content or "").strip() == answer)
