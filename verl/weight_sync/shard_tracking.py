"""A tensor that stands for a whole one of which this process has a part, and which notes what of it is read.

Engines load whole tensors and take the part of their rank themselves. What they read of a whole one is what
they need to be sent the next time; then a `ShardedTensorProxy` with that alone passes for the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from verl.weight_sync.layout import Bounds, full_bounds, intersection, num_elements

# What a rank reads of each tensor, by name; disjoint. Nothing of a tensor: it is not read there.
ShardRanges = Mapping[str, Sequence[Bounds]]


class MissingShardError(RuntimeError):
    """Something was read of a tensor that is not here."""


@dataclass
class _ReadRecord:
    """The tensor that a `ShardedTensorProxy` is a view of.

    Attributes:
        name: for messages.
        shape: of all of it.
        device: of the parts.
        parts: what is here.
        reads: what was read.
    """

    name: str
    shape: tuple[int, ...]
    device: torch.device
    parts: Sequence[tuple[Bounds, Tensor]]
    reads: list[Bounds] = field(default_factory=list)

    @property
    def strides(self) -> list[int]:
        """Of the whole tensor, if it were here without gaps."""
        return [torch.Size(self.shape[dim + 1 :]).numel() for dim in range(len(self.shape))]

    def read(self, view: Tensor) -> Tensor:
        """The values of a view, given as a view of a tensor without storage; a view of a part, where it can
        be one.

        Raises:
            MissingShardError: they are not all here.
        """
        bounds, steps = self._box(view)
        if num_elements(bounds) == 0:
            return torch.empty(view.shape, dtype=view.dtype, device=self.device)
        found = next(((own, part) for own, part in self.parts if intersection(own, bounds) == bounds), None)
        if found is None:
            raise MissingShardError(
                f"the engine reads {bounds_text(bounds)} of {self.name}, of which it was sent {_told(self.parts)}"
            )
        if bounds not in self.reads:
            self.reads.append(bounds)
        box = found[1][slices_of(bounds, within=found[0])]
        if steps is None:  # of no such form as a box with steps
            return box.contiguous().as_strided(view.shape, view.stride(), view.storage_offset())
        strides = [step * box.stride(dim) if step else 0 for dim, step in steps]
        return box.as_strided(view.shape, strides, box.storage_offset())

    def _box(self, view: Tensor) -> tuple[Bounds, list[tuple[int, int]] | None]:
        """The bounds that hold a view, and for each of its dimensions the dimension of the whole that it goes
        along, with its step.

        A view that goes across rows of the whole counts as all of it, without steps.
        """
        sizes, strides = self.shape, self.strides
        if view.numel() == 0:
            return tuple((0, 0) for _ in sizes), []
        rest, starts = view.storage_offset(), []
        for stride in strides:
            starts.append(rest // stride if stride else 0)
            rest -= starts[-1] * stride
        stops, steps = [start + 1 for start in starts], []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            if size == 1 or stride == 0:
                steps.append((0, 0))
                continue
            dim = next(
                d
                for d in range(len(sizes))
                if sizes[d] > 1 and stride >= strides[d] and stride % strides[d] == 0
            )
            steps.append((dim, stride // strides[dim]))
            stops[dim] += (size - 1) * steps[-1][1]
        if any(stop > size for stop, size in zip(stops, sizes, strict=True)):
            return full_bounds(sizes), None
        return tuple(zip(starts, stops, strict=True)), steps


class ShardedTensorProxy(Tensor):
    """A whole tensor, or a view of one, of which only some parts are here.

    Views of it are made without any values; everything else gets the values that it needs, noted as read.
    """

    _whole: _ReadRecord
    _view: Tensor  # without storage

    @classmethod
    def of(cls, source: _ReadRecord, view: Tensor) -> ShardedTensorProxy:
        """A view of a tensor, given as one of a tensor without storage."""
        made: ShardedTensorProxy = torch.Tensor._make_wrapper_subclass(
            cls,
            view.shape,
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=source.device,
        )
        made._whole, made._view = source, view
        return made

    def tolist(self) -> Any:
        """See `Tensor.tolist`, which refuses what is no plain tensor; so does `numpy`."""
        return self._whole.read(self._view).tolist()

    @override
    def numpy(self, *, force: bool = False) -> Any:
        return self._whole.read(self._view).numpy(force=force)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Partial({self._whole.name}, {tuple(self.shape)} {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Views without values, everything else with those that it needs."""
        kwargs = kwargs or {}
        # Without autograd, operators that are made of others come here whole: those of `to` and `contiguous`
        # may be views, or not.
        made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        first = args[0] if args else None
        if isinstance(first, ShardedTensorProxy) and _is_view(func):
            made = func(first._view, *args[1:], **kwargs)
            return tree_map_only(Tensor, lambda view: cls.of(first._whole, view), made)
        args, kwargs = tree_map_only(
            ShardedTensorProxy, lambda own: own._whole.read(own._view), (args, kwargs)
        )
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """Whether an operator gives views of its first argument."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def sharded_proxy(
    name: str, shape: Sequence[int], parts: Sequence[tuple[Bounds, Tensor]], *, like: Tensor
) -> Tensor:
    """A tensor that passes for a whole one.

    Args:
        name: for messages.
        shape: of the whole one.
        parts: what is here of it; none: nothing.
        like: of its dtype and on its device.
    """
    view = torch.empty(tuple(shape), dtype=like.dtype, device="meta")
    return ShardedTensorProxy.of(_ReadRecord(name, tuple(shape), like.device, parts), view)


def record_reads(name: str, tensor: Tensor, reads: list[Bounds]) -> Tensor:
    """A tensor of which all is here, and which adds to `reads` what of it is read."""
    shape = tuple(tensor.shape)
    source = _ReadRecord(name, shape, tensor.device, [(full_bounds(shape), tensor)], reads)
    return ShardedTensorProxy.of(source, torch.empty(shape, dtype=tensor.dtype, device="meta"))


def merge_overlapping(reads: Iterable[Bounds]) -> tuple[Bounds, ...]:
    """Bounds that hold all of these and have nothing in common, in order."""
    found: list[Bounds] = []
    for bounds in reads:
        own, common = bounds, [bounds]
        while common:
            common = [other for other in found if intersection(own, other) is not None]
            found = [other for other in found if other not in common]
            own = tuple(
                (min(start for start, _ in dim), max(stop for _, stop in dim))
                for dim in zip(own, *common, strict=True)
            )
        found.append(own)
    return tuple(sorted(found))


def slices_of(bounds: Bounds, *, within: Bounds | None = None) -> tuple[slice, ...]:
    """What takes bounds out of a whole tensor, or out of the part of it `within` other bounds."""
    starts = [start for start, _ in within] if within is not None else [0] * len(bounds)
    return tuple(
        slice(start - first, stop - first) for (start, stop), first in zip(bounds, starts, strict=True)
    )


def bounds_text(bounds: Bounds) -> str:
    """As in "0:8,16:32"."""
    return ",".join(f"{start}:{stop}" for start, stop in bounds)


def shard_key(name: str, bounds: Bounds, *, shape: Sequence[int]) -> str:
    """Names a part of a tensor of that shape in a fingerprint; all of it by the tensor's own name."""
    return name if bounds == full_bounds(tuple(shape)) else f"{name}@{bounds_text(bounds)}"


def parse_bounds(given: Sequence[Sequence[int]]) -> Bounds:
    """Bounds that have been JSON."""
    return tuple((start, stop) for start, stop in given)


def parse_ranges(given: Mapping[str, Sequence[Sequence[Sequence[int]]]]) -> ShardRanges:
    """`ShardRanges` that have been JSON."""
    return {name: tuple(parse_bounds(bounds) for bounds in own) for name, own in given.items()}


def _told(parts: Sequence[tuple[Bounds, Tensor]]) -> str:
    return " and ".join(bounds_text(bounds) for bounds, _ in parts) or "nothing"
