"""Layouts of rows in the input of a model, and the cache of keys and values that generation reads.

What may attend to what follows from the layout that `use_layout` sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from verl.data.batch import ModelInput
from verl.engines.sequence_parallel import SequenceGroup

# New tokens of a row behind cached ones whose attention is computed at a time: bounds the scores.
_BLOCK_TOKENS = 1024

# In shapes: B rows, S positions of a row, N packed positions, A rows that decode, K key-value heads, D head
# size, L cached positions.

# Keys and values [K, L, D] of one row, by layer.
CachedRow = dict[int, tuple[Tensor, Tensor]]


class AttentionSpan(NamedTuple):
    """Earlier tokens of a row that a token may attend to.

    Attributes:
        window: the last so many tokens, its own included; None: all.
        chunk: only those in its own chunk of so many tokens, as in Llama 4; None: all.
    """

    window: int | None
    chunk: int | None = None

    def hidden(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[..., Q, L] bool, True where a query at position [..., Q] may not attend to a key at [L]."""
        queries = queries[..., None]
        hidden = keys > queries
        if self.window is not None:
            hidden = hidden | (keys <= queries - self.window)
        if self.chunk is not None:
            hidden = hidden | (keys // self.chunk != queries // self.chunk)
        return hidden

    def within(self, length: int) -> AttentionSpan:
        """The same for rows of `length` tokens, without limits that do not matter there."""
        return AttentionSpan(*(None if size is None or size >= length else size for size in self))


class KVCache:
    """Keys and values of up to `num_slots` rows, one pair [slots, K, L, D] per layer; L grows with the rows.

    The states of recurrent layers are here, too, in the same slots. Rows in use are always in the first
    slots: a finished row is overwritten by the last one (`copy`). So every decode step reads a view and
    copies nothing.
    """

    GROWTH = 64

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[tuple[int, str, int], Tensor] = {}
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens of the longest row that there is room for."""
        return self._length

    @property
    def is_recurrent(self) -> bool:
        """True if some layers have a state, which is that after the last token alone."""
        return bool(self._states)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if length <= self._length:
            return
        self._length = -(-length // self.GROWTH) * self.GROWTH

        def grown(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], self._length, old.shape[3])
            new[:, :, : old.shape[2]] = old
            return new

        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (grown(keys), grown(values))

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer; allocated at first to fit `key` and `value` [., K, ., D]."""
        if layer not in self._layers:
            # In the dtype of the values, which come straight from a matrix product. Rotated keys are fp32
            # even in bf16 runs, but the attention would cast them again, and the whole cache in every step.
            keys, values = (
                value.new_zeros(self.num_slots, t.shape[1], self._length, t.shape[3]) for t in (key, value)
            )
            self._layers[layer] = (keys, values)
        return self._layers[layer]

    def layer_states(self, layer: int) -> dict[tuple[str, int], Tensor]:
        """Recurrent states [slots, ...] of a layer, by kind and number."""
        return {key[1:]: states for key, states in self._states.items() if key[0] == layer}

    def put_state(self, key: tuple[int, str, int], slots: Tensor, state: Tensor) -> None:
        """Set a recurrent state of the slots [M] to [M, ...]; the key is its layer, kind and number."""
        if key not in self._states:
            self._states[key] = state.new_zeros(self.num_slots, *state.shape[1:])
        self._states[key][slots] = state

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` positions of the slots `source` to the slots `target`, both [M] int64."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        for states in self._states.values():
            states[target] = states[source]

    def row(self, slot: int, length: int) -> CachedRow:
        """Copy of the first `length` positions of a slot; of layers without a recurrent state."""
        return {
            layer: (keys[slot, :, :length].clone(), values[slot, :, :length].clone())
            for layer, (keys, values) in self._layers.items()
        }

    def put_row(self, slot: int, row: CachedRow, length: int) -> None:
        """Write the first `length` positions of a copied row into a slot, which has room for them."""
        for layer, (keys, values) in row.items():
            own_keys, own_values = self.layer(layer, keys[None], values[None])
            own_keys[slot, :, :length] = keys[:, :length]
            own_values[slot, :, :length] = values[:, :length]


@dataclass(frozen=True)
class RowLayout:
    """Positions of each row in the input, for training and prefill.

    Attributes:
        lengths: tokens of each row.
        packed: the rows lie end to end in one sequence; else one row per line, right-padded.
        device: device of the index tensors.
        cache: filled with keys and values of row i at slots[i]; None: nothing is cached.
        slots: [B] int64.
        index: as in `ModelInput`, where packed rows share their prompts; None: the rows lie end to end.
        spans: span that each layer was called with, filled by the forward pass.
        sequence: the ranks that share the packed sequence; None: it is whole on this rank.
    """

    lengths: list[int]
    packed: bool
    device: torch.device
    cache: KVCache | None = None
    slots: Tensor | None = None
    index: tuple[Tensor, Tensor] | None = None
    spans: dict[int, AttentionSpan] = field(default_factory=dict)
    sequence: SequenceGroup | None = None

    @classmethod
    def from_inputs(cls, inputs: ModelInput, sequence: SequenceGroup | None = None) -> RowLayout:
        """Layout of rows to train on."""
        return cls(
            inputs.lengths, inputs.packed, inputs.input_ids.device, index=inputs.index, sequence=sequence
        )

    @property
    def num_positions(self) -> int:
        """Length of the packed sequence, N."""
        return sum(self.lengths) if self.index is None else len(self.index[1])

    @property
    def uniform(self) -> bool:
        """True if all rows have one length and lie end to end: packed and padded are the same memory."""
        return self.index is None and min(self.lengths) == max(self.lengths)

    @cached_property
    def padded_index(self) -> tuple[Tensor, Tensor]:
        """Index that pads, [B * S], and index that packs, [N].

        The first has the packed position of each padded one (0 for padding), the second the reverse.
        """
        if self.index is not None:
            return self.index
        lengths = torch.tensor(self.lengths, device=self.device)
        positions = torch.arange(max(self.lengths), device=self.device)
        present = positions < lengths[:, None]
        starts = lengths.cumsum(0) - lengths
        to_padded = torch.where(present, starts[:, None] + positions, 0).flatten()
        return to_padded, present.flatten().nonzero().squeeze(1)

    def pad(self, packed: Tensor) -> Tensor:
        """[1, N, ...] to [B, S, ...]."""
        rows = packed[0]
        if not self.uniform:
            rows = rows.index_select(0, self.padded_index[0])
        return rows.unflatten(0, (len(self.lengths), -1))

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, S, ...] to [1, N, ...]."""
        flat = padded.flatten(0, 1)
        return (flat if self.uniform else flat.index_select(0, self.padded_index[1]))[None]


@dataclass(frozen=True)
class DecodeLayout:
    """One new token for each of the first A slots of the cache.

    Attributes:
        cache: holds the earlier tokens and takes the new ones.
        positions: [A] int64, position of each new token in its row.
        length: 1 + the largest position.
        masks: cache of `mask`.
    """

    cache: KVCache
    positions: Tensor
    length: int
    masks: dict[tuple[AttentionSpan, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """[A] int64, the slots in use."""
        return torch.arange(len(self.positions), device=self.positions.device)

    def mask(self, span: AttentionSpan, dtype: torch.dtype) -> Tensor:
        """[A, 1, 1, length], 0 where a new token may attend and -inf elsewhere.

        Made once for all layers with the same span.
        """
        span = span.within(self.length)
        if (span, dtype) not in self.masks:
            keys = torch.arange(self.length, device=self.positions.device)
            hidden = span.hidden(self.positions[:, None], keys)
            self.masks[span, dtype] = additive_mask(hidden, dtype)[:, None]
        return self.masks[span, dtype]


class TokenBlock(NamedTuple):
    """Consecutive new tokens of one row.

    Attributes:
        slot: of the row.
        first: number of the first of them among the packed tokens.
        start: its position in the row.
        num_tokens: of the block.
    """

    slot: int
    first: int
    start: int
    num_tokens: int


@dataclass(frozen=True)
class ExtendLayout:
    """New tokens of rows whose earlier tokens are cached; the new ones lie end to end in one sequence.

    Attributes:
        cache: holds the earlier tokens and takes the new ones.
        slots: of each row.
        starts: number of earlier tokens of each row.
        lengths: number of new tokens of each row.
        device: of the index tensors.
        masks: cache of `mask`.
    """

    cache: KVCache
    slots: list[int]
    starts: list[int]
    lengths: list[int]
    device: torch.device
    masks: dict[tuple[TokenBlock, AttentionSpan, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[TokenBlock]:
        """The new tokens in their order, each block of one row."""
        blocks, first = [], 0
        for slot, start, length in zip(self.slots, self.starts, self.lengths, strict=True):
            for begin in range(0, length, _BLOCK_TOKENS):
                count = min(_BLOCK_TOKENS, length - begin)
                blocks.append(TokenBlock(slot, first + begin, start + begin, count))
            first += length
        return blocks

    @cached_property
    def positions(self) -> Tensor:
        """[N] int64, position of each new token in its row."""
        spans = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + n, device=self.device) for start, n in spans])

    @cached_property
    def token_slots(self) -> Tensor:
        """[N] int64, slot of each new token."""
        slots, lengths = (torch.tensor(each, device=self.device) for each in (self.slots, self.lengths))
        return slots.repeat_interleave(lengths)

    def mask(self, block: TokenBlock, span: AttentionSpan, dtype: torch.dtype) -> Tensor:
        """[count, start + count], 0 where a token of a block may attend and -inf elsewhere.

        Made once for all layers with the same span.
        """
        length = block.start + block.num_tokens
        key = (block, span.within(length), dtype)
        if key not in self.masks:
            positions = torch.arange(length, device=self.device)
            self.masks[key] = additive_mask(span.hidden(positions[block.start :], positions), dtype)
        return self.masks[key]


Layout = RowLayout | DecodeLayout | ExtendLayout
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current_layout() -> Layout | None:
    """The layout of `use_layout`; None outside of it."""
    return _LAYOUT.get()


@contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Context in which attention and recurrent layers read tokens as this layout says."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden` is True, else 0; from a boolean mask PyTorch would make it again in each layer."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
