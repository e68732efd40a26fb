"""Tasks of several turns with tools, whose lowest and best reward are known, and scripted teachers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from verl.data.tasks.answer_tasks import draws

Message = dict[str, Any]
Uniform = Callable[[], float]
# Guesses of an episode; 2^6 - 1 numbers can be told apart.
NUM_GUESSES = 6
_VOWELS, _CONSONANTS = "aeiou", "bdfgklmnprstvz"


@dataclass(frozen=True)
class EpisodeTask:
    """A numbered family of questions that need a tool.

    Attributes:
        name: in the table, and after `task:` in the settings.
        meaning: the question in one sentence.
        question: row {prompt, answer} of a number in [0, num_questions), the prompt a chat.
        num_questions: number of questions.
        num_train: rows of the training split.
        num_test: held-out rows. If there are no more questions than these two, each split has all of them: in
            a game the player does not see the answer.
        tool: schema of the tool.
        teach: what a teacher says to a row: the messages after those of the prompt.
        reward: name of the reward function that suits it; None: that of the environment.
        max_tokens: characters of the longest turn, and an end token.
        words: texts that stand in every conversation, for a tokenizer that makes each of them one token.
        documents: texts that the tool searches.
    """

    name: str
    meaning: str
    question: Callable[[int], dict[str, Any]]
    num_questions: int
    num_train: int
    num_test: int
    tool: dict[str, Any]
    teach: Callable[[dict[str, Any], Uniform], list[Message]]
    reward: Literal["exact"] | None
    max_tokens: int
    words: tuple[str, ...]
    documents: tuple[str, ...] = ()

    def rows(self, split: Literal["train", "test"], seed: int = 0) -> list[dict[str, Any]]:
        """Rows {prompt, answer} of a split; the seed draws the training rows alone."""
        if self.num_questions < self.num_train + self.num_test:
            return [self.question(number) for number in range(self.num_questions)]
        numbers = draws(f"{self.name} held out", self.num_questions, self.num_test, taken=set())
        if split == "train":
            numbers = draws(f"{self.name} {seed}", self.num_questions, self.num_train, taken=set(numbers))
        return [self.question(number) for number in numbers]

    def traces(
        self, split: Literal["train", "test"] = "train", seed: int = 0, *, count: int = 4096
    ) -> list[dict[str, Any]]:
        """Conversations {messages, tools} of the teacher about the rows of a split, in turn."""
        rows, uniform = self.rows(split, seed), random.Random(f"{self.name} teacher {seed}").random
        return [
            {"messages": [*row["prompt"], *self.teach(row, uniform)], "tools": [self.tool]}
            for row in (rows[i % len(rows)] for i in range(count))
        ]


def schema(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    """Schema of a tool.

    Args:
        name: of the tool.
        description: for the model.
        parameters: type and description by name; all are required.
    """
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    wanted = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": wanted},
    }


def calling(name: str, **arguments: Any) -> Message:
    """A turn that calls a tool."""
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def result(name: str, text: str) -> Message:
    """The result of such a call."""
    return {"role": "tool", "name": name, "tool_call_id": "call_0", "content": text}


def says(text: str) -> Message:
    """A turn without a call."""
    return {"role": "assistant", "content": text}


def feedback(guess: int, answer: int) -> str:
    """Answer to a guess: yes, higher (the number is above the guess), or lower."""
    return "yes" if guess == answer else "higher" if answer > guess else "lower"


def _guess(number: int) -> dict[str, Any]:
    return {"prompt": [_user("Find my number from 0 to 31.")], "answer": str(number)}


def _play_clumsily(row: dict[str, Any], uniform: Uniform) -> list[Message]:
    """A player who halves the range that is left in three of four turns, and else guesses any number."""
    messages: list[Message] = []
    low, high, answer = 0, 31, int(row["answer"])
    for turn in range(NUM_GUESSES):
        guess = (low + high + 1) // 2 if uniform() < 3 / 4 else int(uniform() * 32)
        told = feedback(guess, answer)
        messages.append(calling("guess", number=guess))
        if turn + 1 == NUM_GUESSES and told != "yes":
            break
        messages.append(result("guess", told))
        if told == "yes":
            return [*messages, says("ok")]
        low, high = (max(low, guess + 1), high) if told == "higher" else (low, min(high, guess - 1))
    return messages


def _product(number: int) -> dict[str, Any]:
    left, right = 100 + number // 90, 10 + number % 90
    return {"prompt": [_user(f"What is {left} times {right}?")], "answer": str(left * right)}


def _calculate(row: dict[str, Any], uniform: Uniform) -> list[Message]:
    words = row["prompt"][0]["content"].strip("?").split()
    product = f"{words[2]}*{words[4]}"
    return [
        calling("calculator", expression=product),
        result("calculator", row["answer"]),
        says(row["answer"]),
    ]


def _name(number: int) -> str:
    """A name of three syllables, another for each number below 70 cubed."""
    syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
    # A step that has no divisor in common with the number of names visits all of them.
    number = number * 104_729 % len(syllables) ** 3
    return "".join(syllables[number // len(syllables) ** place % len(syllables)] for place in range(3))


def _fact(number: int) -> dict[str, Any]:
    name = _name(number)
    code = 100 + int(random.Random(f"search {name}").random() * 900)
    return {"prompt": [_user(f"What is the code of {name}?")], "answer": str(code)}


def _document(number: int) -> str:
    row = _fact(number)
    return f"The code of {_name(number)} is {row['answer']}."


def _look_up(row: dict[str, Any], uniform: Uniform) -> list[Message]:
    name = row["prompt"][0]["content"].strip("?").split()[-1]
    return [
        calling("search", query=name),
        # As the built-in tool writes the best passage.
        result("search", f"[1] The code of {name} is {row['answer']}."),
        says(row["answer"]),
    ]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _calls(name: str, parameter: str, quote: str) -> tuple[str, ...]:
    """Pieces of conversations with calls of a tool, as the chat template of small models writes them."""
    return f"T:{name}({parameter})", f"[{name}({parameter}={quote}", f"{quote})]", "u:", "a:", "t:"


_NUM_FACTS = 1024
EPISODE_TASKS: dict[str, EpisodeTask] = {
    task.name: task
    for task in (
        EpisodeTask(
            "guess",
            "Find a number from 0 to 31 in six guesses; each is told to be too high or too low.",
            _guess,
            num_questions=32,
            num_train=32,
            num_test=32,
            tool=schema("guess", "Guess the number.", number=("integer", "From 0 to 31.")),
            teach=_play_clumsily,
            reward=None,
            max_tokens=20,
            words=(
                "Find my number from 0 to 31.",
                *_calls("guess", "number", ""),
                "higher",
                "lower",
                "yes",
                "ok",
                # A number is one token, as with the tokenizers of real models.
                *map(str, range(10, 32)),
            ),
        ),
        EpisodeTask(
            "calculator",
            "Multiply a number of three digits by one of two, with a calculator.",
            _product,
            num_questions=900 * 90,
            num_train=8192,
            num_test=512,
            tool=schema("calculator", "Compute.", expression=("string", "Such as 2*3.")),
            teach=_calculate,
            reward="exact",
            max_tokens=40,
            words=("What is ", " times ", *_calls("calculator", "expression", '"')),
        ),
        EpisodeTask(
            "search",
            "Find the code of a name in a collection of documents.",
            _fact,
            num_questions=_NUM_FACTS,
            num_train=_NUM_FACTS - 256,
            num_test=256,
            tool=schema("search", "Search documents.", query=("string", "Words.")),
            teach=_look_up,
            reward="exact",
            max_tokens=40,
            words=("What is the code of ", "[1] The code of ", " is ", *_calls("search", "query", '"')),
            documents=tuple(_document(number) for number in range(_NUM_FACTS)),
        ),
    )
}
