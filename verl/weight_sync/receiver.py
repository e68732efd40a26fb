"""Receiver of weights on one rank of an engine: whole tensors or shards, their digests, recorded reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.cuda_ipc import open_handle
from verl.weight_sync.fingerprint import digest
from verl.weight_sync.layout import Bounds, contains, full_bounds, shape_of
from verl.weight_sync.process_group import broadcast, open_group, receive
from verl.weight_sync.reshard_exchange import exchange
from verl.weight_sync.reshard_plan import Copy, ReshardPlan
from verl.weight_sync.shard_tracking import (
    ShardRanges,
    merge_overlapping,
    parse_bounds,
    record_reads,
    shard_key,
    sharded_proxy,
    slices_of,
)
from verl.weight_sync.shared_memory import (
    dtype_of,
    map_file,
    num_bytes_of,
    read_safetensors,
    shards_in,
    unpack,
)
from verl.weight_sync.types import TensorInfo, WeightChunk

# Transports whose bytes are in memory that this process can open.
_MAPPED = ("shm", "ipc")


class ReceivedTensor(NamedTuple):
    """A tensor of an update, once all that this rank receives of it is here.

    Attributes:
        info: of the whole tensor.
        shards: bounds and values; empty: this rank does not read the tensor.
        digest_bounds: bounds whose digests count in the fingerprint; each lies inside one shard.
    """

    info: TensorInfo
    shards: list[tuple[Bounds, Tensor]]
    digest_bounds: list[Bounds]


@dataclass
class _IncomingTensor:
    """A tensor whose parts come from several ranks of the policy, in several buckets.

    Attributes:
        info: of the whole tensor.
        ranges: bounds of the shards that the parts are put together to.
        expected: bounds of all parts that come to this rank.
        missing: bounds of the parts that have not come yet.
        shards: that have begun to come.
    """

    info: TensorInfo
    ranges: Sequence[Bounds]
    expected: list[Bounds] = field(default_factory=list)
    missing: list[Bounds] = field(default_factory=list)
    shards: list[tuple[Bounds, Tensor]] = field(default_factory=list)

    def put(self, bounds: Bounds, values: Tensor) -> None:
        """Put a part that has come into its shard."""
        self.missing.remove(bounds)
        own = next(own for own in self.ranges if contains(own, bounds))
        if own == bounds:  # the part is the shard: nothing to copy
            self.shards.append((own, values))
            return
        shard = next((shard for known, shard in self.shards if known == own), None)
        if shard is None:
            shard = values.new_empty(shape_of(own))
            self.shards.append((own, shard))
        shard[slices_of(bounds, within=own)] = values


class WeightReceiver:
    """Receives the chunks of updates that are addressed to this rank, and keeps digests of the last update.

    Args:
        device: to which tensors are moved; None: they stay where they arrive, since the model copies them.
        copies_tensors: tensors are still used after their chunk, so each gets memory of its own.

    Attributes:
        digests: of the shards delivered since `reset`, by `shard_key`.
        num_bytes: of the shards delivered since `reset`.
    """

    def __init__(self, device: torch.device | None, *, copies_tensors: bool) -> None:
        self._device, self._copies_tensors = device, copies_tensors
        self._group: Any = None
        self.reset()

    @property
    def read_ranges(self) -> ShardRanges:
        """Bounds that the model read of the tensors whose reads were recorded."""
        return {name: merge_overlapping(bounds) for name, bounds in self._reads.items()}

    def join_group(
        self, address: str, port: int, *, rank: int, num_ranks: int, backend: str, timeout_s: float
    ) -> None:
        """Join the process group over which chunks come; it replaces an earlier one."""
        self._group = None
        self._group = open_group(
            address, port, rank=rank, num_ranks=num_ranks, backend=backend, timeout_s=timeout_s
        )

    def leave_group(self) -> None:
        """Leave the process group."""
        self._group = None

    def reset(self) -> None:
        """Forget the digests and reads of earlier updates."""
        self.digests: dict[str, int] = {}
        self.num_bytes = 0
        self._reads: dict[str, list[Bounds]] = {}

    def batches(self, chunk: WeightChunk, *, records: bool) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Name and tensor of everything in a chunk, in batches as they arrive.

        A batch must be used up before the next one is taken.

        Args:
            chunk: of this rank.
            records: record what the model reads of each tensor, if the chunk has whole tensors.

        Raises:
            RuntimeError: bytes are missing, the process group failed, or there is none.
        """
        if chunk.transport == "disk":
            tensors = read_safetensors(Path(chunk.location["folder"]), device=str(self._device or "cpu"))
            yield (self._deliver(_whole(TensorInfo(name, tuple(t.shape), ""), t)) for name, t in tensors)
            return
        try:
            for batch in self.received(chunk):
                yield (self._deliver(tensor, records=records and not chunk.ranges) for tensor in batch)
        except BaseException:
            # Also if the model failed on a batch: while this rank is in the group, the senders wait for it.
            if chunk.transport not in _MAPPED:
                self.leave_group()
            raise

    def received(self, chunk: WeightChunk) -> Iterator[list[ReceivedTensor]]:
        """Tensors of a chunk that is not in a folder, each once it is complete, without digest or record.

        Raises:
            RuntimeError: as `batches`.
        """
        if chunk.transport == "direct":
            return self._exchange(chunk)
        return iter([self._receive_shards(chunk) if chunk.ranges else self._receive_whole(chunk)])

    def _deliver(self, received: ReceivedTensor, *, records: bool = False) -> tuple[str, Tensor]:
        """Name and tensor for the model; digests of its shards are kept."""
        info, shards, digest_bounds = received
        for bounds in digest_bounds:
            own, shard = next((own, shard) for own, shard in shards if contains(own, bounds))
            self.digests[shard_key(info.name, bounds, shape=info.shape)] = digest(
                shard[slices_of(bounds, within=own)]
            )
        self.num_bytes += sum(shard.nbytes for _, shard in shards)
        if [bounds for bounds, _ in shards] != [full_bounds(info.shape)]:
            like = shards[0][1] if shards else torch.empty(0, dtype=dtype_of(info), device=self._device)
            return info.name, sharded_proxy(info.name, info.shape, shards, like=like)
        ((_, tensor),) = shards
        if not records:
            return info.name, tensor
        return info.name, record_reads(info.name, tensor, self._reads.setdefault(info.name, []))

    def _receive_whole(self, chunk: WeightChunk) -> list[ReceivedTensor]:
        """Whole tensors, from memory of this machine or broadcast by rank 0 of the group."""
        if chunk.transport in _MAPPED:
            content = self._to_engine(_map(chunk))
        else:
            content = torch.empty(
                num_bytes_of(chunk.tensors), dtype=torch.uint8, device=self._device_of_group()
            )
            broadcast(self._group, content)
            content = self._to_engine(content, is_ours=True)
        return [_whole(info, tensor) for info, tensor in unpack(content, chunk.tensors)]

    def _receive_shards(self, chunk: WeightChunk) -> list[ReceivedTensor]:
        """Shards that this rank reads, from memory of this machine or sent by rank 0 of the group."""
        shards = shards_in(chunk.tensors, chunk.ranges[0])
        if chunk.transport in _MAPPED:
            mapped = {info.name: tensor for info, tensor in unpack(_map(chunk), chunk.tensors)}
            tensors = [self._to_engine(mapped[shard.name][slices_of(bounds)]) for shard, bounds in shards]
        else:
            infos = [shard for shard, _ in shards]
            content = torch.empty(num_bytes_of(infos), dtype=torch.uint8, device=self._device_of_group())
            receive(self._group, content, sender=0)
            tensors = [self._to_engine(tensor, is_ours=True) for _, tensor in unpack(content, infos)]
        by_name: dict[str, list[tuple[Bounds, Tensor]]] = {info.name: [] for info in chunk.tensors}
        for (shard, bounds), tensor in zip(shards, tensors, strict=True):
            by_name[shard.name].append((bounds, tensor))
        return [
            ReceivedTensor(info, by_name[info.name], [bounds for bounds, _ in by_name[info.name]])
            for info in chunk.tensors
        ]

    def _exchange(self, chunk: WeightChunk) -> Iterator[list[ReceivedTensor]]:
        """Tensors that the ranks of the policy send, each as soon as all of its parts have come."""
        ranges: ShardRanges = (
            chunk.ranges[0]
            if chunk.ranges
            else {info.name: [full_bounds(info.shape)] for info in chunk.tensors}
        )
        device, rank = self._device_of_group(), self._group.rank()
        buckets = [
            [
                Copy(name, parse_bounds(bounds), sender, "", (), rank, "", ())
                for name, bounds, sender in bucket
            ]
            for bucket in chunk.location["copies"][0]
        ]
        incoming = {info.name: _IncomingTensor(info, ranges[info.name]) for info in chunk.tensors}
        for copy in (copy for bucket in buckets for copy in bucket):
            incoming[copy.name].expected.append(copy.bounds)
            incoming[copy.name].missing.append(copy.bounds)
        dtype = dtype_of(chunk.tensors[0])
        plan = ReshardPlan(self._group.size(), dtype.itemsize, (), tuple(map(tuple, buckets)), rank)
        stream = exchange(plan, rank, self._group, read=_send_nothing, dtype=dtype, device=device)
        yield [ReceivedTensor(tensor.info, [], []) for tensor in incoming.values() if not tensor.expected]
        for bucket in buckets:
            for copy, values in islice(stream, len(bucket)):
                incoming[copy.name].put(copy.bounds, values)
            names = [
                name for name in dict.fromkeys(copy.name for copy in bucket) if not incoming[name].missing
            ]
            # Popped: a tensor's memory is free again as soon as the caller has used it.
            complete = (incoming.pop(name) for name in names)
            yield [
                ReceivedTensor(
                    tensor.info,
                    [(bounds, self._to_engine(shard, is_ours=True)) for bounds, shard in tensor.shards],
                    tensor.expected,
                )
                for tensor in complete
            ]
        for _ in stream:
            raise AssertionError("more came than was expected")

    def _to_engine(self, tensor: Tensor, *, is_ours: bool = False) -> Tensor:
        """Tensor on the engine's device, copied if the engine keeps it and its memory `is_ours` not."""
        device = self._device or tensor.device
        return tensor.to(device, copy=self._copies_tensors and not is_ours)

    def _device_of_group(self) -> torch.device:
        """Device of the tensors that the process group moves.

        Raises:
            RuntimeError: this rank has not joined a group.
        """
        if self._group is None:
            raise RuntimeError("weights were sent over a process group that this engine has not joined")
        on_gpu = dist.is_nccl_available() and isinstance(self._group, dist.ProcessGroupNCCL)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _whole(info: TensorInfo, tensor: Tensor) -> ReceivedTensor:
    return ReceivedTensor(info, [(full_bounds(info.shape), tensor)], [full_bounds(info.shape)])


def _map(chunk: WeightChunk) -> Tensor:
    """Bytes of a chunk in place, [n] uint8: in the policy's GPU memory, or in shared memory."""
    if chunk.transport == "ipc":
        return open_handle(chunk.location)
    return map_file(Path(chunk.location["path"]), num_bytes_of(chunk.tensors))


def _send_nothing(copy: Copy) -> Tensor:
    raise AssertionError(f"an engine sends nothing, not even {copy.name}")
