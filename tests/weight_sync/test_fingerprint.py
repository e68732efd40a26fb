"""Digests of tensors: equal bytes give equal ones, and every change shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.weight_sync.fingerprint import digest, fingerprint


def by_hand(content: bytes, numel: int) -> int:
    """The sum over 8-byte words, in whole numbers of Python."""
    words = [
        int.from_bytes(content[i : i + 8], "little", signed=True) for i in range(0, len(content) // 8 * 8, 8)
    ]
    mixed = [word ^ ((word >> 32) & 0xFFFFFFFF) for word in words]
    rest = int.from_bytes(content[len(words) * 8 :], "little")
    total = sum(word * (1 + 2 * i * 1_099_511_627_689) for i, word in enumerate(mixed)) + (2 * rest + 1) * (
        2 * numel + 1
    )
    return total % 2**64


@given(st.binary(max_size=200))
def test_a_digest_is_the_weighted_sum_of_the_words(content):
    tensor = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.zeros(0, dtype=torch.uint8)
    )
    assert digest(tensor) == by_hand(content, len(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sign_that_flips_shows_wherever_it_is(dtype):
    tensor = torch.randn(1030, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = digest(tensor)
    for i in range(len(tensor)):
        flipped = tensor.clone()
        flipped[i] = -flipped[i]
        assert digest(flipped) != whole


@given(st.integers(0, 63), st.integers(0, 1023))
def test_every_bit_counts(bit, word):
    tensor = torch.arange(1024, dtype=torch.int64) * 0x9E3779B97F4A7
    changed = tensor.clone()
    changed[word] ^= torch.tensor(1, dtype=torch.int64) << bit
    assert digest(changed) != digest(tensor)


def test_moved_and_lost_values_show_and_views_do_not():
    tensor = torch.randn(9, 5)
    swapped = tensor.clone()
    swapped[[0, 2]] = swapped[[2, 0]]
    assert len({digest(tensor), digest(swapped), digest(tensor[:-1]), digest(tensor.view(-1)[:-1])}) == 4
    assert digest(tensor.T.contiguous().T) == digest(tensor) == digest(tensor.view(3, 15))


def test_blocks_are_one_sum():
    tensor = torch.randint(-(2**62), 2**62, (2**21 + 7,), generator=torch.Generator().manual_seed(1))
    assert digest(tensor) == by_hand(tensor.numpy().tobytes(), len(tensor))


def test_a_fingerprint_is_of_names_and_digests_in_any_order():
    one = fingerprint({"a": 1, "b": 2})
    assert one == fingerprint({"b": 2, "a": 1}) and len(one) == 16
    assert (
        len({one, fingerprint({"a": 2, "b": 1}), fingerprint({"a": 1}), fingerprint({"a": 1, "c": 2})}) == 4
    )
