"""Settings of devices: which roles share them, how a model is sharded, and how the policy is resharded."""

from __future__ import annotations

from typing import Literal

from verl.config.fields import Choice, Section, setting


class ParallelConfig(Section):
    """How one model is spread over the devices of its pool; what the sizes leave over are data ranks (with
    FSDP2, shards of the weights).
    """

    tensor: int = setting(
        1,
        "Devices that share every matrix (tensor parallel).",
        unit="devices",
        source="Megatron-LM, 1909.08053",
        ge=1,
    )
    sequence: int = setting(
        1,
        "Devices that share every row (sequence parallel).",
        unit="devices",
        source="Ulysses, 2309.14509",
        ge=1,
    )
    pipeline: int = setting(
        1,
        "Stages of layers, one after the other; megatron.",
        unit="devices",
        source="Megatron-LM, 2104.04473",
        ge=1,
    )
    replicas: int = setting(
        1,
        "Whole copies of the sharded weights (hybrid shard).",
        unit="copies",
        source="FSDP, 2304.11277",
        ge=1,
    )
    offload: bool = setting(
        False,
        "Keep weights and optimizer in the memory of the host between their uses.",
        source="ZeRO-Offload, 2101.06840",
    )
    engine: Choice = setting(
        Choice(name="fsdp"),
        'fsdp (FSDP2), megatron (Megatron-Core), or "package.module:function", with its options.',
    )


class PlacementConfig(Section):
    """Which roles share which devices, and how each model is spread over them. `placement=NAME` is short for
    its name.
    """

    name: Literal["local", "colocated", "split", "standalone"] = setting(
        "local",
        "local: one device, everything in this process; colocated: all roles in turn on one pool; split: policy and reference on one "
        "pool, critic, teacher and reward model on another; standalone: a pool for each role.",
        source="HybridFlow, 2409.19256, 8.3",
    )
    devices: tuple[int, ...] = setting(
        (),
        "Devices of each pool, in the order policy, reference, critic, teacher, reward model; none: as many as its models need.",
        unit="devices",
    )
    policy: ParallelConfig = setting(ParallelConfig(), "How the policy is spread.")
    critic: ParallelConfig = setting(ParallelConfig(), "How the critic is spread.")
    reference: ParallelConfig = setting(
        ParallelConfig(), "How the reference, the teacher and the reward model are spread."
    )
    address: str = setting(
        "auto",
        "Ray cluster: auto joins the one that runs here or starts one; local always starts one; or HOST:PORT.",
    )
    hang_limit_s: float = setting(
        600.0,
        "Time that some ranks wait in a collective for the others before the run stops and says for whom.",
        unit="s",
        gt=0,
    )


class StrategyMapping(Section):
    """The layouts that the policy goes between."""

    rollout: Literal["tensor_parallel"] = setting("tensor_parallel", "Layout of the weights that generate.")
    training: Literal["auto", "fsdp", "megatron"] = setting(
        "auto", "Layout of the weights that train; auto: that of placement.policy.engine."
    )


class RepartitionConfig(Section):
    """How the policy goes from its training layout to its generation layout and back (3D-HybridEngine)."""

    enabled: bool = setting(
        False,
        "Generate in a layout of its own, to which only the slices travel that a rank lacks.",
        source="HybridFlow, 2409.19256, 5",
    )
    strategy_mapping: StrategyMapping = setting(StrategyMapping(), "From which layout to which.")
    tensor: int = setting(
        0,
        "Devices that share every matrix in generation; 0: as many as have different parts of it in training and divide it, within a machine.",
        unit="devices",
        source="HybridFlow, 5.3",
        ge=0,
    )
    communication_overlap: bool = setting(
        True, "The next weights travel while the last ones are put in their place."
    )


class HybridConfig(Section):
    """The 3D-HybridEngine."""

    actor_repartition: RepartitionConfig = setting(
        RepartitionConfig(), "Resharding of the policy between training and generation."
    )
