"""Questions of reasoning-gym with several tries, `reasoning-gym:NAME`: a wrong answer is told.

https://github.com/open-thought/reasoning-gym. As a single answer each question is `task:reasoning-gym/NAME`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from verl.agents.environments.observation import Observation


class ReasoningGymEnvironment:
    """One question.

    Args:
        name: of the generator, such as chain_sum.
        tries: answers to the question, the first included.
        discount: factor of the score for each further try.
        feedback: told after a wrong answer; {score} is its score, {left} the number of tries left.
        **options: of the generator, and `level`, as `task:reasoning-gym/NAME` takes them.
    """

    def __init__(
        self,
        name: str,
        tries: int = 3,
        discount: float = 0.5,
        feedback: str = "This answer is not right. Try again.",
        **options: Any,
    ) -> None:
        if tries < 1:
            raise ValueError(f"need tries of at least 1, got {tries}")
        self._tasks = importlib.import_module("verl.data.tasks.gym_tasks")
        self._tags = importlib.import_module("verl.rewards.library.reasoning_gym")
        self._name, self._options = name, options
        self._left, self._discount, self._worth = tries, discount, 1.0
        self._feedback = feedback
        self._column: Mapping[str, Any] = {}

    def reset(self, seed: int, reasoning_gym: Mapping[str, Any] | None = None) -> str | None:
        """The question of the row, whose prompt it is; else one that the seed draws."""
        if reasoning_gym is not None:
            self._column = reasoning_gym
            return None
        row = next(
            iter(self._tasks.gym_rows(self._name, {**self._options, "size": 1, "seed": seed}, "train"))
        )
        self._column = row["reasoning_gym"]
        prompt = row["prompt"]
        return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])

    def step(self, message: Mapping[str, Any]) -> Observation:
        """The score of an answer; the next try, unless it is right or the last."""
        text = str(message["content"] or "")
        answer = self._tags.answer_in_tags(text, "answer")
        if answer is None:
            answer = text.rpartition("</think>")[2].strip()
        score = self._tasks.gym_score(self._column, answer)
        self._left -= 1
        is_over = score == 1 or self._left == 0
        reward = self._worth * score if is_over else 0.0
        self._worth *= self._discount
        told = self._feedback.format(score=score, left=self._left)
        return Observation(told, reward, is_over, {"right": float(score == 1)} if is_over else {})

    def get_reward(self) -> float:
        """Reward of the episode beside that of its last answer."""
        return 0.0

    def rows(self, split: str, **options: Any) -> list[dict[str, Any]]:
        """Rows of the generator, each with its question."""
        return list(self._tasks.gym_rows(self._name, {**self._options, **options}, split))
