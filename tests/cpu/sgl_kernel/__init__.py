"""Stand-in for SGLang's compiled kernels on a machine without an accelerator; those that a plain model needs
have a slow way in SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__version__ = "0.4.10"

# Some model files of SGLang name these operators when they are imported. No others are declared: the presence
# of `convert_weight_packed` is how SGLang finds out that the real kernels are there.
_NAMED_AT_IMPORT = (
    "fused_sigmoid_mul_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_gdn_gating_cpu",
    "fused_input_proj_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_rmsnorm_gated_cpu",
    "fused_qk_rmsnorm_cpu",
    "fused_qk_norm_rope_cpu",
    "multimodal_rotary_embedding_cpu",
    "apply_multidimensional_rope_cpu",
    "l2norm_cpu",
)


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the stand-in for sgl_kernel has no {name}")

    return kernel


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)


def copy_all_layer_kv_cache_cpu(*_: Any, **__: Any) -> None:
    raise NotImplementedError("the stand-in for sgl_kernel has no copy_all_layer_kv_cache_cpu")


def _without_pinned_memory() -> None:
    """Low-rank additions ask for pinned memory always, which PyTorch refuses where no accelerator is."""

    def unpinned(create: Callable[..., Any]) -> Callable[..., Any]:
        def created(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
            return create(*args, **options)

        return created

    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self


for _name in _NAMED_AT_IMPORT:
    setattr(torch.ops.sgl_kernel, _name, _missing(_name))
if not torch.accelerator.is_available():
    _without_pinned_memory()
