"""SGLang servers behind the contract of engines: started or joined, sampled from by token ids, given weights
through a loader of ours.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
from verl.rollout.sglang.client import Client
from verl.rollout.sglang.options import flags, sizes_of
from verl.rollout.sglang.stream import SGLangStream
from verl.rollout.sglang.worker import LOADER, report_file, report_key, report_store
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint, fingerprint_of_ranks
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import Transport, WeightChunk

OLDEST = "0.5.17"
_NEEDED = (
    "/generate",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weights_from_tensor",
)
# Chosen here, or by the settings of the run.
_OWN_OPTIONS = frozenset(
    {"model", "model_path", "host", "port", "api_key", "admin_api_key", "config", "dtype", "weight_version"}
)
# Deltas: a stream of everything so far grows with the square of the answer. The level keeps one line per
# request out of the log.
_OPTIONS = {"sleep_on_idle": True, "incremental_streaming_output": True, "log_level_http": "warning"}
_CPU_OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "lora_backend": "torch_native",
    "disable_overlap_schedule": True,
    "skip_server_warmup": True,
    # Else SGLang takes most of the memory of the machine for the cache.
    "max_total_tokens": 32768,
    "max_running_requests": 64,
}
# Of a launcher like torchrun: with them the server would look for ranks of training. The last one makes its
# logprobs those before the temperature.
_NOT_INHERITED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)
_ORIGINAL_LOGPROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
# SGLang keeps some tokens of the context for itself; it must have them beyond those of the model, and wants
# to be told that this is meant.
_RESERVED_TOKENS = 8
_LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
_CPU_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
_CAUSE = re.compile(r"\w*(Error|Exception): ")
_REFUSAL = re.compile(r": error: |^(Value|Assertion)Error: ")
_POLL_S = 0.2
_ABORT_S = 5.0


class SGLangServer(InferenceServer):
    """One SGLang server with its tensor-parallel ranks; `received_bytes` are those that each took of the last
    update.

    Weights are taken by `verl.rollout.sglang.worker.load` in each rank, whatever the way: it computes the
    digests of what it hands to the model, and says what the model reads of it. A pause retracts the requests
    that run: they go on after it with a cache that the new weights have computed.
    """

    transports: tuple[Transport, ...] = ("shm", "group", "disk", "direct", "ipc")

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        if spec.address is not None:
            # One that was started elsewhere, maybe in a container, need not see the folders of this run.
            self.transports = ("group", "direct")
        self._process: ServerProcess | None = None
        self._client: Client | None = None
        self._folder: Path | None = None
        self._store: Any = None
        self._has_sessions = self._in_session = False
        self._deterministic = False
        self._max_kept = 0
        self._vocabulary, self._context = sizes_of(Path(spec.model))
        self._asleep = False
        self._running = 0
        self._log_start = 0
        self._num_orders = 0
        self._digests: list[dict[str, int]] = []
        self._seen: list[dict[str, Any]] = []
        self.received_bytes: list[int] = []
        self._additions: str | None = None
        self._aborts: set[asyncio.Task[None]] = set()

    @override
    async def open(self) -> None:
        self._additions = self._store = self.read_ranges = None
        self._asleep = self._in_session = False
        # Reports of the ranks, and the secret while the server starts, are for this user alone.
        self._folder = Path(tempfile.mkdtemp(prefix="verl-sglang-"))
        port = free_port()
        address = self.spec.address or f"http://127.0.0.1:{port}"
        self._client = Client(
            self.spec.name,
            address,
            secret=self.spec.secret,
            timeout_s=self.spec.timeout_s,
            check=self._check_process,
        )
        try:
            if self.spec.address is None:
                await self._start(port)
            await self._learn()
        except BaseException:
            await self.close()
            raise

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        body = self._request(prompt_ids, params, request_seed(params, number))
        answer = SGLangStream(truncates=body["return_sampling_mask"])
        self._running += 1
        try:
            async with aclosing(self._chunks(body, answer)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self._running -= 1
            if not answer.is_finished:
                self._abort(body["rid"])

    async def check(self) -> None:
        """See `InferenceServer.check`; its scheduler must answer, not its HTTP server alone."""
        self._check_process()
        try:
            await self._ask("GET", "/server_info")
        except (RefusedError, ValueError) as error:
            raise EngineError(
                self._asked.told(f"{self.spec.name} does not say how it is: {error}")
            ) from error

    @override
    async def close(self) -> None:
        for task in self._aborts:
            task.cancel()
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            await self._process.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._client = self._process = self._folder = self._store = None

    @override
    async def pause(self) -> None:
        self._asked.is_paused = True
        # Not in place: the cache of requests that run could not be flushed, and they would go on with keys
        # and values of old weights.
        await self._command("/pause_generation", {"mode": "retract"})

    @override
    async def resume(self) -> None:
        await self._command("/flush_cache")
        await self._command("/continue_generation", {})
        self._asked.resumed()

    @override
    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        if backend != "gloo":
            raise ValueError(f"need the backend gloo for weights to SGLang, got {backend}")
        limit_s = self.spec.timeout_s
        where = {"address": address, "port": port, "first_rank": first_rank, "num_ranks": num_ranks}
        self._store = await asyncio.to_thread(
            report_store, address, port, num_ranks=num_ranks, timeout_s=limit_s
        )
        opens = not self._in_session
        if opens:
            await self._begin_session()
        await self._order(
            [WeightChunk((), "group", {**where, "backend": backend, "timeout_s": limit_s})] * self.num_ranks,
            joins=True,
        )
        if opens:
            await self._end_session()

    @override
    async def begin_update(self) -> None:
        self._digests, self._seen = [{} for _ in range(self.num_ranks)], [{} for _ in range(self.num_ranks)]
        self.received_bytes = [0] * self.num_ranks
        await self._begin_session()

    @override
    async def load(self, part: WeightChunk) -> None:
        reports = await self._order([part.of_rank(rank) for rank in range(self.num_ranks)])
        for rank, report in enumerate(reports):
            self._digests[rank] |= report["digests"]
            self._seen[rank] |= report["reads"]
            self.received_bytes[rank] += report["num_bytes"]

    @override
    async def end_update(self, version: int) -> str:
        await self._end_session()
        await self._command(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )
        if any(self._seen):
            self.read_ranges = tuple(parse_ranges(seen) for seen in self._seen)
        return fingerprint_of_ranks(self._digests)

    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        """See `InferenceServer.load_lora_adapter`; the digests are those of the file, which SGLang reads itself."""
        name, before = f"verl-{version}-{self._num_orders}", self._additions
        self._num_orders += 1
        await self._ask("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._additions = name
        if before is not None:
            await self._command("/unload_lora_adapter", {"lora_name": before})
        await self._command(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}
        )
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return fingerprint({key: digest(file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118 - it is not a mapping

    async def sleep(self) -> None:
        """See `InferenceServer.sleep`; memory is given back by a server with `enable_memory_saver`.

        Raises:
            RuntimeError: requests run, which would end the server.
        """
        if self._running:
            raise RuntimeError(
                f"need an idle engine before it sleeps, but {self.spec.name} has {self._running} requests"
            )
        if not self._asleep:
            await self._command("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
        self._asleep = True

    @override
    async def wake(self) -> None:
        if self._asleep:
            await self._command("/resume_memory_occupation", {"tags": ["kv_cache", "weights"]})
        self._asleep = False

    @property
    def _asked(self) -> Client:
        assert self._client is not None, "open first"
        return self._client

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return await self._asked.ask(method, path, body)

    async def _command(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Asks for what every server can do: one that refuses is in a state that it should not be in."""
        try:
            await self._ask("POST", path, body)
        except RefusedError as error:
            raise EngineError(str(error)) from error

    def _check_process(self) -> None:
        """Returns if the process runs that was started, if one was."""
        if self._process is None:
            return
        try:
            self._process.check()
        except EngineError as error:
            # The log ends with what became of the process; why it did comes before.
            causes = [line for line in self._log_lines() if _CAUSE.match(line)]
            raise EngineError(self._asked.told("\n  ".join([str(error), *causes[-1:]]))) from None

    def _log_lines(self) -> list[str]:
        """What the process that was started has written."""
        with self.spec.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    async def _start(self, port: int) -> None:
        assert self._folder is not None
        # The server imports its loader: this package alone is put on its path, not all that is installed
        # beside it.
        (self._folder / "verl").symlink_to(Path(verl.__file__).parent)
        # SGLang prints its settings with the secret.
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        self.spec.log.touch(mode=0o600)
        on_cpu = not torch.accelerator.is_available()
        command = [
            self.spec.python or sys.executable,
            "-m",
            "sglang.launch_server",
            *self._flags(port, on_cpu=on_cpu),
        ]
        environment: dict[str, str | None] = dict.fromkeys((*_NOT_INHERITED, _ORIGINAL_LOGPROBS))
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if "context_length" not in self.spec.options and "context-length" not in self.spec.options:
            environment[_LONGER_CONTEXT] = "1"
        if on_cpu:
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
            environment[_CPU_BINDING] = os.environ.get(_CPU_BINDING) or self._cpu_binding()
        self._log_start = self.spec.log.stat().st_size
        self._process = ServerProcess(self.spec.name, command, environment=environment, log=self.spec.log)
        deadline_s = time.monotonic() + self.spec.start_timeout_s
        while not await self._asked.is_ready():
            self._check_start()
            if time.monotonic() > deadline_s:
                raise EngineError(
                    self._asked.told(
                        f"{self.spec.name} did not start in {self.spec.start_timeout_s:.0f} s{self._process.last_lines()}"
                    )
                )
            await asyncio.sleep(_POLL_S)
        (self._folder / "secret.yaml").unlink(missing_ok=True)

    def _cpu_binding(self) -> str | None:
        """Cores of each rank; SGLang itself knows only one rank per NUMA node."""
        num_ranks = self.spec.options.get("tp_size", self.spec.options.get("tensor_parallel_size", 1))
        if num_ranks == 1 or sys.platform != "linux":
            return None
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[rank::num_ranks] or [cores[rank % len(cores)]] for rank in range(num_ranks)]
        return "|".join(",".join(map(str, share)) for share in shares)

    def _flags(self, port: int, *, on_cpu: bool) -> list[str]:
        assert self._folder is not None
        given = {name.replace("-", "_"): value for name, value in self.spec.options.items()}
        if taken := sorted(_OWN_OPTIONS & given.keys()):
            raise ValueError(
                f"need engine options that the run does not choose itself, got {', '.join(taken)}"
            )
        loaders = given.pop("custom_weight_loader", [])
        own = {"model_path": self.spec.model, "host": "127.0.0.1", "port": port, "dtype": self.spec.dtype}
        room = {"context_length": self._context + _RESERVED_TOKENS} if self._context else {}
        options = {**_OPTIONS, **room, **(_CPU_OPTIONS if on_cpu else {}), **given, **own}
        options["custom_weight_loader"] = [*([loaders] if isinstance(loaders, str) else loaders), LOADER]
        if not self.spec.secret:
            return flags(options)
        # In a file: every user of the machine sees the arguments of a process.
        file = self._folder / "secret.yaml"
        file.write_text(f"api-key: {json.dumps(self.spec.secret)}\n", encoding="utf-8")
        return ["--config", str(file), *flags(options)]

    def _check_start(self) -> None:
        try:
            self._check_process()
        except EngineError as error:
            # What SGLang says of an option: the last word of its parser, or of the checks of the values.
            if refusals := [line for line in self._log_lines() if _REFUSAL.search(line)]:
                raise ValueError(
                    self._asked.told(f"SGLang refuses what it was given: {refusals[-1]}\n  {error}")
                ) from None
            raise

    async def _learn(self) -> None:
        """What the server is and can.

        Raises:
            ValueError: it is too old, or started without what is needed.
        """
        schema = await self._ask("GET", "/openapi.json")
        paths = schema["paths"] if isinstance(schema, dict) and "paths" in schema else {}
        info = await self._ask("GET", "/server_info" if "/server_info" in paths else "/get_server_info")
        version = info["version"] if isinstance(info, dict) and "version" in info else "unknown"
        missing = [path for path in _NEEDED if path not in paths]
        if missing or "sampling_mask_max_tokens" not in info:
            lacking = ", ".join(missing) or "sampling masks"
            raise ValueError(
                f"need SGLang {OLDEST} or newer for engine {self.spec.name}, got {version}, without {lacking}"
            )
        if info["dp_size"] != 1 or info["pp_size"] != 1:
            raise ValueError(
                "need dp_size 1 and pp_size 1 of SGLang, as each replica is a server of its own: set rollout.servers"
            )
        self.syncs_weights = LOADER in info["custom_weight_loader"]
        if self.spec.address is not None and not self.syncs_weights:
            raise ValueError(
                f"need the server at {self.spec.address} to be started with --custom-weight-loader {LOADER}, to give it weights"
            )
        self.num_ranks = info["tp_size"]
        self._has_sessions = "/begin_weight_update" in paths
        self._deterministic = self.position_seeded = bool(info["enable_deterministic_inference"])
        self._max_kept = info["sampling_mask_max_tokens"]

    def _request(self, prompt_ids: Sequence[int], params: SamplingParams, seed: int) -> dict[str, Any]:
        if not all(0 <= token < self._vocabulary for token in prompt_ids) or not prompt_ids:
            # SGLang would not refuse it, but die of it.
            raise RefusedError(
                f"need prompt ids from 0 up to {self._vocabulary - 1}, at least one; got {list(prompt_ids)[:20]}"
            )
        truncates = params.truncates and params.temperature > 0
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p if truncates else 1.0,
            "top_k": self._top_k(params) if truncates else -1,
            "min_p": params.min_p if truncates else 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_new_tokens": params.max_tokens,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": seed,
        }
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": list(prompt_ids),
            "sampling_params": sampling,
            "stream": True,
            "return_logprob": True,
            # SGLang's logprobs are those before the truncation; with the mask come those of what was drawn
            # from.
            "return_sampling_mask": truncates,
        }
        return body if self._additions is None else {**body, "lora_path": self._additions}

    def _top_k(self, params: SamplingParams) -> int:
        """The number of kept tokens, which SGLang must know to say the logprobs of a truncated distribution."""
        top_k = min(params.top_k or self._vocabulary, self._vocabulary)
        if top_k > self._max_kept:
            raise RefusedError(
                f"SGLang says the logprobs of a truncated distribution for at most {self._max_kept} tokens, got top_k={params.top_k}, "
                f"top_p={params.top_p}, min_p={params.min_p} of {self._vocabulary}; set sampling.top_k to at most {self._max_kept}, or "
                f"engine_options.sampling_mask_max_tokens to {top_k}"
            )
        if params.min_p > 0 and self._deterministic:
            raise RefusedError(
                "SGLang cannot sample with min_p and with seeds; set sampling.min_p to 0 or leave enable_deterministic_inference out"
            )
        return top_k

    async def _chunks(self, body: Mapping[str, Any], answer: SGLangStream) -> AsyncIterator[TokenChunk]:
        async with aclosing(self._asked.events("/generate", body)) as events:  # type: ignore[type-var]
            async for event in events:
                for chunk in self._read(answer, event):
                    yield chunk
                if answer.is_finished:
                    return
        raise self._asked.failed("ended an answer without saying why")

    def _read(self, answer: SGLangStream, event: dict[str, Any]) -> list[TokenChunk]:
        if "error" in event:
            error = event["error"]
            raise self._asked.refused(error.get("code", 400), error["message"])
        try:
            reason = event["meta_info"]["finish_reason"] or {}
            if status := reason.get("status_code"):
                raise self._asked.refused(status, reason["message"])
            return answer.take(event)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, RefusedError):
                raise
            raise self._asked.failed(
                f"answers what cannot be read: {error!r} in {str(event)[:500]}"
            ) from error

    def _abort(self, rid: str) -> None:
        """Tells the server, without waiting: the caller may be cancelled itself."""

        async def told() -> None:
            with suppress(EngineError, RefusedError):
                await asyncio.wait_for(self._ask("POST", "/abort_request", {"rid": rid}), _ABORT_S)

        if self._client is not None:
            task = asyncio.create_task(told())
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def _begin_session(self) -> None:
        if not self._has_sessions:
            return
        try:
            await self._command("/begin_weight_update", {"selector": "target"})
        except EngineError:  # one is open that was never ended
            await self._end_session()
            await self._command("/begin_weight_update", {"selector": "target"})
        self._in_session = True

    async def _end_session(self) -> None:
        self._in_session = False
        if self._has_sessions:
            await self._command("/end_weight_update", {})

    async def _order(self, parts: Sequence[WeightChunk], *, joins: bool = False) -> list[dict[str, Any]]:
        """Lets the loader in each rank take a part, or join a group by what is in place of one; what each
        reports.
        """
        number, self._num_orders = self._num_orders, self._num_orders + 1
        in_store = parts[0].transport in ("group", "direct")
        common = {
            "via": "join" if joins else parts[0].transport,
            "tensors": [(info.name, info.shape, info.dtype) for info in parts[0].tensors],
            "records": self.records_reads and self.num_ranks > 1 and parts[0].transport != "disk",
            "number": number,
            "folder": None if in_store else str(self._folder),
        }
        orders = [
            {**common, "where": dict(part.location), "reads": part.ranges, "rank": rank}
            for rank, part in enumerate(parts)
        ]
        selector = {"selector": "target"} if self._has_sessions else {}
        # Flushed once, when the update is there.
        body = {
            "serialized_named_tensors": [_payload(order) for order in orders],
            "load_format": LOADER,
            "flush_cache": False,
            **selector,
        }
        await self._command("/update_weights_from_tensor", body)
        reports = [await self._report(number, rank, in_store=in_store) for rank in range(self.num_ranks)]
        if errors := [report["error"] for report in reports if "error" in report]:
            raise EngineError(f"{self.spec.name} could not take weights: {errors[0]}")
        return reports

    async def _report(self, number: int, rank: int, *, in_store: bool) -> dict[str, Any]:
        assert self._folder is not None
        try:
            if in_store:
                content = (await asyncio.to_thread(self._store.get, report_key(number, rank))).decode()
            else:
                content = report_file(self._folder, number, rank).read_text(encoding="utf-8")
        except (OSError, RuntimeError) as error:
            raise EngineError(
                f"rank {rank} of {self.spec.name} has not said what weights it took: {error}"
            ) from error
        report: dict[str, Any] = json.loads(content)
        return report


def _payload(order: Mapping[str, Any]) -> str:
    """An order as SGLang takes tensors: pickled, with names. No bytes of weights are in it."""
    return base64.b64encode(pickle.dumps([(json.dumps(order), torch.empty(0))])).decode()
