"""Sizes of micro-batches and of chunks of logits that fit a device, where no setting gives them."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from verl.config.roles import RoleConfig

# Enough to keep a GPU busy.
MOST_TOKENS, _MOST_LOGITS = 16_384, 4096
# A core is busy with a few hundred tokens, and more only take memory.
_LEAST_TOKENS = 256
_CPU_ACTIVATION_BYTES = 2**29
_LOGITS_BYTES = {"cpu": 2**25}
_GPU_LOGITS_BYTES = 2**30


def micro_batch_tokens(role: RoleConfig, config: PretrainedConfig, *, on_cpu: bool) -> int:
    """Most tokens of a forward and backward pass: `micro_batch_tokens`, or what suits the device.

    On a CPU the activations of a micro-batch take at most 0.5 GiB, or those of 256 tokens.
    """
    if role.micro_batch_tokens is not None:
        return role.micro_batch_tokens
    if not on_cpu:
        return MOST_TOKENS
    fitting = _CPU_ACTIVATION_BYTES // activation_bytes(role, config)
    return int(min(MOST_TOKENS, max(_LEAST_TOKENS, fitting)))


def activation_bytes(role: RoleConfig, config: PretrainedConfig) -> int:
    """Bytes that a decoder keeps of a token for the backward pass, without its logits.

    Of each layer: two norms with their inputs and outputs, queries, keys, values and the output of attention
    (10 times the width), and the four factors of a gated MLP. A recomputed layer keeps its input.
    """
    text = config.get_text_config().to_dict()
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    inner = text.get("intermediate_size") or 4 * hidden
    bytes_per_number = 4 if role.precision == "fp32" else 2
    of_layer = 10 * hidden + 4 * inner
    if role.gradient_checkpointing:
        return int(bytes_per_number * (layers * hidden + of_layer))
    return int(bytes_per_number * layers * of_layer)


def logits_chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose fp32 logits take at most 32 MiB on a CPU and 1 GiB elsewhere, at most 4096."""
    fitting = _LOGITS_BYTES.get(device.type, _GPU_LOGITS_BYTES) // (4 * vocabulary)
    return max(1, min(_MOST_LOGITS, fitting))
