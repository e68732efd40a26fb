"""Tasks of one answer: small data sets of prompts and answers whose lowest and best reward are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

LETTERS = "abcdefgh"
DIGITS = "0123456789"


@dataclass(frozen=True)
class Task:
    """A numbered family of questions with one right answer each, split into training and held-out prompts.

    Attributes:
        name: in the table, and after `task:` in the settings.
        meaning: the question in one sentence.
        question: prompt and answer of a number in [0, num_questions); a different prompt for each.
        num_questions: number of questions.
        num_train: prompts of the training split, drawn without repetition from those not held out.
        reward: name of the reward function that suits it.
        max_tokens: longest answer in characters and an end token.
        num_test: held-out prompts.
    """

    name: str
    meaning: str
    question: Callable[[int], tuple[str, str]]
    num_questions: int
    num_train: int
    reward: Literal["exact", "position_share", "prefix_share"]
    max_tokens: int
    num_test: int = 512

    def rows(self, split: Literal["train", "test"], seed: int = 0) -> list[dict[str, Any]]:
        """Rows {prompt, answer} of a split; the seed draws the training rows alone."""
        numbers = draws(f"{self.name} held out", self.num_questions, self.num_test, taken=set())
        if split == "train":
            numbers = draws(f"{self.name} {seed}", self.num_questions, self.num_train, taken=set(numbers))
        return [dict(zip(("prompt", "answer"), self.question(number), strict=True)) for number in numbers]


def near_miss(answer: str, *, key: str) -> str:
    """A wrong answer close to the right one: one or two characters changed, two swapped, or one missing.

    Digits become other digits, and letters other letters.

    Args:
        answer: the right answer, with a digit or a letter from a to h in it.
        key: seeds the choice among the wrong answers.

    Returns:
        A text that is not empty and never the right answer.
    """
    uniform = random.Random(f"{key} near miss").random
    wrong = answer
    while wrong in ("", answer):
        wrong = _MISSES[int(uniform() * len(_MISSES))](answer, uniform)
    return wrong


def draws(key: str, stop: int, count: int, *, taken: set[int]) -> list[int]:
    """`count` different numbers below `stop`, none of them taken, in a random order that the key seeds."""
    # Of this module, Python promises only that random() under a given seed stays the same in later versions.
    uniform = random.Random(key).random
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        number = int(uniform() * stop)
        if number not in taken:
            numbers[number] = None
    return list(numbers)


def _digits(number: int, bases: list[int]) -> Iterator[int]:
    """Digits of a number in a mixed base, the last one first."""
    for base in bases:
        yield number % base
        number //= base


def _letters(number: int) -> str:
    return "".join(LETTERS[digit] for digit in _digits(number, [len(LETTERS)] * 8))


def _copy(number: int) -> tuple[str, str]:
    return f"{_letters(number)}=", _letters(number)


def _reverse(number: int) -> tuple[str, str]:
    return f"{_letters(number)}=", _letters(number)[::-1]


def _sort(number: int) -> tuple[str, str]:
    return f"{number:06}=", "".join(sorted(f"{number:06}"))


def _add(number: int) -> tuple[str, str]:
    left, right = (10 + digit for digit in _digits(number, [90, 90]))
    return f"{left}+{right}=", str(left + right)


def _continue_sequence(number: int) -> tuple[str, str]:
    modulus = 9
    first, second, count = _digits(number, [modulus + 1, modulus, 9])
    step = second - first
    answer = ",".join(str((second + step * i) % modulus) for i in range(1, count + 2))
    return f"{first},{second}:{modulus},{count + 1}", answer


def _changed(answer: str, uniform: Callable[[], float]) -> str:
    """One digit or letter replaced by another."""
    places = [i for i, character in enumerate(answer) if character.isalnum()]
    i = places[int(uniform() * len(places))]
    others = (DIGITS if answer[i] in DIGITS else LETTERS).replace(answer[i], "")
    return answer[:i] + others[int(uniform() * len(others))] + answer[i + 1 :]


def _changed_twice(answer: str, uniform: Callable[[], float]) -> str:
    return _changed(_changed(answer, uniform), uniform)


def _swapped(answer: str, uniform: Callable[[], float]) -> str:
    """Two neighbouring digits or letters swapped; no change if they are alike or there is but one."""
    places = [i for i, character in enumerate(answer) if character.isalnum()]
    if len(places) < 2:
        return answer
    first = int(uniform() * (len(places) - 1))
    i, j = places[first : first + 2]
    return answer[:i] + answer[j] + answer[i + 1 : j] + answer[i] + answer[j + 1 :]


def _shortened(answer: str, uniform: Callable[[], float]) -> str:
    i = int(uniform() * len(answer))
    return answer[:i] + answer[i + 1 :]


_MISSES = (_changed, _changed_twice, _swapped, _shortened)

ANSWER_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("copy-8", "Repeat 8 letters from a to h.", _copy, 8**8, 8192, "position_share", max_tokens=9),
        Task(
            "reverse-8",
            "Write 8 letters from a to h in reverse order.",
            _reverse,
            8**8,
            8192,
            "position_share",
            max_tokens=9,
        ),
        Task("sort-6", "Write 6 digits in ascending order.", _sort, 10**6, 8192, "exact", max_tokens=7),
        Task("add-2", "Add two numbers of two digits.", _add, 90 * 90, 7500, "exact", max_tokens=4),
        # The sizes of verl's digit completion: modulus 9, first number up to 9, 1 to 9 numbers wanted, so 810
        # prompts in all. Prompts that want no number are left out: no answer to them could earn a reward.
        Task(
            "digits",
            "Continue an arithmetic sequence modulo a number: `first,second:modulus,count`.",
            _continue_sequence,
            810,
            610,
            "prefix_share",
            max_tokens=18,
            num_test=200,
        ),
    )
}
