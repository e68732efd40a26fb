"""Workers of one model on one rank: what every role can do, and what a trained role adds."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from verl.engines.hf.models import PolicyModel
from verl.engines.minibatches import count_tokens, mean_over_updates, per_token_means, run_updates
from verl.utils.device import memory_bytes


def max_over_ranks(results: Sequence[dict[str, float]], arguments: object) -> dict[str, float]:
    """Join of a dispatch mode: the largest value of each metric."""
    return {name: max(result[name] for result in results) for name in results[0]}


def true_on_all(results: Sequence[bool], arguments: object) -> bool:
    """Join of a dispatch mode: True if all ranks returned True."""
    return all(results)


# Both pass the same arguments to all ranks.
MAX_OVER_RANKS = DispatchMode("ranks", broadcast, max_over_ranks)
TRUE_ON_ALL = DispatchMode("ranks", broadcast, true_on_all)


class RoleWorker(Worker):
    """A model on one rank.

    Args:
        engine: runs the model.
    """

    engine: ForwardEngine

    def __init__(self, engine: ForwardEngine) -> None:
        self.engine = engine
        self.dispatch_ranks = engine.dispatch_ranks

    @register(SAME_ON_ALL)
    def model_config(self) -> PretrainedConfig:
        """The configuration of the model."""
        return self.engine.config

    @register(SAME_ON_ALL)
    def limit_ids(self, num_ids: int) -> None:
        """Give only ids below `num_ids` a probability, if the model has any to give."""
        if isinstance(self.engine.model, PolicyModel):
            self.engine.model.num_ids = num_ids

    @register(MAX_OVER_RANKS)
    def memory(self) -> dict[str, float]:
        """Device memory in bytes: now in use, the peak and the total; the largest values of all ranks."""
        return memory_bytes(self.engine.model.device)

    @register(SAME_ON_ALL)
    def model_bytes(self) -> int:
        """Bytes of the weights that `export` writes."""
        return self.engine.model_bytes()

    @register(SAME_ON_ALL)
    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self.engine.export(folder)

    @register(SAME_ON_ALL)
    def export_adapter(self, folder: Path, base: str) -> None:
        """Write the LoRA adapter alone in PEFT's layout, to be put on the model `base`."""
        self.engine.export_adapter(folder, base)


class ColumnWorker(RoleWorker, ABC):
    """A role that writes columns of the batch before the update."""

    @register(PLANNED)
    @abstractmethod
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """The columns, as a batch of the same rows."""


class Learner(ColumnWorker):
    """A role that is trained.

    Args:
        engine: trains the model.
        algorithm: defines the loss.
        epochs: passes over the rows of a step.
    """

    engine: TrainEngine
    _prefix = ""
    _saving: Future[None] | None = None

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, epochs: int) -> None:
        super().__init__(engine)
        self._algorithm = algorithm
        self._epochs = epochs

    @abstractmethod
    def objective(self, kl_coef: float) -> Objective:
        """The loss of the role, with the coefficient of the KL term where it has one."""

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan, kl_coef: float) -> dict[str, float]:
        """Make every update of a step, on rows that have their loss weights.

        Returns:
            Metrics, means over sampled tokens and over updates, the same on all ranks.
        """
        updates = run_updates(self.engine, batch, plan, self.objective(kl_coef), epochs=self._epochs)
        return self._named(mean_over_updates(updates))

    @register(PLANNED_METRICS)
    def accumulate(self, batch: Batch, plan: BatchPlan, kl_coef: float, first_row: int) -> None:
        """Run forward and backward on a portion of the rows of a step; see `verl.engines.streaming`.

        Args:
            batch: rows that have their loss weights, up to the scale of `finish`.
            plan: of one minibatch.
            kl_coef: as for `update`, the same for all portions.
            first_row: number of the first row of the portion in the step.

        Raises:
            ValueError: the step has several updates, or the engine makes whole updates only.
        """
        if self._epochs > 1 or len(plan.minibatches) > 1:
            raise ValueError(
                f"need one update for a step in portions, got epochs={self._epochs} and "
                f"{len(plan.minibatches)} minibatches"
            )
        numbered = batch.keep(batch.names)
        numbered.write("row_ids", batch.row_ids + first_row)
        self.engine.accumulate(numbered, plan.minibatches[0][0], count_tokens(self.objective(kl_coef)))

    @register(SAME_ON_ALL)
    def finish(self, scale: float) -> dict[str, float]:
        """Make the update of the accumulated portions, with their loss times `scale`; metrics of `update`."""
        return self._named(per_token_means(self.engine.finish(scale)))

    @register(SAME_ON_ALL)
    def discard(self) -> None:
        """Forget the accumulated portions."""
        self.engine.discard()

    @register(TRUE_ON_ALL)
    def can_accumulate(self) -> bool:
        """True if the engine takes an update in portions."""
        return self.engine.can_accumulate

    def _named(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of the role's updates under their names in the run."""
        return {f"{self._prefix}{name}": value for name, value in metrics.items()}

    @register(TRUE_ON_ALL)
    def has_finite_state(self) -> bool:
        """True if no weight and no optimizer state of any rank is infinite or no number."""
        return self.engine.has_finite_state()

    @register(SAME_ON_ALL)
    def checkpoint_bytes(self) -> int:
        """Bytes of weights and optimizer in a checkpoint, of all ranks together, about."""
        return self.engine.checkpoint_bytes()

    @register(SAME_ON_ALL)
    def begin_save(self, folder: Path) -> None:
        """Begin to write weights and optimizer; training may go on at once."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saving = thread.submit(self.engine.save(folder))
        thread.shutdown(wait=False)

    @register(TRUE_ON_ALL)
    def is_saved(self) -> bool:
        """True if every rank has written its part, or has failed to."""
        assert self._saving is not None
        return self._saving.done()

    @register(SAME_ON_ALL)
    def finish_save(self) -> None:
        """Wait until the checkpoint is on the disk; raise the error that prevented it."""
        assert self._saving is not None
        self._saving.result()
        self._saving = None

    @register(SAME_ON_ALL)
    def load(self, folder: Path) -> None:
        """Read a checkpoint, written by any number of ranks."""
        self.engine.load(folder)
