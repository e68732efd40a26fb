"""Rows of tokens by their beginnings: their keys and values, from which later prompts continue."""

from __future__ import annotations

from bisect import bisect, bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from verl.engines.hf.row_layouts import CachedRow

V = TypeVar("V")
_ID = np.dtype(np.int32)
# A prefix is used if it spares at least this share of a prompt: whole rows are computed faster.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class PrefixMatch(Generic[V]):
    """The known beginning of a prompt.

    Attributes:
        value: of a row that begins with it.
        length: its tokens.
    """

    value: V
    length: int


class PrefixIndex(Generic[V]):
    """Values of rows of tokens; no row is the beginning of another one, whose place the longer one takes.

    So all turns of an episode have one row, as each begins with the one before.

    Args:
        max_tokens: limit on the tokens of all rows, above which those that were used longest ago are dropped;
            None: as the caller of `keep` says.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        # Sorted, so that the row with the longest common prefix is a neighbour of the prompt.
        self._keys: list[bytes] = []
        # The one that was used longest ago first.
        self._values: dict[bytes, V] = {}
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self._num_tokens

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._keys)

    def find(self, tokens: Sequence[int]) -> PrefixMatch[V] | None:
        """The longest common beginning with any row; None: there is none."""
        wanted = _encoded(tokens)
        at = bisect(self._keys, wanted)
        near = self._keys[max(0, at - 1) : at + 1]
        length, key = max(((_num_shared(wanted, key), key) for key in near), default=(0, b""))
        if not length:
            return None
        self._values[key] = self._values.pop(key)
        return PrefixMatch(self._values[key], length)

    def has(self, tokens: Sequence[int]) -> bool:
        """True if a row begins with these tokens."""
        key = _encoded(tokens)
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and self._keys[at].startswith(key)

    def keep(self, tokens: Sequence[int], value: V, *, max_tokens: int = 0) -> None:
        """Add a row that no other one begins with; it replaces one that is its beginning.

        Args:
            tokens: of the row.
            value: of the row.
            max_tokens: limit on the tokens of all rows, where the index has none of its own.
        """
        key = _encoded(tokens)
        at = bisect_left(self._keys, key)
        if at and key.startswith(self._keys[at - 1]):
            self._drop(self._keys[at - 1])
        limit = max_tokens if self.max_tokens is None else self.max_tokens
        while self._keys and self._num_tokens + len(tokens) > limit:
            self._drop(next(iter(self._values)))
        if len(tokens) > limit:
            return
        self._keys.insert(bisect_left(self._keys, key), key)
        self._values[key] = value
        self._num_tokens += len(tokens)

    def clear(self) -> None:
        """Drop all rows, as those of other weights."""
        self._keys, self._values, self._num_tokens = [], {}, 0

    def _drop(self, key: bytes) -> None:
        del self._keys[bisect_left(self._keys, key)], self._values[key]
        self._num_tokens -= len(key) // _ID.itemsize


class PrefixCache(PrefixIndex[CachedRow]):
    """Keys and values of rows, of one version of the weights."""

    def prefix_of(self, prompt: Sequence[int]) -> PrefixMatch[CachedRow]:
        """The part of a prompt that need not be computed; never its last token, and not too small a part."""
        found = self.find(prompt[:-1])
        is_worth_it = found is not None and found.length >= _LEAST_SHARE * len(prompt)
        return found if found is not None and is_worth_it else NO_PREFIX


NO_PREFIX: PrefixMatch[CachedRow] = PrefixMatch({}, 0)


def _encoded(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, _ID).tobytes()


def _num_shared(one: bytes, other: bytes) -> int:
    """Number of ids at the beginning of both."""
    size = min(len(one), len(other)) // _ID.itemsize
    differ = np.frombuffer(one, _ID, size) != np.frombuffer(other, _ID, size)
    return int(differ.argmax()) if differ.any() else size
