"""The copies that bring tensors from one layout into another: each rank gets what it lacks, once; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

from verl.weight_sync.layout import (
    Bounds,
    ShardLayout,
    TensorShard,
    difference,
    intersection,
    local_offset,
    num_elements,
    shape_of,
)

BUCKET_BYTES = 2**28
RANKS_PER_NODE = 8

Pieces = list[tuple[int, TensorShard]]  # of one tensor, with their ranks


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a whole tensor that goes from a home to a home.

    Attributes:
        name: of the whole tensor.
        bounds: the part.
        sender: rank that has it.
        sender_tensor: local tensor of the sender.
        sender_offset: where it begins there.
        receiver: rank that needs it.
        receiver_tensor: local tensor of the receiver.
        receiver_offset: where it begins there.
    """

    name: str
    bounds: Bounds
    sender: int
    sender_tensor: str
    sender_offset: tuple[int, ...]
    receiver: int
    receiver_tensor: str
    receiver_offset: tuple[int, ...]


@dataclass(frozen=True)
class ReshardPlan:
    """All copies between two layouts, or those of one rank.

    Attributes:
        num_ranks: of both layouts.
        itemsize: bytes per element as sent.
        local: copies within a rank: nothing travels.
        buckets: copies that travel, for each rank in the order of the target's tensors; of a pipeline, first
            those of the stage behind its own. No rank receives more than `bucket_bytes` in one, and what it
            receives of one tensor is in one, unless that is more.
        rank: whose copies these are; None: of all ranks.
    """

    num_ranks: int
    itemsize: int
    local: tuple[Copy, ...]
    buckets: tuple[tuple[Copy, ...], ...]
    rank: int | None = None

    def sent_bytes(self, rank: int) -> int:
        """Bytes that a rank sends to others."""
        return self._of("sent", rank)

    def received_bytes(self, rank: int) -> int:
        """Bytes that a rank receives from others."""
        return self._of("received", rank)

    def local_bytes(self, rank: int) -> int:
        """Bytes that a rank takes from itself."""
        return self._of("local", rank)

    def num_messages(self, rank: int) -> int:
        """Messages that a rank receives: what one rank sends another in a bucket travels together."""
        return self._of("messages", rank)

    def _of(self, what: str, rank: int) -> int:
        if not 0 <= rank < self.num_ranks or self.rank not in (None, rank):
            raise ValueError(
                f"need a rank of this plan, {self.rank if self.rank is not None else f'0 to {self.num_ranks - 1}'}, got {rank}"
            )
        return self._totals[what][rank]

    @cached_property
    def _totals(self) -> dict[str, Counter[int]]:
        totals: dict[str, Counter[int]] = {
            what: Counter() for what in ("sent", "received", "local", "messages")
        }
        for bucket in self.buckets:
            for copy in bucket:
                num_bytes = num_elements(copy.bounds) * self.itemsize
                totals["sent"][copy.sender] += num_bytes
                totals["received"][copy.receiver] += num_bytes
            totals["messages"].update(
                receiver for _, receiver in {(copy.sender, copy.receiver) for copy in bucket}
            )
        for copy in self.local:
            totals["local"][copy.receiver] += num_elements(copy.bounds) * self.itemsize
        return totals


def make_plan(
    source: ShardLayout,
    target: ShardLayout,
    *,
    itemsize: int,
    bucket_bytes: int = BUCKET_BYTES,
    ranks_per_node: int = RANKS_PER_NODE,
    rank: int | None = None,
) -> ReshardPlan:
    """The copies that fill a target from a source, with as few bytes as possible; the same on every rank.

    What a rank has itself does not travel. What several others have comes from one on its node, else from
    any; among these from the one that has least to send, in the same bucket and then in all.

    Args:
        source: layout of the tensors as they are.
        target: layout that is wanted; every rank of the source is one of the target.
        itemsize: bytes per element as sent.
        bucket_bytes: of a bucket. A part that is larger is split.
        ranks_per_node: of consecutive ranks with fast links between them.
        rank: list only the copies in which this rank takes part, which is faster; None: all.

    Raises:
        ValueError: layouts of different ranks or tensors, or a part of the target that lies nowhere in the
            source.
    """
    walk = ReshardPlanner(
        source, target, itemsize=itemsize, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node
    )
    if rank is not None and not 0 <= rank < source.num_ranks:
        raise ValueError(f"need a rank from 0 to {source.num_ranks - 1}, got {rank}")
    local: list[Copy] = []
    buckets: list[list[Copy]] = []
    for step in walk.steps():
        buckets.extend([] for _ in range(walk.num_buckets - len(buckets)))
        for transfer, sender, index in step.of(rank):
            copy = step.copy(transfer, sender)
            (local if index is None else buckets[index]).append(copy)
    return ReshardPlan(source.num_ranks, itemsize, tuple(local), tuple(map(tuple, buckets)), rank)


@dataclass(frozen=True, slots=True)
class CopySource:
    """A rank that has a part, which of the tensor's source pieces it is in, and where in its home."""

    rank: int
    piece: int
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PendingCopy:
    """A part that a rank needs, and those it may come from: itself alone, or several."""

    bounds: Bounds
    num_bytes: int
    receiver: int
    piece: int
    offset: tuple[int, ...]
    holders: tuple[CopySource, ...]

    @property
    def is_local(self) -> bool:
        """Whether the receiver has it."""
        return self.holders[0].rank == self.receiver


@dataclass
class CopyPattern:
    """What has to be copied for every tensor that is spread in the same way; layers repeat, so there are few.

    Attributes:
        transfers: by receiver.
        received: bytes that each receiver gets from others.
        sent: bytes by receiver and sender of what only one rank can send.
        choices: transfers with several possible senders.
    """

    transfers: list[PendingCopy]
    received: Counter[int] = field(default_factory=Counter)
    sent: dict[int, Counter[int]] = field(default_factory=dict)
    choices: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, transfer in enumerate(self.transfers):
            if transfer.is_local:
                continue
            self.received[transfer.receiver] += transfer.num_bytes
            if len(transfer.holders) > 1:
                self.choices.append(index)
            else:
                self.sent.setdefault(transfer.receiver, Counter())[transfer.holders[0].rank] += (
                    transfer.num_bytes
                )
        self._concerning: dict[int, list[int]] = {}

    def concerning(self, rank: int) -> list[int]:
        """Transfers in which a rank takes part, or may."""
        if rank not in self._concerning:
            ranks = (
                (transfer.receiver, *(holder.rank for holder in transfer.holders))
                for transfer in self.transfers
            )
            self._concerning[rank] = [index for index, parties in enumerate(ranks) if rank in parties]
        return self._concerning[rank]


@dataclass
class TensorCopies:
    """One tensor: its pattern, which holder was chosen where there was a choice, and the buckets.

    Attributes:
        name: of the tensor.
        pattern: of its kind.
        chosen: holder by transfer, where there are several.
        buckets: bucket by receiver.
        spread: bucket by transfer, of receivers that get more than a bucket of this tensor and are not in
            `buckets`.
    """

    name: str
    pattern: CopyPattern
    source: Pieces
    target: Pieces
    chosen: dict[int, CopySource]
    buckets: dict[int, int]
    spread: dict[int, int]

    def of(self, rank: int | None) -> Iterator[tuple[PendingCopy, CopySource, int | None]]:
        """Transfers of a rank or of all, each with its holder and bucket; None: it does not travel."""
        transfers = self.pattern.transfers
        for index in range(len(transfers)) if rank is None else self.pattern.concerning(rank):
            transfer = transfers[index]
            holder = self.chosen.get(index) or transfer.holders[0]
            if rank in (None, holder.rank, transfer.receiver):
                bucket = self.spread[index] if index in self.spread else self.buckets.get(transfer.receiver)
                yield transfer, holder, None if transfer.is_local else bucket

    def copy(self, transfer: PendingCopy, holder: CopySource) -> Copy:
        """A transfer of this tensor."""
        homes = self.source[holder.piece][1].local_name, self.target[transfer.piece][1].local_name
        return Copy(
            self.name,
            transfer.bounds,
            holder.rank,
            homes[0],
            holder.offset,
            transfer.receiver,
            homes[1],
            transfer.offset,
        )


class ReshardPlanner:
    """Goes over the tensors of a target in their order, and chooses senders and buckets.

    Args:
        source: layout of the tensors as they are.
        target: layout that is wanted.
        itemsize: bytes per element as sent.
        bucket_bytes: of a bucket.
        ranks_per_node: of consecutive ranks.

    Raises:
        ValueError: sizes below 1, or layouts that do not belong together.
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
                f"need layouts of the same ranks, got {source.num_ranks} and {target.num_ranks}; give idle ranks no pieces"
            )
        self._source, self._target = _by_name(source), _by_name(target)
        for name in self._target:
            if source.shapes.get(name) != target.shapes[name]:
                raise ValueError(
                    f"need {name} with {target.shapes[name]} in the source, it has {source.shapes.get(name, 'no such tensor')}"
                )
        self._names = [name for name in target.shapes if name in self._target]
        self._num_ranks = source.num_ranks
        self._itemsize, self._bucket_bytes, self._ranks_per_node = itemsize, bucket_bytes, ranks_per_node
        self._patterns: dict[tuple[object, object], CopyPattern] = {}
        # Bytes to send, by bucket (None: in all) and rank.
        self._load = Counter[tuple[int | None, int]]()
        self._chooses = False
        self._bucket, self._fill = Counter[int](), Counter[int]()
        self.num_buckets = 0

    def steps(self) -> Iterator[TensorCopies]:
        """Every tensor, once."""
        patterns = {
            name: self._pattern(name, self._source.get(name, []), self._target[name]) for name in self._names
        }
        placed = self._placed(patterns)
        self._chooses = any(pattern.choices for pattern in patterns.values())
        for name, pattern in patterns.items():
            yield TensorCopies(
                name,
                pattern,
                self._source[name],
                self._target[name],
                self._choose(pattern, *placed[name]),
                *placed[name],
            )

    def _placed(self, patterns: dict[str, CopyPattern]) -> dict[str, tuple[dict[int, int], dict[int, int]]]:
        """Buckets of each tensor by receiver, and by transfer where a receiver needs several for it."""
        # Tensors of different ranks, by the first one: stages of a pipeline, experts.
        stages: dict[int, list[str]] = {}
        for name in patterns:
            stages.setdefault(min(rank for rank, _ in self._source[name]), []).append(name)
        numbers = {
            rank: number for number, first in enumerate(stages) for rank, _ in self._source[stages[first][0]]
        }
        placed: dict[str, tuple[dict[int, int], dict[int, int]]] = {name: ({}, {}) for name in patterns}
        for receiver in range(self._num_ranks):
            # Each begins behind its own stage: so every stage sends at every time, and to few others.
            turn = (numbers.get(receiver, receiver) + 1) % max(1, len(stages))
            order = [*islice(stages.values(), turn, None), *islice(stages.values(), turn)]
            for name in chain.from_iterable(order):
                num_bytes = patterns[name].received.get(receiver, 0)
                buckets, spread = placed[name]
                if num_bytes > self._bucket_bytes:
                    spread.update(self._spread(patterns[name], receiver))
                elif num_bytes:
                    buckets[receiver] = self._place(receiver, num_bytes)
        return placed

    def _pattern(self, name: str, source: Pieces, target: Pieces) -> CopyPattern:
        key = _key(source), _key(target)
        if key not in self._patterns:
            self._patterns[key] = CopyPattern(self._transfers(name, source, target))
        return self._patterns[key]

    def _transfers(self, name: str, source: Pieces, target: Pieces) -> list[PendingCopy]:
        regions = _disjoint_regions(source)
        common: dict[Bounds, list[tuple[Bounds, list[int]]]] = {}
        transfers = []
        for index, (receiver, piece) in enumerate(target):
            if piece.bounds not in common:
                common[piece.bounds] = self._parts(piece.bounds, regions)
            parts = common[piece.bounds]
            if sum(num_elements(part) for part, _ in parts) != num_elements(piece.bounds):
                raise ValueError(
                    f"need all of {name} in the source, it lacks some of {piece.bounds}, which rank {receiver} wants"
                )
            for part, owners in parts:
                holders = tuple(
                    CopySource(source[i][0], i, local_offset(part, source[i][1]))
                    for i in self._usable(receiver, source, owners)
                )
                num_bytes = num_elements(part) * self._itemsize
                transfers.append(
                    PendingCopy(part, num_bytes, receiver, index, local_offset(part, piece), holders)
                )
        return transfers

    def _parts(
        self, bounds: Bounds, regions: Iterable[tuple[Bounds, list[int]]]
    ) -> list[tuple[Bounds, list[int]]]:
        """What a piece has in common with the regions of the source, in parts that fit a bucket."""
        found = ((intersection(region, bounds), owners) for region, owners in regions)
        limit = max(1, self._bucket_bytes // self._itemsize)
        return sorted(
            (part, owners) for common, owners in found if common is not None for part in _split(common, limit)
        )

    def _usable(self, receiver: int, source: Pieces, owners: list[int]) -> list[int]:
        """Pieces that a part may come from: the receiver's own, else those on its node, else all; one of each
        rank.
        """
        by_rank = {source[i][0]: i for i in reversed(owners)}
        if receiver in by_rank:
            return [by_rank[receiver]]
        near = [rank for rank in by_rank if rank // self._ranks_per_node == receiver // self._ranks_per_node]
        # In turn from the receiver on: equal loads are not all laid on the first rank.
        turn = sorted(near or by_rank, key=lambda rank: (rank < receiver, rank))
        return [by_rank[rank] for rank in turn]

    def _choose(
        self, pattern: CopyPattern, buckets: dict[int, int], spread: dict[int, int]
    ) -> dict[int, CopySource]:
        """Of several ranks that have a part the one that has least to send in its bucket, and in all."""
        for receiver, senders in pattern.sent.items() if self._chooses else ():
            for sender, num_bytes in senders.items():
                self._add_load(sender, buckets.get(receiver), num_bytes)
        chosen = {}
        for index in pattern.choices:
            transfer = pattern.transfers[index]
            bucket = spread[index] if index in spread else buckets[transfer.receiver]
            holder = min(
                transfer.holders,
                key=lambda holder: (self._load[bucket, holder.rank], self._load[None, holder.rank]),
            )
            self._add_load(holder.rank, bucket, transfer.num_bytes)
            chosen[index] = holder
        return chosen

    def _add_load(self, sender: int, bucket: int | None, num_bytes: int) -> None:
        self._load[None, sender] += num_bytes
        if bucket is not None:
            self._load[bucket, sender] += num_bytes

    def _place(self, receiver: int, num_bytes: int) -> int:
        """The bucket in which a receiver gets its next bytes."""
        if self._fill[receiver] and self._fill[receiver] + num_bytes > self._bucket_bytes:
            self._bucket[receiver] += 1
            self._fill[receiver] = 0
        self._fill[receiver] += num_bytes
        self.num_buckets = max(self.num_buckets, self._bucket[receiver] + 1)
        return self._bucket[receiver]

    def _spread(self, pattern: CopyPattern, receiver: int) -> dict[int, int]:
        """Buckets of a tensor that is too large for one."""
        arriving = (
            (i, t) for i, t in enumerate(pattern.transfers) if t.receiver == receiver and not t.is_local
        )
        return {index: self._place(receiver, transfer.num_bytes) for index, transfer in arriving}


def _by_name(layout: ShardLayout) -> dict[str, Pieces]:
    pieces: dict[str, Pieces] = {}
    for rank, held in enumerate(layout.shards):
        for piece in held:
            if num_elements(piece.bounds):
                pieces.setdefault(piece.name, []).append((rank, piece))
    return pieces


def _key(pieces: Pieces) -> object:
    """Equal for tensors that are spread over ranks and homes in the same way."""
    return tuple((rank, piece.bounds, piece.offset) for rank, piece in pieces)


def _disjoint_regions(pieces: Pieces) -> list[tuple[Bounds, list[int]]]:
    """All parts that differ in who has them, each with the pieces it lies in."""
    owners: dict[Bounds, list[int]] = {}
    for index, (_, piece) in enumerate(pieces):
        owners.setdefault(piece.bounds, []).append(index)
    regions: list[tuple[Bounds, list[int]]] = []
    for bounds, indices in owners.items():
        rest, cut = [bounds], []
        for region, others in regions:
            common = intersection(region, bounds)
            if common is None:
                cut.append((region, others))
                continue
            cut += [(common, others + indices), *((part, others) for part in difference(region, common))]
            rest = [part for box in rest for part in _without(box, common)]
        regions = [*cut, *((box, indices) for box in rest)]
    return regions


def _without(box: Bounds, other: Bounds) -> list[Bounds]:
    common = intersection(box, other)
    return [box] if common is None else difference(box, common)


def _split(bounds: Bounds, limit: int) -> Iterator[Bounds]:
    """Parts of at most `limit` elements, cut along the first dimension that can be."""
    size = num_elements(bounds)
    if size <= limit:
        yield bounds
        return
    dim = next(dim for dim, size in enumerate(shape_of(bounds)) if size > 1)
    start, stop = bounds[dim]
    inner = size // (stop - start)
    width = max(1, limit // inner)
    for first in range(start, stop, width):
        yield from _split((*bounds[:dim], (first, min(stop, first + width)), *bounds[dim + 1 :]), limit)
