"""The contract of a training engine: a model behind three verbs (infer, update, save), whatever it is sharded over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from verl.data.batch import Batch, ModelInput
from verl.engines.models import Backbone

# One forward pass over some rows: a value, or several, per response token, [M, ...] fp32.
Outputs = Callable[[ModelInput], Tensor]
# The loss of some rows, a scalar that sums to the loss of the minibatch over any split of it, and sums of monitors over tokens.
Objective = Callable[[Batch, ModelInput], tuple[Tensor, dict[str, Tensor]]]


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


class ForwardEngine(ABC):
    """A model that is only read, and how it is spread over devices.

    Attributes:
        model: the model; generation may share its storage.
    """

    model: Backbone

    @abstractmethod
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """[B, T, ...] fp32, `outputs` of every response token of the rows in the micro-batches, without gradient, 0 elsewhere."""


class TrainEngine(ForwardEngine):
    """A model that is trained, with its optimizer."""

    @abstractmethod
    def update(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> dict[str, float]:
        """One optimizer update with the gradient of the objective, summed over the micro-batches.

        An update whose loss or gradient is not finite changes nothing, counts in `skipped_updates`, and after
        `max_bad_updates` in a row raises.

        Returns:
            loss, grad_norm (before clipping), lr, skipped_updates, and the sums of the monitors.

        Raises:
            NotFiniteError: see above; names the rows.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights, optimizer, schedule and loss scale."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, into the storage that is in use."""
