"""The order in which the prompts of a source are drawn: the contract, and orders that need no feedback."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from verl.utils.sampling_types import Prompt

_MIXER = 0x9E3779B97F4A7C15  # separates the random numbers of one purpose from those of the orders


@dataclass(frozen=True)
class GroupFeedback:
    """Rewards of the answers to a prompt, when its group is complete.

    Attributes:
        rewards: of the answers that have one.
        accuracies: of those whose reward function gives `accuracy`.
    """

    rewards: Sequence[float]
    accuracies: Sequence[float] = ()

    @property
    def pass_rate(self) -> float:
        """Mean accuracy; without accuracies, the mean reward.

        Raises:
            ValueError: there is no accuracy, and a reward is not in [0, 1].
        """
        if self.accuracies:
            return math.fsum(self.accuracies) / len(self.accuracies)
        if not self.rewards or not 0 <= min(self.rewards) <= max(self.rewards) <= 1:
            raise ValueError(
                f"need the accuracy of answers for a pass rate, or rewards from 0 to 1, got rewards "
                f"{[round(value, 4) for value in self.rewards]}; let a reward function return "
                '{"reward": ..., "accuracy": ...}, or take another data.curriculum'
            )
        return math.fsum(self.rewards) / len(self.rewards)


class PromptSampler(ABC):
    """Draws prompts by their position; the base class of curricula of your own.

    A class in a file of yours is chosen by `data.curriculum=my.py:MySampler`, with its options as keyword
    arguments of `__init__`. Draws must depend on the arguments, on the feedback and on the state alone: then
    a run can be repeated, and resumed.

    Args:
        prompts: to draw from, at least one; of one source, where sources have weights.
        seed: of random choices, at least 0.
        shuffle: `data.shuffle`.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self.num_prompts, self.seed, self.shuffle = len(prompts), seed, shuffle

    @abstractmethod
    def draw(self, n: int) -> list[int]:
        """Positions of the next n prompts, from 0; a prompt may come again."""

    def observe(self, position: int, feedback: GroupFeedback) -> None:
        """Take up the rewards of a group, after the policy has learned from it; here nothing.

        Args:
            position: of its prompt.
            feedback: its rewards. Groups that dynamic sampling replaces are reported, too.
        """
        return

    def metrics(self) -> dict[str, float]:
        """Metrics since the last call; here none."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that later draws depend on: numbers, texts, lists, dicts and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""


def random_bits(seed: int, number: int, count: int) -> NDArray[np.uint64]:
    """Random numbers that depend on seed and number alone, in every version of NumPy.

    NumPy promises that the raw bits of a generator never change; of its permutations it does not.
    """
    generator = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))
    bits: NDArray[np.uint64] = generator.random_raw(count)
    return bits


def uniforms(seed: int, number: int, count: int) -> NDArray[np.float64]:
    """[count] numbers in [0, 1), other ones than those that make the order of an epoch."""
    bits = random_bits(seed ^ _MIXER, number, count)
    shifted: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return shifted


def epoch_order(count: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """[count] int64, the order of the prompts in an epoch."""
    if not shuffle:
        return np.arange(count)
    order: NDArray[np.int64] = np.argsort(random_bits(seed, epoch, count), kind="stable")
    return order


class EpochSampler(PromptSampler):
    """Each prompt once in each epoch, in a new order each time or always in the given one.

    Attributes:
        epoch: complete passes.
        position: prompts drawn in the pass that has begun.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        super().__init__(prompts, seed=seed, shuffle=shuffle)
        self.epoch = self.position = 0
        self._order: NDArray[np.int64] | None = None

    def order(self, epoch: int) -> NDArray[np.int64]:
        """[num_prompts] int64, positions in the order of an epoch."""
        return epoch_order(self.num_prompts, seed=self.seed, epoch=epoch, shuffle=self.shuffle)

    @override
    def draw(self, n: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < n:
            if self.position == self.num_prompts:
                self.epoch, self.position, self._order = self.epoch + 1, 0, None
            if self._order is None:
                self._order = self.order(self.epoch)
            upcoming = self._order[self.position : self.position + n - len(drawn)]
            drawn += upcoming.tolist()
            self.position += len(upcoming)
        return drawn

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position = state.get("epoch"), state.get("position")
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position <= self.num_prompts
        ):
            raise ValueError(
                f"need an epoch from 0 and a position from 0 to {self.num_prompts}, got {epoch!r} and "
                f"{position!r}"
            )
        self.epoch, self.position, self._order = epoch, position, None


class EasyToHard(EpochSampler):
    """The first epochs go from easy prompts to hard ones, and later ones are in the usual order.

    Bengio et al., Curriculum learning, ICML 2009.

    Args:
        prompts: as in `PromptSampler`.
        seed: of the order of prompts of equal difficulty.
        shuffle: `data.shuffle`.
        column: with the difficulty of a row, a number; none: the length of the prompt in characters.
        epochs: number of first epochs that are sorted.

    Raises:
        ValueError: a row has no number in the column.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        shuffle: bool,
        column: str | None = None,
        epochs: int = 1,
    ) -> None:
        super().__init__(prompts, seed=seed, shuffle=shuffle)
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"need data.curriculum.epochs of at least 1, got {epochs!r}")
        self.epochs = epochs
        given = (num_characters(p) if column is None else difficulty_of(p, column) for p in prompts)
        self._difficulty = np.fromiter(given, dtype=np.float64, count=len(prompts))

    @override
    def order(self, epoch: int) -> NDArray[np.int64]:
        usual = super().order(epoch)
        if epoch >= self.epochs:
            return usual
        ordered: NDArray[np.int64] = usual[np.argsort(self._difficulty[usual], kind="stable")]
        return ordered


def num_characters(prompt: Prompt) -> float:
    """Length of a prompt, of all its messages if it is a chat."""
    content = prompt.content
    return float(len(content) if isinstance(content, str) else sum(len(str(m["content"])) for m in content))


def difficulty_of(prompt: Prompt, column: str) -> float:
    """Number in a column of a row, or the number that its text spells.

    Raises:
        ValueError: there is none.
    """
    value = prompt.columns.get(column)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"need a number in the column {column!r} of data.curriculum, got {value!r} in row {prompt.index} "
            f"of {prompt.source or 'the data'}, which has the columns "
            f"{', '.join(prompt.columns) or 'prompt and answer alone'}"
        )
    return number
