"""One conversation with everything in it: two calls in a turn, a failed call, thoughts, a second question."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number", "description": "One."}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    },
)


def call(number: int, **arguments: Any) -> dict[str, Any]:
    """A call of add, with an id as Kimi K2 writes it."""
    function = {"name": "add", "arguments": arguments}
    return {"id": f"functions.add:{number}", "type": "function", "function": function}


def result(number: int, text: str) -> Message:
    """What a call gave."""
    return {"role": "tool", "name": "add", "tool_call_id": f"functions.add:{number}", "content": text}


def conversation() -> list[Message]:
    """System message, question, two calls, results, answer, question, call, result, answer."""
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2, 3+4?"},
        {
            "role": "assistant",
            "content": "Two sums.",
            "reasoning_content": "Use add.",
            "tool_calls": [call(0, a=1, b=2), call(1, a="3", b=True)],
        },
        result(0, "3"),
        result(1, "Error: no."),
        {"role": "assistant", "content": "3 and 7.", "reasoning_content": "Easy."},
        {"role": "user", "content": "5+6?"},
        {"role": "assistant", "content": "", "reasoning_content": "Again.", "tool_calls": [call(2, a=5)]},
        result(2, "11"),
        {"role": "assistant", "content": "11.", "reasoning_content": "Done."},
    ]
