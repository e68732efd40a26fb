"""Sizes of micro-batches and chunks of logits by hand, for a small and a real model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from verl.config.roles import RoleConfig
from verl.engines.memory_limits import activation_bytes, logits_chunk_tokens, micro_batch_tokens

# Sizes of a model of 135 million weights.
REAL = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49_152)
TINY = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=2, vocab_size=100)


def test_activations_of_a_token_are_those_of_all_layers_or_of_one_that_is_recomputed():
    layer = 10 * 576 + 4 * 1536
    assert activation_bytes(RoleConfig(), REAL) == 4 * 30 * layer
    assert activation_bytes(RoleConfig(precision="bf16"), REAL) == 2 * 30 * layer
    assert activation_bytes(RoleConfig(gradient_checkpointing=True), REAL) == 4 * (30 * 576 + layer)


def test_a_micro_batch_has_what_the_device_can_hold_unless_a_setting_says_it():
    sizes = [micro_batch_tokens(RoleConfig(), model, on_cpu=True) for model in (TINY, REAL)]
    assert sizes == [16_384, 2**29 // (4 * 30 * 11_904)]
    assert micro_batch_tokens(RoleConfig(), REAL, on_cpu=False) == 16_384
    assert micro_batch_tokens(RoleConfig(micro_batch_tokens=99), REAL, on_cpu=True) == 99
    huge = LlamaConfig(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80)
    assert micro_batch_tokens(RoleConfig(), huge, on_cpu=True) == 256


def test_logits_of_a_chunk_have_their_budget_of_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [logits_chunk_tokens(n, cpu) for n in (100, 49_152)] == [4096, 2**23 // 49_152]
    assert [logits_chunk_tokens(n, gpu) for n in (49_152, 151_936)] == [4096, 2**28 // 151_936]
