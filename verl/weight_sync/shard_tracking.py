"""A tensor proxy that stands for a whole tensor of which this process has some shards, and records reads.

Engines load whole tensors and slice their rank's part out of them themselves. What an engine reads of a whole
tensor is what it needs in the next update; from then on a `ShardedTensorProxy` with these shards alone stands
for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from verl.weight_sync.layout import Bounds, contains, full_bounds, intersection, num_elements

# Disjoint bounds that a rank reads of each tensor, by name; empty: the rank does not read the tensor.
ShardRanges = Mapping[str, Sequence[Bounds]]


class MissingShardError(RuntimeError):
    """A part of a tensor was read that this process does not have."""


@dataclass
class _SourceTensor:
    """The whole tensor that a `ShardedTensorProxy` is a view of.

    Attributes:
        name: for messages.
        shape: of the whole tensor.
        device: of the shards.
        shards: bounds and values that this process has.
        reads: bounds that were read.
    """

    name: str
    shape: tuple[int, ...]
    device: torch.device
    shards: Sequence[tuple[Bounds, Tensor]]
    reads: list[Bounds] = field(default_factory=list)

    @property
    def strides(self) -> list[int]:
        """Strides of the whole tensor, if it were contiguous in memory."""
        return [torch.Size(self.shape[dim + 1 :]).numel() for dim in range(len(self.shape))]

    def read(self, view: Tensor) -> Tensor:
        """Values of a view, given as a view of a meta tensor; they are a view of a shard where possible.

        Raises:
            MissingShardError: this process does not have all of them.
        """
        bounds, steps = self._bounds_and_steps(view)
        if num_elements(bounds) == 0:
            return torch.empty(view.shape, dtype=view.dtype, device=self.device)
        found = next(((own, shard) for own, shard in self.shards if contains(own, bounds)), None)
        if found is None:
            sent = " and ".join(bounds_text(own) for own, _ in self.shards) or "nothing"
            raise MissingShardError(
                f"the engine reads {bounds_text(bounds)} of {self.name}, of which it was sent {sent}"
            )
        if bounds not in self.reads:
            self.reads.append(bounds)
        box = found[1][slices_of(bounds, within=found[0])]
        if steps is None:
            return box.contiguous().as_strided(view.shape, view.stride(), view.storage_offset())
        strides = [step * box.stride(dim) if step else 0 for dim, step in steps]
        return box.as_strided(view.shape, strides, box.storage_offset())

    def _bounds_and_steps(self, view: Tensor) -> tuple[Bounds, list[tuple[int, int]] | None]:
        """Bounds that contain a view, and the (dimension, step) in the whole tensor of each view dimension.

        A view that is no box with steps, such as one that runs across rows, counts as all of the tensor; its
        steps are None.
        """
        shape, strides = self.shape, self.strides
        if view.numel() == 0:
            return tuple((0, 0) for _ in shape), []
        rest, starts = view.storage_offset(), []
        for stride in strides:
            starts.append(rest // stride if stride else 0)
            rest -= starts[-1] * stride
        stops, steps = [start + 1 for start in starts], []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            if size == 1 or stride == 0:  # an expanded dimension reads one element again and again
                steps.append((0, 0))
                continue
            dim = next(
                d
                for d in range(len(shape))
                if shape[d] > 1 and stride >= strides[d] and stride % strides[d] == 0
            )
            steps.append((dim, stride // strides[dim]))
            stops[dim] += (size - 1) * steps[-1][1]
        if any(stop > size for stop, size in zip(stops, shape, strict=True)):
            return full_bounds(shape), None
        return tuple(zip(starts, stops, strict=True)), steps


class ShardedTensorProxy(Tensor):
    """A whole tensor, or a view of one, of which this process has only some shards.

    Views of it carry no values. Every other operation gets the values that it needs, recorded as read.
    """

    _source: _SourceTensor
    _view: Tensor  # on the meta device

    @classmethod
    def of(cls, source: _SourceTensor, view: Tensor) -> ShardedTensorProxy:
        """Proxy for a view of a tensor, given as a view of a meta tensor."""
        proxy: ShardedTensorProxy = torch.Tensor._make_wrapper_subclass(
            cls,
            view.shape,
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=source.device,
        )
        proxy._source, proxy._view = source, view
        return proxy

    # PyTorch's own `tolist` and `numpy` refuse subclasses of Tensor.
    @override
    def tolist(self) -> Any:
        return self._source.read(self._view).tolist()

    @override
    def numpy(self, *, force: bool = False) -> Any:
        return self._source.read(self._view).numpy(force=force)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedTensorProxy({self._source.name}, {tuple(self.shape)} {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator: views on the meta tensor, every other operator on the values that it needs."""
        kwargs = kwargs or {}
        # Without autograd, composite operators such as `to` and `contiguous` arrive undecomposed; they return
        # a view in some cases and a copy in others.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        first = args[0] if args else None
        if isinstance(first, ShardedTensorProxy) and returns_view(func):
            result = func(first._view, *args[1:], **kwargs)
            return tree_map_only(Tensor, lambda view: cls.of(first._source, view), result)
        args, kwargs = tree_map_only(
            ShardedTensorProxy, lambda proxy: proxy._source.read(proxy._view), (args, kwargs)
        )
        return func(*args, **kwargs)


def returns_view(operator: Any) -> bool:
    """True if a PyTorch operator only returns views of its first argument."""
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def sharded_proxy(
    name: str, shape: Sequence[int], shards: Sequence[tuple[Bounds, Tensor]], *, like: Tensor
) -> Tensor:
    """Tensor that stands for a whole one of which only some shards are here.

    Args:
        name: for messages.
        shape: of the whole tensor.
        shards: bounds and values that are here; may be empty.
        like: a tensor of the same dtype, on the same device.
    """
    view = torch.empty(tuple(shape), dtype=like.dtype, device="meta")
    return ShardedTensorProxy.of(_SourceTensor(name, tuple(shape), like.device, shards), view)


def record_reads(name: str, tensor: Tensor, reads: list[Bounds]) -> Tensor:
    """Proxy for a tensor of which everything is here; it appends the bounds of each read to `reads`."""
    shape = tuple(tensor.shape)
    source = _SourceTensor(name, shape, tensor.device, [(full_bounds(shape), tensor)], reads)
    return ShardedTensorProxy.of(source, torch.empty(shape, dtype=tensor.dtype, device="meta"))


def merge_overlapping(reads: Iterable[Bounds]) -> tuple[Bounds, ...]:
    """Sorted disjoint bounds that contain all of the given ones."""
    merged: list[Bounds] = []
    for bounds in reads:
        own, overlapping = bounds, [bounds]
        # The hull of overlapping bounds may overlap further ones.
        while overlapping:
            overlapping = [other for other in merged if intersection(own, other) is not None]
            merged = [other for other in merged if other not in overlapping]
            own = tuple(
                (min(start for start, _ in dim), max(stop for _, stop in dim))
                for dim in zip(own, *overlapping, strict=True)
            )
        merged.append(own)
    return tuple(sorted(merged))


def slices_of(bounds: Bounds, *, within: Bounds | None = None) -> tuple[slice, ...]:
    """Slices that select bounds from the whole tensor, or from its part `within` other bounds."""
    starts = [start for start, _ in within] if within is not None else [0] * len(bounds)
    return tuple(
        slice(start - first, stop - first) for (start, stop), first in zip(bounds, starts, strict=True)
    )


def bounds_text(bounds: Bounds) -> str:
    """Bounds as text, such as "0:8,16:32"."""
    return ",".join(f"{start}:{stop}" for start, stop in bounds)


def shard_key(name: str, bounds: Bounds, *, shape: Sequence[int]) -> str:
    """Name of a shard in a fingerprint: "NAME@BOUNDS", or the tensor's own name if the shard is all of it."""
    return name if bounds == full_bounds(tuple(shape)) else f"{name}@{bounds_text(bounds)}"


def parse_bounds(values: Sequence[Sequence[int]]) -> Bounds:
    """Bounds from their JSON form."""
    return tuple((start, stop) for start, stop in values)


def parse_ranges(values: Mapping[str, Sequence[Sequence[Sequence[int]]]]) -> ShardRanges:
    """`ShardRanges` from their JSON form."""
    return {name: tuple(parse_bounds(bounds) for bounds in own) for name, own in values.items()}
