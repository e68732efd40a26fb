"""LoRA adapters on the layers of a model, by PEFT, which are trained instead of the weights.

One model may have several adapters, of which one at a time is used.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.config.roles import LoraConfig
from verl.engines.hf.peft_config import continued_options
from verl.utils.hub import find_adapter

# Names of adapters. "" is the model without any.
POLICY, CRITIC, REFERENCE, NO_ADAPTER = "default", "critic", "reference", ""
_PARAMETER = re.compile(
    r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.([^.]+)(?:\.|$)"
)


def import_peft() -> Any:
    """PEFT, an optional dependency that is imported only for models with adapters.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("need PEFT for LoRA adapters: pip install peft") from error


def add_lora(
    transformer: PreTrainedModel, config: LoraConfig, *, name: str = POLICY, trained: bool = True
) -> None:
    """Freeze the weights and add LoRA adapters B A alpha / rank to the layers in `config.targets`, in place.

    LoRA, https://arxiv.org/abs/2106.09685, section 4.1. With `config.path` the adapter is shaped as the one
    there. `reset_lora` or `load_adapter` sets the values.

    Args:
        transformer: may have other adapters, which stay as they are.
        config: rank, scale and layers.
        name: of the adapter.
        trained: False: it is frozen.

    Raises:
        ValueError: PEFT is not installed, no layer has such a name, or the adapter of `config.path` is of a
            kind that cannot be trained.
    """
    peft = import_peft()
    options = _options(transformer, config, peft)
    before = {n: p.requires_grad for n, p in transformer.named_parameters() if adapter_of(n)}
    is_empty = any(parameter.is_meta for parameter in transformer.parameters())
    with warnings.catch_warnings():
        # Tied embeddings of which an adapter changes one are written as two, see `merged_config`.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(options, transformer, adapter_name=name, low_cpu_mem_usage=is_empty)
    for key, parameter in transformer.named_parameters():
        # The score head of a reward model is new and small: it is trained whole.
        parameter.requires_grad_(before.get(key, trained) if adapter_of(key) else key == "score.weight")
    for dropout in _dropouts(transformer):
        dropout.p = 0.0
    if before:  # PEFT would use the new one
        use_adapter(transformer, POLICY)


def _options(transformer: PreTrainedModel, config: LoraConfig, peft: Any) -> Any:
    """PEFT's configuration of a new adapter, or of the one at `config.path`."""
    if config.path is not None:
        adapter = find_adapter(config.path)
        if adapter is None:
            raise ValueError(
                f"need a folder or hub name with adapter_config.json as lora.path, got {config.path!r}"
            )
        return continued_options(adapter, config, peft)
    layers = _layers(transformer)
    # Families derive routers from nn.Linear, which return more than one tensor.
    linears = {
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")
    }
    targets = sorted(_inner(transformer, linears)) if config.targets == ("all-linear",) else config.targets
    for setting, names in (("targets", targets), ("modules_to_save", config.modules_to_save)):
        if missing := set(names) - layers.keys():
            raise ValueError(
                f"need names of matrices in lora.{setting}, got {sorted(missing)}; "
                f"this model has {', '.join(sorted(layers))}; take some of them, or targets=all-linear"
            )
    if both := sorted({*targets} & {*config.modules_to_save}):
        raise ValueError(
            f"need each layer in one of lora.targets and lora.modules_to_save, got {both} in both; "
            "leave it out of one"
        )
    # DoRA divides by the norms of rows, and the rows of unused tokens may be 0.
    if config.use_dora and (outer := sorted({*targets} - _inner(transformer, linears))):
        raise ValueError(
            f"need linear layers below the output layer as lora.targets for lora.use_dora, got {outer}; "
            "leave them out"
        )
    # PEFT's initial values would depend on the global random state and on the shard.
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(targets),
        modules_to_save=list(config.modules_to_save) or None,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=False,
    )


def _layers(transformer: PreTrainedModel) -> dict[str, nn.Module]:
    """Linear layers and embeddings by the last part of their names, without those of adapters."""
    return {
        base_name(f"{name}.").removesuffix(".").rpartition(".")[2]: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not adapter_of(name)
    }


def _inner(transformer: PreTrainedModel, names: set[str]) -> set[str]:
    """Names of layers without the output layer, which PEFT leaves out of all-linear, too."""
    head = transformer.get_output_embeddings()
    heads = {name.rpartition(".")[2] for name, module in transformer.named_modules() if module is head}
    return names - heads - {"score"}


def adapter_of(name: str) -> str:
    """The adapter that a parameter belongs to, by the name of the parameter; "": it is of the model."""
    found = _PARAMETER.search(name)
    return found[1] if found else ""


def policy_name(name: str) -> str:
    """Name that a parameter of an adapter has in the adapter of a policy."""
    found = _PARAMETER.search(name)
    return f"{name[: found.start(1)]}{POLICY}{name[found.end(1) :]}" if found else name


def has_lora(transformer: nn.Module, name: str | None = None) -> bool:
    """True if the model has an adapter, or that of the name."""
    owners = (adapter_of(key) for key, _ in transformer.named_parameters())
    return any(owner and name in (None, owner) for owner in owners)


def initial_lora_weight(name: str, shape: torch.Size) -> Tensor:
    """Initial value of a LoRA weight: of each pair one is 0, the other uniform in +- 1 / sqrt(inputs).

    It depends on the name alone, so it is the same for every sharding, and for every name of the adapter.
    """
    if ".lora_B." in name or ".lora_embedding_A." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(policy_name(name).encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def reset_lora(transformer: PreTrainedModel, name: str = POLICY) -> None:
    """Set the weights of an adapter on one device to their initial values."""
    for key, parameter in transformer.named_parameters():
        if adapter_of(key) == name and ".lora_" in key and ".lora_magnitude_vector." not in key:
            parameter.copy_(initial_lora_weight(key, parameter.shape))
    for module in transformer.modules():
        magnitude = dict(module.named_parameters()).get(f"lora_magnitude_vector.{name}.weight")
        if magnitude is not None:
            magnitude.copy_(row_norms(dequantized(module.get_parameter("base_layer.weight"))))


def row_norms(weight: Tensor) -> Tensor:
    """[rows], the norm of each row of a matrix: the initial magnitudes of DoRA, 2402.09353, section 4.1."""
    return torch.linalg.norm(weight, dim=1)


def dequantized(parameter: Tensor) -> Tensor:
    """A weight in its floating dtype; a matrix in 4 bits is computed from them."""
    if type(parameter).__name__ != "Params4bit":
        return parameter
    weight: Tensor = importlib.import_module("peft.utils.integrations").dequantize_bnb_weight(parameter)
    return weight


def use_adapter(transformer: PreTrainedModel, name: str) -> None:
    """Let the model compute with the adapter of that name from now on; "": without any.

    Which parameters are trained stays as it is.
    """
    base = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    wrapper = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    for layer in [module for module in transformer.modules() if isinstance(module, base | wrapper)]:
        # A layer that lacks the adapter computes as the model without one.
        own = [name] if name and (isinstance(layer, base) or name in layer.modules_to_save) else []
        if layer.disable_adapters == bool(own) or (own and list(layer.active_adapters) != own):
            _switch(layer, own)


def _switch(layer: Any, own: list[str]) -> None:
    """Use these adapters of a layer, or none; PEFT would also change what is trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.enable_adapters(bool(own))
    if own:
        layer.set_adapter(own)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _dropouts(transformer: nn.Module) -> list[nn.Dropout]:
    """The dropouts of all adapters."""
    return [
        module
        for name, module in transformer.named_modules()
        if ".lora_dropout." in name and isinstance(module, nn.Dropout)
    ]


@contextmanager
def lora_dropout(transformer: nn.Module, share: float) -> Iterator[None]:
    """Context of the forward and backward pass of an update, in which a share of the inputs is set to 0.

    Everywhere else nothing is, so that the logprobs of the trainer are those of the policy.
    """
    if not share:
        yield
        return
    names = [name for name, _ in transformer.named_modules() if name.endswith(".lora_dropout")]
    modules = [transformer.get_submodule(name.removesuffix(".lora_dropout")) for name in names]
    was_training = [module.training for module in modules]
    for module in modules:
        module.train()
    for dropout in _dropouts(transformer):
        dropout.p = share
    try:
        yield
    finally:
        for module, before in zip(modules, was_training, strict=True):
            module.train(before)
        for dropout in _dropouts(transformer):
            dropout.p = 0.0


def base_name(name: str) -> str:
    """Name of a parameter in the model without adapters."""
    plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain)


def lora_scaling(module: nn.Module) -> float:
    """Factor of the policy's adapter of a layer, such as alpha / rank."""
    scaling: float = module.scaling[POLICY]  # type: ignore[index, assignment]
    return scaling
