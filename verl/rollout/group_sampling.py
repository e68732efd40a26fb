"""Several answers to a prompt, and answers to several prompts, over the contract of generation."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    PrefixAffinity,
    SampleRequest,
    SamplingParams,
    check_lengths,
)


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


def prompts_of_groups(
    groups: Sequence[Sequence[SampleRequest]],
) -> tuple[list[Sequence[int]], list[SamplingParams]]:
    """Prompt and sampling parameters of each group of requests; a group is several answers to one prompt."""
    prompts = [group[0].prompt_ids for group in groups]
    return prompts, [group[0].params.of_group(len(group)) for group in groups]


def completions_of(
    generator: BatchGenerator, answers: Sequence[Sequence[Completion]], params: Sequence[SamplingParams]
) -> list[Completion]:
    """All completions of a call, group after group.

    Raises:
        ValueError: the generator returned another number of them.
    """
    counts, wanted = [len(group) for group in answers], [p.n for p in params]
    if counts != wanted:
        raise ValueError(
            f"{type(generator).__name__}.generate must return {reprlib.repr(wanted)} completions for "
            f"{len(wanted)} prompts, got {reprlib.repr(counts)}"
        )
    return [completion for group in answers for completion in group]
