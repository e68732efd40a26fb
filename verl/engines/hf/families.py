"""Properties of model families that the configuration tells: longest rows, sizes in tokens, the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Context of a model whose configuration names none, such as Mamba.
UNLIMITED = 1 << 30
# Sizes in tokens beyond which families compute otherwise: windows, chunks, thresholds, selected tokens. They
# are attributes of configurations and of layers.
TOKEN_SIZES = ("sliding_window", "attention_chunk_size", "floor_scale", "index_topk")

# Known reasons why families cannot be run by rows. `Backbone.check_forward` finds these, and others, by
# numbers.
_OWN_ATTENTION = "its attention does not use the Transformers attention interface"
REFUSED = {
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"), _OWN_ATTENTION),
    "llama4_text": "its temperature depends on the place in the packed line; set attn_temperature_tuning to "
    "false in config.json if rows are shorter than floor_scale tokens",
    "deepseek_v32": "it selects the tokens to attend to",
    "diffllama": "it attends twice in one layer",
    "minimax": "its linear attention has a cache of its own kind",
    "recurrent_gemma": "its recurrent state is kept in the layer",
    "rwkv": "its recurrent state is kept in the layer",
}


def context_length(config: PretrainedConfig) -> int:
    """Tokens of the longest row that a model computes as any shorter one.

    With the rope type `longrope` (Phi-3, Phi-4-mini) all positions of a sequence are rotated otherwise once
    it has more than `original_max_position_embeddings` tokens. Then packed rows would depend on each other,
    and keys in a cache would be wrong, so longer rows are not accepted.
    """
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None) or UNLIMITED]
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings") or limits[0])
    return int(min(limits))


@contextmanager
def small_token_sizes(transformer: PreTrainedModel, size: int) -> Iterator[None]:
    """Context in which windows, chunks and the like of a model are `size` tokens: few tokens show them."""
    configs = {id(m.config): m.config for m in transformer.modules() if isinstance(m, PreTrainedModel)}
    text = transformer.config.get_text_config()
    owners: list[Any] = [*{**configs, id(text): text}.values(), *transformer.modules()]
    before: list[tuple[Any, str, Any]] = []
    for owner in owners:
        for name in TOKEN_SIZES:
            value = vars(owner).get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > size:
                before.append((owner, name, value))
                setattr(owner, name, size)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class GivenStates:
    """Output of a base model of which only the final states [1, M, hidden] are there."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, key: int) -> Tensor | None:
        return self.last_hidden_state if key == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def base_of(transformer: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    base: Any = transformer.base_model
    # The prefix of some families names no attribute of their causal language model, as in Llama 4.
    inner = getattr(transformer, "model", None)
    return inner if base is transformer and isinstance(inner, PreTrainedModel) else base


def decoder_layers(transformer: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, whose weights are gathered together where they are sharded.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers.
    """
    count = transformer.config.get_text_config().num_hidden_layers
    for module in base_of(transformer).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(
        f"need a list of {count} layers in a model that is sharded, and there is none in the family "
        f"{transformer.config.model_type!r}; set engine=local"
    )


def family_logits(transformer: PreTrainedModel, states: Tensor) -> Tensor:
    """[M, V] fp32 from final states [M, hidden], by the family's own code: with its scale, cap and bias."""
    # What follows the matrix product is computed in fp32.
    head = transformer.get_output_embeddings()
    in_fp32 = head.register_forward_hook(lambda module, args, output: output.float())
    # The code of OPT calls the decoder in the base model.
    bases: dict[int, nn.Module] = {
        id(base): base for base in (base_of(transformer), transformer.get_decoder())
    }
    bases.pop(id(transformer), None)
    for base in bases.values():
        base.forward = lambda *args, **kwargs: GivenStates(states[None])
    try:
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        logits: Tensor = transformer(input_ids=ids, use_cache=False).logits[0]
    finally:
        in_fp32.remove()
        for base in bases.values():
            del base.forward  # the method of its class is in use again
    return logits.float()
