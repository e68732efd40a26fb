"""Comparison of the forward pass by rows with a family's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.engines.hf.attention import use_attention
from verl.engines.hf.families import REFUSED, context_length, small_token_sizes
from verl.engines.hf.row_layouts import AttentionSpan, DecodeLayout, ExtendLayout, KVCache, Layout, RowLayout

# Windows and the like in the comparison, whose rows have more tokens.
_TOKEN_SIZE = 3
# Highest first position in the comparison, for families without a longest row.
_HIGH_POSITION = 1 << 20


class CheckedForward(nn.Module, ABC):
    """A model of Transformers whose forward pass by rows can be compared with the family's own.

    Attributes:
        transformer: the Hugging Face model.
        compared: outputs that are compared, for the message.
        decodes: whether decoding with a cache is compared, too.
    """

    transformer: PreTrainedModel
    compared = "states"
    decodes = False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the computation."""

    @abstractmethod
    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """Final hidden states, [..., hidden], of ids and positions [...]; needs `forward_mode`."""

    @abstractmethod
    def family_outputs(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Outputs of the family's own forward pass, to be compared with `outputs`."""

    @abstractmethod
    def outputs(self, states: Tensor) -> Tensor:
        """Outputs [M, ...] from final states [M, hidden]."""

    @torch.no_grad()
    def check_forward(self) -> None:
        """Compare this forward pass with the family's own on a few tokens.

        Two packed rows of different lengths are compared, with windows and the like of 3 tokens, at the first
        positions and at the last ones of the context. A policy also decodes their last tokens with a cache,
        and computes their second halves behind cached first ones.

        Raises:
            ValueError: they differ: the family does something that this forward pass does not support.
        """
        vocabulary = self.transformer.config.get_text_config().vocab_size
        context = context_length(self.transformer.config)
        ids = torch.arange(4, 12, device=self.device) % vocabulary
        for start in (0, max(0, min(context, _HIGH_POSITION) - len(ids))):
            with small_token_sizes(self.transformer, _TOKEN_SIZE):
                self._check_rows([ids, ids[2:7].flip(0)], start)

    def _check_rows(self, rows: list[Tensor], start: int) -> None:
        """Compare rows of ids whose first position is `start`."""
        positions = [torch.arange(start, start + len(row), device=row.device) for row in rows]
        # Eager attention is the family's definition; PyTorch's leaves out Gemma 2's cap.
        with use_attention(self.transformer, "eager"):
            expected = [
                self.family_outputs(*line)[0].float()
                for line in zip((r[None] for r in rows), (p[None] for p in positions), strict=True)
            ]
        layout = RowLayout([len(row) for row in rows], True, self.device)
        try:
            with use_attention(self.transformer):
                states = self.hidden_states(torch.cat(rows)[None], torch.cat(positions)[None], layout)[0]
                ours = self.outputs(states).split(layout.lengths)
                self._compare(ours, expected, "")
                if self.decodes:
                    last = [output[-1:] for output in expected]
                    self._compare(self._decoded_outputs(rows, positions), last, " in decoding")
                    self._compare(self._extended_outputs(rows, positions), last, " behind a cached prefix")
        except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
            # The code of the family does not accept this kind of call.
            raise self._unsupported(f"{type(error).__name__}: {error}") from error
        # A window that the family reads elsewhere would not have been small above.
        if missing := [
            layer for layer in self._windowed_layers() if layout.spans.get(layer) == AttentionSpan(None)
        ]:
            raise self._unsupported(f"the attention of layer {missing[0]} is not told its window")

    def _decoded_outputs(self, rows: list[Tensor], positions: list[Tensor]) -> Sequence[Tensor]:
        """Outputs [1, ...] at the last token of each row, decoded with a cache of the earlier ones."""
        starts = [len(row) - 1 for row in rows]
        cache = self._cache_of(rows, positions, starts)
        last, ends = (torch.stack([t[-1:] for t in tensors]) for tensors in (rows, positions))
        lengths = torch.tensor(starts, device=self.device)
        decode = DecodeLayout(cache, lengths, max(starts) + 1)
        return self.outputs(self.hidden_states(last, ends, decode)[:, 0]).split(1)

    def _extended_outputs(self, rows: list[Tensor], positions: list[Tensor]) -> Sequence[Tensor]:
        """The same from the second halves of the rows at once, as prompts are computed behind a prefix."""
        starts = [len(row) // 2 for row in rows]
        cache = self._cache_of(rows, positions, starts)
        if cache.is_recurrent:  # rows of such families are computed from their beginning
            return self._decoded_outputs(rows, positions)
        lengths = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        layout = ExtendLayout(cache, list(range(len(rows))), starts, lengths, self.device)
        ids, places = (
            torch.cat([t[start:] for t, start in zip(tensors, starts, strict=True)])[None]
            for tensors in (rows, positions)
        )
        ends = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.outputs(self.hidden_states(ids, places, layout)[0, ends]).split(1)

    def _cache_of(self, rows: list[Tensor], positions: list[Tensor], lengths: list[int]) -> KVCache:
        """A cache of the first `lengths` tokens of each row."""
        cache = KVCache(len(rows))
        cache.reserve(max(len(row) for row in rows))
        slots = torch.arange(len(rows), device=self.device)
        ids, places = (
            torch.cat([t[:length] for t, length in zip(tensors, lengths, strict=True)])[None]
            for tensors in (rows, positions)
        )
        self.hidden_states(ids, places, RowLayout(lengths, True, self.device, cache, slots))
        return cache

    def _compare(self, ours: Sequence[Tensor], expected: Sequence[Tensor], where: str) -> None:
        """Raise ValueError if outputs differ by more than rounding."""
        difference = max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True))
        # Weights that are sharded for 16 bits compute in 16 bits here, too, and round accordingly.
        is_wide = next(self.parameters()).dtype == torch.float32
        scale = max(1.0, *(float(output.abs().max()) for output in expected))
        if not difference <= (1e-3 if is_wide else 3e-2) * scale:
            raise self._unsupported(
                f"its {self.compared} differ by {difference:.2g}{where} from its own forward pass"
            )

    def _windowed_layers(self) -> list[int]:
        """Layers that attend to a part of the row, by the configuration."""
        kinds = getattr(self.transformer.config.get_text_config(), "layer_types", None) or []
        return [n for n, kind in enumerate(kinds) if "sliding" in kind or "chunked" in kind]

    def _unsupported(self, reason: str) -> ValueError:
        family = self.transformer.config.get_text_config().model_type
        known = f" ({REFUSED[family]})" if family in REFUSED else ""
        return ValueError(
            f"model family {family!r} cannot be run by rows: {reason}{known}; use a family of the table in "
            "docs/models.md, such as Qwen3, Llama, Mistral, Gemma 3 or gpt-oss"
        )
