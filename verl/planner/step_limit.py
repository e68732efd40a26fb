"""The share of the machine's limit that a step reached."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

import torch
from transformers import PretrainedConfig

from verl.config.run import TrainerConfig
from verl.data.batch import Batch
from verl.data.trajectory import Trajectory
from verl.planner.step_time import ModelShape, StepWork, step_limit
from verl.utils.device import MachineSpeed, measure_speed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepLimitMetric:
    """`limit_share`: the least time that this machine needs for a step, over the time that it took.

    Args:
        config: of the run.
        model_config: of the policy.
        device: that everything runs on.
    """

    def __init__(self, config: TrainerConfig, model_config: PretrainedConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._shape: ModelShape | None = None
        if config.placement.name == "local":
            with suppress(ValueError):  # the formulas cover dense models only; others train all the same
                self._shape = ModelShape.from_hf_config(model_config)

    @cached_property
    def _speed(self) -> MachineSpeed:
        return measure_speed(self._device, _DTYPES[self._config.policy.precision])

    def __call__(self, trajectories: Sequence[Trajectory], seconds: float) -> dict[str, float]:
        """The metric of a step; empty where the limit is not known.

        Args:
            trajectories: that the step learned from.
            seconds: that it took.
        """
        if self._shape is None:
            return {}
        config, rows = self._config, Batch.from_trajectories(trajectories)
        work = StepWork(
            rows.ragged("prompt_ids").lengths,
            rows.response_lengths,
            num_prompts=len(set(rows["group_ids"].tolist())),
            updates=config.algorithm.epochs * config.algorithm.minibatches,
            max_slots=config.rollout.max_slots,
            bytes_per_weight=4 if config.policy.precision == "fp32" else 2,
            epochs=config.algorithm.epochs,
        )
        return {"limit_share": step_limit(self._shape, work, self._speed).total_s / seconds}
