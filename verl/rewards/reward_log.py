"""Progress of a run as reward functions see it, and the columns and metrics that they log.

Worker processes import this module, so it loads nothing heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Parameters with which a function over all rows logs, as in TRL.
LOG_NAMES = ("log_extra", "log_metric")


@dataclass(frozen=True)
class TrainerState:
    """Progress of the run, for the parameter `trainer_state`; names as in Transformers.

    Attributes:
        global_step: steps that are complete.
        max_steps: steps of the whole run.
        epoch: passes over the prompts so far, with the started part of the current one.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0

    @classmethod
    def of(cls, trainer: Any) -> TrainerState:
        """Progress of a `verl.trainer.base.BaseTrainer`."""
        loader = trainer.loader
        epoch = loader.epochs if loader else 0.0
        return cls(trainer.version, trainer.config.steps, epoch)


@dataclass
class RewardLog:
    """Columns and metrics that one call of a reward function logs.

    Attributes:
        num_rows: of the call.
        extras: values by column, one for each row, for the table of samples.
        metrics: numbers by name.
    """

    num_rows: int
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the table of samples; ValueError if it has not one value per row."""
        if len(values) != self.num_rows:
            raise ValueError(f"need one value per row in log_extra, got {len(values)} for {self.num_rows}")
        self.extras[str(column)] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a metric, a number."""
        self.metrics[str(name)] = float(value)


@dataclass(frozen=True)
class Logged:
    """The value of a function together with its log."""

    value: Any
    log: RewardLog


def logging_call(
    function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]
) -> Callable[[], Any]:
    """The call of a function with these arguments; its value is `Logged` if they contain a log's methods."""
    log = next((named[name].__self__ for name in LOG_NAMES if name in named), None)

    def call() -> Any:
        value = function(*positional, **named)
        if log is None:
            return value
        return _logged(value, log) if inspect.isawaitable(value) else Logged(value, log)

    return call


async def _logged(value: Awaitable[Any], log: RewardLog) -> Logged:
    return Logged(await value, log)
