"""Choice of senders and buckets for the copies between two layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from verl.weight_sync.copy_pattern import (
    CopyPattern,
    CopySource,
    PendingCopy,
    RankedShards,
    copy_pattern,
    pattern_key,
)
from verl.weight_sync.layout import ShardLayout, num_elements


@dataclass
class TensorCopies:
    """Copies of one tensor, with their senders and buckets.

    Attributes:
        name: of the tensor.
        pattern: its copies.
        source: its shards as they are.
        target: its shards as they shall be.
        receiver_buckets: bucket by receiver, of all that it gets of this tensor.
        copy_buckets: bucket by index of a copy, for receivers that get more than one bucket of this tensor.
        chosen: source by index of a copy, for copies with several sources.
    """

    name: str
    pattern: CopyPattern
    source: RankedShards
    target: RankedShards
    receiver_buckets: dict[int, int] = field(default_factory=dict)
    copy_buckets: dict[int, int] = field(default_factory=dict)
    chosen: dict[int, CopySource] = field(default_factory=dict)

    def source_of(self, index: int) -> CopySource:
        """Source of a copy."""
        return self.chosen.get(index) or self.pattern.copies[index].sources[0]

    def bucket_of(self, index: int) -> int | None:
        """Bucket of a copy; None if it is local and does not travel."""
        copy = self.pattern.copies[index]
        if copy.is_local:
            return None
        return (
            self.copy_buckets[index] if index in self.copy_buckets else self.receiver_buckets[copy.receiver]
        )

    def copies(self, rank: int | None) -> Iterator[tuple[PendingCopy, CopySource, int | None]]:
        """Copies that a rank (None: any rank) sends or receives, each with its source and bucket."""
        copies = self.pattern.copies
        for index in range(len(copies)) if rank is None else self.pattern.involving(rank):
            source = self.source_of(index)
            if rank in (None, source.rank, copies[index].receiver):
                yield copies[index], source, self.bucket_of(index)


class ReshardPlanner:
    """Plans the copies of all tensors of a target, in their order.

    Args:
        source: layout of the tensors as they are.
        target: layout as it shall be.
        itemsize: bytes per element as sent.
        bucket_bytes: largest size of a bucket for one receiver.
        ranks_per_node: of consecutive ranks.

    Attributes:
        num_buckets: used so far.

    Raises:
        ValueError: sizes below 1, or layouts of different ranks or tensors.
    """

    def __init__(
        self,
        source: ShardLayout,
        target: ShardLayout,
        *,
        itemsize: int,
        bucket_bytes: int,
        ranks_per_node: int,
    ) -> None:
        if min(itemsize, bucket_bytes, ranks_per_node) < 1:
            given = f"itemsize={itemsize}, bucket_bytes={bucket_bytes}, ranks_per_node={ranks_per_node}"
            raise ValueError(f"need sizes from 1, got {given}")
        if source.num_ranks != target.num_ranks:
            raise ValueError(
                f"need layouts of the same ranks, got {source.num_ranks} and {target.num_ranks}; "
                "give idle ranks no shards"
            )
        self._source, self._target = _by_name(source), _by_name(target)
        for name in self._target:
            if source.shapes.get(name) != target.shapes[name]:
                raise ValueError(
                    f"need {name} with {target.shapes[name]} in the source, it has "
                    f"{source.shapes.get(name, 'no such tensor')}"
                )
        self._names = [name for name in target.shapes if name in self._target]
        self._num_ranks = source.num_ranks
        self._bucket_bytes = bucket_bytes
        self._sizes = {"itemsize": itemsize, "bucket_bytes": bucket_bytes, "ranks_per_node": ranks_per_node}
        # Bytes to send, by bucket (None: in all buckets) and rank.
        self._load = Counter[tuple[int | None, int]]()
        # Of each receiver: its current bucket, and the bytes in that one.
        self._bucket, self._fill = Counter[int](), Counter[int]()
        self.num_buckets = 0

    def tensors(self) -> Iterator[TensorCopies]:
        """Copies of each tensor; senders are chosen while iterating, so iterate once and to the end."""
        patterns: dict[object, CopyPattern] = {}
        tensors = []
        for name in self._names:
            source, target = self._source.get(name, []), self._target[name]
            key = pattern_key(source, target)
            if key not in patterns:
                patterns[key] = copy_pattern(name, source, target, **self._sizes)
            tensors.append(TensorCopies(name, patterns[key], source, target))
        self._assign_buckets(tensors)
        has_choices = any(pattern.choices for pattern in patterns.values())
        for tensor in tensors:
            if has_choices:
                self._choose_sources(tensor)
            yield tensor

    def _assign_buckets(self, tensors: list[TensorCopies]) -> None:
        # Tensors whose source is on other ranks, by their first rank: pipeline stages, experts.
        stages: dict[int, list[TensorCopies]] = {}
        for tensor in tensors:
            stages.setdefault(min(rank for rank, _ in tensor.source), []).append(tensor)
        numbers = {
            rank: number for number, stage in enumerate(stages.values()) for rank, _ in stage[0].source
        }
        for receiver in range(self._num_ranks):
            # Each receiver begins with the stage after its own. So all stages send in every bucket, each to
            # few receivers; in one common order all receivers would wait for the same stage.
            turn = (numbers.get(receiver, receiver) + 1) % max(1, len(stages))
            order = [*islice(stages.values(), turn, None), *islice(stages.values(), turn)]
            for tensor in chain.from_iterable(order):
                num_bytes = tensor.pattern.received.get(receiver, 0)
                if num_bytes > self._bucket_bytes:
                    tensor.copy_buckets.update(
                        (index, self._next_bucket(receiver, copy.num_bytes))
                        for index, copy in enumerate(tensor.pattern.copies)
                        if copy.receiver == receiver and not copy.is_local
                    )
                elif num_bytes:
                    tensor.receiver_buckets[receiver] = self._next_bucket(receiver, num_bytes)

    def _next_bucket(self, receiver: int, num_bytes: int) -> int:
        """Bucket of the next bytes of a receiver; a new one if they do not fit into its current one."""
        if self._fill[receiver] and self._fill[receiver] + num_bytes > self._bucket_bytes:
            self._bucket[receiver] += 1
            self._fill[receiver] = 0
        self._fill[receiver] += num_bytes
        self.num_buckets = max(self.num_buckets, self._bucket[receiver] + 1)
        return self._bucket[receiver]

    def _choose_sources(self, tensor: TensorCopies) -> None:
        """Choose for each copy the source that has least to send in its bucket, and then in all buckets."""
        pattern = tensor.pattern
        # What has no choice is counted first, so that choices of this tensor avoid its senders.
        for receiver, senders in pattern.sent.items():
            for sender, num_bytes in senders.items():
                self._add_load(sender, tensor.receiver_buckets.get(receiver), num_bytes)
        for index in pattern.choices:
            bucket = tensor.bucket_of(index)
            tensor.chosen[index] = chosen = min(
                pattern.copies[index].sources,
                key=lambda source: (self._load[bucket, source.rank], self._load[None, source.rank]),
            )
            self._add_load(chosen.rank, bucket, pattern.copies[index].num_bytes)

    def _add_load(self, sender: int, bucket: int | None, num_bytes: int) -> None:
        self._load[None, sender] += num_bytes
        if bucket is not None:
            self._load[bucket, sender] += num_bytes


def _by_name(layout: ShardLayout) -> dict[str, RankedShards]:
    shards: dict[str, RankedShards] = {}
    for rank, own in enumerate(layout.shards):
        for shard in own:
            if num_elements(shard.bounds):
                shards.setdefault(shard.name, []).append((rank, shard))
    return shards
