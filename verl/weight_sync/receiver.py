"""Weights as they come to one rank of an engine: whole tensors, or the parts that it reads; what it was
handed, and what it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.cuda_ipc import open_handle
from verl.weight_sync.fingerprint import digest
from verl.weight_sync.layout import Bounds, full_bounds, shape_of
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

# Ways in which the bytes are where this process sees them.
_MAPPED = ("shm", "ipc")
# A tensor in the parts of it that have come, and the bounds by which it counts in the fingerprint.
Arrived = tuple[TensorInfo, list[tuple[Bounds, Tensor]], list[Bounds]]


class WeightReceiver:
    """Receives parts, as they were cut out for this rank, and notes of each update what it was.

    Args:
        device: where tensors are handed on; None: where they come, as the model copies them itself to where
            it wants them.
        copies_tensors: tensors are used after a part was taken, so they must be in memory of their own.

    Attributes:
        digests: of what was handed on since `reset`, by `shard_key`.
        num_bytes: of it, without what a folder has.
    """

    def __init__(self, device: torch.device | None, *, copies_tensors: bool) -> None:
        self._device, self._keeps = device, copies_tensors
        self._group: Any = None
        self.reset()

    @property
    def read_ranges(self) -> ShardRanges:
        """What was read of the tensors that were handed on to be recorded."""
        return {name: merge_overlapping(bounds) for name, bounds in self._reads.items()}

    def join_group(
        self, address: str, port: int, *, rank: int, num_ranks: int, backend: str, timeout_s: float
    ) -> None:
        """Joins the group over which parts come, in place of one before."""
        self._group = None
        self._group = open_group(
            address, port, rank=rank, num_ranks=num_ranks, backend=backend, timeout_s=timeout_s
        )

    def leave_group(self) -> None:
        """Leaves it."""
        self._group = None

    def reset(self) -> None:
        """Forgets what came before."""
        self.digests: dict[str, int] = {}
        self.num_bytes = 0
        self._reads: dict[str, list[Bounds]] = {}

    def batches(self, part: WeightChunk, *, records: bool) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Name and tensor of all of a part, to be handed on as they come: each batch is used before the next
        one is taken.

        Args:
            part: of this rank.
            records: what is read of them is noted, if they are whole.

        Raises:
            RuntimeError: bytes are missing, the group failed, or there is none.
        """
        if part.transport == "disk":
            tensors = read_safetensors(Path(part.location["folder"]), device=str(self._device or "cpu"))
            arrived = (
                (
                    TensorInfo(name, tuple(t.shape), ""),
                    [(full_bounds(tuple(t.shape)), t)],
                    [full_bounds(tuple(t.shape))],
                )
                for name, t in tensors
            )
            yield (self._handed(*one, records=False) for one in arrived)
            return
        try:
            for batch in self.received(part):
                yield (self._handed(*one, records=records and not part.ranges) for one in batch)
        except BaseException:
            # Also when the model did not take a batch: those who send would wait for us.
            if part.transport not in _MAPPED:
                self.leave_group()
            raise

    def received(self, part: WeightChunk) -> Iterator[list[Arrived]]:
        """What comes of a part that is not in a folder, each tensor once it is complete, noted nowhere.

        Raises:
            RuntimeError: see `batches`.
        """
        return self._exchanged(part) if part.transport == "direct" else iter([self._parts(part)])

    def _handed(
        self, info: TensorInfo, parts: list[tuple[Bounds, Tensor]], marks: list[Bounds], *, records: bool
    ) -> tuple[str, Tensor]:
        for bounds in marks:
            own, part = next((own, part) for own, part in parts if _holds(own, bounds))
            self.digests[shard_key(info.name, bounds, shape=info.shape)] = digest(
                part[slices_of(bounds, within=own)]
            )
        self.num_bytes += sum(part.nbytes for _, part in parts)
        if [bounds for bounds, _ in parts] != [full_bounds(info.shape)]:
            like = parts[0][1] if parts else torch.empty(0, dtype=dtype_of(info), device=self._device)
            return info.name, sharded_proxy(info.name, info.shape, parts, like=like)
        ((_, tensor),) = parts
        return info.name, record_reads(
            info.name, tensor, self._reads.setdefault(info.name, [])
        ) if records else tensor

    def _parts(self, part: WeightChunk) -> list[Arrived]:
        """Of bytes in shared memory, or from rank 0 of the group."""
        infos = part.tensors
        if not part.ranges:
            content = self._whole_content(part)
            return [
                (info, [(full_bounds(info.shape), tensor)], [full_bounds(info.shape)])
                for info, tensor in unpack(content, infos)
            ]
        pieces = shards_in(infos, part.ranges[0])
        if part.transport in _MAPPED:
            mapped = {info.name: tensor for info, tensor in unpack(_mapped(part), infos)}
            tensors = [self._own(mapped[piece.name][slices_of(bounds)]) for piece, bounds in pieces]
        else:
            content = torch.empty(
                num_bytes_of([piece for piece, _ in pieces]), dtype=torch.uint8, device=self._joined()
            )
            receive(self._group, content, sender=0)
            tensors = [
                self._own(tensor, is_ours=True)
                for _, tensor in unpack(content, [piece for piece, _ in pieces])
            ]
        came: dict[str, list[tuple[Bounds, Tensor]]] = {info.name: [] for info in infos}
        for (piece, bounds), tensor in zip(pieces, tensors, strict=True):
            came[piece.name].append((bounds, tensor))
        return [(info, came[info.name], [bounds for bounds, _ in came[info.name]]) for info in infos]

    def _whole_content(self, part: WeightChunk) -> Tensor:
        if part.transport in _MAPPED:
            return self._own(_mapped(part))
        content = torch.empty(num_bytes_of(part.tensors), dtype=torch.uint8, device=self._joined())
        broadcast(self._group, content)
        return self._own(content, is_ours=True)

    def _exchanged(self, part: WeightChunk) -> Iterator[list[Arrived]]:
        """Tensors that the ranks of the policy send, each as soon as all of it has come."""
        infos = {info.name: info for info in part.tensors}
        reads = (
            part.ranges[0]
            if part.ranges
            else {name: [full_bounds(info.shape)] for name, info in infos.items()}
        )
        device, rank = self._joined(), self._group.rank()
        buckets = [[_copy(*copy, receiver=rank) for copy in bucket] for bucket in part.location["copies"][0]]
        left: dict[str, list[Bounds]] = {name: [] for name in infos}
        for copy in (copy for bucket in buckets for copy in bucket):
            left[copy.name].append(copy.bounds)
        came: dict[str, list[tuple[Bounds, Tensor]]] = {name: [] for name in infos}
        marks = {name: list(bounds) for name, bounds in left.items()}
        dtype = dtype_of(part.tensors[0])
        plan = ReshardPlan(self._group.size(), dtype.itemsize, (), tuple(map(tuple, buckets)), rank)
        stream = exchange(plan, rank, self._group, read=_nothing, dtype=dtype, device=device)
        yield [(infos[name], [], []) for name in infos if not left[name]]
        for bucket in buckets:
            for copy, values in islice(stream, len(bucket)):
                _put(came[copy.name], reads[copy.name], copy.bounds, values)
                left[copy.name].remove(copy.bounds)
            names = [name for name in dict.fromkeys(copy.name for copy in bucket) if not left[name]]
            yield [
                (
                    infos[name],
                    [(bounds, self._own(t, is_ours=True)) for bounds, t in came.pop(name)],
                    marks[name],
                )
                for name in names
            ]
        for _ in stream:
            raise AssertionError("more came than was expected")

    def _own(self, tensor: Tensor, *, is_ours: bool = False) -> Tensor:
        """A tensor where the engine wants it, in memory of our own if that is needed."""
        device = self._device or tensor.device
        return tensor.to(device, copy=self._keeps and not is_ours)

    def _joined(self) -> torch.device:
        """Where the group moves tensors.

        Raises:
            RuntimeError: there is none.
        """
        if self._group is None:
            raise RuntimeError("weights were sent over a process group that this engine has not joined")
        on_gpu = dist.is_nccl_available() and isinstance(self._group, dist.ProcessGroupNCCL)
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _mapped(part: WeightChunk) -> Tensor:
    """[n] uint8, the bytes of a part where the policy has them, in memory of this machine or of a GPU."""
    return (
        open_handle(part.location)
        if part.transport == "ipc"
        else map_file(Path(part.location["path"]), num_bytes_of(part.tensors))
    )


def _holds(own: Bounds, bounds: Bounds) -> bool:
    return all(
        first <= start and stop <= last for (first, last), (start, stop) in zip(own, bounds, strict=True)
    )


def _put(parts: list[tuple[Bounds, Tensor]], reads: Any, bounds: Bounds, values: Tensor) -> None:
    """Puts what came of a tensor into the part that it belongs to."""
    own = next(own for own in reads if _holds(own, bounds))
    if own == bounds:
        parts.append((own, values))
        return
    part = next((part for known, part in parts if known == own), None)
    if part is None:
        part = values.new_empty(shape_of(own))
        parts.append((own, part))
    part[slices_of(bounds, within=own)] = values


def _copy(name: str, bounds: list[list[int]], sender: int, *, receiver: int) -> Copy:
    return Copy(name, parse_bounds(bounds), sender, "", (), receiver, "", ())


def _nothing(copy: Copy) -> Tensor:
    raise AssertionError(f"an engine sends nothing, not even {copy.name}")
