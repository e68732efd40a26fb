"""Types of a weight update: its tensors, its chunks and the transport of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from verl.weight_sync.shard_tracking import ShardRanges

# shm: a file in shared memory of this machine; ipc: memory of a GPU of this machine; disk: a Hugging Face
# folder; group: from one process over a process group; direct: from the policy's ranks over a process group.
Transport = Literal["shm", "group", "disk", "direct", "ipc"]


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of a tensor of the policy.

    Attributes:
        name: as in a Hugging Face folder.
        shape: of the whole tensor, or of a shard that travels as a tensor of its own.
        dtype: PyTorch's name, such as "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightChunk:
    """Tensors of an update that travel together; their bytes are end to end, without gaps.

    Attributes:
        tensors: in the order of their bytes.
        transport: of the bytes.
        location: shm: `path`; ipc: a handle of `verl.weight_sync.cuda_ipc`; disk: `folder`, with all weights;
            direct: `copies`, for each rank of the engine its buckets of (name, bounds, sender); group: empty,
            since rank 0 of the group sends one uint8 tensor while `load` runs.
        ranges: for each rank of the engine, the bounds that it receives of each tensor, in the order of the
            tensors; empty: every rank receives all of every tensor.
    """

    tensors: tuple[TensorInfo, ...]
    transport: Transport
    location: Mapping[str, Any] = field(default_factory=dict)
    ranges: tuple[ShardRanges, ...] = ()

    def of_rank(self, rank: int) -> WeightChunk:
        """The chunk without the copies and ranges of other ranks of the engine."""
        own = {"copies": [self.location["copies"][rank]]} if self.transport == "direct" else {}
        return replace(self, location={**self.location, **own}, ranges=self.ranges[rank : rank + 1])
