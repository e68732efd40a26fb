"""The contract of a training engine: a model behind three verbs (infer, update, save), whatever it is sharded over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from verl.controller.dispatch import Place
from verl.controller.group import Worker
from verl.data.batch import Batch, ModelInput
from verl.engines.loading import own_homes, own_pieces, weight_shapes, whole_tensors
from verl.engines.lora import without_additions
from verl.engines.models import Backbone
from verl.hybrid.layout import Piece
from verl.hybrid.meshes import Mesh

# One forward pass over some rows: a value, or several, per response token, [M, ...] fp32.
Outputs = Callable[[ModelInput], Tensor]
# The loss of some rows, a scalar that sums to the loss of the minibatch over any split of it, and sums of monitors over tokens,
# or their largest, see `MAX_SUFFIX`.
Objective = Callable[[Batch, ModelInput], tuple[Tensor, dict[str, Tensor]]]


# Monitors whose names end so are not summed: the largest counts.
MAX_SUFFIX = "_max"


def combined(name: str, one: Any, other: Any) -> Any:
    """A monitor of two parts of the rows together, numbers or scalars."""
    return max(one, other) if name.endswith(MAX_SUFFIX) else one + other


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


class ForwardEngine(ABC):
    """A model that is only read, and how it is spread over devices.

    Attributes:
        model: the model; generation may share its storage.
        places: where this rank stands, see `Worker`.
        mesh: sizes of the layout that the weights have.
        generates: whether `model` can answer prompts, inside `whole_weights`; if not, another model of these weights must.
    """

    model: Backbone
    places: Mapping[str, Place] = Worker.places
    mesh: Mesh = Mesh()
    generates: bool = True

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration of the model."""
        return self.model.transformer.config

    @abstractmethod
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """[B, T, ...] fp32, `outputs` of every response token of the rows in the micro-batches, without gradient, 0 elsewhere.

        The rows are those of this rank; all ranks have the same number of micro-batches, of which some may be empty.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format, low-rank additions merged into the weights; on all ranks together."""

    def gather_over_data(self, thing: Any) -> list[Any]:
        """Plain data of every data rank, in their order; of this one, if it is alone."""
        return [thing]

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, this rank can run forward passes without the other data ranks, as generation does."""
        return nullcontext()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of the model, by their names in a Hugging Face folder."""
        return dict(weight_shapes(self.model.transformer))

    def pieces(self) -> list[Piece]:
        """What of the whole tensors lies on this rank."""
        return own_pieces(self.model.transformer)

    def homes(self) -> dict[str, Tensor]:
        """The local tensors of `pieces`, by name; low-rank additions are merged into them, which takes all ranks."""
        return own_homes(self.model.transformer)

    def whole_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, one after the other, low-rank additions merged into them; on all ranks together.

        Args:
            wanted: names of those to yield, the same on all ranks; none: all.
        """
        return whole_tensors(self.model.transformer, wanted)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Inside, the model is the one that its low-rank additions started from.

        Raises:
            ValueError: it has none.
        """
        return without_additions(self.model.transformer)


class TrainEngine(ForwardEngine):
    """A model that is trained, with its optimizer."""

    @abstractmethod
    def update(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> dict[str, float]:
        """One optimizer update with the gradient of the objective, summed over the micro-batches of all data ranks.

        An update whose loss or gradient is not finite changes nothing, counts in `skipped_updates`, and after
        `max_bad_updates` in a row raises.

        Returns:
            loss, grad_norm (before clipping), lr, skipped_updates, and the sums of the monitors, the same on all ranks.

        Raises:
            NotFiniteError: see above; names the rows.
        """

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
