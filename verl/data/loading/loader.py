"""The contract of loaders: endless draws of prompts, whose position a checkpoint keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl.data.loading.prompt_sampler import GroupFeedback
from verl.utils.sampling_types import Prompt


class Loader(ABC):
    """Endless draws of prompts.

    Two loaders with the same prompts, seed, state and feedback give the same prompts.
    """

    @abstractmethod
    def take(self, n: int) -> list[Prompt]:
        """The next n prompts.

        Raises:
            ValueError: n is below 1, or a row of a stream cannot be used.
        """

    @property
    @abstractmethod
    def prompts(self) -> Sequence[Prompt]:
        """Prompts that are known before the first step: all of them, or the first ones of a stream."""

    @property
    @abstractmethod
    def num_prompts(self) -> int | None:
        """Number of all prompts; None: a stream, whose end was not seen yet."""

    @property
    @abstractmethod
    def epochs(self) -> float | None:
        """Passes over the prompts so far, such as 1.5; None: the prompts are not counted yet."""

    @abstractmethod
    def prompt(self, index: int) -> Prompt | None:
        """The prompt with this `Prompt.index`; None: there is none, or it is of a stream."""

    def observe(self, prompt: Prompt, feedback: GroupFeedback) -> None:
        """Take up the rewards of a group that was learned from, or replaced; here nothing."""
        return

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call; here none."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that later prompts depend on: numbers, texts, lists, dicts and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the position at which `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts, another seed or another order, so that prompts would be
                repeated or left out.
        """

    def prompts_by_index(self, indices: Iterable[int]) -> dict[int, Prompt]:
        """Those of the prompts that can be found again, by their `Prompt.index`."""
        found = {index: self.prompt(index) for index in set(indices)}
        return {index: prompt for index, prompt in found.items() if prompt is not None}


def check_identity(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a state is of the prompts and the order that `own` tells.

    Raises:
        ValueError: it is of others.
    """
    for key, value in own.items():
        if state.get(key) != value:
            raise ValueError(
                f"need the prompts and the order that the run began with: {key} was {state.get(key)!r} "
                f"and is {value!r}; restore the settings of data and seed, or start afresh with "
                "checkpoint.resume=never"
            )


def check_count(n: int) -> None:
    """Raises ValueError if fewer than one prompt is to be taken."""
    if n < 1:
        raise ValueError(f"need to take at least one prompt, got {n}")
