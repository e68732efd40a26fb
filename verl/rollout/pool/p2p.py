"""Weights from the ranks of the policy straight to those of an engine: each sends what it has of what they
read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from verl.controller.dispatch import ONE_TO_ALL, SAME_ON_ALL, register
from verl.controller.worker_group import WorkerGroup
from verl.engines.roles.base import RoleWorker
from verl.rollout.engine import EngineError, InferenceServer
from verl.rollout.pool.broadcast import address_towards, both, free_port_at
from verl.weight_sync.fingerprint import digest
from verl.weight_sync.layout import ShardLayout, TensorShard, full_bounds, local_slices, shape_of
from verl.weight_sync.process_group import open_group, shared_memory_id
from verl.weight_sync.reshard_exchange import exchange
from verl.weight_sync.reshard_plan import Copy, ReshardPlan, make_plan
from verl.weight_sync.shard_tracking import ShardRanges, shard_key
from verl.weight_sync.shared_memory import dtype_of
from verl.weight_sync.types import TensorInfo, WeightChunk

# Of an address that is in no network, to find the way out of this machine; nothing is sent there. RFC 5737.
_ELSEWHERE = "http://192.0.2.1"
# What a rank of the policy sent: digests by rank of the engine and by `shard_key`; and why it failed, if it did.
Sent = tuple[dict[int, dict[str, int]], str]


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a policy and of one engine meet; those of the policy are the first."""

    address: str
    port: int
    num_senders: int
    num_ranks: int
    timeout_s: float


@dataclass
class Plans:
    """How parts travel from the policy to engines that read them in one way; made once for each.

    Args:
        pieces: of each rank of the policy.
        rank: whose copies are wanted; None: all.
    """

    pieces: Sequence[Sequence[TensorShard]]
    rank: int | None = None
    _made: dict[str, tuple[tuple[TensorInfo, ...], tuple[ShardRanges, ...], ReshardPlan]] = field(
        default_factory=dict, init=False
    )

    def of(self, infos: tuple[TensorInfo, ...], reads: tuple[ShardRanges, ...]) -> ReshardPlan:
        """For a part, of which each rank of an engine reads something."""
        first = infos[0].name
        made = self._made.get(first)
        if made is None or made[:2] != (infos, reads):
            made = self._made[first] = infos, reads, self._make(infos, reads)
        return made[2]

    def _make(self, infos: tuple[TensorInfo, ...], reads: tuple[ShardRanges, ...]) -> ReshardPlan:
        shapes = {info.name: info.shape for info in infos}
        held = tuple(tuple(piece for piece in own if piece.name in shapes) for own in self.pieces)
        wanted = tuple(
            tuple(
                TensorShard(name, bounds, name, (0,) * len(bounds)) for name in shapes for bounds in own[name]
            )
            for own in reads
        )
        source = ShardLayout(shapes, (*held, *(() for _ in wanted)))
        target = ShardLayout(shapes, (*(() for _ in held), *wanted))
        # Which of them are near each other is not known.
        return make_plan(
            source,
            target,
            itemsize=dtype_of(infos[0]).itemsize,
            ranks_per_node=source.num_ranks,
            rank=self.rank,
        )


@dataclass
class _Link:
    """A group with the ranks of an engine."""

    group: Any
    num_senders: int


class PolicyWeightSender(RoleWorker):
    """A rank of the policy that sends its weights to engines. What goes wrong on the way is told, and ends no
    rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._links: dict[str, _Link] = {}
        self._plans: Plans | None = None

    @register(ONE_TO_ALL)
    def held_pieces(self) -> tuple[list[TensorShard], str]:
        """What of the weights lies on this rank; and which processes see the same shared memory."""
        return self.engine.pieces(), shared_memory_id()

    @register(SAME_ON_ALL)
    def meeting_place(self, url: str | None) -> tuple[str, int]:
        """Where the first rank can be met by an engine at an address; none: by one on this machine."""
        address = address_towards(url)
        return address, free_port_at(address)

    @register(ONE_TO_ALL)
    def join_engine(self, name: str, meeting: Meeting, pieces: Sequence[Sequence[TensorShard]]) -> str:
        """Joins the group with an engine, in place of one before; why that failed, if it did.

        Args:
            name: of the engine.
            meeting: where.
            pieces: of all ranks of the policy.
        """
        self._links.pop(name, None)
        rank = self._rank
        if self._plans is None or self._plans.pieces != pieces:
            self._plans = Plans(pieces, rank)
        place = {"num_ranks": meeting.num_ranks, "timeout_s": meeting.timeout_s}
        try:
            group = open_group(meeting.address, meeting.port, rank=rank, backend="gloo", **place)  # type: ignore[arg-type]
        except (RuntimeError, OSError) as error:
            return f"rank {rank} of the policy: {error}"
        self._links[name] = _Link(group, meeting.num_senders)
        return ""

    @register(ONE_TO_ALL)
    def send_weights(self, name: str, infos: tuple[TensorInfo, ...], reads: tuple[ShardRanges, ...]) -> Sent:
        """Sends what this rank has of some tensors to those ranks of an engine that read it, which receive it
        meanwhile.
        """
        link, homes, dtype = self._links.get(name), self.engine.homes(), dtype_of(infos[0])
        if link is None or self._plans is None:
            return {}, "no group with the engine"
        digests: dict[int, dict[str, int]] = {}
        shapes = {info.name: info.shape for info in infos}

        def read(copy: Copy) -> Tensor:
            home = homes[copy.sender_tensor]
            values = (
                home[local_slices(copy.bounds, copy.sender_offset)].reshape(shape_of(copy.bounds)).to(dtype)
            )
            own = digests.setdefault(copy.receiver - link.num_senders, {})
            own[shard_key(copy.name, copy.bounds, shape=shapes[copy.name])] = digest(values)
            return values

        try:
            plan = self._plans.of(infos, reads)
            for copy, _ in exchange(
                plan, self._rank, link.group, read=read, dtype=dtype, device=torch.device("cpu")
            ):
                raise AssertionError(f"engines send nothing, not even {copy.name}")
        except RuntimeError as error:
            del self._links[name]
            return {}, f"rank {self._rank} of the policy: {error}"
        return digests, ""

    @register(ONE_TO_ALL)
    def leave_engine(self, name: str) -> None:
        """Leaves the group with an engine, whatever state it is in."""
        self._links.pop(name, None)

    @property
    def _rank(self) -> int:
        return self.dispatch_ranks["ranks"].data_rank


class P2PSender:
    """Lets the ranks of a policy send to engines, one engine at a time; used while nobody else calls the
    policy.

    Args:
        policy: its ranks, each a `PolicyWeightSender`.
    """

    def __init__(self, policy: WorkerGroup) -> None:
        self._policy = policy
        self._turn = asyncio.Lock()
        self._plans: Plans | None = None
        self._is_here = False
        self._joined: dict[str, object] = {}

    async def send(self, part: WeightChunk, engine: InferenceServer, life: object) -> list[dict[str, int]]:
        """Sends a part while the engine loads it.

        Args:
            part: with what each rank of the engine reads; nothing is said of any: all of it.
            engine: that waits for it.
            life: another one than before means that the engine has begun anew and is met again.

        Returns:
            For each rank of the engine the digests of what it was sent, by `shard_key`.

        Raises:
            EngineError: it did not get there. The group is given up, and the next part begins with another
                one.
        """
        async with self._turn:
            name = engine.spec.name
            try:
                if self._joined.get(name) is not life:
                    await self._join(engine)
                    self._joined[name] = life
                return await self._sent(part, engine)
            except BaseException:
                self._joined.pop(name, None)
                await self._call(PolicyWeightSender.leave_engine, name)
                raise

    async def _join(self, engine: InferenceServer) -> None:
        name, limit_s = engine.spec.name, engine.spec.timeout_s
        plans = await self._all_plans()
        is_near = engine.spec.address is None and self._is_here
        url = None if is_near else engine.spec.address or f"http://{address_towards(_ELSEWHERE)}"
        address, port = await self._call(PolicyWeightSender.meeting_place, url)
        num_senders = len(plans.pieces)
        meeting = Meeting(address, port, num_senders, num_senders + engine.num_ranks, limit_s)
        joined = engine.join_group(
            address=address, port=port, first_rank=num_senders, num_ranks=meeting.num_ranks, backend="gloo"
        )
        causes, _ = await both(
            self._call(PolicyWeightSender.join_engine, name, meeting, plans.pieces),
            joined,
            f"engine {name} did not join the policy for weights",
        )
        _check(causes, f"engine {name} did not join the policy for weights")

    async def _sent(self, part: WeightChunk, engine: InferenceServer) -> list[dict[str, int]]:
        plans, name = await self._all_plans(), engine.spec.name
        everything = {info.name: (full_bounds(info.shape),) for info in part.tensors}
        names = everything.keys()
        reads = (
            tuple({key: tuple(own[key]) for key in names} for own in part.ranges)
            or (everything,) * engine.num_ranks
        )
        plan, first = plans.of(part.tensors, reads), len(plans.pieces)
        ranks = range(first, first + engine.num_ranks)
        copies = [
            [[(c.name, c.bounds, c.sender) for c in bucket if c.receiver == rank] for bucket in plan.buckets]
            for rank in ranks
        ]
        sending = self._call(PolicyWeightSender.send_weights, name, part.tensors, reads)
        loading = engine.load(WeightChunk(part.tensors, "direct", {"copies": copies}, part.ranges))
        sent, _ = await both(sending, loading, f"weights did not reach engine {name}")
        _check([cause for _, cause in sent], f"weights did not reach engine {name}")
        digests: list[dict[str, int]] = [{} for _ in ranks]
        for own, _ in sent:
            for rank, found in own.items():
                digests[rank] |= found
        return digests

    async def _all_plans(self) -> Plans:
        if self._plans is None:
            held = await self._call(PolicyWeightSender.held_pieces)
            self._plans = Plans([pieces for pieces, _ in held])
            self._is_here = {machine for _, machine in held} == {shared_memory_id()}
        return self._plans

    async def _call(self, method: Any, *args: Any) -> Any:
        """Of all ranks, beside the loop of the engines."""
        return await asyncio.to_thread(lambda: self._policy.call(method, *args).result())


def _check(causes: Sequence[str], what: str) -> None:
    if found := [cause for cause in causes if cause]:
        raise EngineError(f"{what}: {found[0]}")
