"""Types of a weight update: its tensors, its chunks and how their bytes travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from verl.weight_sync.shard_tracking import ShardRanges

# How the bytes of weights travel. shm: a file in shared memory of this machine; group: from this process over
# a process group; disk: a Hugging Face folder; direct: from the ranks of the policy over a process group.
Transport = Literal["shm", "group", "disk", "direct", "ipc"]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the policy, by the name that it has in a Hugging Face folder; dtype as PyTorch names it,
    such as "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightChunk:
    """Tensors of an update, their bytes end to end without gaps, and where they are.

    Attributes:
        tensors: in the order of their bytes.
        transport: how they travel.
        location: shm: `path`; group: nothing, they come from rank 0 as one uint8 tensor while `load` runs; disk:
            `folder`, with all weights; direct: `copies`, for each rank its
            buckets of (name, bounds, sender).
        ranges: for each rank of the engine, what it gets of the tensors, in their order and end to end; none:
            each gets all.
    """

    tensors: tuple[TensorInfo, ...]
    transport: Transport
    location: Mapping[str, Any] = field(default_factory=dict)
    ranges: tuple[ShardRanges, ...] = ()

    def of_rank(self, rank: int) -> WeightChunk:
        """What one rank of an engine has to know of it."""
        own = {"copies": [self.location["copies"][rank]]} if self.transport == "direct" else {}
        return replace(self, location={**self.location, **own}, ranges=self.ranges[rank : rank + 1])
