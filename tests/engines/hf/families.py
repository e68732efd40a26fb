"""Tiny models of many families, and what works with each: the tables in docs/models.md.

`python -m tests.engines.hf.families` writes the tables, and with names of families prints their figures.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import FAMILIES, model_input, random_prompts, tiny_codec, tiny_policy
from verl.config.roles import LoraConfig
from verl.engines.hf.attention import use_attention
from verl.engines.hf.lora import POLICY, add_lora
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.recurrent import recurrent_layers
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import SamplingParams

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
# Relative, of the gradient; absolute, of logprobs in fp32. Delta rules and experts round most.
GRADIENT_TOLERANCE, LOGPROB_TOLERANCE = 2e-5, 3e-5

PROMPTS = random_prompts([3, 9, 3, 6])
PROMPTS[2] = PROMPTS[0]  # shared in the packed line
RESPONSES = random_prompts([8, 2, 13, 5], seed=1)
WEIGHTS = torch.linspace(-1, 2, sum(map(len, RESPONSES)))

# Beside the sizes in tests/tiny.py: windows are shorter than rows, and no multiplier is 1.
_HEADS = {"head_dim": 16}
_SMALL_HEADS = {"head_dim": 8}
_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_GROUPS = {**_EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {**FAMILIES["deepseek_v3"][1], "topk_method": "greedy", "head_dim": 8}
_DELTA = {
    **_HEADS,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_CONV = {"layer_types": ["conv", "full_attention"]}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
_GRANITE = {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2}
_PER_LAYER = {**_HEADS, **_WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 200}
_LLAMA4 = {
    **_EXPERTS,
    **_SMALL_HEADS,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 5,
    "intermediate_size_mlp": 32,
}

MODELS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "cohere": {},
    "cohere2": _WINDOW,
    "cwm": {**_WINDOW, **_SMALL_HEADS},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "q_lora_rank": 16, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    "diffllama": {},
    "dots1": {**_GROUPS, **_WINDOW},
    "ernie4_5": {},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": _WINDOW,
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon_h1": _MAMBA,
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": _EXPERTS,
    "gemma": _HEADS,
    "gemma2": FAMILIES["gemma2"][1],
    "gemma3_text": FAMILIES["gemma3"][1],
    "gemma3n_text": {
        **_PER_LAYER,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**_PER_LAYER, "num_kv_shared_layers": 0},
    "glm": _HEADS,
    "glm4": _HEADS,
    "glm4_moe": {**_GROUPS, **_HEADS},
    "glm4_moe_lite": _LATENT,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": FAMILIES["gpt_oss"][1],
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": {**_GRANITE, "embedding_multiplier": 2.0},
    "granitemoe": {**_GRANITE, "num_local_experts": 4},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
    },
    "helium": _SMALL_HEADS,
    "hunyuan_v1_dense": _SMALL_HEADS,
    "hunyuan_v1_moe": {**_EXPERTS, **_SMALL_HEADS, "moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {},
    "kimi_linear": {**_LATENT, **_DELTA, **_EXPERTS, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_CONV, **_EXPERTS, "num_dense_layers": 1},
    "llama": {},
    "llama4_text": _LLAMA4,
    "mamba": {"state_size": 8},
    "mamba2": _MAMBA2,
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": {**_EXPERTS, **_SMALL_HEADS, "rotary_dim": 4},
    "ministral": {**_WINDOW, **_SMALL_HEADS},
    "ministral3": _SMALL_HEADS,
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **_SMALL_HEADS,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "time_step_min": 0.1,
    },
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": _DELTA,
    "olmoe": {**_EXPERTS, "clip_qkv": 0.5},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, **_WINDOW, "use_sliding_window": True},
    "qwen3": _HEADS,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {**_EXPERTS, **_HEADS},
    "qwen3_next": FAMILIES["qwen3_next"][1],
    "recurrent_gemma": {},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": _SMALL_HEADS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": _EXPERTS,
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
    "vaultgemma": {**_WINDOW, **_HEADS, "query_pre_attn_scalar": 16},
    "xglm": {},
    "zamba2": {
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "mamba_headdim": 16,
        "time_step_min": 0.1,
    },
}


@dataclass(frozen=True)
class FamilyStatus:
    """What works with a family.

    Attributes:
        kind: of the layers: attention or recurrent.
        gradient: relative difference of the gradient of packed rows with a shared prompt, with activations
            recomputed, from that of the family's own forward pass of each row.
        logprobs: largest difference of the logprobs of sampled tokens from those of the trainer.
        recomputes: False if the family has no gradient checkpointing.
        lora: targets of `policy.lora`: default, all-linear, in_proj or none.
    """

    kind: str
    gradient: float
    logprobs: float
    recomputes: bool
    lora: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Cells of the table: layers, training, generation, LoRA."""
        training = "exact" if self.gradient <= GRADIENT_TOLERANCE else f"off by {self.gradient:.0e}"
        if not self.recomputes:
            training += ", without `gradient_checkpointing`"
        generation = "exact" if self.logprobs <= LOGPROB_TOLERANCE else f"off by {self.logprobs:.0e}"
        return self.kind, training, generation, self.lora


def flat_gradient(policy: PolicyModel) -> Tensor:
    """All gradients in one line; clears them."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    policy.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def packed_gradient(policy: PolicyModel) -> Tensor:
    with policy.forward_mode():
        inputs = model_input(PROMPTS, RESPONSES)
        logprobs = policy.token_logprobs(inputs, temperature=1.0, chunk=1000)[0]
    (logprobs * WEIGHTS).sum().backward()
    return flat_gradient(policy)


def own_gradient(policy: PolicyModel) -> Tensor:
    """Gradient of the same loss by the family's own forward pass, row by row."""
    weights = WEIGHTS.split([len(response) for response in RESPONSES])
    for prompt, response, own_weights in zip(PROMPTS, RESPONSES, weights, strict=True):
        with use_attention(policy.transformer, "eager"):
            logits = policy.transformer(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        (own * own_weights).sum().backward()
    return flat_gradient(policy)


def sampled_difference(policy: PolicyModel) -> float:
    """Largest difference of sampled logprobs from those of the trainer; rows wait for slots and move."""
    prompts = [PROMPTS[0], PROMPTS[1]]
    params = [SamplingParams(n=3, max_tokens=tokens, seed=1, temperature=1.0) for tokens in (5, 8)]
    groups = EmbeddedEngine(policy, tiny_codec(), max_slots=4).generate(prompts, params)
    answers = [(prompt, each) for prompt, group in zip(prompts, groups, strict=True) for each in group]
    inputs = model_input([prompt for prompt, _ in answers], [each.token_ids for _, each in answers])
    policy.num_ids = tiny_codec().num_ids
    with torch.no_grad(), policy.forward_mode():
        logprobs = policy.token_logprobs(inputs, temperature=1.0, chunk=1000)[0]
    policy.num_ids = None
    sampled = torch.tensor([logprob for _, each in answers for logprob in each.logprobs])
    return float((logprobs - sampled).abs().max())


def lora_targets(policy: PolicyModel) -> str:
    """Shortest setting of the targets with which the family has adapters."""
    for name, config in {
        "default": LoraConfig(rank=2),
        "`all-linear`": LoraConfig(rank=2, targets=("all-linear",)),
        "`in_proj`": LoraConfig(rank=2, targets=("in_proj",)),
    }.items():
        try:
            add_lora(policy.transformer, config)
        except ValueError:
            continue
        policy.adapter = POLICY
        for key, parameter in policy.named_parameters():
            if ".lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        policy.check_forward()
        packed_gradient(policy)
        return name
    return "none"


@cache
def status_of(name: str) -> FamilyStatus | str:
    """What works with a family, or the reason why it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = tiny_policy(name, **MODELS[name])
        try:
            policy.check_forward()
        except ValueError as error:
            return re.sub(r".*by rows: ", "", str(error)).partition("; use a family")[0]
        expected, logprobs = own_gradient(policy), sampled_difference(policy)
        recomputes = policy.transformer.supports_gradient_checkpointing
        if recomputes:
            policy.enable_gradient_checkpointing()
        policy.train()
        difference = float((packed_gradient(policy) - expected).norm() / expected.norm())
        policy.eval()
        kind = "recurrent" if recurrent_layers(policy.transformer) else "attention"
        return FamilyStatus(kind, difference, logprobs, recomputes, lora_targets(policy))


def reason_of(status: str) -> str:
    """The reason without figures: the known one if there is one."""
    known = re.search(r" \((its .*|it .*)\)$", status)
    return known[1] if known else re.sub(r"its logits differ.*", "its logits differ", status)


def tables() -> str:
    """Markdown of the tables."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    for name in MODELS:
        status = status_of(name)
        if isinstance(status, str):
            refused[reason_of(status)].append(f"`{name}`")
        else:
            groups[status.row].append(f"`{name}`")
    lines = ["| families | layers | training | embedded generation | LoRA targets |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join([', '.join(names), *row])} |" for row, names in sorted(groups.items())]
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(refused.items())]
    return "\n".join(lines) + "\n"


def documented() -> dict[str, tuple[str, ...]]:
    """Cells of the tables in the documentation, by family."""
    block = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows: dict[str, tuple[str, ...]] = {}
    for line in re.findall(r"^\| (`.*) \|$", block, re.MULTILINE):
        names, *cells = line.split(" | ")
        rows |= {name.strip("`"): tuple(cells) for name in names.split(", ")}
    return rows


if __name__ == "__main__":
    if sys.argv[1:]:
        for chosen in sys.argv[1:]:
            print(chosen, status_of(chosen))
    else:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(head + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")
