"""The contract of a training engine: a model behind three verbs (infer, update, save), whatever it is sharded
over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from verl.controller.dispatch import DispatchRank
from verl.controller.worker_group import Worker
from verl.data.batch import Batch, ModelInput
from verl.engines.hf.lora import disable_lora
from verl.engines.hf.models import Backbone
from verl.engines.hf.weights import full_shapes, full_tensors, local_shards, local_tensors
from verl.weight_sync.layout import TensorShard
from verl.weight_sync.meshes import Mesh

# One forward pass over some rows: a value, or several, per response token, [M, ...] fp32.
Outputs = Callable[[ModelInput], Tensor]
# The loss of some rows, a scalar that sums to the loss of the minibatch over any split of it, and sums of
# monitors over tokens, or their largest, see `MAX_SUFFIX`.
Objective = Callable[[Batch, ModelInput], tuple[Tensor, dict[str, Tensor]]]


# Monitors whose names end so are not summed: the largest counts.
MAX_SUFFIX = "_max"


def combined(name: str, one: Any, other: Any) -> Any:
    """A monitor of two parts of the rows together, numbers or scalars."""
    return max(one, other) if name.endswith(MAX_SUFFIX) else one + other


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


@dataclass
class UpdateTotals:
    """What an update that is not finished has come to on one rank, beside its gradients.

    Attributes:
        totals: the loss and the monitors so far, scalars by name.
        bad: numbers of the rows whose loss is not finite.
        rows: numbers of all rows so far.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, monitors: Mapping[str, Tensor]) -> None:
        """Takes in a micro-batch."""
        for name, value in {"loss": loss.detach(), **monitors}.items():
            self.totals[name] = combined(name, self.totals[name], value) if name in self.totals else value


class ForwardEngine(ABC):
    """A model that is only read, and how it is spread over devices.

    Attributes:
        model: the model; generation may share its storage.
        places: where this rank stands, see `Worker`.
        mesh: sizes of the layout that the weights have.
        can_generate: whether `model` can answer prompts, inside `unsharded_weights`; if not, another model of these
            weights must.
    """

    model: Backbone
    dispatch_ranks: Mapping[str, DispatchRank] = Worker.dispatch_ranks
    mesh: Mesh = Mesh()
    can_generate: bool = True

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration of the model."""
        return self.model.transformer.config

    @abstractmethod
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """[B, T, ...] fp32, `outputs` of every response token of the rows in the micro-batches, without
        gradient, 0 elsewhere.

        The rows are those of this rank; all ranks have the same number of micro-batches, of which some may be
        empty.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format, low-rank additions merged into the weights; on all ranks
        together.
        """

    def gather_over_data(self, thing: Any) -> list[Any]:
        """Plain data of every data rank, in their order; of this one, if it is alone."""
        return [thing]

    def unsharded_weights(self) -> AbstractContextManager[None]:
        """Inside, this rank can run forward passes without the other data ranks, as generation does."""
        return nullcontext()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of the model, by their names in a Hugging Face folder."""
        return dict(full_shapes(self.model.transformer))

    def local_shards(self) -> list[TensorShard]:
        """What of the whole tensors lies on this rank."""
        return local_shards(self.model.transformer)

    def local_tensors(self) -> dict[str, Tensor]:
        """The local tensors of `pieces`, by name; low-rank additions are merged into them, which takes all
        ranks.
        """
        return local_tensors(self.model.transformer)

    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, one after the other, low-rank additions merged into them; on all ranks
        together.

        Args:
            wanted: names of those to yield, the same on all ranks; none: all.
        """
        return full_tensors(self.model.transformer, wanted)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, the model is the one that its low-rank additions started from.

        Raises:
            ValueError: it has none.
        """
        return disable_lora(self.model.transformer)


class TrainEngine(ForwardEngine):
    """A model that is trained, with its optimizer.

    Attributes:
        can_accumulate: whether an update may come in portions, by `accumulate` and `finish`.
    """

    can_accumulate: bool = False

    @abstractmethod
    def update(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> dict[str, float]:
        """One optimizer update with the gradient of the objective, summed over the micro-batches of all data
        ranks.

        An update whose loss or gradient is not finite changes nothing, counts in `skipped_updates`, and after
        `max_bad_updates` in a row raises.

        Returns:
            loss, grad_norm (before clipping), lr, skipped_updates, and the sums of the monitors, the same on
            all ranks.

        Raises:
            NotFiniteError: see above; names the rows.
        """

    def accumulate(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        """Adds the gradient of a portion of an update to those of the portions before it; weights and
        optimizer stay.

        All ranks take part in every portion, as in an update. Between portions the model may be read, by
        `infer` or to generate.

        Raises:
            ValueError: this engine makes whole updates only.
        """
        raise ValueError(
            f"need whole updates for {type(self).__name__}, which does not keep gradients from one call to the next"
        )

    def finish(self, scale: float = 1.0) -> dict[str, float]:
        """The update with everything that was accumulated since the last one, as if `update` had been given
        all of it at once.

        Args:
            scale: of the loss and its gradient: what the portions could not know, such as 1 / (tokens of all
                of them). Monitors are sums, and stay.

        Returns:
            See `update`.

        Raises:
            NotFiniteError: see `update`.
        """
        raise ValueError(
            f"need whole updates for {type(self).__name__}, which does not keep gradients from one call to the next"
        )

    def discard(self) -> None:
        """Forgets what was accumulated; the next portion begins an update."""
        return

    @abstractmethod
    def save(self, folder: Path) -> Callable[[], None]:
        """Begins to write weights, optimizer, schedule and loss scale; training may go on at once.

        Returns:
            What waits until they are on the disk, or raises what kept them from it.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, on however many ranks, into the storage that is in use.

        Raises:
            ValueError: the folder is not of this model, or broken.
        """
