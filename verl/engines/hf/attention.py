"""One attention function for training, prefill and decoding of any Transformers model.

It is plugged in by the attention interface of Transformers; what may attend to what follows from the layout
that `use_layout` sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from verl.data.batch import ModelInput
from verl.engines.sequence_parallel import SequenceGroup

IMPLEMENTATION = "verl_rows"
# Options that attention layers pass without a meaning here: dropout is off, rows are causal, and positions
# are in the keys already.
_IGNORED = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position"}

# In shapes: B rows, S positions of a row, N packed positions, A rows that decode, H query heads, K key-value
# heads, D head size, L cached positions.


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


_LAYOUT: ContextVar[RowLayout | DecodeLayout | None] = ContextVar("layout", default=None)


def current_layout() -> RowLayout | DecodeLayout | None:
    """The layout of `use_layout`; None outside of it."""
    return _LAYOUT.get()


@contextmanager
def use_layout(layout: RowLayout | DecodeLayout | None) -> Iterator[None]:
    """Context in which attention and recurrent layers read tokens as this layout says."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden` is True, else 0; from a boolean mask PyTorch would make it again in each layer."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer, with the options that Transformers passes.

    Attributes:
        layer: number of the layer.
        scaling: factor of the scores; None: D ** -0.5.
        span: tokens of the row that a token may attend to.
        softcap: cap of the scores, as in Gemma 2; None: no cap.
        sinks: [H], score of each head for attending to nothing, as in gpt-oss; None: there is none.
    """

    layer: int
    scaling: float | None
    span: AttentionSpan
    softcap: float | None = None
    sinks: Tensor | None = None

    def over_rows(self, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout) -> Tensor:
        """Attention of each row to itself.

        [1, N, H, D] from packed rows [1, H, N, D], [B, S, H, D] from padded rows [B, H, S, D].
        """
        if layout.packed:
            query, key, value = (layout.pad(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
        layout.spans[self.layer] = self.span
        width = max(layout.lengths)
        if layout.cache is not None and layout.slots is not None:
            keys, values = layout.cache.layer(self.layer, key, value)
            keys[layout.slots, :, :width] = key.to(keys.dtype)
            values[layout.slots, :, :width] = value
        mask, span = None, self.span.within(width)
        if span != AttentionSpan(None):
            positions = torch.arange(width, device=query.device)
            mask = additive_mask(span.hidden(positions, positions), query.dtype)
        # Rows are right-padded, so no real token can see padding: the causal mask is enough.
        sinks = None if self.sinks is None else self.sinks[:, None]
        out = self._attend(query, key, value, mask, sinks=sinks).transpose(1, 2)
        return layout.unpad(out) if layout.packed else out

    def over_cache(self, query: Tensor, key: Tensor, value: Tensor, layout: DecodeLayout) -> Tensor:
        """[A, 1, H, D] of one token per row, [A, H, 1, D]; its key and value are put into the cache."""
        keys, values = layout.cache.layer(self.layer, key, value)
        keys[layout.rows, :, layout.positions] = key[:, :, 0].to(keys.dtype)
        values[layout.rows, :, layout.positions] = value[:, :, 0]
        num_rows, kv_heads = key.shape[:2]
        # The query heads that share a key-value head take the place of query positions: no key is repeated.
        grouped = query.reshape(num_rows, kv_heads, -1, query.shape[-1])
        sinks = None if self.sinks is None else self.sinks.view(kv_heads, -1)
        keys, values = (cached[:num_rows, :, : layout.length] for cached in (keys, values))
        mask = layout.mask(self.span, grouped.dtype)
        out = self._attend(grouped, keys, values, mask, sinks=sinks)
        return out.reshape(num_rows, 1, -1, out.shape[-1])

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, sinks: Tensor | None
    ) -> Tensor:
        """[B, H, S, D] from query [B, H, S, D], key and value [B, K, L, D]; causal if there is no mask.

        Sinks are [H, S] or [H, 1].
        """
        if self.softcap is None and sinks is None:
            gqa = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=gqa
            )
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = query @ key.transpose(2, 3) * scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            mask = torch.full(scores.shape[2:], float("-inf"), device=query.device).triu(1)
        scores = scores.float() + mask
        if sinks is None:
            weights = torch.softmax(scores, -1)
        else:
            # A sink takes its part of the weights, and nothing is read from it.
            column = sinks.float()[None, ..., None].expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
        return weights.to(value.dtype) @ value


def span_of(module: nn.Module, layer: int, window: int | None) -> AttentionSpan:
    """AttentionSpan of an attention layer, from the window that it passes and from the type of the layer."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None) or ()
    kind = types[layer] if layer < len(types) else None
    if kind == "chunked_attention":
        return AttentionSpan(window, config.attention_chunk_size)
    if kind == "sliding_attention" and window is None:
        return AttentionSpan(config.sliding_window)
    return AttentionSpan(window)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The function that Transformers calls in every attention layer; the mask follows from the layout.

    Raises:
        ValueError: the layer has a mask of its own, or an option that is not known here.
    """
    layout = current_layout()
    if layout is None:
        raise RuntimeError("need the layout of the rows: call the model within `use_layout`")
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if attention_mask is not None or unknown:
        raise ValueError(f"its attention has {', '.join(unknown) or 'a mask of its own'}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of Transformers has one
    attention = LayerAttention(layer, scaling, span_of(module, layer, sliding_window), softcap, s_aux)
    if isinstance(layout, DecodeLayout):
        return attention.over_cache(query, key, value, layout), None
    sequence = layout.sequence
    if sequence is None:
        return attention.over_rows(query, key, value, layout), None
    query, key, value = sequence.sequence_to_heads(query, key, value, num_positions=layout.num_positions)
    if s_aux is not None:  # this rank has a part of the heads
        attention = replace(attention, sinks=s_aux.chunk(sequence.size)[sequence.rank])
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
