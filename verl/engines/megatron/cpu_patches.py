"""Megatron-Core on a CPU: the places where version 0.16 takes a GPU for granted, answered for a CPU while an
engine works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_ABSENT = object()


class _OnTheCPU(TorchFunctionMode):
    """New tensors that are asked for on `cuda` are made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


class _InOrder:
    """A stream or event where everything is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __enter__(self) -> _InOrder:
        return self

    def __exit__(self, *_: Any) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., _InOrder]:
        return _InOrder


def _nothing(*_: Any, **__: Any) -> None:
    return


def _itself(thing: Any, *_: Any, **__: Any) -> Any:
    return thing


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _named_as_on_cuda(own_type: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, by whose text Megatron's optimizers tell precisions."""

    def type_of(tensor: Tensor, *given: Any, **options: Any) -> Any:
        name = own_type(tensor, *given, **options)
        is_name = not given and not options and isinstance(name, str) and "cuda" not in name
        return name.replace("torch.", "torch.cuda.", 1) if is_name else name

    return type_of


def _replacements() -> list[tuple[Any, str, Any]]:
    """Owner, name and what stands in its place."""

    def state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new: Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new)

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "empty_cache", _nothing),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", state),
        (torch.cuda, "set_rng_state", set_state),
        (torch.cuda, "Stream", _InOrder),
        (torch.cuda, "Event", _InOrder),
        (torch.cuda, "stream", _InOrder),
        (torch.cuda, "current_stream", _InOrder),
        (torch.cuda, "default_stream", _InOrder),
        (Tensor, "cuda", _itself),
        (Tensor, "record_stream", _nothing),
        (Tensor, "type", _named_as_on_cuda(Tensor.type)),
        (nn.Module, "cuda", _itself),
        (megatron_random, "_get_cuda_rng_state", state),
        (megatron_random, "_set_cuda_rng_state", set_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _to_cpu),
    ]


@contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """Inside, Megatron-Core works on the device: on a GPU as it is, on a CPU with stand-ins for what only a
    GPU has.
    """
    with ExitStack() as stack:
        # 0.16.1 reads this name of TransformerEngine also where that is not installed; None stands for its
        # absence, on a GPU too.
        if "te_general_gemm" not in vars(moe_utils):
            stack.enter_context(_replaced(moe_utils, "te_general_gemm", None))
        if device.type != "cuda":
            for owner, name, stand_in in _replacements():
                stack.enter_context(_replaced(owner, name, stand_in))
            stack.enter_context(_OnTheCPU())
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
