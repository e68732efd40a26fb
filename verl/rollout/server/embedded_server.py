"""Client side of `verl serve`: a process with the embedded generator as an engine of the pool."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

import verl
from verl.engines.hf.models import Precision
from verl.rollout.http_client import HTTPClient
from verl.rollout.inference_server import EngineError, InferenceServer, ServerSpec, TokenChunk
from verl.rollout.openai_engine import parse_options
from verl.rollout.server.token_client import TokenStreamClient
from verl.rollout.server.token_messages import MAX_MESSAGE_BYTES, PATH
from verl.rollout.server_process import ServerProcess, cause_of
from verl.utils.network import LOOPBACK, free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.types import Transport, WeightChunk

_SECRET_VARIABLE = "VERL_SERVE_SECRET"
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_POLL_S, _REQUEST_S = 0.05, 1.0
# Another program may take the port between its choice and the start of the server.
_MAX_STARTS = 3


@dataclass(frozen=True)
class EmbeddedServerOptions:
    """Options of the engine `served`.

    Attributes:
        max_slots: answers generated at a time; further ones wait.
        prefix_tokens: tokens of finished answers that are kept for prompts that begin with them; None: as
            many as answers in generation take, 0: none.
        device: auto, cpu or cuda.
        recompute: recompute the KV caches of running answers after an update; else they stay those of the
            old weights.
        threads: of PyTorch on a CPU; None: as the environment says.
        pace_s: seconds between two messages with tokens of running answers. Tokens not sent yet are lost
            with the server, and sampled again.
    """

    max_slots: int = 256
    prefix_tokens: int | None = None
    device: str = "auto"
    # With a KV cache of the old weights, the rest of an answer is drawn from the distribution of neither the
    # old nor the new policy. Recomputing costs one prefill of the running answers.
    recompute: bool = True
    threads: int | None = None
    pace_s: float = 0.1


@dataclass(frozen=True)
class _Connection:
    """The clients of a server that is open, and its URL."""

    address: str
    http: HTTPClient
    tokens: TokenStreamClient


class EmbeddedServer(InferenceServer):
    """A server of `verl.rollout.server.app`, started or joined with the secret of the spec.

    See `EmbeddedServerOptions`.
    """

    transports: tuple[Transport, ...] = ("shm", "group", "disk", "direct", "ipc")
    position_seeded = True

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._options: EmbeddedServerOptions = parse_options(
            EmbeddedServerOptions, spec.options, engine="served"
        )
        if spec.dtype not in _PRECISIONS:
            raise ValueError(f"need dtype {', '.join(_PRECISIONS)} for engine {spec.name}, got {spec.dtype}")
        if spec.address is not None and not spec.secret:
            raise ValueError(
                f"need the secret of the server at {spec.address} to join it as engine {spec.name}"
            )
        self._secret = spec.secret or secrets.token_hex(16)
        self._process: ServerProcess | None = None
        self._open_connection: _Connection | None = None

    @property
    def pid(self) -> int:
        """Id of the started process, which leads its process group."""
        if self._process is None:
            raise EngineError(f"{self.spec.name} has no process of its own")
        return self._process.pid

    @property
    def address(self) -> str:
        """URL of the open server."""
        return self._connection.address

    @property
    def secret(self) -> str:
        """API key of the server."""
        return self._secret

    def check_process(self) -> None:
        """Raise EngineError, with the cause, if the started process has ended."""
        if self._process is not None:
            self._process.check()

    @override
    async def open(self) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        for start in range(_MAX_STARTS):
            try:
                return await self._connect(self.spec.address or self._launch(), deadline)
            except BaseException as error:
                await self.close()
                if start == _MAX_STARTS - 1 or "cannot listen at" not in str(error):
                    raise

    @override
    async def check(self) -> None:
        self.check_process()
        try:
            await self._connection.http.json("GET", "/health", timeout_s=self.spec.timeout_s)
        except EngineError as error:
            raise await cause_of(error, self._process.check if self._process else None) from error

    @override
    async def close(self) -> None:
        connection, self._open_connection = self._open_connection, None
        if connection is not None:
            await connection.tokens.close()
            await connection.http.close()
        if self._process is not None:
            await self._process.end()
            self._process = None

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        stream = self._connection.tokens.sample(prompt_ids, params)
        async with aclosing(stream) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    @override
    async def pause(self) -> None:
        await self._command("pause")

    @override
    async def resume(self) -> None:
        await self._command("resume", recompute=self._options.recompute)

    @override
    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        await self._command(
            "join_group", address=address, port=port, rank=first_rank, num_ranks=num_ranks, backend=backend
        )

    @override
    async def begin_update(self) -> None:
        # The server samples nothing until an update ends without error.
        await self._command("begin_update")

    @override
    async def load(self, chunk: WeightChunk) -> None:
        location = {
            name: str(value) if isinstance(value, Path) else value for name, value in chunk.location.items()
        }
        tensors = [asdict(info) for info in chunk.tensors]
        await self._command("load", tensors=tensors, via=chunk.transport, where=location)

    @override
    async def end_update(self, version: int) -> str:
        # Missing weights are an error: the server then refuses requests until the next update.
        return str((await self._command("end_update", version=version))["fingerprint"])

    @override
    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        # The server merges the adapter into its weights.
        response = await self._command("load_lora_adapter", folder=str(folder), version=version)
        return str(response["fingerprint"])

    @property
    def _connection(self) -> _Connection:
        if self._open_connection is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._open_connection

    async def _command(self, name: str, **body: Any) -> dict[str, Any]:
        return await self._connection.http.json(
            "POST", f"/control/{name}", body, timeout_s=self.spec.timeout_s
        )

    def _launch(self) -> str:
        """Start the server on a free port of the loopback interface; return its address."""
        port = free_port()
        options = {
            "model": self.spec.model,
            "port": port,
            "max_slots": self._options.max_slots,
            "prefix_tokens": self._options.prefix_tokens,
            "precision": _PRECISIONS[self.spec.dtype],
            "device": self._options.device,
            "group_timeout_s": self.spec.timeout_s,
            "pace_s": self._options.pace_s,
        }
        python = self.spec.python or sys.executable
        module = ["-m", "verl.rollout.server.app"]
        command = [python, *module, json.dumps(options), "--secret-env", _SECRET_VARIABLE]
        root = str(Path(verl.__file__).parents[1])
        environment: dict[str, str | None] = {
            _SECRET_VARIABLE: self._secret,
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if self._options.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._options.threads)
        self._process = ServerProcess(self.spec.name, command, environment=environment, log=self.spec.log)
        return f"http://{LOOPBACK}:{port}"

    async def _connect(self, address: str, deadline: float) -> None:
        """Wait until the server accepts the secret, which another program on its port would not."""
        http = HTTPClient(self.spec.name, address, api_key=self._secret)
        tokens = TokenStreamClient(
            self.spec.name, lambda: http.websocket(PATH, MAX_MESSAGE_BYTES), timeout_s=self.spec.timeout_s
        )
        self._open_connection = _Connection(address, http, tokens)
        while True:
            self.check_process()
            try:
                state = await http.json("GET", "/control/state", timeout_s=_REQUEST_S)
                if self._process is None or state.get("pid") == self._process.pid:
                    break
            except EngineError as error:
                if time.monotonic() > deadline:
                    log = self._process.last_lines() if self._process is not None else ""
                    limit = f"within {self.spec.start_timeout_s:g} s"
                    raise EngineError(f"{self.spec.name} did not start {limit}: {error}{log}") from error
            await asyncio.sleep(_POLL_S)
        is_local = state.get("shared_memory") == shared_memory_id()
        self.transports = (
            ("shm", "group", "disk", "direct", "ipc") if is_local else ("group", "disk", "direct")
        )
