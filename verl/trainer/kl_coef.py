"""KL coefficient: constant, on a linear schedule, or adapted towards a target KL."""

from __future__ import annotations

from collections.abc import Mapping

from verl.algorithms.kl import adapted_coef, scheduled_coef
from verl.config.algorithm import KLAdaptive, KLSchedule
from verl.config.run import TrainerConfig


class KLController:
    """Moves the weight of the KL from step to step.

    Attributes:
        coef: weight in this step.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._setting = config.algorithm.kl.coef
        self._is_used = config.algorithm.kl.where != "off"
        self.coef: float
        if isinstance(self._setting, KLSchedule):
            self.coef = self._setting.start
        elif isinstance(self._setting, KLAdaptive):
            self.coef = self._setting.initial
        else:
            self.coef = self._setting

    def update(
        self, metrics: Mapping[str, float], *, version: int, num_trajectories: int
    ) -> dict[str, float]:
        """Move to the weight of the next step.

        Args:
            metrics: of this step; `kl` is read.
            version: of the policy after it.
            num_trajectories: answers that it learned from.

        Returns:
            `kl_coef`, the weight of this step, if the algorithm has a KL.
        """
        used = {"kl_coef": self.coef} if self._is_used else {}
        setting = self._setting
        if isinstance(setting, KLSchedule):
            self.coef = scheduled_coef(version, start=setting.start, end=setting.end, steps=setting.steps)
        elif isinstance(setting, KLAdaptive) and "kl" in metrics:
            self.coef = adapted_coef(
                self.coef,
                metrics["kl"],
                target=setting.target,
                horizon=setting.horizon,
                num_trajectories=num_trajectories,
            )
        return used
