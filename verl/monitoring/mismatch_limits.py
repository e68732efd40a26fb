"""Limits on the difference between the logprobs of sampler and trainer."""

from __future__ import annotations

from collections.abc import Mapping

from verl.config.rollout import RolloutConfig


def check_mismatch(metrics: Mapping[str, float], config: RolloutConfig) -> list[str]:
    """Warnings about the difference between sampler and trainer in a step.

    Args:
        metrics: of the step; `kl_sampler`, `sampler_gap` and `sampler_gap_max` are read, in nats per token,
            of the learned rows alone (`learned/NAME`) where others are skipped.
        config: has the limits `mismatch_warn` and `mismatch_stop`.

    Raises:
        RuntimeError: the KL is above `rollout.mismatch_stop`.
    """
    metrics = {name.removeprefix("learned/"): value for name, value in metrics.items()}
    if "kl_sampler" not in metrics:
        return []
    kl = metrics["kl_sampler"]
    warning = (
        f"sampler and trainer differ: KL {kl:.3g} nats per token, logprobs by "
        f"{metrics.get('sampler_gap', kl):.3g} on average and at most "
        f"{metrics.get('sampler_gap_max', kl):.3g}; compare their weights, precision and sampling "
        "parameters, or take a correction such as token_tis"
    )
    if config.mismatch_stop is not None and not kl <= config.mismatch_stop:
        raise RuntimeError(f"{warning}; the limit rollout.mismatch_stop is {config.mismatch_stop}")
    return [] if kl <= config.mismatch_warn else [warning]
