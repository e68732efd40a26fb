"""Coordinates of a rank in a Megatron-Core model, and the process groups of each parallel layout."""

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
    """Parallel sizes of a model; the remaining factor of the world size is data parallelism.

    Attributes:
        tensor: ranks that share every matrix.
        pipeline: stages of layers.
        context: ranks that share every packed sequence.
        expert: ranks that share the experts of a layer, each of which is whole on one rank; 0: no experts.
        virtual_pipeline: model chunks on each stage; above 1, stages are interleaved.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 0
    virtual_pipeline: int = 1

    def check(self, world_size: int) -> None:
        """Check that the sizes fit a number of ranks.

        Raises:
            ValueError: they do not divide it.
        """
        replica = self.tensor * self.pipeline * self.context
        if world_size % replica:
            raise ValueError(
                f"need tensor * pipeline * sequence to divide the {world_size} ranks of the pool, got "
                f"{self.tensor} * {self.pipeline} * {self.context}; change placement.devices or these sizes"
            )
        if self.expert and world_size % (self.pipeline * self.expert):
            raise ValueError(
                f"need pipeline * expert to divide the {world_size} ranks of the pool, got "
                f"{self.pipeline} * {self.expert}; change placement.devices or these sizes"
            )


@dataclass(frozen=True)
class RankCoordinates:
    """Coordinates of this rank among those of a model, and its process groups.

    Attributes:
        sizes: parallel sizes of the model.
        device: of this rank.
        tensor_rank: in tensor parallelism.
        stage: in the pipeline.
        expert_rank: in expert parallelism.
        data_rank: in data parallelism.
        sequence: the ranks that share every packed sequence; None without context parallelism.
        data_group: ranks with the same coordinates and other rows; of gloo.
        replica_group: ranks with the same rows; of gloo.
        result_rank: global rank in the replica whose results count: the first one of the last stage.
        dispatch_ranks: see `Worker`.
        mesh: the sizes, as the weights are handed to generation.
    """

    sizes: ParallelSizes
    device: torch.device
    tensor_rank: int
    stage: int
    expert_rank: int
    data_rank: int
    sequence: SequenceGroup | None
    data_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    result_rank: int
    dispatch_ranks: Mapping[str, DispatchRank]
    mesh: Mesh
    _state: Mapping[str, Any]

    @property
    def is_last_stage(self) -> bool:
        """True on the last pipeline stage."""
        return self.stage == self.sizes.pipeline - 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which Megatron-Core uses the process groups of this model.

        Megatron-Core keeps its groups in global variables, but models of several layouts share a process.
        """
        before = _read_state()
        vars(parallel_state).update(self._state)
        try:
            with megatron_on(self.device):
                yield
        finally:
            vars(parallel_state).update(before)


# By world, sizes and device. Coordinates are made once: each of their groups costs a communicator.
_coordinates: dict[tuple[Any, ParallelSizes, str], RankCoordinates] = {}


def make_coordinates(sizes: ParallelSizes, device: torch.device) -> RankCoordinates:
    """Coordinates over all ranks of the default process group; a collective call.

    Raises:
        ValueError: the sizes do not fit the number of ranks.
    """
    sizes.check(dist.get_world_size())
    key = (id(dist.group.WORLD), sizes, str(device))
    if key not in _coordinates:
        _coordinates[key] = _new_coordinates(sizes, device)
    return _coordinates[key]


def _read_state() -> dict[str, Any]:
    """The global variables of Megatron-Core that hold process groups and sizes."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.strip("_").isupper()
    }


def _new_coordinates(sizes: ParallelSizes, device: torch.device) -> RankCoordinates:
    before = _read_state()
    try:
        with megatron_on(device):
            _initialize(sizes, device)
            state = _read_state()
            own = (
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            context_group = parallel_state.get_context_parallel_group()
            expert_rank = parallel_state.get_expert_model_parallel_rank()
    finally:
        vars(parallel_state).update(before)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    data, context, stage, tensor = own
    data_group, _ = _subgroup([rank[1:] for rank in everyone])
    replica_group, num_replicas = _subgroup([rank[0] for rank in everyone])
    result_rank = everyone.index((data, 0, sizes.pipeline - 1, 0))
    returns_results = dist.get_rank() == result_rank
    mesh = Mesh(
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        sequence=sizes.context,
        experts=max(1, sizes.expert),
        replicas=num_replicas,
    )
    return RankCoordinates(
        sizes=sizes,
        device=device,
        tensor_rank=tensor,
        stage=stage,
        expert_rank=expert_rank,
        data_rank=data,
        sequence=SequenceGroup(context_group, context, sizes.context) if sizes.context > 1 else None,
        data_group=data_group,
        replica_group=replica_group,
        result_rank=result_rank,
        dispatch_ranks={
            "ranks": DispatchRank(dist.get_rank(), True),
            "train": DispatchRank(data, returns_results),
            "generate": DispatchRank(data, returns_results),
            "stages": DispatchRank(stage, (data, context, tensor) == (0, 0, 0)),
        },
        mesh=mesh,
        _state=state,
    )


def _subgroup(keys: list[Any]) -> tuple[dist.ProcessGroup, int]:
    """The group of ranks whose key is that of this rank, given the keys of all; and the number of groups."""
    members = [[rank for rank, key in enumerate(keys) if key == wanted] for wanted in sorted(set(keys))]
    # gloo on any device: these groups exchange Python objects in host memory.
    group, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")
    assert group is not None
    return group, len(members)


def _initialize(sizes: ParallelSizes, device: torch.device) -> None:
    """Let Megatron-Core make new groups in its global variables."""
    vars(parallel_state).update(
        {name: {} if isinstance(value, dict) else None for name, value in _read_state().items()}
    )
    parallel_state.initialize_model_parallel(
        sizes.tensor,
        sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=max(1, sizes.expert),
        expert_tensor_parallel_size=1 if sizes.expert else None,
        # Consecutive ranks form one replica. With experts and stages Megatron-Core supports only the other
        # order.
        order="tp-cp-ep-dp-pp" if sizes.expert and sizes.pipeline > 1 else "tp-cp-ep-pp-dp",
    )
    # Megatron-Core's random generators belong to a layout too. Without dropout nothing is drawn from them,
    # but seeding them must not change the run's own random states.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model_parallel_cuda_manual_seed(0)
