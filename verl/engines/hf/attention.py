"""One attention function for training, prefill and decoding, plugged into any Transformers model by its
attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from verl.data.batch import ModelInput
from verl.engines.sequence_parallel import SequenceGroup

IMPLEMENTATION = "verl_rows"

# In shapes: B rows, S positions of a row, N packed positions, H query heads, K key-value heads, D head size,
# L cached positions.


class KVCache:
    """Keys and values of up to `num_slots` rows, one [slots, K, L, D] pair per layer, grown in steps as rows
    get longer.

    Rows in use are always the first ones: a finished row is overwritten by the last (`copy`), so that every
    decode step reads a view and copies nothing.
    """

    GROWTH = 64

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens."""
        if length <= self._length:
            return
        self._length = -(-length // self.GROWTH) * self.GROWTH
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (self._grown(keys), self._grown(values))

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [slots, K, L, D] each, where `key` and `value` [., K, ., D] fit in."""
        if layer not in self._layers:
            # In the dtype of the values, which come straight from a matrix product: rotated keys are fp32 in
            # bf16 runs, too, but a product would cast them again, and the whole cache in every step.
            keys, values = (
                value.new_zeros(self.num_slots, t.shape[1], self._length, t.shape[3]) for t in (key, value)
            )
            self._layers[layer] = (keys, values)
        return self._layers[layer]

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copies the first `length` positions of the slots `source` to the slots `target`, [M] int64 each."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self._length, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new


@dataclass(frozen=True)
class RowLayout:
    """Which positions of the input belong to which row, for training and prefill.

    Attributes:
        lengths: tokens of each row.
        packed: the rows lie end to end in one line; else one line per row, right-padded.
        device: where index tensors are made.
        cache: filled with keys and values of row i at slots[i], if given.
        slots: [B] int64.
        index: as in `ModelInput`, where packed rows share their prompts; none: the rows lie end to end.
        windows: the window that each layer was told, filled by the forward pass.
        sequence: the ranks that share the packed line, each with a slice of it; none: the line is whole.
    """

    lengths: list[int]
    packed: bool
    device: torch.device
    cache: KVCache | None = None
    slots: Tensor | None = None
    index: tuple[Tensor, Tensor] | None = None
    windows: dict[int, int | None] = field(default_factory=dict)
    sequence: SequenceGroup | None = None

    @classmethod
    def from_inputs(cls, inputs: ModelInput, sequence: SequenceGroup | None = None) -> RowLayout:
        """Layout of rows to train on."""
        return cls(
            inputs.lengths, inputs.packed, inputs.input_ids.device, index=inputs.index, sequence=sequence
        )

    @property
    def num_places(self) -> int:
        """Places of the packed line."""
        return sum(self.lengths) if self.index is None else len(self.index[1])

    @property
    def uniform(self) -> bool:
        """Whether all rows have one length and lie end to end, so that packed and padded are the same memory."""
        return self.index is None and min(self.lengths) == max(self.lengths)

    @cached_property
    def padded_index(self) -> tuple[Tensor, Tensor]:
        """For each padded position its packed one ([B * S], padding reads position 0), and the reverse ([N])."""
        if self.index is not None:
            return self.index
        lengths = torch.tensor(self.lengths, device=self.device)
        positions = torch.arange(max(self.lengths), device=self.device)
        present = positions < lengths[:, None]
        starts = lengths.cumsum(0) - lengths
        to_padded = torch.where(present, starts[:, None] + positions, 0).flatten()
        return to_padded, present.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class DecodeLayout:
    """One new token for each of the first A slots of the cache.

    Attributes:
        cache: holds the earlier tokens, takes the new one.
        positions: [A] int64, position of each new token in its row.
        length: 1 + the largest position.
        masks: see `mask`.
    """

    cache: KVCache
    positions: Tensor
    length: int

    @cached_property
    def rows(self) -> Tensor:
        """[A] int64, the slots in use."""
        return torch.arange(len(self.positions), device=self.positions.device)

    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[A, 1, 1, length], 0 where a new token may look and -inf elsewhere; made once for all layers that
        are alike.
        """
        window = None if window is None or window >= self.length else window
        if (window, dtype) not in self.masks:
            age = self.positions[:, None] - torch.arange(self.length, device=self.positions.device)
            hidden = (age < 0) if window is None else (age < 0) | (age >= window)
            # As numbers to add: from booleans PyTorch would make these again in each layer.
            self.masks[window, dtype] = _added_mask(hidden, dtype)[:, None, None]
        return self.masks[window, dtype]


@dataclass(frozen=True)
class _Score:
    """How a layer scores: factor on the products (None: D ** -0.5), window in tokens, and Gemma 2's cap."""

    scaling: float | None
    window: int | None
    softcap: float | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, S, D] from query [B, H, S, D], key and value [B, K, L, D]; causal if there is no mask."""
        if self.softcap is None:
            gqa = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=gqa
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = torch.tanh(query @ key.transpose(2, 3) * scale / self.softcap) * self.softcap
        if mask is None:
            mask = torch.full(scores.shape[2:], float("-inf"), device=query.device).triu(1)
        weights = torch.softmax(scores.float() + mask, -1)
        return weights.to(value.dtype) @ value


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, *, layer: int, score: _Score
) -> Tensor:
    """Each row attends to itself. Packed [1, H, N, D] or padded [B, H, S, D] in, [1, N, H, D] or [B, S, H, D]
    out.
    """
    if layout.packed:
        query, key, value = (_padded(t, layout) for t in (query, key, value))
    layout.windows[layer] = score.window
    width = max(layout.lengths)
    if layout.cache is not None and layout.slots is not None:
        keys, values = layout.cache.layer(layer, key, value)
        keys[layout.slots, :, :width] = key.to(keys.dtype)
        values[layout.slots, :, :width] = value
    mask = None
    if score.window is not None and score.window < width:
        age = torch.arange(width, device=query.device)[:, None] - torch.arange(width, device=query.device)
        mask = _added_mask((age < 0) | (age >= score.window), query.dtype)
    # Rows are right-padded, so no real token can see padding: the causal mask is enough.
    out = score.attend(query, key, value, mask).transpose(1, 2)
    if not layout.packed:
        return out
    flat = out.flatten(0, 1)
    return (flat if layout.uniform else flat.index_select(0, layout.padded_index[1]))[None]


def _added_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden` is True, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _padded(packed: Tensor, layout: RowLayout) -> Tensor:
    """[1, H, N, D] to [B, H, S, D]."""
    rows = packed[0].transpose(0, 1)
    if not layout.uniform:
        rows = rows.index_select(0, layout.padded_index[0])
    return rows.unflatten(0, (len(layout.lengths), -1)).transpose(1, 2)


def _attend_cached(
    query: Tensor, key: Tensor, value: Tensor, layout: DecodeLayout, *, layer: int, score: _Score
) -> Tensor:
    """One token per row, [A, H, 1, D] in, [A, 1, H, D] out; its key and value are put into the cache."""
    keys, values = layout.cache.layer(layer, key, value)
    keys[layout.rows, :, layout.positions] = key[:, :, 0].to(keys.dtype)
    values[layout.rows, :, layout.positions] = value[:, :, 0]
    num_rows, kv_heads = key.shape[:2]
    # The query heads that share a key-value head stand in the place of query positions: nothing is repeated.
    grouped = query.reshape(num_rows, kv_heads, -1, query.shape[-1])
    mask = layout.mask(score.window, grouped.dtype)
    out = score.attend(
        grouped, keys[:num_rows, :, : layout.length], values[:num_rows, :, : layout.length], mask
    )
    return out.reshape(num_rows, 1, -1, out.shape[-1])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layout: RowLayout | DecodeLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function that Transformers calls in every attention layer; what may attend to what follows from
    `layout`.
    """
    score = _Score(scaling, sliding_window, softcap)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of Transformers has its number
    if isinstance(layout, DecodeLayout):
        return _attend_cached(query, key, value, layout, layer=layer, score=score), None
    if layout.sequence is None:
        return _attend_rows(query, key, value, layout, layer=layer, score=score), None
    shares = layout.sequence.sequence_to_heads(query, key, value, num_places=layout.num_places)
    return layout.sequence.heads_to_sequence(_attend_rows(*shares, layout, layer=layer, score=score)), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


@contextmanager
def use_attention(model: PreTrainedModel, implementation: str = IMPLEMENTATION) -> Iterator[None]:
    """Makes the model attend by `layout=` (or as Transformers names it) inside the block; outside, it is as
    it was.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before: list[tuple[PretrainedConfig, str]] = [(c, c._attn_implementation) for c in configs.values()]
    for config in configs.values():
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
