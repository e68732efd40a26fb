"""Low-rank additions to the matrices of a model, by PEFT: trained instead of the weights themselves."""

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

# Loaded only where there are low-rank additions.
_PEFT = "peft"
_ADAPTER = "default"


def add_lora(transformer: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes the weights and gives the matrices named in `config.targets` additions B A alpha / rank, in
    place.

    LoRA, https://arxiv.org/abs/2106.09685, section 4.1. Their values are set by `reset_lora`.

    Raises:
        ValueError: PEFT is not installed, or no matrix has such a name.
    """
    try:
        peft = importlib.import_module(_PEFT)
    except ImportError as error:
        raise ValueError("need PEFT for lora.rank above 0: pip install 'verl[lora]'") from error
    targets = list(config.targets)
    names = {
        name.rpartition(".")[2]
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if missing := set(targets) - names:
        raise ValueError(
            f"need names of matrices in lora.targets, got {sorted(missing)}; this model has {', '.join(sorted(names))}"
        )
    # A model that is loaded has its weights; those of additions begin as LoRA has them, see
    # `reset_lora`.
    options = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights=False
    )
    peft.inject_adapter_in_model(options, transformer, adapter_name=_ADAPTER)
    transformer.requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        # A head that scores is new, and small.
        parameter.requires_grad_(is_lora_parameter(name) or name == "score.weight")


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter of that name belongs to low-rank additions."""
    return ".lora_A." in name or ".lora_B." in name


def has_lora(transformer: nn.Module) -> bool:
    """Whether the model has low-rank additions."""
    return any(is_lora_parameter(name) for name, _ in transformer.named_parameters())


def initial_lora_weight(name: str, shape: torch.Size) -> Tensor:
    """The first value of an addition: B is 0, A uniform in +- 1 / sqrt(inputs), the same for a name however
    it is sharded.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def reset_lora(transformer: PreTrainedModel) -> None:
    """Gives the additions of a model on one device their first values."""
    for name, parameter in transformer.named_parameters():
        if is_lora_parameter(name):
            parameter.copy_(initial_lora_weight(name, parameter.shape))


@contextmanager
def without_lora(transformer: PreTrainedModel) -> Iterator[None]:
    """Inside, the additions are switched off.

    Raises:
        ValueError: there are none.
    """
    layers = [module for name, module in transformer.named_modules() if name.endswith("lora_A")]
    if not layers:
        raise ValueError(
            "need low-rank additions to switch off, got a model without; set policy.lora.rank above 0"
        )
    tuners = [
        module
        for module in transformer.modules()
        if isinstance(module, importlib.import_module("peft.tuners.lora").LoraLayer)
    ]
    for tuner in tuners:
        tuner.enable_adapters(False)
    try:
        yield
    finally:
        for tuner in tuners:
            tuner.enable_adapters(True)


def base_name(name: str) -> str:
    """The name that a parameter has in the model without additions."""
    return name.replace(".base_layer.", ".")


def scaling_of(module: nn.Module) -> float:
    """Factor of the additions B A of a matrix."""
    scaling: float = module.scaling[_ADAPTER]  # type: ignore[index, assignment]
    return scaling
