"""Weights whose numbers went wrong: they are not saved, and the error names the last good checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from verl.engines.base import NotFiniteError, not_finite_advice
from verl.trainer.base import BaseTrainer
from verl.trainer.checkpoint_store import CheckpointStore


def has_learned(metrics: Mapping[str, float]) -> bool:
    """True unless a model skipped all of its updates of a step, since none was finite."""
    skipping = [name for name, value in metrics.items() if name.endswith("skipped_updates") and value > 0]
    return all(f"{name.removesuffix('skipped_updates')}grad_norm" in metrics for name in skipping)


def check_finite(trainer: BaseTrainer) -> None:
    """Check all weights and optimizer states before they are saved.

    Raises:
        NotFiniteError: some are infinite or no numbers.
    """
    if bad := trainer.models.not_finite():
        policy = trainer.config.policy
        raise NotFiniteError(
            f"weights or optimizer states of {' and '.join(bad)} are not finite after step "
            f"{trainer.version}, so they are not saved; "
            f"{not_finite_advice(policy.precision, policy.optimizer)}"
        )


@contextmanager
def naming_good_checkpoint(store: CheckpointStore) -> Iterator[None]:
    """Context whose errors about numbers that are not finite name the last good checkpoint."""
    try:
        yield
    except RuntimeError as error:
        # Of an error in another process, of a rank or a server, only the text is left.
        if not isinstance(error, NotFiniteError) and "not finite" not in str(error):
            raise
        store.finish()
        good, newest = store.newest_good(), store.newest()
        remedy = (
            f"the last good checkpoint is {good}: to go on from it, change this and set "
            f"checkpoint.resume={good}"
            if good
            else "no checkpoint has proven good: change this, and start anew with checkpoint.resume=never"
        )
        if newest and newest != good:
            remedy += f" ({newest.name} has the weights that failed)"
        raise NotFiniteError(f"{error}; {remedy}") from error
