"""Who is where: ranks of training, and the groups in which the same ranks generate; pure.

The grouping is that of HybridFlow, https://arxiv.org/abs/2409.19256, section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingCoordinates:
    """Where a rank stands in training.

    Attributes:
        replica: which copy of the model.
        stage: of the pipeline.
        shard: of FSDP, of what the tensor rank has.
        sequence: part of a line; the ranks of a line have equal weights.
        tensor: part of every matrix.
    """

    replica: int
    stage: int
    shard: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of training, rank = (((replica * pipeline + stage) * shards + shard) * sequence + place in the
    line) * tensor + tensor rank.

    Without shards and sequence this is Megatron's order, without stages that of `placement` with FSDP; there,
    the ranks of a line hold different shards, so `shards` is shards x sequence and `sequence` is 1.

    Attributes:
        tensor: ranks that share every matrix, t.
        pipeline: stages, p.
        shards: of FSDP.
        sequence: ranks that share a line and have equal weights.
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
        """All ranks."""
        return self.tensor * self.pipeline * self.shards * self.sequence * self.replicas

    def coordinates(self, rank: int) -> TrainingCoordinates:
        """Where a rank stands."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        rest, shard = divmod(rest, self.shards)
        replica, stage = divmod(rest, self.pipeline)
        return TrainingCoordinates(replica, stage, shard, sequence, tensor)

    def expert_rank(self, rank: int) -> int:
        """Which part of the experts a rank has."""
        place = self.coordinates(rank)
        return ((place.replica * self.sequence + place.sequence) * self.tensor + place.tensor) % self.experts


@dataclass(frozen=True, slots=True)
class GenerationCoordinates:
    """Where a rank stands in generation.

    Attributes:
        replica: which copy of the model; each answers its own prompts.
        stage: of the pipeline.
        tensor: part of every matrix.
    """

    replica: int
    stage: int
    tensor: int


def zero_redundancy(rank: int, training: Mesh, tensor: int, pipeline: int) -> GenerationCoordinates:
    """What a rank has in training is part of what it needs: ranks of a generation group are at stride t /
    t_g, not consecutive.

    With t divisible by t_g and p by p_g: tensor rank of generation = tensor rank // (t / t_g), stage
    likewise, and what is left over numbers the d_g = p t / (p_g t_g) replicas of generation in a replica of
    training. Shards of FSDP play the part of tensor ranks, within these.
    """
    place = training.coordinates(rank)
    width, depth = training.tensor * training.shards // tensor, training.pipeline // pipeline
    column, micro_column = divmod(place.tensor * training.shards + place.shard, width)
    stage, micro_stage = divmod(place.stage, depth)
    line = place.replica * training.sequence + place.sequence
    return GenerationCoordinates((line * depth + micro_stage) * width + micro_column, stage, column)


def consecutive(rank: int, training: Mesh, tensor: int, pipeline: int) -> GenerationCoordinates:
    """The grouping of an engine by itself, and of the paper's HybridFlow-V: consecutive ranks share a model."""
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
    """Where a rank of training stands in generation.

    Args:
        rank: of training.
        training: its sizes.
        tensor: of generation, t_g.
        pipeline: of generation, p_g.
        grouping: a key of `GROUPINGS`.

    Raises:
        ValueError: sizes of generation that do not divide those of training.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"need a grouping of {', '.join(GROUPINGS)}, got {grouping!r}")
    columns = training.tensor * training.shards
    if min(tensor, pipeline) < 1:
        raise ValueError(f"need sizes from 1, got tensor={tensor} and pipeline={pipeline} for generation")
    if grouping == "zero-redundancy" and (columns % tensor or training.pipeline % pipeline):
        raise ValueError(
            f"need tensor and pipeline of generation to divide those of training, got tensor={tensor} for {training.tensor} tensor ranks x "
            f"{training.shards} shards and pipeline={pipeline} for {training.pipeline} stages; take divisors or the grouping consecutive"
        )
    if training.num_ranks % (tensor * pipeline):
        raise ValueError(
            f"need tensor * pipeline of generation to divide the {training.num_ranks} ranks, got {tensor} * {pipeline}"
        )
    return GROUPINGS[grouping](rank, training, tensor, pipeline)


def generation_groups(
    training: Mesh, *, tensor: int, pipeline: int = 1, grouping: str = "zero-redundancy"
) -> list[list[int]]:
    """Ranks of each replica of generation, by stage and tensor rank."""
    places = [
        generation_coordinates(rank, training, tensor=tensor, pipeline=pipeline, grouping=grouping)
        for rank in range(training.num_ranks)
    ]
    order = sorted(
        range(len(places)), key=lambda rank: (places[rank].replica, places[rank].stage, places[rank].tensor)
    )
    size = tensor * pipeline
    return [order[first : first + size] for first in range(0, len(order), size)]


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each stage: as many in each, the first ones one more if that does not work out.

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
