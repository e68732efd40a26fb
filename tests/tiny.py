"""Small random models of several families, with the character tokenizer, for tests that run a real model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from verl.data.batch import Batch, ModelInput
from verl.data.trajectory import Trajectory
from verl.engines.hf.models import PolicyModel, Precision
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec, character_tokenizer

WINDOW = 5  # Shorter than the rows of the tests, so that it decides what they see.

_GEMMA = {"num_key_value_heads": 2, "head_dim": 16}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Latent attention, whose values are smaller than its keys, and experts in the second layer.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# A gated delta rule in the first layer, and attention that rotates a part of each head in the second.
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# Name -> model type of Transformers and what differs from the common sizes: grouped heads and tied ones
# unless said.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_untied_mha": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": (
        "gemma2",
        {
            **_GEMMA,
            **_WINDOWED,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, **_WINDOWED, "query_pre_attn_scalar": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, **_WINDOWED, "head_dim": 16}),
    "qwen3_next": ("qwen3_next", {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16}),
}


def tiny_transformer(family: str = "qwen2", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh random model of a family of `FAMILIES`, or of any model type of Transformers.

    It has 2 layers of 32 hidden units.
    """
    model_type, own = FAMILIES.get(family, (family, {}))
    tokenizer = character_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Ten times the usual spread: with it distributions are far from uniform and attention is far from a
        # mean.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **own, **changes}))
            .float()
            .eval()
        )


def tiny_policy(
    family: str = "qwen2", precision: Precision = "fp32", *, seed: int = 0, **changes: Any
) -> PolicyModel:
    """A fresh policy on `tiny_transformer`."""
    return PolicyModel(tiny_transformer(family, seed=seed, **changes), precision)


@cache
def shared_policy(family: str = "qwen2") -> PolicyModel:
    """A policy in fp32 made once for all tests, which must leave its weights as they are."""
    return tiny_policy(family)


def tiny_codec() -> TextCodec:
    """The character tokenizer behind a codec; token 1 ends an answer."""
    return TextCodec(character_tokenizer())


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of 4 tokens, <eos> 0, a 1, b 2, ab 3, that never writes "ab" as two."""
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def random_prompts(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Prompts of printable characters, one for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 99, (length,), generator=generator).tolist() for length in lengths]


def batch_of(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Rows of given ids, all sampled, without rewards or logprobs."""
    return Batch.from_trajectories(
        [
            Trajectory(Prompt(""), list(p), list(r), [True] * len(r), None, [0] * len(r), i)
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
    )


def model_input(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, packed: bool = True
) -> ModelInput:
    """The same rows as a model reads them, on the CPU."""
    return ModelInput.from_batch(batch_of(prompts, responses), packed=packed, device=torch.device("cpu"))


def kept_by_hand(probs: list[float], params: SamplingParams) -> set[int]:
    """Tokens that survive the truncation, one rule after the other."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, mass = set(order[: params.top_k or None]), 0.0
    for token in order:
        if mass >= params.top_p or probs[token] < params.min_p * max(probs):
            kept.discard(token)
        mass += probs[token]
    return kept
