"""Coordinates of ranks in training, and the groups in which the same ranks generate.

The grouping is that of HybridFlow, https://arxiv.org/abs/2409.19256, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingCoordinates:
    """Coordinates of a rank in the mesh of training.

    Attributes:
        replica: copy of the model.
        stage: of the pipeline.
        shard: of FSDP, within the tensor rank's part.
        sequence: slice of a packed sequence; the ranks of one sequence have equal weights.
        tensor: rank in tensor parallelism.
    """

    replica: int
    stage: int
    shard: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """Parallel sizes of training.

    rank = (((replica * pipeline + stage) * shards + shard) * sequence + sequence_rank) * tensor + tensor_rank

    With 1 shard and sequence 1 this is Megatron's order; with 1 stage it is the order of `placement` with
    FSDP. With FSDP the ranks of a sequence hold different shards: there `shards` is shards x sequence, and
    `sequence` is 1.

    Attributes:
        tensor: ranks that share every matrix, t.
        pipeline: stages, p.
        shards: of FSDP.
        sequence: ranks that share a packed sequence and have equal weights.
        replicas: copies of the model, d.
        experts: consecutive ranks of a stage that share the experts of a layer; 1: experts are split as other
            matrices.

    Raises:
        ValueError: a size below 1, or experts that do not fit.
    """

    tensor: int = 1
    pipeline: int = 1
    shards: int = 1
    sequence: int = 1
    replicas: int = 1
    experts: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.shards, self.sequence, self.replicas, self.experts) < 1:
            raise ValueError(f"need sizes from 1, got {self}")
        if self.experts > 1 and (self.shards > 1 or (self.num_ranks // self.pipeline) % self.experts):
            raise ValueError(
                f"need experts that divide the ranks of a stage, and no shards beside them, got {self}"
            )

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the whole mesh."""
        return self.tensor * self.pipeline * self.shards * self.sequence * self.replicas

    def coordinates(self, rank: int) -> TrainingCoordinates:
        """Coordinates of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        rest, shard = divmod(rest, self.shards)
        replica, stage = divmod(rest, self.pipeline)
        return TrainingCoordinates(replica, stage, shard, sequence, tensor)

    def expert_rank(self, rank: int) -> int:
        """Rank in expert parallelism, from 0 to experts - 1."""
        own = self.coordinates(rank)
        return ((own.replica * self.sequence + own.sequence) * self.tensor + own.tensor) % self.experts


@dataclass(frozen=True, slots=True)
class GenerationCoordinates:
    """Coordinates of a rank in generation.

    Attributes:
        replica: copy of the model; each generates for its own prompts.
        stage: of the pipeline.
        tensor: rank in tensor parallelism.
    """

    replica: int
    stage: int
    tensor: int


def zero_redundancy(rank: int, training: Mesh, tensor: int, pipeline: int) -> GenerationCoordinates:
    """Coordinates in groups of stride t / t_g, where a rank needs in generation what it has in training.

    With t divisible by t_g and p by p_g: the tensor rank of generation is the tensor rank // (t / t_g), the
    stage likewise, and the remainders number the d_g = p t / (p_g t_g) replicas of generation in a replica of
    training. Shards of FSDP count as tensor ranks, within each tensor rank.
    """
    own = training.coordinates(rank)
    width, depth = training.tensor * training.shards // tensor, training.pipeline // pipeline
    column, micro_column = divmod(own.tensor * training.shards + own.shard, width)
    stage, micro_stage = divmod(own.stage, depth)
    replica = own.replica * training.sequence + own.sequence
    return GenerationCoordinates((replica * depth + micro_stage) * width + micro_column, stage, column)


def consecutive(rank: int, training: Mesh, tensor: int, pipeline: int) -> GenerationCoordinates:
    """Coordinates in groups of consecutive ranks, as in a standalone engine and the paper's HybridFlow-V."""
    rest, column = divmod(rank, tensor)
    replica, stage = divmod(rest, pipeline)
    return GenerationCoordinates(replica, stage, column)


GROUPINGS: dict[str, Callable[[int, Mesh, int, int], GenerationCoordinates]] = {
    "zero-redundancy": zero_redundancy,
    "consecutive": consecutive,
}


def generation_coordinates(
    rank: int, training: Mesh, *, tensor: int, pipeline: int = 1, grouping: str = "zero-redundancy"
) -> GenerationCoordinates:
    """Coordinates in generation of a rank of training.

    Args:
        rank: of training.
        training: its sizes.
        tensor: tensor parallel size of generation, t_g.
        pipeline: stages of generation, p_g.
        grouping: a key of `GROUPINGS`.

    Raises:
        ValueError: an unknown grouping, or sizes of generation that do not divide those of training.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"need a grouping of {', '.join(GROUPINGS)}, got {grouping!r}")
    columns = training.tensor * training.shards
    if min(tensor, pipeline) < 1:
        raise ValueError(f"need sizes from 1, got tensor={tensor} and pipeline={pipeline} for generation")
    if grouping == "zero-redundancy" and (columns % tensor or training.pipeline % pipeline):
        raise ValueError(
            f"need tensor and pipeline of generation to divide those of training, got tensor={tensor} for "
            f"{training.tensor} tensor ranks x {training.shards} shards and pipeline={pipeline} for "
            f"{training.pipeline} stages; take divisors or the grouping consecutive"
        )
    if training.num_ranks % (tensor * pipeline):
        raise ValueError(
            f"need tensor * pipeline of generation to divide the {training.num_ranks} ranks, "
            f"got {tensor} * {pipeline}"
        )
    return GROUPINGS[grouping](rank, training, tensor, pipeline)


def generation_groups(
    training: Mesh, *, tensor: int, pipeline: int = 1, grouping: str = "zero-redundancy"
) -> list[list[int]]:
    """Ranks of each replica of generation, ordered by stage and tensor rank."""
    coordinates = [
        generation_coordinates(rank, training, tensor=tensor, pipeline=pipeline, grouping=grouping)
        for rank in range(training.num_ranks)
    ]
    order = sorted(
        range(len(coordinates)),
        key=lambda rank: (coordinates[rank].replica, coordinates[rank].stage, coordinates[rank].tensor),
    )
    size = tensor * pipeline
    return [order[first : first + size] for first in range(0, len(order), size)]


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each stage; if they do not divide evenly, the first stages have one more.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > num_layers:
        raise ValueError(f"need at most as many stages as layers, got {stages} for {num_layers}")
    few, more = divmod(num_layers, stages)
    ends = [0]
    for stage in range(stages):
        ends.append(ends[-1] + few + (stage < more))
    return [range(first, last) for first, last in zip(ends, ends[1:], strict=False)]
