"""SGLang's server as an engine in another process, started or joined."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from safetensors import safe_open
from typing_extensions import override

from verl.rollout.inference_server import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.rollout.server_process import cause_of
from verl.rollout.sglang.client import SGLangClient
from verl.rollout.sglang.launch import SGLangProcess
from verl.rollout.sglang.options import read_model_sizes
from verl.rollout.sglang.requests import ServerInfo, parse_server_info, request_body
from verl.rollout.sglang.stream import SGLangStream
from verl.rollout.sglang.weight_updater import WeightUpdater
from verl.rollout.sglang.worker import LOADER
from verl.utils.network import LOOPBACK, free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint, fingerprint_of_ranks
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import Transport, WeightChunk

_POLL_S = 0.2
_MEMORY_TAGS = {"tags": ["kv_cache", "weights"]}


class SGLangServer(InferenceServer):
    """An SGLang server with its tensor-parallel ranks.

    Weights are loaded by `verl.rollout.sglang.worker.load` in each rank, by any transport: it computes
    digests of what it gives to the model, and records what the model reads. A pause retracts running
    requests; they continue after it with a KV cache of the new weights.

    Attributes:
        received_bytes: bytes of weights that each rank received in the last update.
    """

    transports: tuple[Transport, ...] = ("shm", "group", "disk", "direct", "ipc")

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        if spec.address is not None:
            # A server started elsewhere, maybe in a container, may not see the folders of this run.
            self.transports = ("group", "direct")
        self._vocab_size, self._context = read_model_sizes(Path(spec.model))
        self._process: SGLangProcess | None = None
        self._open_client: SGLangClient | None = None
        self._folder: Path | None = None
        self._info: ServerInfo | None = None
        self._updater: WeightUpdater | None = None
        self._adapter_name: str | None = None
        self._num_adapters = 0
        self._num_running = 0
        self._is_asleep = False
        self.received_bytes: list[int] = []

    @property
    def client(self) -> SGLangClient:
        """Client of the server, which must be open."""
        assert self._open_client is not None, "open first"
        return self._open_client

    @override
    async def open(self) -> None:
        self._adapter_name = self.read_ranges = None
        self._is_asleep = False
        # For this user alone: it has the reports of the ranks, and the secret while the server starts.
        self._folder = Path(tempfile.mkdtemp(prefix="verl-sglang-"))
        try:
            address = self.spec.address
            if address is None:
                port = free_port()
                address = f"http://{LOOPBACK}:{port}"
                self._process = SGLangProcess(
                    self.spec, folder=self._folder, port=port, context=self._context
                )
            self._open_client = SGLangClient(
                self.spec.name,
                address,
                secret=self.spec.secret,
                timeout_s=self.spec.timeout_s,
                process=self._process,
            )
            if self._process is not None:
                await self._wait_until_healthy(self._process)
            await self._inspect(self._folder)
        except BaseException:
            await self.close()
            raise

    @override
    async def check(self) -> None:
        if self._process is not None:
            self._process.check()
        # Answered by the scheduler, which may hang while the HTTP server still answers.
        try:
            await self.client.request("GET", "/server_info")
        except (RefusedError, ValueError) as error:
            raise EngineError(f"{self.spec.name} does not describe itself: {error}") from error
        except EngineError as error:
            raise await cause_of(error, self._process.check if self._process else None) from error

    @override
    async def close(self) -> None:
        if self._open_client is not None:
            await self._open_client.close()
        if self._process is not None:
            await self._process.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._open_client = self._process = self._folder = self._info = self._updater = None

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        assert self._info is not None, "open first"
        seed = request_seed(params)
        body = request_body(prompt_ids, params, seed=seed, vocab_size=self._vocab_size, info=self._info)
        if self._adapter_name is not None:
            body["lora_path"] = self._adapter_name
        stream = SGLangStream(truncates=body["return_sampling_mask"])
        self._num_running += 1
        try:
            async with aclosing(self._chunks(body, stream)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self._num_running -= 1
            if not stream.is_finished and self._open_client is not None:
                self._open_client.abort(body["rid"])

    @override
    async def pause(self) -> None:
        self.client.silence.pause()
        # With "in_place" requests would keep their KV cache, which could not be flushed, and go on with keys
        # and values of old weights.
        await self.client.command("/pause_generation", {"mode": "retract"})

    @override
    async def resume(self) -> None:
        await self.client.command("/flush_cache")
        await self.client.command("/continue_generation", {})
        self.client.silence.resume()

    @override
    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        if backend != "gloo":
            raise ValueError(f"need the backend gloo for weights to SGLang, got {backend}")
        await self.updater.join_group(
            address,
            port,
            first_rank=first_rank,
            num_ranks=num_ranks,
            backend=backend,
            timeout_s=self.spec.timeout_s,
        )

    @override
    async def begin_update(self) -> None:
        await self.updater.begin()

    @override
    async def load(self, chunk: WeightChunk) -> None:
        records = self.records_reads and self.num_ranks > 1 and chunk.transport != "disk"
        await self.updater.load(chunk, records=records)
        self.received_bytes = list(self.updater.num_bytes)

    @override
    async def end_update(self, version: int) -> str:
        await self.updater.end()
        await self.client.set_weight_version(version)
        if any(self.updater.read_ranges):
            self.read_ranges = tuple(parse_ranges(own) for own in self.updater.read_ranges)
        return fingerprint_of_ranks(self.updater.digests)

    @override
    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        name, old_name = f"verl-{version}-{self._num_adapters}", self._adapter_name
        self._num_adapters += 1
        await self.client.request("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._adapter_name = name
        if old_name is not None:
            await self.client.command("/unload_lora_adapter", {"lora_name": old_name})
        await self.client.set_weight_version(version)
        # Digests of the file: SGLang reads it by itself, and says nothing about what it read.
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return fingerprint({key: digest(file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118

    @override
    async def sleep(self) -> None:
        # Frees memory only in a server with the option `enable_memory_saver`.
        if self._num_running:
            # Running requests would crash the server.
            raise RuntimeError(
                f"need an idle engine before it sleeps, but {self.spec.name} has {self._num_running} requests"
            )
        if not self._is_asleep:
            await self.client.command("/release_memory_occupation", _MEMORY_TAGS)
        self._is_asleep = True

    @override
    async def wake(self) -> None:
        if self._is_asleep:
            await self.client.command("/resume_memory_occupation", _MEMORY_TAGS)
        self._is_asleep = False

    @property
    def updater(self) -> WeightUpdater:
        """Weight updates of the server, which must be open."""
        assert self._updater is not None, "open first"
        return self._updater

    async def _wait_until_healthy(self, process: SGLangProcess) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        while not await self.client.is_healthy():
            process.check_startup()
            if time.monotonic() > deadline:
                raise process.startup_timeout()
            await asyncio.sleep(_POLL_S)
        process.delete_secret_file()

    async def _inspect(self, folder: Path) -> None:
        """Read ranks and abilities from the server; raise ValueError if it cannot be used."""
        schema = await self.client.request("GET", "/openapi.json")
        paths = schema["paths"] if isinstance(schema, dict) and "paths" in schema else {}
        path = "/server_info" if "/server_info" in paths else "/get_server_info"
        info = parse_server_info(await self.client.request("GET", path), paths, engine=self.spec.name)
        if self.spec.address is not None and not info.has_loader:
            raise ValueError(
                f"need the server at {self.spec.address} to be started with --custom-weight-loader {LOADER},"
                " to give it weights"
            )
        self._info, self.num_ranks, self.syncs_weights = info, info.num_ranks, info.has_loader
        self.position_seeded = info.is_deterministic
        self._updater = WeightUpdater(
            self.client,
            name=self.spec.name,
            folder=folder,
            num_ranks=info.num_ranks,
            has_sessions=info.has_update_sessions,
        )

    async def _chunks(self, body: Mapping[str, Any], stream: SGLangStream) -> AsyncIterator[TokenChunk]:
        async with aclosing(self.client.stream("/generate", body)) as events:  # type: ignore[type-var]
            async for event in events:
                for chunk in self._parse_event(stream, event):
                    yield chunk
                if stream.is_finished:
                    return
        raise self.client.error("ended an answer without a finish reason")

    def _parse_event(self, stream: SGLangStream, event: Mapping[str, Any]) -> list[TokenChunk]:
        """Parse an event of a stream; raise RefusedError or EngineError if it is an error or invalid."""
        if "error" in event:
            error = event["error"]
            raise self.client.status_error(error.get("code", 400), error["message"])
        try:
            reason = event["meta_info"]["finish_reason"] or {}
            if status := reason.get("status_code"):
                raise self.client.status_error(status, reason["message"])
            return stream.parse(event)
        except RefusedError:  # a ValueError, but not one of an invalid event
            raise
        except (KeyError, TypeError, IndexError, ValueError) as error:
            excerpt = f"{error!r} in {str(event)[:500]}"
            raise self.client.error(f"sends an invalid event: {excerpt}") from error
