"""Several answers to a prompt, and answers to several prompts, over the contract of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import Completion, PrefixAffinity, SamplingParams, check_lengths


class Sampler(Protocol):
    """The part of `RolloutEngine` that answers."""

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        """Sample one answer."""


async def sample_group(
    engine: Sampler, prompt_ids: Sequence[int], params: SamplingParams
) -> list[Completion]:
    """The `params.n` answers to one prompt, on one engine of a pool if possible."""
    affinity = PrefixAffinity()
    numbers = range(params.sample_index, params.sample_index + params.n)
    return await gather_all(
        [engine.sample(prompt_ids, replace(params, n=1, sample_index=i), affinity) for i in numbers]
    )


async def sample_groups(
    engine: Sampler, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[Completion]]:
    """The answers to several prompts: for each of them `params[i].n`, in order.

    Raises:
        ValueError: another number of parameters than prompts.
    """
    check_lengths(prompts, params)
    groups = zip(prompts, params, strict=True)
    return await gather_all([sample_group(engine, prompt, wanted) for prompt, wanted in groups])
