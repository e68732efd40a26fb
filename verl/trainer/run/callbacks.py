"""Callbacks: code of a user that is called at fixed points of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl.trainer.run.run_loop import RunnableTrainer


class Callback:
    """Code that is called at fixed points of a run; override what you need.

    Each method gets the trainer: `trainer.version` is the number of steps done, `trainer.config` has the
    settings, and `trainer.request_stop()` ends the run after this step. An error in a callback ends the run.
    """

    def on_start(self, trainer: RunnableTrainer) -> None:
        """Called before the first step, after a checkpoint was loaded if there is one."""

    def on_step(self, trainer: RunnableTrainer, metrics: dict[str, float]) -> None:
        """Called after each step, before its metrics are written; it may add to them."""

    def on_evaluate(self, trainer: RunnableTrainer, metrics: dict[str, float]) -> None:
        """Called after each evaluation, before its metrics are written; it may add to them."""

    def on_checkpoint(self, trainer: RunnableTrainer, folder: Path) -> None:
        """Called when a checkpoint is complete on disk."""

    def on_end(self, trainer: RunnableTrainer) -> None:
        """Called after the last step, its checkpoint and the model; not after an error."""


def notify(callbacks: Sequence[Callback], name: str, call: Callable[[Callback], None]) -> None:
    """Call a method of all callbacks, in order.

    Args:
        callbacks: of the run.
        name: of the method, for messages.
        call: calls it.

    Raises:
        RuntimeError: a callback failed; names it.
    """
    for callback in callbacks:
        try:
            call(callback)
        except Exception as error:
            raise RuntimeError(
                f"{type(callback).__name__}.{name} failed: {type(error).__name__}: {error}; mend this "
                "callback, or leave it out"
            ) from error
