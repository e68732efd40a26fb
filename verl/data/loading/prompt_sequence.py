"""The base of sequences of prompts that are not lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

from verl.utils.sampling_types import Prompt


class PromptSequence(Sequence[Prompt]):
    """Prompts by their positions; negative positions and slices are those of a list."""

    @abstractmethod
    def prompt_at(self, position: int) -> Prompt:
        """The prompt at a position from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, position: int) -> Prompt: ...

    @overload
    def __getitem__(self, position: slice) -> list[Prompt]: ...

    def __getitem__(self, position: int | slice) -> Prompt | list[Prompt]:
        """The prompt at a position, or a list of those of a slice; raises IndexError beyond the end."""
        places = range(len(self))[position]
        return self.prompt_at(places) if isinstance(places, int) else [self.prompt_at(i) for i in places]

    def __iter__(self) -> Iterator[Prompt]:
        return (self.prompt_at(i) for i in range(len(self)))
