"""`verl serve` as an engine of a pool: a process with our own generator, whose weights follow the policy; it
needs no other library.
"""

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
from verl.rollout.engine import EngineError, InferenceServer, ServerSpec, TokenChunk
from verl.rollout.openai_engine import Connection, options_of
from verl.rollout.server.token_stream import MAX_MESSAGE_BYTES, PATH, AnswerClient
from verl.rollout.server_process import ServerProcess
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.types import Transport, WeightChunk

_SECRET = "VERL_SERVE_SECRET"
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_POLL_S, _START_POLL_S = 0.05, 1.0
# Somebody else may take the port between its choice and the start.
_MAX_STARTS = 3


@dataclass(frozen=True)
class EmbeddedServerOptions:
    """Options of the engine `served`.

    Attributes:
        max_slots: answers generated at a time; further ones wait.
        device: auto, cpu or cuda.
        recompute: after an update, caches of answers that go on are computed anew; else they stay those of
            the weights before.
        threads: of PyTorch on a CPU; none: as the environment says.
        pace_s: tokens of answers that go on are sent so often, together; those of a server that dies
            meanwhile are sampled again.
    """

    max_slots: int = 256
    device: str = "auto"
    # With caches of the old weights, an answer that goes on is drawn from no policy's distribution: neither
    # the old nor the new one gives its tokens these logprobs. Computing them anew costs one prefill of what
    # is running.
    recompute: bool = True
    threads: int | None = None
    pace_s: float = 0.1


class EmbeddedServer(InferenceServer):
    """Starts `verl.rollout.server.app`, or joins one that was started with the secret of the spec. See
    `EmbeddedServerOptions`.
    """

    transports: tuple[Transport, ...] = ("shm", "group", "disk", "direct", "ipc")
    position_seeded = True

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._options: EmbeddedServerOptions = options_of(EmbeddedServerOptions, spec.options, "served")
        if spec.dtype not in _PRECISIONS:
            raise ValueError(f"need dtype {', '.join(_PRECISIONS)} for engine {spec.name}, got {spec.dtype}")
        if spec.address is not None and not spec.secret:
            raise ValueError(
                f"need the secret of the server at {spec.address} to join it as engine {spec.name}"
            )
        self._secret = spec.secret or secrets.token_hex(16)
        self._process: ServerProcess | None = None
        self._connection: Connection | None = None
        self._answers: AnswerClient | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started; the leader of its group."""
        if self._process is None:
            raise EngineError(f"{self.spec.name} has no process of its own")
        return self._process.pid

    @override
    async def open(self) -> None:
        deadline = time.monotonic() + self.spec.start_timeout_s
        try:
            if self.spec.address is not None:
                await self._connect(self.spec.address, deadline)
                return
            for start in range(_MAX_STARTS):
                if await self._started(deadline, is_last=start == _MAX_STARTS - 1):
                    return
        except BaseException:
            await self.close()
            raise

    @override
    async def check(self) -> None:
        if self._process is not None:
            self._process.check()
        await self._connected().json("GET", "/health", timeout_s=self.spec.timeout_s)

    @override
    async def close(self) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            await answers.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        if self._process is not None:
            await self._process.end()
            self._process = None

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        async with aclosing(self._asked().sample(prompt_ids, params, number=number)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    @override
    async def pause(self) -> None:
        await self._command("pause")

    @override
    async def resume(self) -> None:
        await self._command("resume", recompute=self._options.recompute)

    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        """See `InferenceServer.join_group`; the group is one of `verl.weight_sync.process_group.open_group` on
        all sides.
        """
        await self._command(
            "join_group", address=address, port=port, rank=first_rank, num_ranks=num_ranks, backend=backend
        )

    async def begin_update(self) -> None:
        """See `InferenceServer.begin_update`; nothing is sampled until an update has ended well."""
        await self._command("begin_update")

    @override
    async def load(self, part: WeightChunk) -> None:
        where = {
            name: str(value) if isinstance(value, Path) else value for name, value in part.location.items()
        }
        await self._command(
            "load", tensors=[asdict(info) for info in part.tensors], via=part.transport, where=where
        )

    async def end_update(self, version: int) -> str:
        """See `InferenceServer.end_update`; weights that were not sent are an error, and the engine serves
        nothing until the next update.
        """
        return str((await self._command("end_update", version=version))["fingerprint"])

    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        """See `InferenceServer.load_lora_adapter`; they are merged into the weights."""
        return str(
            (await self._command("load_lora_adapter", folder=str(folder), version=version))["fingerprint"]
        )

    async def _started(self, deadline: float, *, is_last: bool) -> bool:
        """Starts the server; False if its port was taken meanwhile."""
        port = free_port()
        options = {
            "model": self.spec.model,
            "port": port,
            "max_slots": self._options.max_slots,
            "precision": _PRECISIONS[self.spec.dtype],
            "device": self._options.device,
            "group_timeout_s": self.spec.timeout_s,
            "pace_s": self._options.pace_s,
        }
        command = [
            self.spec.python or sys.executable,
            "-m",
            "verl.rollout.server.app",
            json.dumps(options),
            "--secret-env",
            _SECRET,
        ]
        self._process = ServerProcess(
            self.spec.name, command, environment=self._environment(), log=self.spec.log
        )
        try:
            await self._connect(f"http://127.0.0.1:{port}", deadline)
        except EngineError as error:
            if is_last or "cannot listen at" not in str(error):
                raise
            return False
        return True

    def _environment(self) -> dict[str, str | None]:
        root = str(Path(verl.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {} if self._options.threads is None else {"OMP_NUM_THREADS": str(self._options.threads)}
        return {_SECRET: self._secret, "PYTHONPATH": path, **threads}

    async def _connect(self, address: str, deadline: float) -> None:
        """Waits until the server answers to the secret, as no other program at its port would."""
        connection = self._connection = Connection(self.spec.name, address, key=self._secret)
        self._answers = AnswerClient(
            self.spec.name, lambda: connection.socket(PATH, MAX_MESSAGE_BYTES), timeout_s=self.spec.timeout_s
        )
        while True:
            if self._process is not None:
                self._process.check()
            try:
                state = await self._connection.json("GET", "/control/state", timeout_s=_START_POLL_S)
                if self._process is None or state.get("pid") == self._process.pid:
                    is_near = state.get("shared_memory") == shared_memory_id()
                    self.transports = (
                        ("shm", "group", "disk", "direct", "ipc") if is_near else ("group", "disk", "direct")
                    )
                    return
            except EngineError as error:
                if time.monotonic() > deadline:
                    last_lines = self._process.last_lines() if self._process is not None else ""
                    raise EngineError(
                        f"{self.spec.name} did not start within {self.spec.start_timeout_s:g} s: {error}{last_lines}"
                    ) from error
            await asyncio.sleep(_POLL_S)

    def _connected(self) -> Connection:
        if self._connection is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._connection

    async def _command(self, name: str, **body: Any) -> dict[str, Any]:
        return await self._connected().json("POST", f"/control/{name}", body, timeout_s=self.spec.timeout_s)

    def _asked(self) -> AnswerClient:
        if self._answers is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._answers
