"""One attention function for training, prefill and decoding of any Transformers model.

It is plugged in by the attention interface of Transformers; what may attend to what follows from the layout
that `use_layout` sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from verl.engines.hf.row_layouts import (
    AttentionSpan,
    DecodeLayout,
    ExtendLayout,
    RowLayout,
    additive_mask,
    current_layout,
)

IMPLEMENTATION = "verl_rows"
# Options that attention layers pass without a meaning here: dropout is off, rows are causal, and positions
# are in the keys already.
_IGNORED = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position"}

# In shapes: B rows, S positions of a row, N packed positions, A rows that decode, H query heads, K key-value
# heads, D head size, L cached positions.


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

    def over_prefixes(self, query: Tensor, key: Tensor, value: Tensor, layout: ExtendLayout) -> Tensor:
        """[1, N, H, D] of new tokens [1, H, N, D]; their keys and values are put into the cache.

        Row by row: nothing is padded, and cached keys are read where they are.
        """
        keys, values = layout.cache.layer(self.layer, key, value)
        keys[layout.token_slots, :, layout.positions] = key[0].transpose(0, 1).to(keys.dtype)
        values[layout.token_slots, :, layout.positions] = value[0].transpose(0, 1)
        sinks = None if self.sinks is None else self.sinks[:, None]
        parts = []
        for block in layout.blocks:
            slot, length = block.slot, block.start + block.num_tokens
            own_keys, own_values = (each[slot : slot + 1, :, :length] for each in (keys, values))
            own = query[:, :, block.first : block.first + block.num_tokens]
            mask = layout.mask(block, self.span, own.dtype)
            parts.append(self._attend(own, own_keys, own_values, mask, sinks=sinks).transpose(1, 2))
        # Some families view the result in another shape.
        return torch.cat(parts, 1).contiguous()

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
    if isinstance(layout, ExtendLayout):
        return attention.over_prefixes(query, key, value, layout), None
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
