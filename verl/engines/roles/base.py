"""A model on one rank: what every role can do with it, and what a trained role adds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from transformers import PretrainedConfig

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, PLANNED_METRICS, SAME_ON_ALL, DispatchMode, broadcast, register
from verl.controller.worker_group import Worker
from verl.data.batch import Batch
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine, Objective, TrainEngine
from verl.engines.micro_batches import counted, mean_over, per_token, run_updates
from verl.utils.device import memory_bytes


def _fullest(results: Sequence[dict[str, float]], arguments: object) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in results[0]}


def _all(results: Sequence[bool], arguments: object) -> bool:
    return all(results)


# The same arguments to all ranks; of numbers by name the largest.
FULLEST = DispatchMode("ranks", broadcast, _fullest)


class RoleWorker(Worker):
    """A model on one rank, and what every role can do with it.

    Args:
        engine: of the model.
    """

    engine: ForwardEngine

    def __init__(self, engine: ForwardEngine) -> None:
        self.engine = engine
        self.dispatch_ranks = engine.dispatch_ranks

    @register(SAME_ON_ALL)
    def model_config(self) -> PretrainedConfig:
        """The configuration of the model."""
        return self.engine.config

    @register(FULLEST)
    def memory(self) -> dict[str, float]:
        """Bytes of the device in use, at most and in all; of the rank that has most."""
        return memory_bytes(self.engine.model.device)

    @register(SAME_ON_ALL)
    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format."""
        self.engine.export(folder)


class ColumnWorker(RoleWorker):
    """A role that gives the rows a column before the update."""

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """The columns, as a batch of the same rows."""
        raise NotImplementedError


class Learner(ColumnWorker):
    """A role that is trained.

    Args:
        engine: of the model.
        algorithm: what to minimise.
        epochs: passes over the rows.
    """

    engine: TrainEngine
    _prefix = ""
    _saving: Future[None] | None = None

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, epochs: int) -> None:
        super().__init__(engine)
        self._algorithm = algorithm
        self._epochs = epochs

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan, kl_coef: float) -> dict[str, float]:
        """Runs every update of a step on rows that have their weights.

        Returns:
            Metrics, means over sampled tokens and over updates, the same on all ranks.
        """
        return self._named(
            mean_over(run_updates(self.engine, batch, plan, self._objective(kl_coef), self._epochs))
        )

    @register(PLANNED_METRICS)
    def accumulate(self, batch: Batch, plan: BatchPlan, kl_coef: float, first_row: int) -> None:
        """Runs forward and backward on a portion of the rows of a step of one update; see
        `verl.engines.streaming`.

        Args:
            batch: rows that have their weights, up to the factor that `finish` is given.
            plan: of one minibatch.
            kl_coef: as for `update`, the same for all portions.
            first_row: number of the first row of the portion in the step.

        Raises:
            ValueError: the step has several updates, or its engine makes whole ones only.
        """
        if self._epochs > 1 or len(plan.minibatches) > 1:
            raise ValueError(
                f"need one update for a step in portions, got epochs={self._epochs} and {len(plan.minibatches)} minibatches"
            )
        numbered = batch.keep(batch.names)
        numbered.write("row_ids", batch.row_ids + first_row)
        self.engine.accumulate(numbered, plan.minibatches[0][0], counted(self._objective(kl_coef)))

    @register(SAME_ON_ALL)
    def finish(self, scale: float) -> dict[str, float]:
        """Makes the update of the portions since the last one, with their loss times `scale`; returns what
        `update` does.
        """
        return self._named(per_token(self.engine.finish(scale)))

    @register(SAME_ON_ALL)
    def discard(self) -> None:
        """Forgets the portions since the last update."""
        self.engine.discard()

    @register(DispatchMode("ranks", broadcast, _all))
    def can_accumulate(self) -> bool:
        """Whether the engine takes an update in portions."""
        return self.engine.can_accumulate

    def _objective(self, kl_coef: float) -> Objective:
        raise NotImplementedError

    def _named(self, metrics: dict[str, float]) -> dict[str, float]:
        return {f"{self._prefix}{name}": value for name, value in metrics.items()}

    @register(SAME_ON_ALL)
    def begin_save(self, folder: Path) -> None:
        """Begins to write weights and optimizer; training may go on at once."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saving = thread.submit(self.engine.save(folder))
        thread.shutdown(wait=False)

    @register(DispatchMode("ranks", broadcast, _all))
    def is_saved(self) -> bool:
        """Whether it is written, or has failed, on every rank."""
        assert self._saving is not None
        return self._saving.done()

    @register(SAME_ON_ALL)
    def finish_save(self) -> None:
        """Waits until it is on the disk, or raises what kept it from it."""
        assert self._saving is not None
        self._saving.result()
        self._saving = None

    @register(SAME_ON_ALL)
    def load(self, folder: Path) -> None:
        """Reads what was saved, at any number of ranks."""
        self.engine.load(folder)
