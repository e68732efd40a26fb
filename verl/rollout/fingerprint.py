"""Which weights an engine has: a digest of each tensor and one text for all; imports PyTorch alone, as engines' own processes load it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# A prime near 2^40: places that are some power of two apart must not have the same weight.
_STRIDE = 1_099_511_627_689
_LANE_BYTES = 8


def digest(tensor: Tensor) -> int:
    """A 64-bit number of the bytes of a tensor and their order; equal on every device.

    The sum over 8-byte words of word * (1 + place * stride), modulo 2^64: any single changed, lost or moved word changes it.
    """
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // _LANE_BYTES * _LANE_BYTES
    words = content[:whole].view(torch.int64) if content.data_ptr() % _LANE_BYTES == 0 else content[:whole].clone().view(torch.int64)
    places = torch.arange(len(words), device=words.device) * _STRIDE + 1
    rest = int.from_bytes(bytes(content[whole:].tolist()), "little")
    total = int((words * places).sum()) + (rest + 1) * (tensor.numel() + 1)
    return total % 2**64


def fingerprint(digests: Mapping[str, int]) -> str:
    """One text for named tensors, whatever their order."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
