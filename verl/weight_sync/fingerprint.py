"""Which weights an engine has: a digest of each tensor and one text for all; imports PyTorch alone, as
engines' own processes load it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

# A prime near 2^40: places that are some power of two apart must not have the same weight.
_STRIDE = 1_099_511_627_689
_WORD_BYTES = 8
# Blocks that stay in the cache of a CPU, and blocks that keep a GPU busy: whether it is a CPU -> words.
_BLOCK_WORDS = {True: 2**17, False: 2**24}


def digest(tensor: Tensor) -> int:
    """A 64-bit number of the bytes of a tensor and their order; equal on every device.

    The sum over 8-byte words of mixed(word) * (1 + 2 * place * stride), modulo 2^64. Mixing is one to one and
    the weights are odd, so any single word that changes changes it.
    """
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // _WORD_BYTES * _WORD_BYTES
    rest = int.from_bytes(bytes(content[whole:].tolist()), "little")
    aligned = content[:whole] if content.data_ptr() % _WORD_BYTES == 0 else content[:whole].clone()
    words = aligned.view(torch.int64)
    is_cpu = words.device.type == "cpu"
    size = max(1, min(len(words), _BLOCK_WORDS[is_cpu]))
    weights = _cpu_weights()[:size] if is_cpu else _weights(size, words.device)
    mixed = torch.empty_like(weights)
    total = (2 * rest + 1) * (2 * tensor.numel() + 1)
    for first in range(0, len(words), size):
        block = words[first : first + size]
        own = mixed[: len(block)]
        # The upper half goes into the lower: a sign alone, at the top of a word, would be lost in a sum of
        # products of even numbers.
        torch.bitwise_right_shift(block, 32, out=own)
        own &= 0xFFFFFFFF
        own ^= block
        plain = int(own.sum()) if first else 0
        own *= weights[: len(block)]
        total += int(own.sum()) + plain * 2 * _STRIDE * first
    return total % 2**64


def _weights(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) * (2 * _STRIDE) + 1


@cache
def _cpu_weights() -> Tensor:
    """Of all blocks on a CPU: most tensors are small, and to make them takes as long as to use them."""
    with torch.inference_mode(False):
        return _weights(_BLOCK_WORDS[True], torch.device("cpu"))


def fingerprint(digests: Mapping[str, int]) -> str:
    """One text for named tensors, whatever their order."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def fingerprint_of_ranks(digests: Sequence[Mapping[str, int]]) -> str:
    """One text for what the ranks of an engine have: that of one of them where all have the same."""
    if all(own == digests[0] for own in digests):
        return fingerprint(digests[0])
    return fingerprint(
        {f"{rank}:{name}": value for rank, own in enumerate(digests) for name, value in own.items()}
    )
