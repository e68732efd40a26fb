"""Tensor parallelism: the plan by which the matrices of a model are split over ranks."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from verl.config.placement import ParallelConfig
from verl.engines.hf.lora import adapter_of
from verl.engines.hf.recurrent import recurrent_layers

# Families that fit this plan; others have experts, latent attention, or norms over all heads.
TENSOR_PARALLEL = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")
_HEAD_NORMS = re.compile(r"\.(q_norm|k_norm)\.weight$")


def check_parallel_sizes(transformer: PreTrainedModel, parallel: ParallelConfig, *, packing: bool) -> None:
    """Refuse sizes of tensor and sequence parallelism that do not fit the model.

    Raises:
        ValueError: a size of the model is not divisible, the family is not supported, or rows are not packed.
    """
    config = transformer.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    tensor, sequence = parallel.tensor, parallel.sequence
    if sequence > 1 and not packing:
        raise ValueError(
            f"need packing true for sequence={sequence}: a packed sequence is what its ranks share"
        )
    if sequence > 1 and recurrent_layers(transformer):
        raise ValueError(
            f"need sequence=1 for {config.model_type!r}, whose recurrent layers read a row from its start, "
            f"got {sequence}"
        )
    local_kv_heads = kv_heads // tensor
    # Key-value heads are either split over the sequence ranks, or each is repeated on several of them.
    kv_heads_fit = local_kv_heads % sequence == 0 or sequence % max(1, local_kv_heads) == 0
    if sequence > 1 and ((heads // tensor) % sequence or not kv_heads_fit):
        raise ValueError(
            f"need heads that sequence divides, got {heads} heads and {kv_heads} key-value heads over "
            f"tensor={tensor} for sequence={sequence}; take a divisor"
        )
    if tensor == 1:
        return
    if transformer.config.model_type not in TENSOR_PARALLEL:
        raise ValueError(
            f"need a family of {', '.join(TENSOR_PARALLEL)} for tensor={tensor}, got "
            f"{transformer.config.model_type!r}; set tensor=1, its weights are sharded over the data ranks"
        )
    sizes = {
        "heads": heads,
        "key-value heads": kv_heads,
        "hidden size": config.hidden_size,
        "MLP width": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }
    if unfit := [f"{size} {name}" for name, size in sizes.items() if size % tensor]:
        raise ValueError(
            f"need sizes of the model that tensor={tensor} divides, got {', '.join(unfit)}; take a divisor"
        )


def check_parallel_adapter(transformer: PreTrainedModel, parallel: ParallelConfig) -> None:
    """Refuse adapters that tensor parallelism does not split: all but LoRA on the linear layers of a block.

    Raises:
        ValueError: names the first parameter.
    """
    if parallel.tensor == 1:
        return
    names = [name for name, _ in transformer.named_parameters() if adapter_of(name)]
    if unfit := [name for name in names if "_proj.lora_A." not in name and "_proj.lora_B." not in name]:
        raise ValueError(
            f"need plain LoRA adapters on the projections of a layer for tensor={parallel.tensor}, got "
            f"{unfit[0]}; leave lora.use_dora, lora.modules_to_save and other targets out, or set tensor=1"
        )


def parallelize(transformer: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the matrices over the ranks of a mesh, in place, including LoRA weights.

    Megatron-LM, https://arxiv.org/abs/1909.08053, section 3: query, key, value, gate and up by columns,
    output and down by rows, embedding and head by the vocabulary; the logits are gathered.
    """
    styles = {
        name: style
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear and name != "lm_head" and (style := _parallel_style(name))
    }
    parallelize_module(transformer, mesh, styles)
    embedding = transformer.get_input_embeddings()
    head = transformer.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        # PyTorch would apply the index to each shard, where it is another token's row.
        embedding.register_forward_hook(partial(_detach_padding, embedding.padding_idx))
        embedding.padding_idx = None
    if head is None:
        return
    # Each call of parallelize_module makes new parameters: the head is tied before, so that it is split as
    # the embedding is, and after, so that both are one parameter again.
    if is_tied:
        head.weight = embedding.weight
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if is_tied:
        head.weight = embedding.weight


def _detach_padding(
    padding_id: int, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook of an embedding: `without_padding_gradient` of its output."""
    ids = args[0].to_local() if isinstance(args[0], DTensor) else args[0]
    return without_padding_gradient(output, ids, padding_id)


def without_padding_gradient(embedded: Tensor, ids: Tensor, padding_id: int) -> Tensor:
    """Embedded ids [..., hidden] without gradient at the padding id, as `nn.Embedding(padding_idx=...)`."""
    return torch.where((ids == padding_id)[..., None], embedded.detach(), embedded)


def _parallel_style(name: str) -> ParallelStyle | None:
    """Split of a linear layer, by its name.

    The LoRA adapter B A of a layer is split as the layer: B by columns, or A by rows.
    """
    path = name.split(".")
    is_a, is_b = "lora_A" in path, "lora_B" in path
    by_columns, by_rows = (any(part in names for part in path) for names in (_COLUMNS, _ROWS))
    if by_columns and not is_a:
        return ColwiseParallel()
    return RowwiseParallel() if by_rows and not is_b else None


def is_head_norm(name: str) -> bool:
    """True if a weight is a norm of single heads: a tensor rank has the gradient of its own heads only."""
    return _HEAD_NORMS.search(name) is not None
