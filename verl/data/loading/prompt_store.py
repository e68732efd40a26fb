"""Prompts of a data set as a sequence: in memory, or in a private file on disk where they are many."""

from __future__ import annotations

import sys
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor
from typing_extensions import override

from verl.config.data import WeightedChoice
from verl.data.loading.prompt_sequence import PromptSequence
from verl.data.records import decode_record, encode_record
from verl.utils.sampling_types import Prompt


class PromptStore(PromptSequence):
    """Prompts that are kept in memory up to a bound, and beyond it all in one file without a name.

    The file is in the folder of temporary files (`TMPDIR`) and vanishes with the process. Prompts with values
    that no file can hold, such as images in memory, stay in memory.

    Args:
        in_memory_bytes: bound, compared with the approximate size of the prompts as Python objects.
    """

    def __init__(self, *, in_memory_bytes: float = float("inf")) -> None:
        self._bound, self._size = in_memory_bytes, 0
        self._in_memory: list[Prompt] = []
        self._file: IO[bytes] | None = None
        self._starts = array("q")
        self._end = 0
        self._unencodable: dict[int, Prompt] = {}
        self._indices = array("q")

    @property
    def is_on_disk(self) -> bool:
        """True if there are more prompts than memory may hold."""
        return self._file is not None

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def append(self, prompt: Prompt) -> None:
        """Add a prompt at the end."""
        self._indices.append(prompt.index)
        if self._file is not None:
            self._write(prompt)
            return
        self._in_memory.append(prompt)
        if self._bound == float("inf"):
            return
        self._size += approximate_bytes(prompt)
        if self._size > self._bound:
            self._file = tempfile.TemporaryFile(prefix="verl-prompts-")  # noqa: SIM115
            prompts, self._in_memory = self._in_memory, []
            for one in prompts:
                self._write(one)

    def index_at(self, position: int) -> int:
        """`Prompt.index` of a prompt, without reading the prompt."""
        return self._indices[position]

    def __len__(self) -> int:
        return len(self._indices)

    @override
    def prompt_at(self, position: int) -> Prompt:
        if self._file is None:
            return self._in_memory[position]
        return self._unencodable.get(position) or self._read(position)

    def _write(self, prompt: Prompt) -> None:
        assert self._file is not None
        try:
            body = encoded_prompt(prompt)
        except ValueError:
            self._unencodable[len(self._starts)], body = prompt, b""
        self._file.seek(self._end)
        self._file.write(body)
        self._starts.append(self._end)
        self._end += len(body)

    def _read(self, position: int) -> Prompt:
        assert self._file is not None
        start = self._starts[position]
        end = self._starts[position + 1] if position + 1 < len(self._starts) else self._end
        self._file.seek(start)
        return decoded_prompt(self._file.read(end - start))


class PromptView(PromptSequence):
    """Some of the prompts of a sequence, by their positions in it.

    Args:
        prompts: all.
        positions: of those that are meant, in their order.
    """

    def __init__(self, prompts: Sequence[Prompt], positions: Sequence[int]) -> None:
        self._prompts, self._positions = prompts, array("q", positions)

    def index_at(self, position: int) -> int:
        """`Prompt.index` of a prompt."""
        return index_at(self._prompts, self._positions[position])

    def __len__(self) -> int:
        return len(self._positions)

    @override
    def prompt_at(self, position: int) -> Prompt:
        return self._prompts[self._positions[position]]


def selected(prompts: Sequence[Prompt], positions: Sequence[int]) -> Sequence[Prompt]:
    """The prompts at some positions, without a copy of them."""
    return prompts if len(positions) == len(prompts) else PromptView(prompts, positions)


def index_at(prompts: Sequence[Prompt], position: int) -> int:
    """`Prompt.index` at a position; of prompts on disk without reading them."""
    if isinstance(prompts, PromptStore | PromptView):
        return prompts.index_at(position)
    return prompts[position].index


def encoded_prompt(prompt: Prompt) -> bytes:
    """A prompt as bytes, without pickle.

    Raises:
        ValueError: it has a value that cannot be encoded.
    """
    reward = None if prompt.reward is None else prompt.reward.model_dump(mode="json")
    return encode_record(vars(prompt) | {"reward": reward})


def decoded_prompt(body: bytes) -> Prompt:
    """The prompt of `encoded_prompt`."""
    facts = decode_record(bytearray(body))
    reward = facts.pop("reward")
    return Prompt(**facts, reward=None if reward is None else WeightedChoice.model_validate(reward))


def prompt_tensor(prompt: Prompt) -> Tensor:
    """A prompt as uint8 tensor, for a checkpoint.

    Raises:
        ValueError: as `encoded_prompt`.
    """
    return torch.frombuffer(bytearray(encoded_prompt(prompt)), dtype=torch.uint8)


def prompt_of_tensor(body: Tensor) -> Prompt:
    """The prompt of `prompt_tensor`."""
    return decoded_prompt(body.numpy().tobytes())


def approximate_bytes(value: Any) -> int:
    """Memory of a value with all that it holds, about; shared objects count each time."""
    if isinstance(value, Prompt):
        return sys.getsizeof(value) + sum(approximate_bytes(part) for part in vars(value).values())
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(approximate_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(approximate_bytes, value))
    return sys.getsizeof(value)
