"""Options that the run sets in vLLM, and the body of a request for one answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from verl.engines.hf.families import context_length
from verl.rollout.vllm.versions import weight_options
from verl.utils.sampling_types import FinishReason, SamplingParams

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
# Options that users cannot set, beside those of `weight_options`.
_RESERVED_OPTIONS = {
    "model",
    "served-model-name",
    "host",
    "port",
    "dtype",
    "logprobs-mode",
    "generation-config",
    "middleware",
    "api-key",
    "worker-extension-cls",
    "weight-transfer-config",
}


def run_options(user_options: Mapping[str, Any], version: str, *, model: str, dtype: str) -> dict[str, Any]:
    """Options that the run sets, by the names of vLLM's flags without the dashes in front.

    Raises:
        ValueError: the user sets one of them.
    """
    needed = weight_options(version)
    if taken := sorted({*_RESERVED_OPTIONS, *needed} & {name.replace("_", "-") for name in user_options}):
        raise ValueError(f"rollout.engine_options cannot set {', '.join(taken)}: the run does")
    return {
        "model": model,
        "dtype": dtype,
        **needed,
        # Logprobs of the distribution that was sampled from, not of the model's own.
        "logprobs-mode": "processed_logprobs",
        # Else vLLM applies the model's generation_config.json, which may have a repetition penalty.
        "generation-config": "vllm",
        "enable-prefix-caching": True,
    }


def check_context(config: PretrainedConfig, user_options: Mapping[str, Any]) -> None:
    """Refuse a context with which vLLM rotates positions otherwise than the trainer.

    With the rope type `longrope` it takes the factors of long sequences for all, if its context is longer.

    Raises:
        ValueError: names the longest context.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = context_length(config)
    if longest is None or limit >= longest:
        return
    wanted = user_options.get("max_model_len", user_options.get("max-model-len")) or longest
    if wanted > limit:
        raise ValueError(
            f"need rollout.engine_options.max_model_len of at most {limit} for a model with the rope type "
            f"longrope, got {wanted}: above it vLLM rotates all positions otherwise than the trainer"
        )


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Command line of options: {"a": 1, "b": True, "c": False, "d": [2]} is --a 1 --b --no-c --d 2."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", json.dumps(dict(value))]
        elif isinstance(value, Iterable) and not isinstance(value, str):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def has_accelerator() -> bool:
    """True if this machine has an accelerator, even one that PyTorch in this environment cannot use."""
    devices = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
    return torch.accelerator.is_available() or any(device.exists() for device in devices)


def request_body(params: SamplingParams) -> dict[str, Any]:
    """Body of a streamed request for one answer, without model, prompt and seed."""
    truncation: dict[str, Any] = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
    if params.temperature == 0:
        # The most likely token is drawn from the model's own distribution.
        truncation = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return {
        "stream": True,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        **truncation,
        "repetition_penalty": params.repetition_penalty,
        # A server that was joined may have other defaults.
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        # vLLM's own end token is among the stop ids, if it ends answers.
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }


def missing_weights(names: Sequence[str]) -> str:
    """Message about an update that did not reach these parameters."""
    some = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    count = f"{len(names)} parameters, which are as they were before"
    return f"an update came without all weights of {count}: {some}"
