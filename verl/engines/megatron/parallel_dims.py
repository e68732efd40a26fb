"""Which rank of a Megatron-Core model is where: its process groups, made once for each shape, and those in
use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from verl.controller.dispatch import DispatchRank
from verl.engines.megatron.cpu_patches import megatron_on
from verl.engines.sequence_parallel import SequenceGroup
from verl.weight_sync.meshes import Mesh


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks in each direction of a grid; what they leave over are data ranks.

    Attributes:
        tensor: that share every matrix.
        pipeline: stages of layers.
        context: that share every line of packed rows.
        expert: that share the experts of a layer, each of which is whole on a rank; 0: a model without
            experts.
        virtual: chunks of layers on each stage, if stages are interleaved.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 0
    virtual: int = 1

    def check(self, world: int) -> None:
        """Refuses a grid that does not fit the ranks.

        Raises:
            ValueError: see above.
        """
        replica = self.tensor * self.pipeline * self.context
        if world % replica:
            raise ValueError(
                f"need tensor * pipeline * sequence to divide the {world} ranks of the pool, got {self.tensor} * {self.pipeline} * "
                f"{self.context}; change placement.devices or these sizes"
            )
        if self.expert and world % (self.pipeline * self.expert):
            raise ValueError(
                f"need pipeline * expert to divide the {world} ranks of the pool, got {self.pipeline} * {self.expert}; change "
                "placement.devices or these sizes"
            )


@dataclass(frozen=True)
class RankCoordinates:
    """This rank among those of a model.

    Attributes:
        extents: of the grid.
        device: of this rank.
        tensor_rank: slice of every matrix.
        stage: of the pipeline.
        expert_rank: among the ranks that share the experts.
        data_rank: which rows.
        sequence: the ranks that share every line; None: one has it whole.
        data_ranks: group of the ranks with other rows, of a backend for the CPU.
        replica: group of the ranks with the same rows, likewise.
        collector: global rank of the one in the replica whose results count: the last stage's first.
        places: see `Worker`.
        mesh: the sizes, for those who generate with the weights.
    """

    extents: ParallelSizes
    device: torch.device
    tensor_rank: int
    stage: int
    expert_rank: int
    data_rank: int
    sequence: SequenceGroup | None
    data_ranks: dist.ProcessGroup
    replica: dist.ProcessGroup
    collector: int
    dispatch_ranks: Mapping[str, DispatchRank]
    mesh: Mesh
    _state: Mapping[str, Any]

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == self.extents.pipeline - 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, Megatron-Core works on this grid: its groups are global, and models of several shapes share
        a process.
        """
        before = _groups()
        vars(parallel_state).update(self._state)
        try:
            with megatron_on(self.device):
                yield
        finally:
            vars(parallel_state).update(before)


# Grids of this process by the world they are in, their extents and device: every group costs a communicator.
_grids: dict[tuple[Any, ParallelSizes, str], RankCoordinates] = {}


def make_coordinates(extents: ParallelSizes, device: torch.device) -> RankCoordinates:
    """The grid over all ranks of the default process group; every rank makes it at once.

    Raises:
        ValueError: it does not fit the number of ranks.
    """
    extents.check(dist.get_world_size())
    key = (id(dist.group.WORLD), extents, str(device))
    if key not in _grids:
        _grids[key] = _new_grid(extents, device)
    return _grids[key]


def _groups() -> dict[str, Any]:
    """The global variables of Megatron-Core that hold process groups and sizes."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.strip("_").isupper()
    }


def _new_grid(extents: ParallelSizes, device: torch.device) -> RankCoordinates:
    before = _groups()
    try:
        with megatron_on(device):
            _initialize(extents, device)
            state = _groups()
            where = (
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            context = parallel_state.get_context_parallel_group()
            expert = parallel_state.get_expert_model_parallel_rank()
    finally:
        vars(parallel_state).update(before)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, where)
    data, line, stage, tensor = where
    same_place = [
        [r for r, other in enumerate(everywhere) if other[1:] == key]
        for key in sorted({w[1:] for w in everywhere})
    ]
    same_rows = [
        [r for r, other in enumerate(everywhere) if other[0] == key]
        for key in sorted({w[0] for w in everywhere})
    ]
    # Of a backend for the CPU whatever the device: what travels here are numbers and rows of the host.
    data_ranks, _ = dist.new_subgroups_by_enumeration(same_place, backend="gloo")
    replica, _ = dist.new_subgroups_by_enumeration(same_rows, backend="gloo")
    assert data_ranks is not None and replica is not None
    collector = everywhere.index((data, 0, extents.pipeline - 1, 0))
    collects = dist.get_rank() == collector
    places = {
        "ranks": DispatchRank(dist.get_rank(), True),
        "train": DispatchRank(data, collects),
        "generate": DispatchRank(data, collects),
        "stages": DispatchRank(stage, (data, line, tensor) == (0, 0, 0)),
    }
    sequence = SequenceGroup(context, line, extents.context) if extents.context > 1 else None
    sizes = {
        "tensor": extents.tensor,
        "pipeline": extents.pipeline,
        "sequence": extents.context,
        "experts": max(1, extents.expert),
    }
    mesh = Mesh(**sizes, replicas=len(same_rows))
    return RankCoordinates(
        extents,
        device,
        tensor,
        stage,
        expert,
        data,
        sequence,
        data_ranks,
        replica,
        collector,
        places,
        mesh,
        state,
    )


def _initialize(extents: ParallelSizes, device: torch.device) -> None:
    """Makes Megatron-Core's groups anew."""
    vars(parallel_state).update(
        {name: {} if isinstance(value, dict) else None for name, value in _groups().items()}
    )
    parallel_state.initialize_model_parallel(
        extents.tensor,
        extents.pipeline,
        virtual_pipeline_model_parallel_size=extents.virtual if extents.virtual > 1 else None,
        context_parallel_size=extents.context,
        expert_model_parallel_size=max(1, extents.expert),
        expert_tensor_parallel_size=1 if extents.expert else None,
        # Consecutive ranks are one copy of the model; Megatron-Core deals experts to stages only the other
        # way round.
        order="tp-cp-ep-dp-pp" if extents.expert and extents.pipeline > 1 else "tp-cp-ep-pp-dp",
    )
    # The states of its generators are of this grid, too; nothing is drawn from them, as there is no dropout.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model_parallel_cuda_manual_seed(0)
