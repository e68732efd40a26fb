"""Token sampling: temperature, truncation, random numbers that depend on seed, answer and position alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.utils.sampling_types import SamplingParams

# Constants of SplitMix64, see `uniforms`.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_U64 = (1 << 64) - 1


def answer_seed(seed: int, sample_index: int) -> int:
    """Seed of the random numbers of one answer to a prompt, as a signed 64-bit integer."""
    state = (seed * _GOLDEN + (sample_index + 1) * _MIX[0]) & _U64
    state = ((state ^ (state >> 30)) * _MIX[1]) & _U64
    return _signed(state ^ (state >> 31))


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """[A] fp32 in [0, 1), a hash of (seed, position), both [A] int64.

    The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195).
    """
    state = seeds + (positions + 1) * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_MIX[0])
    state = (state ^ _shifted(state, 27)) * _signed(_MIX[1])
    state = state ^ _shifted(state, 31)
    # 24 bits: every value is exact in fp32.
    return _shifted(state, 40).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Logical right shift; that of torch keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class RowSampling:
    """Sampling parameters of A rows as tensors [A].

    Attributes:
        temperature: fp32, 1 for greedy rows.
        greedy: bool.
        top_p: fp32.
        top_k: int64, the size of the vocabulary if all tokens are kept.
        min_p: fp32.
        is_plain: no row is greedy or truncated, so that the cheap path suffices.
    """

    temperature: Tensor
    greedy: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    is_plain: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], *, vocabulary: int, device: torch.device) -> RowSampling:
        """One row per entry of `params`."""
        return cls(
            torch.tensor([p.temperature or 1.0 for p in params], device=device),
            torch.tensor([p.temperature == 0 for p in params], device=device),
            torch.tensor([p.top_p for p in params], device=device),
            torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device),
            torch.tensor([p.min_p for p in params], device=device),
            all(p.temperature > 0 and not p.truncates for p in params),
        )


def truncated(logits: Tensor, params: RowSampling) -> Tensor:
    """Logits [A, V] with -inf for tokens that top-k, top-p or min-p drop; the most likely token always stays.

    All three apply to the distribution after the temperature; a token must pass each of them.
    """
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    # A token is in the nucleus if the mass before it is below top_p. With top_p = 1 all are: the rounded sum
    # may reach 1 long before the last token.
    top_p = params.top_p[:, None]
    nucleus = (probs.cumsum(-1) - probs < top_p) | (top_p >= 1)
    keep = (rank < params.top_k[:, None]) & nucleus & (probs >= params.min_p[:, None] * probs[:, :1])
    keep[:, 0] = True
    return logits.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), float("-inf"))


def sampling_logits(logits: Tensor, params: RowSampling) -> Tensor:
    """Logits [A, V] of the distribution to draw from: after the temperature, truncated for sampled rows."""
    scaled = logits / params.temperature[:, None]
    if params.is_plain:
        return scaled
    return torch.where(params.greedy[:, None], scaled, truncated(scaled, params))


def penalized(logits: Tensor, penalties: Sequence[float], seen: Sequence[Collection[int]]) -> Tensor:
    """Logits [A, V] with the repetition penalty of each row on the tokens that it has seen, before all else.

    CTRL, https://arxiv.org/abs/1909.05858, 4.1; see `SamplingParams.repetition_penalty`.
    """
    if all(penalty == 1 for penalty in penalties):
        return logits
    result = logits.clone()
    for row, (penalty, tokens) in enumerate(zip(penalties, seen, strict=True)):
        ids = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
        own = logits[row, ids]
        result[row, ids] = torch.where(own > 0, own / penalty, own * penalty)
    return result


def sample_tokens(logits: Tensor, params: RowSampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [A] int64, and their logprobs [A] fp32 under the distribution that they were drawn from.

    The logprob is NaN for NaN logits.

    Args:
        logits: [A, V] fp32.
        params: of the A rows.
        uniform: [A] in [0, 1); equal numbers give equal tokens.
    """
    scaled = sampling_logits(logits, params)
    logprobs = torch.log_softmax(scaled, -1)
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1]
    # Strictly below the total: rounding must not select a token of probability 0 after the last possible one.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    # A threshold of NaN is past the last token.
    tokens = tokens.clamp_max(logits.shape[1] - 1)
    if not params.is_plain:
        # A parallel cumulative sum, as on a GPU, may also round up at a token of probability 0.
        dropped = logprobs.gather(1, tokens[:, None]).squeeze(1).isneginf()
        tokens = torch.where(params.greedy | dropped, scaled.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
