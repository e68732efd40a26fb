"""The reward of the tasks of reasoning-gym: the score that each generator gives itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verl.data.tasks.gym_tasks import gym_score
from verl.rewards.library.answer_text import without_thoughts

# A minus behind a digit or a bracket is an operator: the last number of "7-4" is 4.
_NUMBER = re.compile(r"(?<![\w)\]])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def reasoning_gym(
    response: str,
    reasoning_gym: Mapping[str, Any],
    *,
    tag: str = "answer",
    need_tag: bool = False,
    number: bool = False,
) -> dict[str, float]:
    """Score of an answer by the generator that asked, `score_answer` of reasoning-gym.

    The answer is the text in the last pair of tags; without tags all of the text. Thoughts are no answer. It
    is stripped of surrounding white space.

    Args:
        response: the answer of the policy.
        reasoning_gym: column of a row of `task:reasoning-gym/NAME`.
        tag: name of the tags, `<answer>` and `</answer>`.
        need_tag: an answer without the tags is worth 0.
        number: of this text, the last number is the answer, so that words around it cost nothing; a text
            without a number is taken as it is. For generators that ask for a number.

    Returns:
        `reward`, the score, and `accuracy`, 1 if the score is 1, else 0. Some generators give a part of the
        score for a part of the answer.
    """
    text = without_thoughts(response)
    answer = answer_in_tags(text, tag)
    if answer is None and need_tag:
        return {"reward": 0.0, "accuracy": 0.0}
    if answer is None:
        answer = text.strip()
    if number and (found := _NUMBER.findall(answer)):
        answer = found[-1].replace(",", "")
    score = gym_score(reasoning_gym, answer)
    return {"reward": score, "accuracy": float(score == 1)}


def answer_in_tags(text: str, tag: str) -> str | None:
    """Text between the last `<tag>` and `</tag>`, stripped; None if there is no such pair."""
    before, end, _ = text.rpartition(f"</{tag}>")
    _, start, answer = before.rpartition(f"<{tag}>")
    return answer.strip() if start and end else None
