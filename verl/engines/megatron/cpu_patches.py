"""Patches with which Megatron-Core 0.16, which requires a GPU, runs on a CPU while an engine is active."""

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


class _CudaToCpu(TorchFunctionMode):
    """Creates on the CPU the tensors that are requested on `cuda`."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


class _NullStream:
    """A CUDA stream or event without effect: on a CPU all operations run in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: Any) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., _NullStream]:
        return _NullStream


def _patches() -> list[tuple[Any, str, Any]]:
    """Owner, attribute and replacement of each patch."""
    tensor_type = Tensor.type

    def do_nothing(*_: Any, **__: Any) -> None:
        return

    def identity(value: Any, *_: Any, **__: Any) -> Any:
        return value

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    def cuda_type(tensor: Tensor, *args: Any, **options: Any) -> Any:
        # Megatron's optimizers recognize precisions by texts such as torch.cuda.FloatTensor.
        name = tensor_type(tensor, *args, **options)
        is_name = not args and not options and isinstance(name, str) and "cuda" not in name
        return name.replace("torch.", "torch.cuda.", 1) if is_name else name

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def set_state(new: Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new)

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", do_nothing),
        (torch.cuda, "empty_cache", do_nothing),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (torch.cuda, "Stream", _NullStream),
        (torch.cuda, "Event", _NullStream),
        (torch.cuda, "stream", _NullStream),
        (torch.cuda, "current_stream", _NullStream),
        (torch.cuda, "default_stream", _NullStream),
        (Tensor, "cuda", identity),
        (Tensor, "record_stream", do_nothing),
        (Tensor, "type", cuda_type),
        (nn.Module, "cuda", identity),
        (megatron_random, "_get_cuda_rng_state", get_state),
        (megatron_random, "_set_cuda_rng_state", set_state),
        (token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu),
    ]


@contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """Context in which Megatron-Core runs on the device: unchanged on a GPU, patched on a CPU."""
    with ExitStack() as stack:
        # On a GPU too: 0.16.1 reads this name of TransformerEngine even if that is not installed, where None
        # means that it is absent.
        if "te_general_gemm" not in vars(moe_utils):
            stack.enter_context(_patched(moe_utils, "te_general_gemm", None))
        if device.type != "cuda":
            for owner, name, replacement in _patches():
                stack.enter_context(_patched(owner, name, replacement))
            stack.enter_context(_CudaToCpu())
        yield


@contextmanager
def _patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    # An inherited attribute is absent from `vars`, and is restored by deleting the patch.
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
