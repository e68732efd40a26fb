"""Models on the meta device: built and sharded without memory, then given that of the local shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel


def empty_transformer(source: Path | PretrainedConfig, family: Any) -> PreTrainedModel:
    """A model whose parameters are on the meta device; its buffers have their values.

    Args:
        source: folder of a model, or its configuration.
        family: class of Transformers with `from_config`, such as `AutoModelForCausalLM`.

    Raises:
        ValueError: there is no model in the folder.
    """
    try:
        config = AutoConfig.from_pretrained(source) if isinstance(source, Path) else source
        with parameters_on_meta():
            transformer: PreTrainedModel = family.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model from {str(source)!r}: {error}") from error
    transformer.tie_weights()
    return transformer.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Context in which new modules get parameters that have shapes but no memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def keep_tied_weights(transformer: PreTrainedModel) -> Iterator[None]:
    """Context that replaces parameters one by one; those that layers share are shared again at its end."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in transformer.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    yield
    for (first, first_name), *others in places.values():
        for module, name in others:
            module.register_parameter(name, first.get_parameter(first_name))
