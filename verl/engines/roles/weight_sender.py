"""The policy's ranks as senders of weights to inference engines: into shared memory, or from rank to rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.controller.dispatch import ONE_TO_ALL, SAME_ON_ALL, register
from verl.engines.hf.weights import is_plain_lora, lora_adapter_files, unties_embeddings
from verl.engines.roles.role_worker import RoleWorker
from verl.utils.device import synchronize
from verl.utils.network import address_towards, free_port
from verl.weight_sync.cuda_ipc import export_handle
from verl.weight_sync.fingerprint import digest
from verl.weight_sync.layout import Bounds, ShardLayout, TensorShard, full_bounds, local_slices, shape_of
from verl.weight_sync.process_group import open_group, shared_memory_id
from verl.weight_sync.reshard_exchange import exchange
from verl.weight_sync.reshard_plan import Copy, ReshardPlan, make_plan
from verl.weight_sync.shard_tracking import ShardRanges, shard_key, slices_of
from verl.weight_sync.shared_memory import dtype_of, map_file, num_bytes_of, unpack
from verl.weight_sync.types import TensorInfo

# Result of a P2P send on one policy rank: digests of what it sent, by engine rank and by `shard_key`; and the
# error message if the send failed, else "".
SendResult = tuple[dict[int, dict[str, int]], str]


@dataclass(frozen=True)
class Rendezvous:
    """A process group of policy ranks and the ranks of one engine; the policy ranks come first.

    Attributes:
        address: of rank 0, which listens.
        port: of rank 0.
        num_senders: policy ranks.
        num_ranks: policy and engine ranks.
        timeout_s: of joining, and of each transfer.
    """

    address: str
    port: int
    num_senders: int
    num_ranks: int
    timeout_s: float


@dataclass
class TransferPlans:
    """Copies from policy ranks to engine ranks for each weight chunk, planned once and reused.

    Args:
        shards: of each policy rank.
        rank: plan only the copies of this rank; None: all copies.
    """

    shards: Sequence[Sequence[TensorShard]]
    rank: int | None = None
    # By the first tensor of a chunk: the tensors and ranges that the plan was made for, and the plan.
    _plans: dict[str, tuple[tuple[TensorInfo, ...], tuple[ShardRanges, ...], ReshardPlan]] = field(
        default_factory=dict, init=False
    )

    def plan(self, infos: tuple[TensorInfo, ...], ranges: tuple[ShardRanges, ...]) -> ReshardPlan:
        """Copies of one chunk.

        Args:
            infos: tensors of the chunk.
            ranges: parts of these tensors that each engine rank loads.
        """
        cached = self._plans.get(infos[0].name)
        if cached is not None and cached[:2] == (infos, ranges):
            return cached[2]
        shapes = {info.name: info.shape for info in infos}
        held = tuple(tuple(shard for shard in own if shard.name in shapes) for own in self.shards)
        wanted = tuple(
            tuple(
                TensorShard(name, bounds, name, (0,) * len(bounds)) for name in shapes for bounds in own[name]
            )
            for own in ranges
        )
        # One group of ranks: the policy's hold everything and want nothing, the engine's the other way round.
        source = ShardLayout(shapes, (*held, *(() for _ in wanted)))
        target = ShardLayout(shapes, (*(() for _ in held), *wanted))
        plan = make_plan(
            source,
            target,
            itemsize=dtype_of(infos[0]).itemsize,
            # It is unknown which ranks share a node, so all count as one node.
            ranks_per_node=source.num_ranks,
            rank=self.rank,
        )
        self._plans[infos[0].name] = infos, ranges, plan
        return plan


class PolicyWeightSender(RoleWorker):
    """A policy rank that hands its weights to inference engines.

    P2P methods return error messages instead of raising, so that a failing engine does not end the policy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Memory of this GPU that engines read, until `free_shared_weights`.
        self._shared: list[Tensor] = []
        # By the name of an engine: the process group with its ranks, and the number of policy ranks in it.
        self._groups: dict[str, tuple[Any, int]] = {}
        self._plans: TransferPlans | None = None

    @register(SAME_ON_ALL)
    def trains_lora_only(self) -> bool:
        """True if a LoRA adapter is trained that servers can load alone; else they get merged weights."""
        return is_plain_lora(self.engine.model.transformer)

    @register(SAME_ON_ALL)
    def unties_embeddings(self) -> bool:
        """True if an adapter changes one of two embeddings that the model's files hold as one."""
        return unties_embeddings(self.engine.model.transformer)

    @register(SAME_ON_ALL)
    def lora_adapter(self) -> dict[str, bytes]:
        """Files of the LoRA adapter in PEFT format, by name."""
        return lora_adapter_files(self.engine.model.transformer)

    @register(SAME_ON_ALL)
    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor of the policy, as in a Hugging Face folder."""
        return list(self.engine.shapes().items())

    @register(SAME_ON_ALL)
    def write_weights(
        self, infos: Sequence[TensorInfo], path: str, shards: Mapping[str, Sequence[Bounds]]
    ) -> tuple[dict[str, int], Tensor | None]:
        """Write tensors of the policy end to end into a mapped file; all ranks gather, the first one writes.

        Args:
            infos: tensors to write, in order.
            path: of the file, which exists with the right size, unless it is on another machine.
            shards: parts of each tensor whose digests are wanted beside that of the whole tensor.

        Returns:
            The digests by `shard_key`, taken before the write; and the bytes, if the file is elsewhere.
        """
        if self._rank != 0:
            return self._gather_into(None, infos, shards), None
        num_bytes, file = num_bytes_of(infos), Path(path)
        if file.exists():
            return self._gather_into(map_file(file, num_bytes, for_writing=True), infos, shards), None
        content = torch.empty(num_bytes, dtype=torch.uint8)
        return self._gather_into(content, infos, shards), content

    @register(SAME_ON_ALL)
    def share_weights(
        self, infos: Sequence[TensorInfo], shards: Mapping[str, Sequence[Bounds]]
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Write tensors into GPU memory of the first rank, kept until `free_shared_weights`.

        Takes the same arguments as `write_weights`.

        Returns:
            The digests by `shard_key`, and the CUDA IPC handle of the memory.

        Raises:
            ValueError: the policy is not on a GPU.
        """
        device = self.engine.model.device
        if device.type != "cuda":
            raise ValueError(
                f"need the policy on a GPU for rollout.weights_via=ipc, it is on {device}; take auto"
            )
        if self._rank != 0:
            return self._gather_into(None, infos, shards), {}
        target = torch.empty(num_bytes_of(infos), dtype=torch.uint8, device=device)
        digests = self._gather_into(target, infos, shards)
        self._shared.append(target)
        synchronize(device)
        return digests, export_handle(target)

    @register(SAME_ON_ALL)
    def free_shared_weights(self) -> None:
        """Free the memory of `share_weights` as soon as no engine reads it."""
        self._shared.clear()

    @register(ONE_TO_ALL)
    def held_shards(self) -> tuple[list[TensorShard], str]:
        """Shards of this rank, and the identity of the shared memory that this process sees."""
        return self.engine.local_shards(), shared_memory_id()

    @register(SAME_ON_ALL)
    def rendezvous_address(self, url: str | None) -> tuple[str, int]:
        """Address and free port of the first rank, for an engine at a URL; None: on this machine."""
        address = address_towards(url)
        return address, free_port(address)

    @register(ONE_TO_ALL)
    def join_engine(self, name: str, rendezvous: Rendezvous, shards: Sequence[Sequence[TensorShard]]) -> str:
        """Join a process group with an engine, in place of an earlier one; return the error message, or "".

        Args:
            name: of the engine.
            rendezvous: the group.
            shards: of all policy ranks.
        """
        self._groups.pop(name, None)
        if self._plans is None or self._plans.shards != shards:
            self._plans = TransferPlans(shards, self._rank)
        try:
            group = open_group(
                rendezvous.address,
                rendezvous.port,
                rank=self._rank,
                num_ranks=rendezvous.num_ranks,
                backend="gloo",
                timeout_s=rendezvous.timeout_s,
            )
        except (RuntimeError, OSError) as error:
            return f"rank {self._rank} of the policy: {error}"
        self._groups[name] = group, rendezvous.num_senders
        return ""

    @register(ONE_TO_ALL)
    def send_weights(
        self, name: str, infos: tuple[TensorInfo, ...], ranges: tuple[ShardRanges, ...]
    ) -> SendResult:
        """Send this rank's shards of some tensors to the ranks of an engine, which receive at the same time.

        Args:
            name: of the engine.
            infos: tensors to send.
            ranges: parts of these tensors that each engine rank loads.
        """
        if name not in self._groups or self._plans is None:
            return {}, "no group with the engine"
        group, num_senders = self._groups[name]
        tensors, dtype = self.engine.local_tensors(), dtype_of(infos[0])
        shapes = {info.name: info.shape for info in infos}
        digests: dict[int, dict[str, int]] = {}

        def read(copy: Copy) -> Tensor:
            values = tensors[copy.sender_tensor][local_slices(copy.bounds, copy.sender_offset)]
            values = values.reshape(shape_of(copy.bounds)).to(dtype)
            own = digests.setdefault(copy.receiver - num_senders, {})
            own[shard_key(copy.name, copy.bounds, shape=shapes[copy.name])] = digest(values)
            return values

        device = torch.device("cpu")
        try:
            plan = self._plans.plan(infos, ranges)
            for copy, _ in exchange(plan, self._rank, group, read=read, dtype=dtype, device=device):
                raise AssertionError(f"engines send nothing, not even {copy.name}")
        except RuntimeError as error:
            # A transfer that failed leaves the group in an unknown state.
            del self._groups[name]
            return {}, f"rank {self._rank} of the policy: {error}"
        return digests, ""

    @register(ONE_TO_ALL)
    def leave_engine(self, name: str) -> None:
        """Leave the process group with an engine, whatever state it is in."""
        self._groups.pop(name, None)

    @property
    def _rank(self) -> int:
        return self.dispatch_ranks["ranks"].data_rank

    def _gather_into(
        self, target: Tensor | None, infos: Sequence[TensorInfo], shards: Mapping[str, Sequence[Bounds]]
    ) -> dict[str, int]:
        """Gather full tensors on all ranks; a rank with a target fills it and returns the digests."""
        wanted = {info.name: info for info in infos}
        digests: dict[str, int] = {}
        slots = {info.name: place for info, place in unpack(target, infos)} if target is not None else {}
        for name, tensor in self.engine.full_tensors(wanted):
            if target is None:
                continue
            served, shape = tensor.to(dtype_of(wanted[name])), wanted[name].shape
            for bounds in {full_bounds(shape), *shards[name]}:
                digests[shard_key(name, bounds, shape=shape)] = digest(served[slices_of(bounds)])
            slots[name].copy_(served)
        return digests
