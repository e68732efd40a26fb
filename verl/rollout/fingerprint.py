"""Which weights an engine has: a digest of each tensor and one text for all; imports PyTorch alone, as engines' own processes load it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# A prime near 2^40: places that are some power of two apart must not have the same weight.
_STRIDE = 1_099_511_627_689
_WORD_BYTES = 8
# Bounds the memory that the sum takes beside the tensor, to twice this.
_BLOCK_BYTES = 2**24


def digest(tensor: Tensor) -> int:
    """A 64-bit number of the bytes of a tensor and their order; equal on every device.

    The sum over 8-byte words of mixed(word) * (1 + 2 * place * stride), modulo 2^64. Mixing is one to one and the weights are odd, so any
    single word that changes changes it.
    """
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // _WORD_BYTES * _WORD_BYTES
    rest = int.from_bytes(bytes(content[whole:].tolist()), "little")
    total = (2 * rest + 1) * (2 * tensor.numel() + 1)
    for start in range(0, whole, _BLOCK_BYTES):
        block = content[start : min(whole, start + _BLOCK_BYTES)]
        words = (block if block.data_ptr() % _WORD_BYTES == 0 else block.clone()).view(torch.int64)
        first = start // _WORD_BYTES
        weights = torch.arange(first, first + len(words), device=words.device) * (2 * _STRIDE) + 1
        # The upper half goes into the lower: a sign alone, at the top of a word, would be lost in a sum of products of even numbers.
        total += int(((words ^ ((words >> 32) & 0xFFFFFFFF)) * weights).sum())
    return total % 2**64


def fingerprint(digests: Mapping[str, int]) -> str:
    """One text for named tensors, whatever their order."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
