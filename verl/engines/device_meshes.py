"""Device meshes and process groups of one model: replicas, shards, sequence and tensor parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.config.placement import ParallelConfig
from verl.controller.dispatch import DispatchRank
from verl.engines.sequence_parallel import SequenceGroup
from verl.weight_sync.meshes import Mesh


@dataclass(frozen=True)
class DeviceMeshes:
    """The meshes of a model and the coordinates of this rank.

    The ranks are replicas x shards x sequence x tensor, with tensor as the innermost dimension.

    Attributes:
        data: mesh of FSDP: shards x sequence as one dimension, or two dimensions with the replicas.
        tensor: mesh of the ranks that share every matrix; None without tensor parallelism.
        sequence: the ranks that share every packed sequence; None without sequence parallelism.
        data_group: the ranks with different rows; its backend is for the CPU.
        dispatch_ranks: this rank's place in each layout of its group, see `Worker`.
        mesh: the sizes.
    """

    data: DeviceMesh
    tensor: DeviceMesh | None
    sequence: SequenceGroup | None
    data_group: dist.ProcessGroup
    dispatch_ranks: Mapping[str, DispatchRank]
    mesh: Mesh


def make_device_meshes(parallel: ParallelConfig, device: torch.device) -> DeviceMeshes:
    """Meshes over all ranks of the default process group; a collective.

    Raises:
        ValueError: the sizes do not divide the number of ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    replicas, sequence, tensor = parallel.replicas, parallel.sequence, parallel.tensor
    if world % (replicas * sequence * tensor):
        raise ValueError(
            f"need replicas * sequence * tensor to divide the {world} ranks of the pool, got "
            f"{replicas} * {sequence} * {tensor}; change placement.devices or these sizes"
        )
    shards = world // (replicas * sequence * tensor)
    # Two views of the same ranks: weights are sharded over the sequence ranks, too, which share their rows.
    for_weights = init_device_mesh(
        device.type, (replicas, shards * sequence, tensor), mesh_dim_names=("replicas", "shards", "tensor")
    )
    for_rows = init_device_mesh(
        device.type, (replicas * shards, sequence, tensor), mesh_dim_names=("data", "sequence", "tensor")
    )
    data_rank, sequence_rank, tensor_rank = for_rows.get_coordinate() or (0, 0, 0)
    # On the CPU whatever the device: it carries numbers and rows that are in the host's memory.
    data_groups = [list(range(offset, world, sequence * tensor)) for offset in range(sequence * tensor)]
    data_group, _ = dist.new_subgroups_by_enumeration(data_groups, backend="gloo")
    assert data_group is not None
    is_first = tensor_rank == 0
    return DeviceMeshes(
        data=for_weights["replicas", "shards"] if replicas > 1 else for_weights["shards"],
        tensor=for_weights["tensor"] if tensor > 1 else None,
        sequence=(
            SequenceGroup(for_rows["sequence"].get_group(), sequence_rank, sequence) if sequence > 1 else None
        ),
        data_group=data_group,
        dispatch_ranks={
            "ranks": DispatchRank(rank, True),
            "train": DispatchRank(data_rank, is_first and sequence_rank == 0),
            # Generation does not split sequences, so sequence ranks take different prompts.
            "generate": DispatchRank(data_rank * sequence + sequence_rank, is_first),
            "stages": DispatchRank(0, rank == 0),
        },
        mesh=Mesh(tensor=tensor, shards=shards * sequence, replicas=replicas),
    )
