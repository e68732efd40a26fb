"""KL coefficient: constant, on a linear schedule, or adapted towards a target KL."""

from __future__ import annotations

from collections.abc import Mapping

from verl.algorithms.kl import adapted_coef, scheduled_coef
from verl.config.algorithm import KLAdaptive, KLSchedule
from verl.config.run import TrainerConfig


def first_kl_coef(config: TrainerConfig) -> float:
    """The coefficient of the first step."""
    coef = config.algorithm.kl.coef
    if isinstance(coef, KLSchedule):
        return coef.start
    return coef.initial if isinstance(coef, KLAdaptive) else coef


def next_kl_coef(
    config: TrainerConfig,
    current: float,
    metrics: Mapping[str, float],
    *,
    version: int,
    num_trajectories: int,
) -> float:
    """The coefficient after a step.

    Args:
        config: settings of the run.
        current: coefficient of the step.
        metrics: metrics of the step; only `kl` is read.
        version: policy version after the step.
        num_trajectories: trajectories that the step trained on.
    """
    coef = config.algorithm.kl.coef
    if isinstance(coef, KLSchedule):
        return scheduled_coef(version, start=coef.start, end=coef.end, steps=coef.steps)
    if isinstance(coef, KLAdaptive) and "kl" in metrics:
        return adapted_coef(
            current,
            metrics["kl"],
            target=coef.target,
            horizon=coef.horizon,
            num_trajectories=num_trajectories,
        )
    return current
