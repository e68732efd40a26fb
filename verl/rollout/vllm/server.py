"""vLLM's server behind the contract of an engine in another process; vLLM itself is imported there alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from typing_extensions import override

import verl
from verl.rollout.engine import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.rollout.server_process import ServerProcess
from verl.rollout.vllm.options import (
    MODEL,
    REASONS,
    as_flags,
    lacking,
    request_body,
    server_environment,
    server_flags,
)
from verl.rollout.vllm.versions import (
    ASK,
    BEGIN,
    END,
    JOIN,
    LOAD,
    check_version,
    control,
    has_own_steps,
    method_of,
)
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import fingerprint, fingerprint_of_ranks
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import WeightChunk

T = TypeVar("T")

_ADDITIONS = "verl-additions"
# Of the answers to a request: the server did understand it, and any other one would refuse it, too.
_REFUSALS = (400, 413, 422)
_START_POLL_S = 0.2
# A line of a stream that repeats a long prompt.
_LINE_BYTES = 2**24


class VLLMServer(InferenceServer):
    """A server of vLLM, started on the loopback interface or joined.

    A server that is joined must have been started with the flags of `docs/vllm.md`.
    """

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._process: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._folder: Path | None = None
        self._url = (spec.address or "").rstrip("/")
        self._vocabulary = self._context = 0
        self._version = ""
        self.received_bytes: list[int] = []
        self._base = self._served = MODEL
        self._is_paused = False
        self._last_sign_s = 0.0

    @override
    async def open(self) -> None:
        self._vocabulary = _vocabulary(self.spec.model)
        headers = {"Authorization": f"Bearer {self.spec.secret}"} if self.spec.secret else {}
        # A connection for each request: vLLM closes those that wait for 5 s and those of some errors, which
        # fails the next request on them.
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(),
            read_bufsize=_LINE_BYTES,
        )
        try:
            if not self._url:
                self._version = await asyncio.to_thread(self._installed)
                self._start()
            await self._answers()
            await self._inspect()
            if self.spec.address is not None:
                await self._call("POST", "/resume")  # a run that ended in an update may have left it paused
            # The first answer may take long: kernels are compiled for it, and some mistakes come out with it
            # alone.
            first = {
                "model": self._served,
                "prompt": [0],
                **request_body(SamplingParams(max_tokens=1)),
                "stream": False,
            }
            await self._call("POST", "/v1/completions", body=first, timeout_s=self.spec.start_timeout_s)
        except BaseException:
            await self.close()
            raise

    def _installed(self) -> str:
        """The version of vLLM in the environment of a server that is not started yet; "" if that does not
        come out here.

        Raises:
            ValueError: it is too old: it may not start, in words that lead astray.
        """
        python = self.spec.python or sys.executable
        environment = {**os.environ, "PYTHONPATH": ""}
        try:
            asked = subprocess.run(
                [python, "-c", ASK],
                capture_output=True,
                text=True,
                timeout=self.spec.timeout_s,
                env=environment,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        version = (asked.stdout.split() or [""])[0]
        check_version(version, f"in the environment of {python}")
        return version

    def _start(self) -> None:
        """Starts a server with a copy of verl alone in its path: its environment may be another one."""
        self._folder = Path(tempfile.mkdtemp(prefix="verl-vllm-"))
        (self._folder / "verl").symlink_to(Path(verl.__file__).resolve().parent)
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = ServerProcess(
            f"vLLM server {self.spec.name}",
            [
                self.spec.python or sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                *server_flags(self.spec, port, self._version),
            ],
            environment=server_environment(self.spec, self._folder, self._version),
            log=self.spec.log,
        )

    async def _answers(self) -> None:
        """Waits until the server is well."""
        give_up_s = time.monotonic() + (self.spec.start_timeout_s if self._process else self.spec.timeout_s)
        while True:
            self._check_process(starting=True)
            with contextlib.suppress(EngineError):
                return await self.check()
            if time.monotonic() > give_up_s:
                lines = self._process.last_lines() if self._process else ""
                raise EngineError(
                    f"vLLM server {self.spec.name} at {self._url} did not answer in time{lines}"
                )
            await asyncio.sleep(_START_POLL_S)

    async def _inspect(self) -> None:
        """Looks at what answers: its version, the name of the model, and how weights can travel to it."""
        self._version = str((await self._call("GET", "/version")).get("version"))
        check_version(self._version, f"at {self._url}")
        model = next(
            model for model in (await self._call("GET", "/v1/models"))["data"] if not model.get("parent")
        )
        self._base = self._served = model["id"]
        self._context = model["max_model_len"]
        try:
            places = await self._on_all_ranks("verl_place")
        except EngineError as error:
            flags = " ".join(as_flags(control(self._version)))
            raise ValueError(
                f"need a vLLM server that takes weights from verl, got another one at {self._url}; start it with VLLM_SERVER_DEV_MODE=1, "
                f"verl on its PYTHONPATH, and {flags} ({error})"
            ) from error
        if any(place.get("loses_tokens") for place in places):
            raise ValueError(
                f"need vLLM {self._version} at {self._url} with --no-async-scheduling: else it loses a token of every answer that goes on "
                "over an update; start it so, or upgrade it to 0.22"
            )
        self.num_ranks = int((await self._call("GET", "/get_world_size"))["world_size"])
        is_near = shared_memory_id() in {place["shared_memory"] for place in places} - {""}
        self.transports = (
            ("shm", "group", "disk", "direct", "ipc") if is_near else ("group", "disk", "direct")
        )
        self.read_ranges = None

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        if len(prompt_ids) + params.max_tokens > self._context:
            # vLLM would answer, and stop where its context ends.
            raise RefusedError(
                f"a prompt has {len(prompt_ids)} tokens and may get {params.max_tokens} more, but vLLM serves {self._context} in all; "
                "lower sampling.max_tokens or data.max_prompt_tokens, or raise rollout.engine_options.max_model_len"
            )
        request = {
            "model": self._served,
            "prompt": list(prompt_ids),
            "seed": request_seed(params, number),
            **request_body(params),
        }
        response = await self._within(self._http().post(f"{self._url}/v1/completions", json=request))
        try:
            if response.status != 200:
                raise _refusal(response.status, await self._within(response.text()))
            stream = self._stream(response)
            async for event in stream:
                chunk = self._chunk(event, prompt_ids)
                if chunk.token_ids or chunk.finish_reason:
                    yield chunk
                if chunk.finish_reason:
                    return
            raise EngineError(f"vLLM server {self.spec.name} ended an answer without saying why")
        finally:
            # Closes the connection of an answer that is not at its end: the server sees it and stops.
            response.close()

    async def _stream(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer."""
        while line := await self._within(response.content.readline()):
            content = line.removeprefix(b"data:").strip()
            if content and content != b"[DONE]":
                yield self._json(content)

    def _chunk(self, event: dict[str, Any], prompt_ids: Sequence[int]) -> TokenChunk:
        """What an event says, if it can be."""
        if error := event.get("error"):
            raise _refusal(int(error.get("code") or 500), str(error.get("message")))
        if not event.get("choices"):
            return TokenChunk()
        choice = event["choices"][0]
        read = choice.get("prompt_token_ids")
        if read is not None and read != list(prompt_ids):
            raise EngineError(
                f"vLLM server {self.spec.name} read another prompt of {len(read)} tokens, not that of {len(prompt_ids)}"
            )
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if ids is None or len(logprobs) != len(ids):
            raise EngineError(f"vLLM server {self.spec.name} gave tokens {ids} with {len(logprobs)} logprobs")
        if not all(isinstance(token, int) and 0 <= token < self._vocabulary for token in ids):
            raise EngineError(
                f"vLLM server {self.spec.name} gave tokens outside of the vocabulary of {self._vocabulary}: {ids}"
            )
        # Pydantic writes NaN as null.
        if not all(isinstance(logprob, float | int) and math.isfinite(logprob) for logprob in logprobs):
            raise EngineError(
                f"vLLM server {self.spec.name} gave logprobs that are no numbers: {logprobs}; look at the last updates"
            )
        if reason is not None and reason not in REASONS:
            raise EngineError(f"vLLM server {self.spec.name} ended an answer with {reason!r}")
        return TokenChunk(ids, logprobs, REASONS.get(reason))

    @override
    async def check(self) -> None:
        self._check_process()
        await self._call("GET", "/health", timeout_s=self.spec.timeout_s)

    @override
    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            await self._process.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._session = self._process = self._folder = None

    @override
    async def pause(self) -> None:
        await self._call("POST", "/pause", query={"mode": "keep"})
        self._is_paused = True

    async def resume(self) -> None:
        """See `InferenceServer.resume`; the prompts and answers of kept requests are read again with the weights
        of now.
        """
        await self._forget_cache()
        await self._call("POST", "/resume")
        self._last_sign_s = time.monotonic()
        self._is_paused = False

    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        """See `InferenceServer.join_group`; rank 0 opens `verl.weight_sync.process_group.open_group`."""
        group = {
            "address": address,
            "port": port,
            "first_rank": first_rank,
            "num_ranks": num_ranks,
            "backend": backend,
        }
        await self._step(JOIN, init_info={**group, "timeout_s": self.spec.timeout_s})

    @override
    async def begin_update(self) -> None:
        try:
            await self._step(BEGIN)
        except EngineError:
            # One before it was cut: the server still waits for its end.
            await self._step(END)
            await self._step(BEGIN)

    @override
    async def load(self, part: WeightChunk) -> None:
        tensors = [(info.name, list(info.shape), info.dtype) for info in part.tensors]
        where = {
            name: str(value) if isinstance(value, Path) else value for name, value in part.location.items()
        }
        records = self.records_reads and self.num_ranks > 1 and part.transport != "disk"
        update = {
            "via": part.transport,
            "tensors": tensors,
            "where": where,
            "reads": part.ranges,
            "records": records,
        }
        await self._step(LOAD, update_info=update)

    async def end_update(self, version: int) -> str:
        """See `InferenceServer.end_update`.

        Raises:
            EngineError: there are parameters that no tensor reached, or one was not taken.
        """
        reports = await self._on_all_ranks("verl_report")
        missing = sorted({name for report in reports for name in report["missing"]})
        errors = [error for report in reports for error in report["errors"]]
        await self._step(END, **({} if missing or errors else {"weight_version": str(version)}))
        if errors:
            raise EngineError(f"vLLM server {self.spec.name} could not take weights: {errors[0]}")
        if missing:
            raise EngineError(f"vLLM server {self.spec.name}: {lacking(missing)}")
        self.received_bytes = [report["num_bytes"] for report in reports]
        # Of data-parallel replicas in one server, not every rank reports.
        if len(reports) == self.num_ranks and any(report["reads"] for report in reports):
            self.read_ranges = tuple(parse_ranges(report["reads"]) for report in reports)
        self._served = self._base
        return fingerprint_of_ranks([report["digests"] for report in reports])

    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        """See `InferenceServer.load_lora_adapter`; needs the option `enable_lora`."""
        adapter = {"lora_name": _ADDITIONS, "lora_path": str(folder), "load_inplace": True}
        await self._call("POST", "/v1/load_lora_adapter", body=adapter)
        await self._forget_cache()
        first, *others = await self._on_all_ranks(
            "verl_digests_of", str(folder / "adapter_model.safetensors")
        )
        if any(digests != first for digests in others):
            raise EngineError(f"the ranks of vLLM server {self.spec.name} read different additions")
        self._served = _ADDITIONS
        return fingerprint(first)

    async def sleep(self) -> None:
        """See `InferenceServer.sleep`; on a GPU it needs the option `enable_sleep_mode`."""
        await self._call("POST", "/sleep", query={"level": "2"})

    @override
    async def wake(self) -> None:
        await self._call("POST", "/wake_up")

    async def _forget_cache(self) -> None:
        # Blocks that a kept request holds would stay in the cache, and answer new requests with old weights.
        reset = await self._call("POST", "/reset_prefix_cache", query={"reset_running_requests": "true"})
        if not reset.get("success", True):
            raise EngineError(f"vLLM server {self.spec.name} keeps its cache of old weights")

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineError(f"vLLM server {self.spec.name} is not open")
        return self._session

    def _check_process(self, *, starting: bool = False) -> None:
        if self._process is None:
            return
        try:
            self._process.check()
        except EngineError as error:
            # What the parser of its command line says before it ends.
            if starting and re.search(
                r"error: (unrecognized arguments|argument |ambiguous option)", str(error)
            ):
                raise ValueError(f"rollout.engine_options: {error}") from error
            raise

    async def _step(self, step: str, **given: Any) -> None:
        """A step of an update, see `verl.rollout.vllm.versions`."""
        if has_own_steps(self._version):
            await self._call("POST", f"/{step}", body=given)
        else:
            await self._on_all_ranks(method_of(self._version, step), **given)

    async def _on_all_ranks(self, method: str, *arguments: str, **named: Any) -> list[Any]:
        called = {"method": method, "args": arguments, "kwargs": named}
        return list((await self._call("POST", "/collective_rpc", body=called))["results"])

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """What a path other than that of answers says; nothing but JSON counts.

        Raises:
            EngineError: it says that it failed, or nothing.
        """
        limit = aiohttp.ClientTimeout(total=timeout_s or self.spec.timeout_s)
        try:
            async with self._http().request(
                method, f"{self._url}{path}", json=body, params=query, timeout=limit
            ) as response:
                content = await response.text()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            self._check_process()
            raise EngineError(
                f"vLLM server {self.spec.name} does not answer to {path}: {type(error).__name__} {error}"
            ) from error
        if response.status != 200:
            lines = self._process.last_lines() if self._process and response.status >= 500 else ""
            raise EngineError(
                f"vLLM server {self.spec.name} answered {response.status} to {path}: {_message(content)}{lines}"
            )
        answer = self._json(content) if content.startswith("{") else {}
        return answer

    def _json(self, content: str | bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise EngineError(f"vLLM server {self.spec.name} gave no JSON: {content[:200]!r}") from error
        if not isinstance(answer, dict):
            raise EngineError(
                f"vLLM server {self.spec.name} gave {type(answer).__name__} for an object: {content[:200]!r}"
            )
        return answer

    async def _within(self, awaitable: Awaitable[T]) -> T:
        """What comes of it, unless the whole server says nothing for too long; a time in which it is paused
        does not count.
        """
        start_s = time.monotonic()
        task = asyncio.ensure_future(awaitable)
        try:
            while not task.done():
                silent_s = time.monotonic() - max(start_s, self._last_sign_s)
                if silent_s >= self.spec.timeout_s and not self._is_paused:
                    raise EngineError(
                        f"vLLM server {self.spec.name} has said nothing for {self.spec.timeout_s} s"
                    )
                await asyncio.wait({task}, timeout=max(self.spec.timeout_s - silent_s, _START_POLL_S))
            result = task.result()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._check_process()
            raise EngineError(
                f"vLLM server {self.spec.name} broke off: {type(error).__name__} {error}"
            ) from error
        finally:
            task.cancel()
        self._last_sign_s = time.monotonic()
        return result


def _refusal(status: int, content: str) -> EngineError | RefusedError:
    message = f"vLLM answered {status}: {_message(content)}"
    return RefusedError(message) if status in _REFUSALS else EngineError(message)


def _message(content: str) -> str:
    """vLLM's own words in the body of an answer."""
    try:
        error = json.loads(content)
    except ValueError:
        return content[:2000]
    error = error.get("error", error) if isinstance(error, dict) else error
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]


def _vocabulary(folder: str) -> int:
    """Number of ids that the model has."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"need a model folder with a config.json that has vocab_size, got {folder}: {error}"
        ) from error
