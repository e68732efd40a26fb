"""The game of the task `guess` in each of the forms that episodes may have: environment, tool, program.

verl train grpo data.train=task:guess agent.environment=guess.py:Guess ...
verl train grpo data.train=task:guess agent.tools=[guess.py:guess] rewards.functions=[guess.py:found] ...
verl train grpo data.train=task:guess agent.program=guess.py:play ...
"""

import json

GUESS = {
    "type": "function",
    "function": {
        "name": "guess",
        "description": "Guess the number.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "description": "From 0 to 31."}},
            "required": ["number"],
        },
    },
}


def told(number, answer):
    """What the player hears: yes, higher (the number is above the guess) or lower."""
    return "yes" if number == answer else "higher" if answer > number else "lower"


class Guess:
    """The game as an environment: it keeps the number, and the range that is left as its state."""

    def reset(self, answer: str, **columns) -> None:
        """Begin with the answer of the row."""
        self.answer, self.low, self.high, self.won = int(answer), 0, 31, False

    @property
    def state(self) -> str:
        """What an advantage that compares turns from equal states (gigpo) reads."""
        return f"{self.low} to {self.high}"

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: From 0 to 31.
        """
        heard = told(number, self.answer)
        self.won = self.won or heard == "yes"
        self.low = max(self.low, number + 1) if heard == "higher" else self.low
        self.high = min(self.high, number - 1) if heard == "lower" else self.high
        return heard

    def get_reward(self) -> float:
        """1 if a guess was right."""
        return float(self.won)


def guess(number: int, episode) -> str:
    """Guess the number.

    Args:
        number: From 0 to 31.
    """
    return told(number, int(episode.answer))


def found(messages) -> float:
    """The reward of an episode with the tool: 1 if a guess was right."""
    return float(any(m["role"] == "tool" and m["content"] == "yes" for m in messages))


async def play(task, client) -> float:
    """The game as a program that runs its own loop, in six guesses."""
    messages = list(task["prompt"])
    for _ in range(6):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[GUESS])
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return 0.0
        for call in message.tool_calls:
            try:
                heard = told(int(json.loads(call.function.arguments)["number"]), int(task["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                heard = f"Error: {error}"
            if heard == "yes":
                return 1.0
            messages.append({"role": "tool", "tool_call_id": call.id, "content": heard})
    return 0.0
