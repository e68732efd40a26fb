"""Endless draws from a stream, whose rows are read and checked while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from verl.config.data import DataConfig, DataSource
from verl.data.loading.loader import Loader, check_count, check_identity
from verl.data.loading.prompt_sampler import uniforms
from verl.data.loading.prompt_store import decoded_prompt, encoded_prompt
from verl.data.loading.row_prompts import RowPrompts
from verl.data.reading.file_readers import PlacedRow
from verl.data.reading.row_cells import MalformedRow
from verl.data.reading.row_stream import RowStream
from verl.utils.sampling_types import Prompt

# Rows in a row that cannot be used, after which the stream is given up: it may have no end.
_MAX_UNUSABLE = 10_000


class StreamLoader(Loader):
    """Draws from a buffer of rows of a stream, in a random order; a stream that ends begins again.

    In each pass every usable row is drawn once. A checkpoint holds the rows in the buffer, so that a resumed
    run goes on with exactly the same prompts. The index of a prompt is the number of its row among all that
    were read, over all passes.

    Args:
        stream: the rows.
        make: makes prompts of them.
        admits: False for a prompt that is dropped, as it is too long. It raises `MalformedRow` for a row that
            `data.on_malformed` decides on, and ValueError for one that always ends the run.
        config: `shuffle`, `shuffle_buffer` and `on_malformed` are read.
        seed: of the order.
    """

    def __init__(
        self,
        stream: RowStream,
        make: RowPrompts,
        admits: Callable[[Prompt], bool],
        config: DataConfig,
        *,
        seed: int,
    ) -> None:
        self._stream, self._make, self._admits, self.seed = stream, make, admits, seed
        self._stops = config.on_malformed == "stop"
        self.shuffle, self._size = config.shuffle, config.shuffle_buffer if config.shuffle else 1
        self.first_index, self.index_step = 0, 1
        self._rows: Iterator[PlacedRow] | None = None
        self._buffer: list[bytes] = []  # encoded: so a checkpoint can hold them for sure
        self._is_at_end = False
        self._num_read = self._num_malformed = self._num_too_long = 0
        self._num_drawn = self._passes = self._drawn_in_pass = 0
        self._pass_size: int | None = None

    @property
    def source(self) -> DataSource:
        """Source of the rows."""
        return self._stream.source

    @property
    @override
    def prompts(self) -> Sequence[Prompt]:
        self._fill_some()
        return [decoded_prompt(body) for body in self._buffer]

    @property
    @override
    def num_prompts(self) -> int | None:
        return self._pass_size

    @property
    @override
    def epochs(self) -> float | None:
        size = self._pass_size or self._num_rows
        return self._passes + min(1.0, self._drawn_in_pass / size) if size else None

    @override
    def take(self, n: int) -> list[Prompt]:
        check_count(n)
        return [self._next() for _ in range(n)]

    @override
    def prompt(self, index: int) -> None:
        return None

    @override
    def take_metrics(self) -> dict[str, float]:
        return {
            "data/malformed_rows": float(self._num_malformed),
            "data/too_long_rows": float(self._num_too_long),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        body = bytearray(b"".join(self._buffer))
        return {
            **self._identity,
            "stream": self._stream.state_dict(),
            "is_at_end": self._is_at_end,
            "buffer": torch.frombuffer(body, dtype=torch.uint8)
            if body
            else torch.empty(0, dtype=torch.uint8),
            "buffer_lengths": [len(one) for one in self._buffer],
            "counts": {name: vars(self)[f"_{name}"] for name in _COUNTS},
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_identity(state, self._identity)
        self._stream.load_state_dict(state["stream"])
        self._rows, self._is_at_end = None, state["is_at_end"]
        body = state["buffer"].numpy().astype(np.uint8).tobytes()
        ends = list(accumulate(state["buffer_lengths"], initial=0))
        self._buffer = [body[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        for name in _COUNTS:
            setattr(self, f"_{name}", state["counts"][name])

    @property
    def _identity(self) -> dict[str, Any]:
        return {"source": self._stream.source.path, "seed": self.seed, "shuffle_buffer": self._size}

    @cached_property
    def _num_rows(self) -> int | None:
        return self._stream.num_rows

    def _next(self) -> Prompt:
        self._fill_some()
        place = int(uniforms(self.seed, self._num_drawn, 1)[0] * len(self._buffer))
        body, last = self._buffer[place], self._buffer.pop()
        if place < len(self._buffer):
            self._buffer[place] = last
        self._num_drawn += 1
        self._drawn_in_pass += 1
        return decoded_prompt(body)

    def _fill_some(self) -> None:
        """Read until the buffer is full; raises ValueError if a whole pass has no usable row."""
        self._fill()
        if not self._buffer:
            raise ValueError(
                f"need at least one usable row in {self._stream.source.path}, got none in a whole pass of "
                f"{self._num_read} rows: {self._num_malformed} malformed, {self._num_too_long} too long"
            )

    def _fill(self) -> None:
        """Read until the buffer is full; behind the last row of a pass the next one begins.

        The buffer is empty afterwards only if a whole pass has no usable row.
        """
        self._read_ahead()
        if not self._buffer and self._drawn_in_pass:
            self._pass_size = self._drawn_in_pass
            self._passes, self._drawn_in_pass, self._is_at_end = self._passes + 1, 0, False
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Read rows until the buffer is full, or the pass ends."""
        num_unusable = 0
        while len(self._buffer) < self._size and not self._is_at_end:
            if self._rows is None:
                self._rows = iter(self._stream)
            row = next(self._rows, None)
            if row is None:
                self._rows, self._is_at_end = None, True
                break
            prompt = self._prompt(*row)
            num_unusable = 0 if prompt else num_unusable + 1
            if num_unusable == _MAX_UNUSABLE:
                raise ValueError(
                    f"{row[0]}: {num_unusable} rows in a row cannot be used, {self._num_malformed} of all "
                    f"are malformed and {self._num_too_long} too long; correct data.prompt_key or the source"
                )
            if prompt:
                self._buffer.append(prompt)

    def _prompt(self, place: str, raw: Any) -> bytes | None:
        """The prompt of a row, encoded; None: it is left out."""
        index = self.first_index + self._num_read * self.index_step
        self._num_read += 1
        try:
            prompt = self._make(raw, index)
            if not self._admits(prompt):
                self._num_too_long += 1
                return None
            return encoded_prompt(prompt)
        except MalformedRow as problem:
            if self._stops:
                raise ValueError(
                    f"{place}: {problem}; correct it, or leave such rows out with data.on_malformed=skip"
                ) from problem
            self._num_malformed += 1
            return None
        except ValueError as problem:
            raise ValueError(f"{place}: {problem}") from problem


_COUNTS = (
    "num_read",
    "num_malformed",
    "num_too_long",
    "num_drawn",
    "passes",
    "drawn_in_pass",
    "pass_size",
)
