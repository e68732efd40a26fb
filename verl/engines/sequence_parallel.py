"""Sequence parallelism: ranks that share a packed line, each with a slice of its places, or in attention with
a share of the heads.

DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# In shapes: Q ranks of the group, N places of the line, n = ceil(N / Q) of a slice, H heads, D head size, M
# response tokens.


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension goes to rank i; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


class _Together(torch.autograd.Function):
    """Values of own tokens to those of all; the gradient of the own ones comes back, since every rank has the
    same loss.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, own: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        together = values.new_zeros(num_tokens, *values.shape[1:])
        together[own] = values
        dist.all_reduce(together, group=group)
        return together

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return grad[own], None, None, None


@dataclass(frozen=True)
class SequenceGroup:
    """This rank among those that share a line.

    Attributes:
        group: of the processes.
        rank: in the group.
        size: of the group, Q.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def local_slice(self, line: Tensor) -> Tensor:
        """[1, n] of a line [1, N], the last slices filled up with 0."""
        width = -(-line.shape[1] // self.size)
        return F.pad(line, (0, self.size * width - line.shape[1]))[
            :, self.rank * width : (self.rank + 1) * width
        ]

    def local_indices(self, places: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
        """Which of the places [M] of a line are in the own slice, as indices [m], and where in the slice,
        [m].
        """
        width = -(-num_places // self.size)
        own = (places // width == self.rank).nonzero().squeeze(1)
        return own, places[own] - self.rank * width

    def gather_tokens(self, values: Tensor, own: Tensor, num_tokens: int) -> Tensor:
        """[M, ...] on every rank from the values [m, ...] of the own ones."""
        out: Tensor = _Together.apply(values, own, num_tokens, self.group)
        return out

    def sequence_to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_places: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slices [1, H, n, D] of all heads to [1, H / Q, N, D] of this rank's heads; fewer key-value heads
        than ranks are repeated.
        """
        repeats = max(1, self.size // key.shape[1])
        key, value = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
        return self._share(query, num_places), self._share(key, num_places), self._share(value, num_places)

    def heads_to_sequence(self, attended: Tensor) -> Tensor:
        """The way back: [1, N, H / Q, D] of this rank's heads to its slice [1, n, H, D]."""
        width = -(-attended.shape[1] // self.size)
        padded = F.pad(attended[0], (0, 0, 0, 0, 0, self.size * width - attended.shape[1]))
        received = _Exchange.apply(padded.unflatten(0, (self.size, width)), self.group)
        return received.transpose(0, 1).flatten(1, 2)[None]

    def _share(self, heads: Tensor, num_places: int) -> Tensor:
        if heads.shape[1] % self.size:
            raise ValueError(
                f"need heads that placement sequence divides, got {heads.shape[1]} for sequence={self.size}; take a divisor of the heads"
            )
        received = _Exchange.apply(
            heads[0].unflatten(0, (self.size, -1)), self.group
        )  # [Q, H / Q, n, D], by slice
        return received.transpose(0, 1).flatten(1, 2)[None, :, :num_places]
