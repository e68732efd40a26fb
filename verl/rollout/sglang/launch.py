"""Starts an SGLang server, and explains from its log why it ended."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import verl
from verl.rollout.http_client import hide_secret
from verl.rollout.inference_server import EngineError, ServerSpec
from verl.rollout.server_process import ServerProcess
from verl.rollout.sglang.options import as_flags
from verl.rollout.sglang.worker import LOADER
from verl.utils.network import LOOPBACK

# Options that the run or its settings choose.
_RESERVED_OPTIONS = frozenset(
    {"model", "model_path", "host", "port", "api_key", "admin_api_key", "config", "dtype", "weight_version"}
)
_DEFAULT_OPTIONS = {
    "sleep_on_idle": True,
    # Events with new tokens alone: with all tokens so far, a stream grows with the square of the answer.
    "incremental_streaming_output": True,
    # Else the log has a line for each request.
    "log_level_http": "warning",
}
_CPU_OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "lora_backend": "torch_native",
    "disable_overlap_schedule": True,
    "skip_server_warmup": True,
    # Else SGLang takes most of the memory of the machine for the KV cache.
    "max_total_tokens": 32768,
    "max_running_requests": 64,
}
_REMOVED_VARIABLES = (
    # Set by launchers such as torchrun: with them the server would look for the ranks of training.
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    # Makes SGLang's logprobs those before the temperature.
    "SGLANG_RETURN_ORIGINAL_LOGPROB",
)
# SGLang keeps some tokens of the context for itself. It gets them beyond the context of the model, which it
# accepts only with the variable.
_RESERVED_TOKENS = 8
_LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
_CPU_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
_SECRET_FILE = "secret.yaml"
# Lines of a log about a wrong option, by SGLang's parser or its checks of values.
_OPTION_ERROR = re.compile(r": error: |^(Value|Assertion)Error: ")


class SGLangProcess:
    """A server that was started on the loopback interface.

    Args:
        spec: of the server.
        folder: of this run of the server alone, readable by its user alone.
        port: to listen on.
        context: length of the model's context in tokens, if it is known.

    Raises:
        ValueError: the user sets an option that the run sets itself.
    """

    def __init__(self, spec: ServerSpec, *, folder: Path, port: int, context: int | None) -> None:
        self._spec, self._secret_file = spec, folder / _SECRET_FILE
        on_cpu = not torch.accelerator.is_available()
        options = server_options(spec, port=port, context=context, on_cpu=on_cpu)
        flags = as_flags(options)
        if spec.secret:
            # In a file, since every user of the machine can read the arguments of a process.
            self._secret_file.write_text(f"api-key: {json.dumps(spec.secret)}\n", encoding="utf-8")
            flags = ["--config", str(self._secret_file), *flags]
        # The server imports its weight loader from this package, but nothing else of this environment.
        (folder / "verl").symlink_to(Path(verl.__file__).parent)
        # Readable by the user alone, since SGLang prints its settings with the secret.
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        spec.log.touch(mode=0o600)
        self._process = ServerProcess(
            spec.name,
            [spec.python or sys.executable, "-m", "sglang.launch_server", *flags],
            environment=server_environment(spec, folder=folder, on_cpu=on_cpu),
            log=spec.log,
        )

    @property
    def pid(self) -> int:
        """Id of the process and of its process group."""
        return self._process.pid

    def check(self) -> None:
        """Raise EngineError if the process has ended, with cause and end of its log."""
        try:
            self._process.check()
        except EngineError as error:
            raise self._error(str(error)) from None

    def check_startup(self) -> None:
        """Check a process that starts.

        Raises:
            EngineError: it has ended.
            ValueError: it has ended because of an option, with SGLang's own message.
        """
        try:
            self.check()
        except EngineError as error:
            if refusals := [line for line in self._process.log_lines() if _OPTION_ERROR.search(line)]:
                message = f"SGLang refuses its options: {refusals[-1]}\n  {error}"
                raise ValueError(hide_secret(message, self._spec.secret)) from None
            raise

    def startup_timeout(self) -> EngineError:
        """Error of a server that did not start in time, with the end of its log."""
        name, limit_s = self._spec.name, self._spec.start_timeout_s
        return self._error(f"{name} did not start in {limit_s:.0f} s{self._process.last_lines()}")

    def delete_secret_file(self) -> None:
        """Delete the file with the secret, which the server reads at its start alone."""
        self._secret_file.unlink(missing_ok=True)

    async def end(self) -> None:
        """End the server with all its processes."""
        await self._process.end()

    def _error(self, message: str) -> EngineError:
        return EngineError(hide_secret(message, self._spec.secret))


def server_options(spec: ServerSpec, *, port: int, context: int | None, on_cpu: bool) -> dict[str, Any]:
    """Options of a server, by the names of its flags with underscores.

    Raises:
        ValueError: the user sets an option that the run sets itself.
    """
    user_options = {name.replace("-", "_"): value for name, value in spec.options.items()}
    if taken := sorted(_RESERVED_OPTIONS & user_options.keys()):
        raise ValueError(f"need engine options that the run does not choose itself, got {', '.join(taken)}")
    loaders = user_options.pop("custom_weight_loader", [])
    return {
        **_DEFAULT_OPTIONS,
        **({"context_length": context + _RESERVED_TOKENS} if context else {}),
        **(_CPU_OPTIONS if on_cpu else {}),
        **user_options,
        "model_path": spec.model,
        "host": LOOPBACK,
        "port": port,
        "dtype": spec.dtype,
        "custom_weight_loader": [*([loaders] if isinstance(loaders, str) else loaders), LOADER],
    }


def server_environment(spec: ServerSpec, *, folder: Path, on_cpu: bool) -> dict[str, str | None]:
    """Environment variables of a server, beside those of this process; None removes one."""
    environment: dict[str, str | None] = dict.fromkeys(_REMOVED_VARIABLES)
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if "context_length" not in spec.options and "context-length" not in spec.options:
        environment[_LONGER_CONTEXT] = "1"
    if on_cpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment[_CPU_BINDING] = os.environ.get(_CPU_BINDING) or cpu_binding(spec.options)
    return environment


def cpu_binding(options: Mapping[str, Any]) -> str | None:
    """Cores of each rank, such as "0,2|1,3": by itself SGLang binds only one rank per NUMA node."""
    num_ranks = options.get("tp_size", options.get("tensor_parallel_size", 1))
    if num_ranks == 1 or sys.platform != "linux":
        return None
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::num_ranks] or [cores[rank % len(cores)]] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)
