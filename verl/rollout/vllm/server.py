"""vLLM's server as an engine in another process, started or joined; vLLM itself is imported there alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.rollout.http_client import num_reused
from verl.rollout.inference_server import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.rollout.server_process import ServerProcess, cause_of
from verl.rollout.vllm.client import VLLMClient
from verl.rollout.vllm.launch import MODEL_NAME, launch_server, server_version
from verl.rollout.vllm.options import as_flags, missing_weights, request_body
from verl.rollout.vllm.stream import parse_event
from verl.rollout.vllm.versions import (
    BEGIN_UPDATE,
    END_UPDATE,
    JOIN_GROUP,
    LOAD_CHUNK,
    check_version,
    has_update_calls,
    weight_options,
    worker_method,
)
from verl.utils.network import LOOPBACK, free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import fingerprint, fingerprint_of_ranks
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import WeightChunk

_ADAPTER_NAME = "verl-lora"
_POLL_S = 0.2
# The parser of vLLM's command line, about an option that it does not take.
_OPTION_ERROR = re.compile(r"error: (unrecognized arguments|argument |ambiguous option)")


class VLLMServer(InferenceServer):
    """A vLLM server, started on the loopback interface or joined.

    A server to join must have been started with the flags of `docs/vllm.md`.

    Attributes:
        received_bytes: bytes of weights that each rank received in the last update.
    """

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._process: ServerProcess | None = None
        self._open_client: VLLMClient | None = None
        self._folder: Path | None = None
        self._vocab_size = self._context = 0
        self._version = ""
        # Name of the policy in requests, without and with a LoRA adapter.
        self._base_model = self._model = MODEL_NAME
        self.received_bytes: list[int] = []

    @property
    def client(self) -> VLLMClient:
        """Client of the server; raises EngineError if it is not open."""
        if self._open_client is None:
            raise EngineError(f"vLLM server {self.spec.name} is not open")
        return self._open_client

    @override
    async def open(self) -> None:
        self._vocab_size = read_vocab_size(self.spec.model)
        try:
            address = self.spec.address or await self._launch()
            self._open_client = VLLMClient(
                self.spec.name,
                address,
                secret=self.spec.secret,
                timeout_s=self.spec.timeout_s,
                process=self._process,
            )
            await self._wait_until_healthy()
            await self._inspect()
            if self.spec.address is not None:
                # A run that ended during an update may have left the server paused.
                await self.client.request("POST", "/resume")
            # The first answer may take long, since kernels are compiled for it, and shows some wrong options.
            first = {
                "model": self._model,
                "prompt": [0],
                **request_body(SamplingParams(max_tokens=1)),
                "stream": False,
                "stream_options": None,
            }
            timeout_s = self.spec.start_timeout_s
            await self.client.request("POST", "/v1/completions", body=first, timeout_s=timeout_s)
        except BaseException:
            await self.close()
            raise

    @override
    async def check(self) -> None:
        self.client.check_process()
        try:
            await self.client.request("GET", "/health")
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
        self._open_client = self._process = self._folder = None

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        if len(prompt_ids) + params.max_tokens > self._context:
            # vLLM would accept the request and cut the answer at the end of its context.
            raise RefusedError(
                f"a prompt has {len(prompt_ids)} tokens and may get {params.max_tokens} more, but vLLM serves"
                f" {self._context} in all; lower sampling.max_tokens or data.max_prompt_tokens, or raise"
                " rollout.engine_options.max_model_len"
            )
        body = {
            "model": self._model,
            "prompt": list(prompt_ids),
            "seed": request_seed(params),
            **request_body(params),
        }
        last: TokenChunk | None = None
        async with aclosing(self.client.stream(body)) as events:  # type: ignore[type-var]
            async for event in events:
                if last is not None:  # the counts of tokens follow the end
                    last = replace(last, num_reused=num_reused(event))
                    break
                try:
                    chunk = parse_event(event, prompt_ids=prompt_ids, vocab_size=self._vocab_size)
                except ValueError as error:
                    raise self.client.error(str(error)) from error
                if chunk.finish_reason:
                    last = chunk
                elif chunk.token_ids:
                    yield chunk
        if last is None:
            raise self.client.error("ended an answer without a finish reason")
        yield last

    @override
    async def pause(self) -> None:
        await self.client.request("POST", "/pause", query={"mode": "keep"})
        self.client.silence.pause()

    @override
    async def resume(self) -> None:
        # Requests that were kept compute their prompts and answers again, with the new weights.
        await self._reset_prefix_cache()
        await self.client.request("POST", "/resume")
        self.client.silence.resume()

    @override
    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        group = {
            "address": address,
            "port": port,
            "first_rank": first_rank,
            "num_ranks": num_ranks,
            "backend": backend,
            "timeout_s": self.spec.timeout_s,
        }
        await self._update_step(JOIN_GROUP, init_info=group)

    @override
    async def begin_update(self) -> None:
        try:
            await self._update_step(BEGIN_UPDATE)
        except EngineError:
            # The server may still wait for the end of an earlier update that broke off.
            await self._update_step(END_UPDATE)
            await self._update_step(BEGIN_UPDATE)

    @override
    async def load(self, chunk: WeightChunk) -> None:
        location = {
            name: str(value) if isinstance(value, Path) else value for name, value in chunk.location.items()
        }
        fields = {
            "transport": chunk.transport,
            "tensors": [(info.name, list(info.shape), info.dtype) for info in chunk.tensors],
            "location": location,
            "ranges": chunk.ranges,
            "records_reads": self.records_reads and self.num_ranks > 1 and chunk.transport != "disk",
        }
        await self._update_step(LOAD_CHUNK, update_info=fields)

    @override
    async def end_update(self, version: int) -> str:
        reports = await self.client.collective_rpc("verl_update_report")
        missing = sorted({name for report in reports for name in report["missing"]})
        errors = [error for report in reports for error in report["errors"]]
        # Ended in any case, since vLLM accepts no other update before; only a complete one gets a version.
        await self._update_step(END_UPDATE, **({} if missing or errors else {"weight_version": str(version)}))
        if errors:
            raise self.client.error(f"could not take weights: {errors[0]}")
        if missing:
            raise EngineError(f"vLLM server {self.spec.name}: {missing_weights(missing)}")
        self.received_bytes = [report["num_bytes"] for report in reports]
        # With data-parallel replicas in one server, not every rank reports.
        if len(reports) == self.num_ranks and any(report["read_ranges"] for report in reports):
            self.read_ranges = tuple(parse_ranges(report["read_ranges"]) for report in reports)
        self._model = self._base_model
        return fingerprint_of_ranks([report["digests"] for report in reports])

    @override
    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        # Needs the option `enable_lora`.
        adapter = {"lora_name": _ADAPTER_NAME, "lora_path": str(folder), "load_inplace": True}
        await self.client.request("POST", "/v1/load_lora_adapter", body=adapter)
        await self._reset_prefix_cache()
        path = str(folder / "adapter_model.safetensors")
        first, *others = await self.client.collective_rpc("verl_digest_file", path)
        if any(digests != first for digests in others):
            raise EngineError(f"the ranks of vLLM server {self.spec.name} read different LoRA adapters")
        self._model = _ADAPTER_NAME
        return fingerprint(first)

    @override
    async def sleep(self) -> None:
        # On a GPU it needs the option `enable_sleep_mode`.
        await self.client.request("POST", "/sleep", query={"level": "2"})

    @override
    async def wake(self) -> None:
        await self.client.request("POST", "/wake_up")

    async def _launch(self) -> str:
        """Start the server and return its address."""
        self._version = await asyncio.to_thread(server_version, self.spec)
        self._folder, port = Path(tempfile.mkdtemp(prefix="verl-vllm-")), free_port()
        self._process = launch_server(self.spec, version=self._version, folder=self._folder, port=port)
        return f"http://{LOOPBACK}:{port}"

    async def _wait_until_healthy(self) -> None:
        """Wait until the server answers; raise ValueError if it does not know one of its options."""
        deadline = time.monotonic() + (self.spec.start_timeout_s if self._process else self.spec.timeout_s)
        while True:
            try:
                self.client.check_process()
            except EngineError as error:
                if _OPTION_ERROR.search(str(error)):
                    raise ValueError(f"rollout.engine_options: {error}") from error
                raise
            with contextlib.suppress(EngineError):
                return await self.check()
            if time.monotonic() > deadline:
                raise self.client.error(f"at {self.client.address} did not answer in time", with_log=True)
            await asyncio.sleep(_POLL_S)

    async def _inspect(self) -> None:
        """Read version, model, ranks and transports from the server.

        Raises:
            ValueError: it cannot take weights from verl.
        """
        client = self.client
        self._version = str((await client.request("GET", "/version")).get("version"))
        check_version(self._version, f"at {client.address}")
        models = (await client.request("GET", "/v1/models"))["data"]
        model = next(model for model in models if not model.get("parent"))  # a LoRA adapter has a parent
        self._base_model = self._model = model["id"]
        self._context = model["max_model_len"]
        try:
            workers = await client.collective_rpc("verl_describe")
        except EngineError as error:
            flags = " ".join(as_flags(weight_options(self._version)))
            raise ValueError(
                f"need a vLLM server that takes weights from verl, got another one at {client.address}; start"
                f" it with VLLM_SERVER_DEV_MODE=1, verl on its PYTHONPATH, and {flags} ({error})"
            ) from error
        if any(worker.get("loses_tokens") for worker in workers):
            raise ValueError(
                f"need vLLM {self._version} at {client.address} with --no-async-scheduling: else it loses a"
                " token of every answer that goes on over an update; start it so, or upgrade it to 0.22"
            )
        self.num_ranks = int((await client.request("GET", "/get_world_size"))["world_size"])
        is_local = shared_memory_id() in {worker["shared_memory"] for worker in workers} - {""}
        self.transports = (
            ("shm", "group", "disk", "direct", "ipc") if is_local else ("group", "disk", "direct")
        )
        self.read_ranges = None

    async def _reset_prefix_cache(self) -> None:
        # Running requests are reset, too: the blocks that they hold would stay in the cache, and new requests
        # would use keys and values of old weights.
        query = {"reset_running_requests": "true"}
        reset = await self.client.request("POST", "/reset_prefix_cache", query=query)
        if not reset.get("success", True):
            raise self.client.error("keeps its cache of old weights")

    async def _update_step(self, step: str, **arguments: Any) -> None:
        """Run a step of an update, see `verl.rollout.vllm.versions`."""
        if has_update_calls(self._version):
            await self.client.request("POST", f"/{step}", body=arguments)
        else:
            await self.client.collective_rpc(worker_method(self._version, step), **arguments)


def read_vocab_size(folder: str) -> int:
    """Size of the vocabulary, from the config.json of a model folder."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"need a model folder with a config.json that has vocab_size, got {folder}: {error}"
        ) from error
