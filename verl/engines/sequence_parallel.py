"""Sequence parallelism: ranks that share a packed sequence, each with a slice of its positions.

In attention each rank has all positions of a part of the heads instead. DeepSpeed-Ulysses,
https://arxiv.org/abs/2309.14509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# In shapes: Q ranks of the group, N positions of the packed sequence, n = ceil(N / Q) of a slice, H heads,
# D head size, M response tokens, m of them in the slice of this rank.


class _AllToAll(torch.autograd.Function):
    """Send part i of the first dimension to rank i; backward is the same exchange of the gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


class _GatherTokens(torch.autograd.Function):
    """Gather the values of all tokens from the local ones.

    The gradient of the local tokens is passed on as it is: every rank computes the same loss.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, num_tokens: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(indices)
        gathered = values.new_zeros(num_tokens, *values.shape[1:])
        gathered[indices] = values
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (indices,) = ctx.saved_tensors
        return grad[indices], None, None, None


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a packed sequence, and this rank among them.

    Attributes:
        group: their process group.
        rank: this rank's number in it.
        size: number of ranks, Q.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def local_slice(self, sequence: Tensor) -> Tensor:
        """This rank's slice [1, n] of a packed sequence [1, N]; the last slices are padded with 0."""
        width = -(-sequence.shape[1] // self.size)
        padded = F.pad(sequence, (0, self.size * width - sequence.shape[1]))
        return padded[:, self.rank * width : (self.rank + 1) * width]

    def local_indices(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Indices [m] of the positions [M] that are in this rank's slice, and their positions in it, [m]."""
        width = -(-num_positions // self.size)
        indices = (positions // width == self.rank).nonzero().squeeze(1)
        return indices, positions[indices] - self.rank * width

    def gather_tokens(self, values: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
        """[M, ...] on every rank from the values [m, ...] of its `local_indices`."""
        gathered: Tensor = _GatherTokens.apply(values, indices, num_tokens, self.group)
        return gathered

    def sequence_to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange slices [1, H, n, D] of all heads for all positions [1, H / Q, N, D] of this rank's heads.

        If there are fewer key-value heads than ranks they are repeated.
        """

        def exchange(heads: Tensor) -> Tensor:
            if heads.shape[1] % self.size:
                raise ValueError(
                    f"need heads that placement sequence divides, got {heads.shape[1]} for "
                    f"sequence={self.size}; take a divisor of the heads"
                )
            # [Q, H / Q, n, D] before and after: by the rank of the heads, then by the rank of the slice.
            received = _AllToAll.apply(heads[0].unflatten(0, (self.size, -1)), self.group)
            return received.transpose(0, 1).flatten(1, 2)[None, :, :num_positions]

        repeats = max(1, self.size // key.shape[1])
        key, value = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
        return exchange(query), exchange(key), exchange(value)

    def heads_to_sequence(self, attended: Tensor) -> Tensor:
        """The reverse: all positions [1, N, H / Q, D] of this rank's heads for its slice [1, n, H, D]."""
        width = -(-attended.shape[1] // self.size)
        padded = F.pad(attended[0], (0, 0, 0, 0, 0, self.size * width - attended.shape[1]))
        received = _AllToAll.apply(padded.unflatten(0, (self.size, width)), self.group)
        return received.transpose(0, 1).flatten(1, 2)[None]
