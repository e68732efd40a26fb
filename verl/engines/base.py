"""The contract of an engine: a model with forward passes and optimizer updates, however it is sharded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from verl.config.roles import OptimizerConfig
from verl.controller.dispatch import DispatchRank
from verl.controller.worker_group import Worker
from verl.data.batch import Batch, ModelInput, present_mask
from verl.data.trajectory import Trajectory
from verl.engines.hf.adapters import export_adapter
from verl.engines.hf.lora import NO_ADAPTER, REFERENCE, has_lora, use_adapter
from verl.engines.hf.models import Backbone
from verl.engines.hf.weights import (
    full_shapes,
    full_tensors,
    local_shards,
    local_tensors,
    merged_config,
    to_local,
)
from verl.utils.sampling_types import Prompt
from verl.weight_sync.layout import TensorShard
from verl.weight_sync.meshes import Mesh

# In shapes: B rows, T response tokens of the longest row, M response tokens of all rows.

# One forward pass over some rows: one or several values per response token, [M, ...] fp32.
Outputs = Callable[[ModelInput], Tensor]
# The loss of some rows, a scalar, and their monitors, scalars too. The losses of the parts of any split of a
# minibatch sum to the loss of the minibatch; so do monitors, except those with `MAX_SUFFIX`.
Objective = Callable[[Batch, ModelInput], tuple[Tensor, dict[str, Tensor]]]
# A monitor whose name ends so is combined by its maximum.
MAX_SUFFIX = "_max"


def combine_monitors(name: str, one: Any, other: Any) -> Any:
    """A monitor (numbers or scalar tensors) of two parts of the rows, combined: their sum or maximum."""
    return max(one, other) if name.endswith(MAX_SUFFIX) else one + other


class NotFiniteError(RuntimeError):
    """A loss, a gradient, a logit or a weight is not finite, and training cannot go on."""


def not_finite_advice(precision: str, optimizer: OptimizerConfig | None = None) -> str:
    """Changes that may help where a loss, a gradient, a weight or a logit was not finite.

    Args:
        precision: of the computation. bf16 has the range of fp32, so fp32 would not help it.
        optimizer: of the model; None: not known.
    """
    remedies = ["use policy.precision=bf16 or fp32, whose range is wider"] if precision == "fp16" else []
    remedies.append("lower optimizer.lr" + (f" ({optimizer.lr:g} now)" if optimizer else ""))
    if optimizer and optimizer.max_grad_norm > 1:
        remedies.append(f"set optimizer.max_grad_norm=1 ({optimizer.max_grad_norm:g} now)")
    return ", or ".join(remedies)


@dataclass
class UpdateTotals:
    """Loss, monitors and rows of an unfinished update on one rank.

    Attributes:
        monitors: the loss (as `loss`) and the monitors so far, scalars by name.
        bad_rows: `row_ids` of the rows whose loss is not finite.
        rows: `row_ids` of all rows so far.
    """

    monitors: dict[str, Tensor] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, monitors: Mapping[str, Tensor]) -> None:
        """Add the loss and the monitors of a micro-batch."""
        for name, value in {"loss": loss.detach(), **monitors}.items():
            known = name in self.monitors
            self.monitors[name] = combine_monitors(name, self.monitors[name], value) if known else value

    def over_ranks(self, gather: Callable[[Any], list[Any]]) -> tuple[dict[str, float], list[int]]:
        """Monitors and bad rows of all data ranks; `gather` is `ForwardEngine.gather_over_data`."""
        ranks = gather(({name: float(value) for name, value in self.monitors.items()}, self.bad_rows))
        combined: dict[str, float] = {}
        for monitors, _ in ranks:
            for name, value in monitors.items():
                known = name in combined
                combined[name] = combine_monitors(name, combined[name], value) if known else value
        return combined, [row for _, bad_rows in ranks for row in bad_rows]


class ForwardEngine(ABC):
    """A model that runs forward passes, and the way it is sharded over devices.

    Attributes:
        model: the model; generation may share its storage.
        dispatch_ranks: this rank's place in each layout of its group, see `Worker`.
        mesh: sizes of the mesh that the weights are sharded over.
        can_generate: True if `model` can generate inside `unsharded_weights`; else the hybrid engine has a
            copy of the model for it.
    """

    model: Backbone
    dispatch_ranks: Mapping[str, DispatchRank] = Worker.dispatch_ranks
    mesh: Mesh = Mesh()
    can_generate: bool = True

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration of the model as it is exported."""
        return merged_config(self.model.transformer)

    @abstractmethod
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """`outputs` of every response token of the rows in the micro-batches, [B, T, ...] fp32, 0 elsewhere.

        No gradient is computed. The rows are those of this rank. All ranks pass the same number of
        micro-batches, some of which may be empty.
        """

    def model_bytes(self) -> int:
        """Bytes of the weights that `export` writes, which are fp32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes().values())

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format, LoRA weights merged; on all ranks together."""

    def export_adapter(self, folder: Path, base: str) -> None:
        """Write the LoRA adapter alone in PEFT's layout; on all ranks together.

        Args:
            folder: destination.
            base: folder or hub name of the model that the adapter belongs to.
        """
        export_adapter(self.model, folder, base=base)

    def gather_over_data(self, item: Any) -> list[Any]:
        """Items (plain data) of all data ranks, in the order of the ranks; a collective."""
        return [item]

    def unsharded_weights(self) -> AbstractContextManager[None]:
        """Context in which this rank can run forward passes without the other data ranks, to generate."""
        return nullcontext()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of the model, by their names in a Hugging Face folder."""
        return full_shapes(self.model.transformer)

    def local_shards(self) -> list[TensorShard]:
        """Shards of the whole tensors on this rank."""
        return local_shards(self.model.transformer)

    def local_tensors(self) -> dict[str, Tensor]:
        """The tensors of `local_shards` by name; merging LoRA weights into them is a collective."""
        return local_tensors(self.model.transformer)

    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, one after the other, LoRA weights merged; on all ranks together.

        Args:
            wanted: names of the tensors to yield, the same on all ranks; None: all.
        """
        return full_tensors(self.model.transformer, wanted)

    @contextmanager
    def other_adapter(self, name: str) -> Iterator[None]:
        """Context in which the model computes with another of its LoRA adapters; "": without any.

        Raises:
            ValueError: the model has no adapter of that name.
        """
        model = self.model
        if not has_lora(model.transformer, name or None):
            raise ValueError(
                f"need a LoRA adapter {name or 'to switch off'}, got a model without; set policy.lora.rank "
                "above 0"
            )
        own, model.adapter = model.adapter, name
        use_adapter(model.transformer, name)
        try:
            yield
        finally:
            model.adapter = own
            use_adapter(model.transformer, own or NO_ADAPTER)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Context in which the model computes without its LoRA adapter, as the model that it was put on.

        Raises:
            ValueError: the model has no adapter.
        """
        return self.other_adapter(NO_ADAPTER)

    def as_reference(self) -> AbstractContextManager[None]:
        """Context in which the policy computes as its reference: by a frozen adapter, or without any.

        Raises:
            ValueError: the model has no adapter.
        """
        has_own = has_lora(self.model.transformer, REFERENCE)
        return self.other_adapter(REFERENCE if has_own else NO_ADAPTER)


class TrainEngine(ForwardEngine):
    """A model that is trained, with its optimizer.

    Attributes:
        can_accumulate: True if an update may come in portions, by `accumulate` and `finish`.
    """

    can_accumulate: bool = False

    @abstractmethod
    def update(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> dict[str, float]:
        """One optimizer update with the gradient of the objective.

        The gradient is summed over the micro-batches of all data ranks. An update whose loss or gradient is
        not finite changes nothing and counts in `skipped_updates`.

        Returns:
            loss, grad_norm (before clipping), lr, skipped_updates, and the combined monitors, the same on all
            ranks; of a skipped update only a part of them.

        Raises:
            NotFiniteError: `max_bad_updates` updates in a row were not finite; names the rows.
        """

    def accumulate(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        """Add the gradient of a portion of an update; weights and optimizer stay as they are.

        All ranks take part in every portion, as in an update. Between portions the model may run forward
        passes, by `infer` or to generate.

        Raises:
            ValueError: this engine makes whole updates only.
        """
        raise ValueError(
            f"need whole updates for {type(self).__name__}, which does not keep gradients from one call to "
            "the next"
        )

    def finish(self, scale: float = 1.0) -> dict[str, float]:
        """Make the update with all portions since the last one, as one call of `update` with all rows would.

        Args:
            scale: factor of the loss and its gradient that a portion could not know, such as 1 / (tokens of
                all portions). Monitors are sums and are not scaled.

        Returns:
            The metrics of `update`.

        Raises:
            NotFiniteError: as in `update`.
            ValueError: this engine makes whole updates only.
        """
        raise ValueError(
            f"need whole updates for {type(self).__name__}, which does not keep gradients from one call to "
            "the next"
        )

    def discard(self) -> None:
        """Forget the accumulated portions; the next portion begins an update."""
        return

    def has_finite_state(self) -> bool:
        """True if no weight, and no optimizer state, on this rank is infinite or no number."""
        return all_finite(to_local(parameter) for parameter in self.model.parameters())

    def checkpoint_bytes(self) -> int:
        """Bytes that `save` writes on all ranks together, about: fp32 weights and AdamW's two moments."""
        return 3 * self.model_bytes()

    @abstractmethod
    def save(self, folder: Path) -> Callable[[], None]:
        """Begin to write weights, optimizer, schedule and loss scale; training may go on at once.

        Returns:
            A function that waits until they are on the disk, and raises the error that prevented it.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read a checkpoint of `save`, written on any number of ranks, into the storage in use.

        Raises:
            ValueError: the folder is of another model, or broken.
        """


def scatter_response_values(batch: Batch, parts: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
    """[B, T, ...] fp32 from the values [m, ...] of the response tokens of some rows; 0 elsewhere."""
    present = present_mask(batch.response_lengths)
    result = torch.zeros(present.shape)
    for rows, values in parts:
        if values.ndim >= result.ndim:
            # Several values per token, which is known from the first part on.
            result = result.new_zeros(*present.shape, *values.shape[1:])
        block = result.new_zeros(len(rows), *result.shape[1:])
        block[present[list(rows)]] = values
        result[list(rows)] = block
    return result


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if every number of the tensors is finite; one pass over them, without copies."""
    # The smallest and the largest number are not finite if any number is: they pass NaN on.
    bounds = [bound.float() for t in tensors if t.numel() for bound in torch.aminmax(t)]
    # One transfer from each device, and no other wait.
    by_device: dict[torch.device, list[Tensor]] = {}
    for bound in bounds:
        by_device.setdefault(bound.device, []).append(bound)
    return all(bool(torch.isfinite(torch.stack(group)).all()) for group in by_device.values())


def dummy_batch() -> Batch:
    """One row of one token, for a rank without rows that must take part in a collective forward pass."""
    return Batch.from_trajectories([Trajectory(Prompt(""), [0], [0], [True], None, [0], 0)])
