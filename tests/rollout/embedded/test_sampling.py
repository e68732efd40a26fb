"""Tests of drawing tokens: the numbers, the truncation, the frequencies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verl.rollout.embedded.sampling import (
    RowSampling,
    answer_seed,
    penalized,
    sample_tokens,
    truncated,
    uniforms,
)
from verl.utils.sampling_types import SamplingParams

PROBS = torch.tensor([0.15, 0.5, 0.1, 0.25])


def row_params(*params: SamplingParams, vocabulary: int = 4) -> RowSampling:
    return RowSampling.of(params, vocabulary=vocabulary, device=torch.device("cpu"))


def draws(logits: Tensor, params: SamplingParams, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and logprobs of `count` draws from one distribution, as of one answer's positions."""
    uniform = uniforms(torch.full((count,), answer_seed(seed, 0)), torch.arange(count))
    return sample_tokens(
        logits.expand(count, -1), row_params(*[params] * count, vocabulary=len(logits)), uniform
    )


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", ["positions", "samples", "seeds"])
def test_numbers_are_spread_evenly_over_positions_samples_and_seeds(axis):
    index = range(32_000)
    seeds = [
        answer_seed(i, 0)
        if axis == "seeds"
        else answer_seed(3, i)
        if axis == "samples"
        else answer_seed(3, 5)
        for i in index
    ]
    numbers = uniforms(
        torch.tensor(seeds), torch.arange(32_000) if axis == "positions" else torch.full((32_000,), 7)
    )
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    # 99.9% of chi-squares with 31 degrees of freedom are below 61.1; neighbours correlate by 1 / sqrt(32000)
    # = 0.006 by chance.
    assert chi_square(numbers.histc(32, 0, 1), torch.full((32,), 1 / 32)) < 61.1
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.02


def test_numbers_of_neighbouring_answers_and_positions_are_independent():
    seeds = torch.tensor([answer_seed(seed, sample) for seed in range(20) for sample in range(20)])
    table = uniforms(seeds.repeat_interleave(50), torch.arange(50).repeat(400)).view(400, 50)
    correlation = torch.corrcoef(table) - torch.eye(400)
    # 80 thousand pairs over 50 positions each: 5 standard deviations are 0.7.
    assert float(correlation.abs().max()) < 0.75
    assert abs(float(correlation.mean())) < 0.005
    assert table.unique().numel() > 0.998 * table.numel()


def test_every_answer_has_its_own_seed_of_64_bits():
    seeds = {
        answer_seed(seed, sample)
        for seed in (0, 1, 2, 3, 1 << 32, (1 << 32) + 1, (7 << 32) + 5)
        for sample in range(300)
    }
    assert len(seeds) == 2100
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)


def test_the_numbers_are_those_of_splitmix64():
    # The reference generator with seed 0 begins with these, https://prng.di.unimi.it/splitmix64.c
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    numbers = uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert numbers.tolist() == [(value >> 40) * 2.0**-24 for value in reference]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), [0, 1, 2, 3]),
        (SamplingParams(top_k=2), [1, 3]),
        (SamplingParams(top_k=9), [0, 1, 2, 3]),
        (SamplingParams(top_p=0.4), [1]),
        (SamplingParams(top_p=0.7), [1, 3]),
        (SamplingParams(top_p=0.8), [0, 1, 3]),
        (SamplingParams(min_p=0.25), [0, 1, 3]),
        (SamplingParams(min_p=1.0), [1]),
        (SamplingParams(top_k=3, top_p=0.99, min_p=0.4), [1, 3]),
        (SamplingParams(top_k=1, top_p=0.99, min_p=0.1), [1]),
    ],
)
def test_truncation_keeps_the_tokens_that_it_must(params, kept):
    logits = truncated(PROBS.log()[None], row_params(params))[0]
    assert logits.isfinite().nonzero().squeeze(1).tolist() == kept
    torch.testing.assert_close(logits[kept], PROBS.log()[kept])


def test_a_row_that_keeps_all_tokens_does_so_beside_rows_that_do_not():
    # Of so many tokens the sum of probabilities reaches 1 before the last one.
    logits = torch.randn(6, 150_000, generator=torch.Generator().manual_seed(0))
    params = row_params(*[SamplingParams()] * 5, SamplingParams(top_p=0.9), vocabulary=150_000)
    assert truncated(logits, params).isneginf().any(-1).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(1.7, top_k=6),
        SamplingParams(top_p=0.8),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(params):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = draws(logits, params, 20_000)
    counts = tokens.bincount(minlength=10).float()
    probs = truncated(logits[None] / params.temperature, row_params(params, vocabulary=10))[0].softmax(-1)
    assert counts[probs == 0].sum() == 0
    # 99.9% of chi-squares with 9 degrees of freedom are below 27.9.
    assert chi_square(counts[probs > 0], probs[probs > 0]) < 27.9
    torch.testing.assert_close(logprobs, probs.log()[tokens])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-24])
def test_a_token_of_probability_0_is_never_drawn(uniform):
    logits = torch.full((64, 101), -1000.0)
    possible = torch.arange(64) % 100
    logits[torch.arange(64), possible] = torch.linspace(-3, 30, 64)
    tokens, logprobs = sample_tokens(
        logits, row_params(*[SamplingParams()] * 64, vocabulary=101), torch.full((64,), uniform)
    )
    assert torch.equal(tokens, possible) and torch.equal(logprobs, torch.zeros(64))


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2.0**-24])
def test_a_truncated_token_is_never_drawn(uniform):
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(2))
    rows = row_params(*[SamplingParams(top_k=1 + i % 7, top_p=0.9) for i in range(200)], vocabulary=500)
    tokens, logprobs = sample_tokens(logits, rows, torch.full((200,), uniform))
    assert truncated(logits, rows).gather(1, tokens[:, None]).isfinite().all()
    assert logprobs.isfinite().all()


def test_a_greedy_row_takes_the_most_likely_token_and_its_own_probability():
    rows = row_params(
        SamplingParams(temperature=0, top_k=1), SamplingParams(temperature=0.5), SamplingParams(temperature=0)
    )
    tokens, logprobs = sample_tokens(PROBS.log().expand(3, -1), rows, torch.tensor([0.99, 0.99, 0.0]))
    assert tokens.tolist() == [1, 3, 1]
    sharp = PROBS**2 / (PROBS**2).sum()
    torch.testing.assert_close(logprobs.exp(), torch.stack([PROBS[1], sharp[3], PROBS[1]]))


def test_a_token_is_the_same_whatever_rows_are_beside_it():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    uniform = uniforms(torch.arange(8), torch.arange(8))
    plain = [SamplingParams() for _ in range(8)]
    alone = sample_tokens(logits, row_params(*plain, vocabulary=50), uniform)
    beside = sample_tokens(
        logits, row_params(*plain[:7], SamplingParams(top_k=2, temperature=0.1), vocabulary=50), uniform
    )
    assert torch.equal(alone[0][:7], beside[0][:7]) and torch.equal(alone[1][:7], beside[1][:7])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=2)])
def test_logits_that_are_not_finite_give_a_logprob_that_is_not(params):
    tokens, logprobs = sample_tokens(
        torch.full((1, 4), float("nan")), row_params(params), torch.tensor([0.5])
    )
    assert 0 <= int(tokens) < 4 and bool(logprobs.isnan())


def test_the_repetition_penalty_weakens_each_seen_token_once():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    result = penalized(logits, [2.0, 1.0], [[0, 1, 0, 0], [2]])
    assert result.tolist() == [[1.0, -4.0, 1.0, -1.0], logits[1].tolist()]
    assert penalized(logits, [1.0, 1.0], [[0], [1]]) is logits
