"""Fingerprint of the weights that an engine has: a digest of each tensor, and one text for all of them.

The engines import this module in their own environments: it needs PyTorch alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

# A prime near 2^40: positions that are a power of two apart must not get the same weight.
_STRIDE = 1_099_511_627_689
_WORD_BYTES = 8
# Words of a block, by "is on a CPU": a block fits into the cache of a CPU, or keeps a GPU busy.
_BLOCK_WORDS = {True: 2**17, False: 2**24}


def digest(tensor: Tensor) -> int:
    """64-bit digest of the bytes of a tensor and of their order; equal on every device.

    The sum over 8-byte words of mixed(word) * (1 + 2 * position * stride), modulo 2^64. Mixing is one to one
    and the weights are odd, so a change of any single word changes the digest.
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
        # Mixing: XOR the upper half of each word into its lower half. Without it two flipped top bits (signs)
        # would cancel, since 2^63 times an odd weight is 2^63 modulo 2^64.
        torch.bitwise_right_shift(block, 32, out=own)
        own &= 0xFFFFFFFF
        own ^= block
        plain = int(own.sum()) if first else 0
        own *= weights[: len(block)]
        # The weights are those of the first block: a later one adds 2 * stride * first to each of them.
        total += int(own.sum()) + plain * 2 * _STRIDE * first
    return total % 2**64


def _weights(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) * (2 * _STRIDE) + 1


@cache
def _cpu_weights() -> Tensor:
    """Weights of a block on a CPU, kept: for small tensors making them takes as long as using them."""
    with torch.inference_mode(False):
        return _weights(_BLOCK_WORDS[True], torch.device("cpu"))


def fingerprint(digests: Mapping[str, int]) -> str:
    """Fingerprint of named digests, independent of their order: 16 hexadecimal digits."""
    lines = "".join(f"{name} {digests[name]:016x}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def fingerprint_of_ranks(digests: Sequence[Mapping[str, int]]) -> str:
    """Fingerprint of all ranks of an engine; if all have equal digests, that of one rank."""
    if all(own == digests[0] for own in digests):
        return fingerprint(digests[0])
    return fingerprint(
        {f"{rank}:{name}": value for rank, own in enumerate(digests) for name, value in own.items()}
    )
