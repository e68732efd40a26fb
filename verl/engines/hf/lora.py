"""LoRA adapters on the linear layers of a model, by PEFT, which are trained instead of the weights."""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.config.roles import LoraConfig

# Optional dependency, imported only for models with a LoRA adapter.
_PEFT = "peft"
_ADAPTER = "default"


def add_lora(transformer: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the weights and add LoRA adapters B A alpha / rank to the layers in `config.targets`, in place.

    LoRA, https://arxiv.org/abs/2106.09685, section 4.1. `reset_lora` sets the initial values.

    Raises:
        ValueError: PEFT is not installed, or no linear layer has such a name.
    """
    try:
        peft = importlib.import_module(_PEFT)
    except ImportError as error:
        raise ValueError("need PEFT for lora.rank above 0: pip install peft") from error
    targets = list(config.targets)
    linears = (name for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
    names = {name.rpartition(".")[2] for name in linears}
    if missing := set(targets) - names:
        raise ValueError(
            f"need names of matrices in lora.targets, got {sorted(missing)}; "
            f"this model has {', '.join(sorted(names))}"
        )
    # PEFT's initial values would depend on the global random state and on the shard.
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights=False
    )
    peft.inject_adapter_in_model(options, transformer, adapter_name=_ADAPTER)
    transformer.requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        # The score head of a reward model is new and small: it is trained whole.
        parameter.requires_grad_(is_lora_parameter(name) or name == "score.weight")


def is_lora_parameter(name: str) -> bool:
    """True if the parameter of that name belongs to a LoRA adapter."""
    return ".lora_A." in name or ".lora_B." in name


def has_lora(transformer: nn.Module) -> bool:
    """True if the model has a LoRA adapter."""
    return any(is_lora_parameter(name) for name, _ in transformer.named_parameters())


def initial_lora_weight(name: str, shape: torch.Size) -> Tensor:
    """Initial value of a LoRA weight: B is 0, A uniform in +- 1 / sqrt(inputs).

    It depends on the name alone, so it is the same for every sharding.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def reset_lora(transformer: PreTrainedModel) -> None:
    """Set the LoRA weights of a model on one device to their initial values."""
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name):
            parameter.copy_(initial_lora_weight(name, parameter.shape))


@contextmanager
def disable_lora(transformer: PreTrainedModel) -> Iterator[None]:
    """Context in which the model computes without its LoRA adapter.

    Raises:
        ValueError: the model has no adapter.
    """
    if not has_lora(transformer):
        raise ValueError(
            "need a LoRA adapter to switch off, got a model without; set policy.lora.rank above 0"
        )
    lora_layer = importlib.import_module("peft.tuners.lora").LoraLayer
    layers = [module for module in transformer.modules() if isinstance(module, lora_layer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_name(name: str) -> str:
    """Name of a parameter in the model without an adapter."""
    return name.replace(".base_layer.", ".")


def lora_scaling(module: nn.Module) -> float:
    """Factor alpha / rank of the LoRA adapter of a layer."""
    scaling: float = module.scaling[_ADAPTER]  # type: ignore[index, assignment]
    return scaling
