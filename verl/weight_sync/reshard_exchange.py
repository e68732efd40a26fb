"""A plan carried out: what a rank has and others lack travels in buckets, the next one while the last is put
in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.layout import Bounds, local_slices, num_elements, shape_of
from verl.weight_sync.reshard_plan import Copy, ReshardPlan


def local_view(home: Tensor, bounds: Bounds, offset: tuple[int, ...]) -> Tensor:
    """A view of the part of a home that begins at an offset; as many elements as the bounds have, in their
    order.
    """
    return home[local_slices(bounds, offset)]


@dataclass
class _Travelling:
    """A bucket on its way: what will have come, and what must be kept until it has."""

    copies: list[Copy]
    received: Tensor
    sent: Tensor
    work: Any

    def arrived(self) -> Iterator[tuple[Copy, Tensor]]:
        self.work.wait()
        start = 0
        for copy in self.copies:
            stop = start + num_elements(copy.bounds)
            yield copy, self.received[start:stop].view(shape_of(copy.bounds))
            start = stop


def exchange(
    plan: ReshardPlan,
    rank: int,
    group: Any,
    *,
    read: Callable[[Copy], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    overlap: bool = True,
) -> Iterator[tuple[Copy, Tensor]]:
    """Does a rank's part of a plan: sends what others lack, and yields what this one lacks, as it comes; all
    ranks of the group at once.

    Args:
        plan: its ranks are those of the group.
        rank: of this process.
        group: of PyTorch, of whichever backend moves tensors of `device`.
        read: the values of a copy that this rank sends, of the sizes of its bounds, in any dtype.
        dtype: in which they travel.
        device: where they come to.
        overlap: the next bucket travels while the last one is used; it costs the memory of a second bucket.

    Yields:
        A copy and its values, which are never overwritten, and kept only as long as the caller keeps them.

    Raises:
        RuntimeError: another rank is gone or does not answer in the time limit of the group.
    """
    for bucket in exchange_by_bucket(
        plan, rank, group, read=read, dtype=dtype, device=device, overlap=overlap
    ):
        yield from bucket


def exchange_by_bucket(
    plan: ReshardPlan,
    rank: int,
    group: Any,
    *,
    read: Callable[[Copy], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    overlap: bool = True,
) -> Iterator[Iterator[tuple[Copy, Tensor]]]:
    """As `exchange`, bucket by bucket: a bucket comes only if all ranks have asked for it, so who does other
    things together in between must do so after the same buckets."""
    ahead: _Travelling | None = None
    for bucket in plan.buckets:
        started = _started(bucket, rank, group, read=read, dtype=dtype, device=device)
        if not overlap:
            yield started.arrived()
            continue
        if ahead is not None:
            yield ahead.arrived()
        ahead = started
    if ahead is not None:
        yield ahead.arrived()


@torch.no_grad()
def _started(
    bucket: Sequence[Copy],
    rank: int,
    group: Any,
    *,
    read: Callable[[Copy], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> _Travelling:
    num_ranks = group.size()
    goes = sorted((copy for copy in bucket if copy.sender == rank), key=lambda copy: copy.receiver)
    comes = sorted((copy for copy in bucket if copy.receiver == rank), key=lambda copy: copy.sender)
    sent = torch.empty(sum(num_elements(copy.bounds) for copy in goes), dtype=dtype, device=device)
    start = 0
    for copy in goes:
        stop = start + num_elements(copy.bounds)
        values = read(copy)
        # Cast here, by the copy into the buffer: what travels is in the dtype that is wanted there.
        sent[start:stop].view(values.shape).copy_(values)
        start = stop
    received = torch.empty(sum(num_elements(copy.bounds) for copy in comes), dtype=dtype, device=device)
    to, of = [0] * num_ranks, [0] * num_ranks
    for copy in goes:
        to[copy.receiver] += num_elements(copy.bounds)
    for copy in comes:
        of[copy.sender] += num_elements(copy.bounds)
    work = group.alltoall_base(received, sent, of, to, dist.AllToAllOptions())
    return _Travelling(comes, received, sent, work)
