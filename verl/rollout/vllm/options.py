"""What the run asks of vLLM beside the user's options: flags, environment, and what a request says; imports
PyTorch alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from verl.rollout.engine import ServerSpec
from verl.rollout.vllm.auth import OWNED_VARIABLE, SECRET_VARIABLE
from verl.rollout.vllm.versions import control, cpu_environment
from verl.utils.sampling_types import FinishReason, SamplingParams

MODEL = "verl"
_GUARD = "verl.rollout.vllm.auth.RequireSecret"
# Options that the run sets itself, beside those of `control`.
_OWN = {
    "model",
    "served-model-name",
    "host",
    "port",
    "dtype",
    "logprobs-mode",
    "generation-config",
    "middleware",
    "api-key",
}
_OWN |= {"worker-extension-cls", "weight-transfer-config"}
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def server_flags(spec: ServerSpec, port: int, version: str) -> list[str]:
    """The command line of a server of a version of vLLM.

    Raises:
        ValueError: an option that the run sets itself.
    """
    own = own_options(spec.options, {"model": spec.model, "dtype": spec.dtype}, version)
    place = {"served-model-name": MODEL, "host": "127.0.0.1", "port": port}
    guard = {"middleware": _GUARD} if spec.secret else {}
    on_cpu = {} if has_accelerator() else {"enforce-eager": True}
    return as_flags(
        {**own, **place, **guard, **on_cpu, **{name.replace("_", "-"): v for name, v in spec.options.items()}}
    )


def own_options(options: Mapping[str, Any], own: Mapping[str, Any], version: str) -> dict[str, Any]:
    """What the run asks of vLLM, beside the user's options, as flags without dashes in front.

    Raises:
        ValueError: the user's options have one of them.
    """
    needed = control(version)
    if taken := sorted({*_OWN, *needed} & {name.replace("_", "-") for name in options}):
        raise ValueError(f"rollout.engine_options cannot set {', '.join(taken)}: the run does")
    return {
        **own,
        **needed,
        # Of the distribution that was drawn from, not of the model's own.
        "logprobs-mode": "processed_logprobs",
        # Else it applies what the model's generation_config.json says, such as a repetition penalty.
        "generation-config": "vllm",
        "enable-prefix-caching": True,
    }


def lacking(missing: Sequence[str]) -> str:
    """What to say of an update that did not reach these parameters."""
    names = f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}"
    return f"an update came without all weights of {len(missing)} parameters, which are as they were before: {names}"


def has_accelerator() -> bool:
    """Whether this machine has one, whatever this environment can use."""
    return torch.accelerator.is_available() or any(
        Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")
    )


def server_environment(spec: ServerSpec, folder: Path, version: str) -> dict[str, str | None]:
    """Added to the environment of a server; the folder has verl in it, and nothing else."""
    own: dict[str, str | None] = {
        "PYTHONPATH": str(folder),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        OWNED_VARIABLE: "1",
        SECRET_VARIABLE: spec.secret or None,
        # vLLM would add a guard of its own.
        "VLLM_API_KEY": None,
    }
    # Compiling the few functions that vLLM compiles in any case takes half a minute, and is done for the
    # first request.
    return own if has_accelerator() else {**cpu_environment(version), "TORCH_COMPILE_DISABLE": "1", **own}


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """`{"a": 1, "b": True, "c": False, "d": {"e": 2}}` as --a 1 --b --no-c --d '{"e": 2}'."""
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


def request_body(params: SamplingParams) -> dict[str, Any]:
    """What a request for one answer says beside the model, the prompt and the seed."""
    truncation = {"top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p}
    return {
        "stream": True,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        # The most likely token is drawn from the model's own distribution.
        **(truncation if params.temperature else {"top_p": 1.0, "top_k": 0, "min_p": 0.0}),
        # A server that was joined may have other defaults.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        # Its own end of sequence is among the stop ids, if it is one.
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
