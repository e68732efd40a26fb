"""Models without memory: built from a configuration, spread over ranks, and only then given the memory of
what lies on this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel


def empty_transformer(source: Path | PretrainedConfig, family: Any) -> PreTrainedModel:
    """The model of a folder or configuration whose parameters have no memory yet; its buffers are what the
    configuration makes them.

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
    """Inside, parameters of new modules have shapes but no memory."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def kept_tied(transformer: PreTrainedModel) -> Iterator[None]:
    """What is done inside to the parameters one by one leaves a head that is the embedding what it is."""
    head = transformer.get_output_embeddings()
    is_tied = isinstance(head, nn.Linear) and head.weight is transformer.get_input_embeddings().weight
    yield
    if is_tied:
        transformer.get_output_embeddings().weight = transformer.get_input_embeddings().weight
