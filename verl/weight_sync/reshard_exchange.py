"""Execution of a reshard plan: copies between ranks, with one bucket in flight while the last one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.layout import Bounds, local_slices, num_elements, shape_of
from verl.weight_sync.reshard_plan import Copy, ReshardPlan


def local_view(tensor: Tensor, bounds: Bounds, offset: tuple[int, ...]) -> Tensor:
    """View of the part of a local tensor that begins at an offset, with the elements of bounds in order."""
    return tensor[local_slices(bounds, offset)]


@dataclass
class _BucketInFlight:
    """A bucket that is being exchanged.

    Attributes:
        copies: that this rank receives, in the order of their values.
        received: their values, end to end; complete once `work` has ended.
        sent: values that this rank sends; must be kept until `work` has ended.
        work: handle of the collective.
    """

    copies: list[Copy]
    received: Tensor
    sent: Tensor
    work: Any

    def wait(self) -> Iterator[tuple[Copy, Tensor]]:
        """Wait for the bucket; yield its copies and their values."""
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
    """Send and receive this rank's copies of a plan; all ranks of the group must call it at once.

    Args:
        plan: its ranks are those of the group.
        rank: of this process.
        group: process group of PyTorch, of any backend that moves tensors of `device`.
        read: values of a copy that this rank sends, with the shape of its bounds, in any dtype.
        dtype: of the values on their way.
        device: of the values that are received.
        overlap: exchange the next bucket while the last one is used; needs memory for a second bucket.

    Yields:
        A copy that this rank receives and its values. They are not overwritten by later ones; only the caller
        keeps them alive.

    Raises:
        RuntimeError: another rank ended, or did not answer in the time limit of the group.
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
    """Same as `exchange`, one iterator for each bucket.

    A bucket comes only when all ranks have asked for it. Ranks that run other collectives in between must do
    so after the same buckets.
    """
    ahead: _BucketInFlight | None = None
    for bucket in plan.buckets:
        started = _start(bucket, rank, group, read=read, dtype=dtype, device=device)
        if not overlap:
            yield started.wait()
            continue
        if ahead is not None:
            yield ahead.wait()
        ahead = started
    if ahead is not None:
        yield ahead.wait()


@torch.no_grad()
def _start(
    bucket: Sequence[Copy],
    rank: int,
    group: Any,
    *,
    read: Callable[[Copy], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> _BucketInFlight:
    """Start the all-to-all of one bucket."""
    outgoing = sorted((copy for copy in bucket if copy.sender == rank), key=lambda copy: copy.receiver)
    incoming = sorted((copy for copy in bucket if copy.receiver == rank), key=lambda copy: copy.sender)
    sent = torch.empty(sum(num_elements(copy.bounds) for copy in outgoing), dtype=dtype, device=device)
    start = 0
    for copy in outgoing:
        stop = start + num_elements(copy.bounds)
        values = read(copy)
        # Cast by the copy into the buffer: the values travel in the dtype that the receiver wants.
        sent[start:stop].view(values.shape).copy_(values)
        start = stop
    received = torch.empty(sum(num_elements(copy.bounds) for copy in incoming), dtype=dtype, device=device)
    send_sizes, receive_sizes = [0] * group.size(), [0] * group.size()
    for copy in outgoing:
        send_sizes[copy.receiver] += num_elements(copy.bounds)
    for copy in incoming:
        receive_sizes[copy.sender] += num_elements(copy.bounds)
    work = group.alltoall_base(received, sent, receive_sizes, send_sizes, dist.AllToAllOptions())
    return _BucketInFlight(incoming, received, sent, work)
