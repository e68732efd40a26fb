"""One attention function for training, prefill and decoding of any Transformers model.

It is plugged in by the attention interface of Transformers; what may attend to what follows from a layout.
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

# In shapes: B rows, S positions of a row, N packed positions, A rows that decode, H query heads, K key-value
# heads, D head size, L cached positions.


class KVCache:
    """Keys and values of up to `num_slots` rows, one pair [slots, K, L, D] per layer; L grows with the rows.

    Rows in use are always in the first slots: a finished row is overwritten by the last one (`copy`). So
    every decode step reads a view and copies nothing.
    """

    GROWTH = 64

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

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

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` positions of the slots `source` to the slots `target`, both [M] int64."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


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
        windows: sliding window that each layer was called with, filled by the forward pass.
        sequence: the ranks that share the packed sequence; None: it is whole on this rank.
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
        """[1, H, N, D] to [B, H, S, D]."""
        rows = packed[0].transpose(0, 1)
        if not self.uniform:
            rows = rows.index_select(0, self.padded_index[0])
        return rows.unflatten(0, (len(self.lengths), -1)).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, S, H, D] to [1, N, H, D]."""
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
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """[A] int64, the slots in use."""
        return torch.arange(len(self.positions), device=self.positions.device)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[A, 1, 1, length], 0 where a new token may attend and -inf elsewhere.

        Made once for all layers with the same window.
        """
        window = None if window is None or window >= self.length else window
        if (window, dtype) not in self.masks:
            age = self.positions[:, None] - torch.arange(self.length, device=self.positions.device)
            hidden = (age < 0) if window is None else (age < 0) | (age >= window)
            self.masks[window, dtype] = additive_mask(hidden, dtype)[:, None, None]
        return self.masks[window, dtype]


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden` is True, else 0; from a boolean mask PyTorch would make it again in each layer."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, with the options that Transformers passes.

    Attributes:
        layer: number of the layer.
        scaling: factor of the scores; None: D ** -0.5.
        window: sliding window in tokens; None: the whole row.
        softcap: cap of the scores, as in Gemma 2; None: no cap.
    """

    layer: int
    scaling: float | None
    window: int | None
    softcap: float | None

    def over_rows(self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
        """Attention of each row to itself.

        [1, N, H, D] from packed rows [1, H, N, D], [B, S, H, D] from padded rows [B, H, S, D].
        """
        if layout.packed:
            query, key, value = (layout.pad(t) for t in (query, key, value))
        layout.windows[self.layer] = self.window
        width = max(layout.lengths)
        if layout.cache is not None and layout.slots is not None:
            keys, values = layout.cache.layer(self.layer, key, value)
            keys[layout.slots, :, :width] = key.to(keys.dtype)
            values[layout.slots, :, :width] = value
        mask = None
        if self.window is not None and self.window < width:
            positions = torch.arange(width, device=query.device)
            age = positions[:, None] - positions
            mask = additive_mask((age < 0) | (age >= self.window), query.dtype)
        # Rows are right-padded, so no real token can see padding: the causal mask is enough.
        out = self._attend(query, key, value, mask).transpose(1, 2)
        return layout.unpad(out) if layout.packed else out

    def over_cache(self, query: Tensor, key: Tensor, value: Tensor, layout: DecodeLayout) -> Tensor:
        """[A, 1, H, D] of one token per row, [A, H, 1, D]; its key and value are put into the cache."""
        keys, values = layout.cache.layer(self.layer, key, value)
        keys[layout.rows, :, layout.positions] = key[:, :, 0].to(keys.dtype)
        values[layout.rows, :, layout.positions] = value[:, :, 0]
        num_rows, kv_heads = key.shape[:2]
        # The query heads that share a key-value head take the place of query positions: no key is repeated.
        grouped = query.reshape(num_rows, kv_heads, -1, query.shape[-1])
        keys, values = (cached[:num_rows, :, : layout.length] for cached in (keys, values))
        out = self._attend(grouped, keys, values, layout.mask(self.window, grouped.dtype))
        return out.reshape(num_rows, 1, -1, out.shape[-1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
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
    """The function that Transformers calls in every attention layer; the mask follows from `layout`."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of Transformers has one
    attention = LayerAttention(layer, scaling, sliding_window, softcap)
    if isinstance(layout, DecodeLayout):
        return attention.over_cache(query, key, value, layout), None
    sequence = layout.sequence
    if sequence is None:
        return attention.over_rows(query, key, value, layout), None
    query, key, value = sequence.sequence_to_heads(query, key, value, num_positions=layout.num_positions)
    return sequence.heads_to_sequence(attention.over_rows(query, key, value, layout)), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


@contextmanager
def use_attention(model: PreTrainedModel, implementation: str = IMPLEMENTATION) -> Iterator[None]:
    """Context in which the model attends by `layout=`, or by another implementation of Transformers."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before: list[tuple[PretrainedConfig, str]] = [(c, c._attn_implementation) for c in configs.values()]
    for config in configs.values():
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
