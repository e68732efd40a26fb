"""Starts a vLLM server, in this or another Python environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import verl
from verl.rollout.inference_server import ServerSpec
from verl.rollout.server_process import ServerProcess
from verl.rollout.vllm.auth import OWNED_VARIABLE, SECRET_VARIABLE
from verl.rollout.vllm.options import as_flags, has_accelerator, run_options
from verl.rollout.vllm.versions import VERSION_PROGRAM, check_version, cpu_environment
from verl.utils.network import LOOPBACK

# Name of the policy in requests.
MODEL_NAME = "verl"


def server_version(spec: ServerSpec) -> str:
    """Version of vLLM in the environment of a server to start; "" if it cannot be read.

    Raises:
        ValueError: it is too old; vLLM itself may fail at its start with an unrelated message.
    """
    python = spec.python or sys.executable
    try:
        result = subprocess.run(
            [python, "-c", VERSION_PROGRAM],
            capture_output=True,
            text=True,
            timeout=spec.timeout_s,
            env={**os.environ, "PYTHONPATH": ""},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    version = (result.stdout.split() or [""])[0]
    check_version(version, f"in the environment of {python}")
    return version


def launch_server(spec: ServerSpec, *, version: str, folder: Path, port: int) -> ServerProcess:
    """Start a server on the loopback interface.

    Args:
        spec: of the server.
        version: of vLLM.
        folder: an empty one, for as long as the server runs.
        port: to listen on.

    Raises:
        ValueError: the user sets an option that the run sets itself.
    """
    # The server imports this package, but nothing else of this environment: its own may have other versions.
    (folder / "verl").symlink_to(Path(verl.__file__).resolve().parent)
    python, module = spec.python or sys.executable, "vllm.entrypoints.openai.api_server"
    return ServerProcess(
        f"vLLM server {spec.name}",
        [python, "-m", module, *server_flags(spec, version, port=port)],
        environment=server_environment(spec, version, folder=folder),
        log=spec.log,
    )


def server_flags(spec: ServerSpec, version: str, *, port: int) -> list[str]:
    """Command line of a server.

    Raises:
        ValueError: the user sets an option that the run sets itself.
    """
    options = run_options(spec.options, version, model=spec.model, dtype=spec.dtype)
    options |= {"served-model-name": MODEL_NAME, "host": LOOPBACK, "port": port}
    options["enable-prompt-tokens-details"] = True  # else it does not say what it reused
    if spec.secret:
        options["middleware"] = "verl.rollout.vllm.auth.RequireSecret"
    if not has_accelerator():
        options["enforce-eager"] = True
    user_options = {name.replace("_", "-"): value for name, value in spec.options.items()}
    return as_flags({**options, **user_options})


def server_environment(spec: ServerSpec, version: str, *, folder: Path) -> dict[str, str | None]:
    """Environment variables of a server, beside those of this process; None removes one."""
    environment: dict[str, str | None] = {}
    if not has_accelerator():
        # vLLM compiles a few functions at the first request, even in eager mode, which takes half a minute.
        environment = {**cpu_environment(version), "TORCH_COMPILE_DISABLE": "1"}
    return {
        **environment,
        "PYTHONPATH": str(folder),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        OWNED_VARIABLE: "1",
        SECRET_VARIABLE: spec.secret or None,
        # With a key of its own vLLM would check every request a second time, for another key.
        "VLLM_API_KEY": None,
    }
