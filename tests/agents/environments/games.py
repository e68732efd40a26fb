"""Environments of users, good and bad, for tests."""

from __future__ import annotations

import os
import random
import time

from verl.agents.environments.observation import EnvironmentLost, Observation


class Guess:
    """The number guessing game by TRL's contract, with turn rewards and an end of its own."""

    is_over = False

    def __init__(self, most: int = 100) -> None:
        self.most, self.number, self.guesses = most, 0, 0

    def reset(self, seed: int, low: int = 1, **columns) -> str:
        self.number = random.randint(low, self.most)
        return f" Guess a number from {low} to {self.most}."

    def guess(self, number: int) -> tuple[str, float]:
        """Guess the number.

        Args:
            number: The guess.
        """
        self.guesses += 1
        self.is_over = number == self.number
        return ("right" if self.is_over else "wrong"), (1.0 if self.is_over else -0.1)

    def fail(self) -> str:
        """Raise an error."""
        raise KeyError("game over")

    def lose(self) -> str:
        """Lose the connection to the board."""
        raise EnvironmentLost("the board is gone")

    async def tell(self) -> str:
        """Tell the number."""
        return str(self.number)

    def get_reward(self) -> dict:
        return {"reward": 0.5, "guesses": self.guesses}

    def _private(self) -> None:
        raise AssertionError


class Talk:
    """A game that talks, and fails as its row says."""

    def reset(self, fault: str = "", **columns) -> None:
        self.fault, self.turns = fault, 0
        self._act("reset")

    def step(self, message: dict) -> str | None:
        self._act("step")
        self.turns += 1
        return None if message["content"] == "bye" else f"you said {message['content']}"

    async def get_reward(self, messages: list) -> float:
        self._act("get_reward")
        return float(len(messages))

    def _act(self, place: str) -> None:
        """Fail, if it is the turn."""
        kind, _, where = self.fault.partition(" in ")
        if where != place:
            return
        if kind == "raises":
            raise ValueError("lost the board")
        if kind == "hangs":
            time.sleep(100)
        if kind == "dies":
            os._exit(3)
        if kind == "eats":
            os.kill(os.getpid(), 9)


class Flood:
    """Answers that are far too long, in text and in print."""

    def step(self, message: dict) -> str:
        print("x" * 5_000_000)
        return "a" * 50_000 + "b" * 50_000


class Wordy:
    """All that a step may return."""

    answers = [
        Observation(
            messages=[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}], reward=1
        ),
        ("three", 0.25),
        Observation("four", metrics={"seen": 4}),
        (None, 2.0),
    ]

    def __init__(self) -> None:
        self.left = list(self.answers)

    def step(self, message: dict) -> object:
        return self.left.pop(0)


class Silent:
    """Neither tools nor turns."""

    def reset(self) -> None:
        return None


def make_guess(most: int) -> Guess:
    """A factory, as TRL's `environment_factory`."""
    return Guess(most=most)
