"""Sampling parameters of rows, over those of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from verl.config.checks.contradictions import compares_with_sampler
from verl.config.run import TrainerConfig
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec

# Parameters that change the distribution that is sampled, besides the temperature.
_RESHAPING = ("top_p", "top_k", "min_p", "repetition_penalty")


def with_row_sampling(params: SamplingParams, prompt: Prompt, codec: TextCodec) -> SamplingParams:
    """Parameters of the settings with those of a prompt over them; its stop texts replace the others."""
    if not prompt.sampling:
        return params
    own = dict(prompt.sampling)
    if "stop" in own:
        # Stop texts of the settings that are tokens are ids already; the settings' own ids stay.
        replaced = set(codec.token_ids_of(params.stop))
        kept = [i for i in params.stop_ids if i not in replaced]
        own["stop_ids"] = tuple(dict.fromkeys([*kept, *codec.token_ids_of(own["stop"])]))
    return replace(params, **own)


def check_row_sampling(prompts: Sequence[Prompt], config: TrainerConfig, *, trains: bool) -> None:
    """Check that rows are sampled as the settings can train on, and as the engine can sample.

    Args:
        prompts: with sampling parameters of their own or without.
        config: of the run.
        trains: the answers are learned from, so the trainer computes their logprobs.

    Raises:
        ValueError: a row has a parameter that does not fit.
    """
    for prompt in prompts:
        if prompt.sampling and (problem := _problem(prompt, config, trains=trains)):
            raise ValueError(f"row {prompt.index} of {prompt.source or 'the prompts'}: {problem}")


def _problem(prompt: Prompt, config: TrainerConfig, *, trains: bool) -> str:
    """Reason why a prompt's own parameters do not fit; "" if they do."""
    own, sampling = prompt.sampling, config.sampling
    if config.rollout.engine == "sglang" and own.get("repetition_penalty", 1) != 1:
        return (
            "need repetition_penalty 1 for rollout.engine sglang, whose penalty leaves the prompt out, got "
            f"{own['repetition_penalty']}; take another engine"
        )
    if not trains:
        return ""
    temperature = own.get("temperature", sampling.temperature)
    if temperature != sampling.temperature:
        return (
            f"need sampling.temperature {sampling.temperature:g} for a prompt of the training data, as the "
            f"trainer computes all logprobs at it, got {temperature:g}; leave it out of the row, or set "
            "sampling.temperature (rows of data.test may have another)"
        )
    changed = [name for name in _RESHAPING if name in own and own[name] != vars(sampling)[name]]
    if changed and compares_with_sampler(config):
        return (
            f"need logprobs of the model's own distribution for algorithm.correction "
            f"{config.algorithm.correction.name} and algorithm.policy_loss "
            f"{config.algorithm.policy_loss.name}, got {changed[0]} {own[changed[0]]}; leave it out of the "
            "row, or set algorithm.correction=recompute and a policy loss other than dppo"
        )
    longest, buffer = own.get("max_tokens", sampling.max_tokens), config.algorithm.overlong_buffer_tokens
    if buffer >= longest:
        return f"need max_tokens above algorithm.overlong_buffer_tokens {buffer}, got {longest}; raise it"
    return ""
