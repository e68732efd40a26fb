"""Inference servers by name, and the specs of the servers that a run starts or joins."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from verl.config.rollout import RolloutConfig
from verl.config.run import TrainerConfig
from verl.rollout.inference_server import InferenceServer, ServerSpec
from verl.weight_sync.types import Transport

# Imported where one is chosen.
SERVERS = {
    "vllm": "verl.rollout.vllm.server:VLLMServer",
    "sglang": "verl.rollout.sglang.server:SGLangServer",
    "served": "verl.rollout.server.embedded_server:EmbeddedServer",
    "http": "verl.rollout.openai_engine:HTTPEngine",
}
# Settings of a run in the options of an engine.
_OPTIONS_OF_RUN: dict[str, Callable[[RolloutConfig], dict[str, Any]]] = {
    "served": lambda rollout: {
        "max_slots": rollout.max_slots,
        **({} if rollout.prefix_tokens is None else {"prefix_tokens": rollout.prefix_tokens}),
    }
}


def server_class(name: str) -> type[InferenceServer]:
    """Class of an engine by its name in `SERVERS`, or as "package.module:Class".

    Raises:
        ValueError: there is none.
    """
    module, colon, attribute = SERVERS.get(name, name).partition(":")
    try:
        found = vars(importlib.import_module(module))[attribute] if colon else None
    except (ImportError, KeyError) as error:
        raise ValueError(f"cannot load rollout.engine {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, InferenceServer)):
        raise ValueError(
            f"need rollout.engine as one of {', '.join(SERVERS)}, or package.module:Class of an "
            f"InferenceServer, got {name!r}"
        )
    return found


def server_specs(config: TrainerConfig, source: str, dtype: str) -> list[ServerSpec]:
    """Specs of the servers that a run joins and starts at first.

    Args:
        config: of the run.
        source: folder of the policy as it was at the start.
        dtype: of the weights that they serve, as PyTorch names it.
    """
    rollout = config.rollout
    joined = [(f"{rollout.engine}-at-{i}", address) for i, address in enumerate(rollout.addresses)]
    started = [(f"{rollout.engine}-{i}", None) for i in range(rollout.servers)]
    return [server_spec(config, source, dtype, name=n, address=a) for n, a in (*joined, *started)]


def server_spec(
    config: TrainerConfig, source: str, dtype: str, *, name: str, address: str | None
) -> ServerSpec:
    """Spec of one server; without an address the run starts it, with a secret of its own."""
    rollout = config.rollout
    options = _OPTIONS_OF_RUN.get(rollout.engine, lambda _: {})(rollout)
    transports: dict[str, Transport] = {name: name for name in get_args(Transport)}
    return ServerSpec(
        name,
        source,
        {**options, **rollout.engine_options.values},
        address,
        rollout.python,
        secrets.token_hex(32) if address is None else os.environ.get(rollout.secret_env, ""),
        Path(config.output_dir) / "logs" / f"{name}.log",
        dtype,
        transports.get(rollout.weights_via),  # None for auto: the engine chooses
        rollout.timeout_s,
    )
