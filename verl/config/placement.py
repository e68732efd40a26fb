"""Settings of devices: roles and their pools, how a model is sharded, and how the policy is resharded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from verl.config.fields import Choice, Section, setting


class ParallelConfig(Section):
    """Division of one model over the devices of its pool.

    Devices that these sizes do not use are data parallel ranks; with FSDP2 they also shard the weights.
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
        "Stages of consecutive layers (pipeline parallel); megatron only.",
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
        "Keep weights and optimizer in host memory while they are not used.",
        source="ZeRO-Offload, 2101.06840",
    )
    engine: Choice = setting(
        Choice(name="fsdp"),
        'fsdp (FSDP2), megatron (Megatron-Core), or "package.module:function", with its options.',
    )


class PlacementConfig(Section):
    """The devices of each role. `placement=NAME` is short for `placement.name=NAME`."""

    name: Literal["local", "colocated", "split", "standalone"] = setting(
        "local",
        "local: one device, everything in this process; colocated: all roles take turns on one pool; "
        "split: policy and reference on one pool, critic, teacher and reward model on another; "
        "standalone: a pool for each role.",
        source="HybridFlow, 2409.19256, 8.3",
    )
    devices: tuple[int, ...] = setting(
        (),
        "Devices of each pool, in the order policy, reference, critic, teacher, reward model; "
        "none: as many as its models need.",
        unit="devices",
    )
    policy: ParallelConfig = setting(ParallelConfig(), "How the policy is divided.")
    critic: ParallelConfig = setting(ParallelConfig(), "How the critic is divided.")
    reference: ParallelConfig = setting(
        ParallelConfig(), "How the reference, the teacher and the reward model are divided."
    )
    address: str = setting(
        "auto",
        "Ray cluster. auto: join the one of this machine, or start one; local: always start one; "
        "or HOST:PORT.",
    )
    hang_limit_s: float = setting(
        600.0,
        "Time that some ranks wait in a collective for the others before the run stops and names those.",
        unit="s",
        gt=0,
    )


class StrategyMapping(Section):
    """The layouts that the policy is resharded between; for generation it is always tensor parallel."""

    training: Literal["auto", "fsdp", "megatron"] = setting(
        "auto", "Layout of the weights in training; auto: that of placement.policy.engine."
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_rollout(cls, value: Any) -> Any:
        """A file may also name the layout of generation, although there is only one."""
        if not isinstance(value, dict) or "rollout" not in value:
            return value
        if value["rollout"] != "tensor_parallel":
            raise ValueError(f"need rollout: tensor_parallel, got {value['rollout']}; leave rollout out")
        return {key: layout for key, layout in value.items() if key != "rollout"}


class RepartitionConfig(Section):
    """Resharding of the policy between training and generation (3D-HybridEngine)."""

    enabled: bool = setting(
        False,
        "Generate in a layout of its own; a rank receives only the slices that it does not hold.",
        source="HybridFlow, 2409.19256, 5",
    )
    strategy_mapping: StrategyMapping = setting(StrategyMapping(), "The two layouts.")
    tensor: int = setting(
        0,
        "Devices that share every matrix in generation; 0: as many as hold different parts of it in training "
        "and divide it, within a machine.",
        unit="devices",
        source="HybridFlow, 5.3",
        ge=0,
    )
    communication_overlap: bool = setting(
        True, "Receive the next weights while the last ones are copied to their place."
    )


class HybridConfig(Section):
    """The 3D-HybridEngine."""

    actor_repartition: RepartitionConfig = setting(
        RepartitionConfig(), "Resharding of the policy between training and generation."
    )
