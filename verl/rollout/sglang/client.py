"""HTTP client of one SGLang server: control calls, and streams of answers that are silent during a pause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import aiohttp

from verl.rollout.http_client import SilenceError, SilenceTimeout, hide_secret
from verl.rollout.inference_server import EngineError, RefusedError
from verl.rollout.sglang.launch import SGLangProcess

T = TypeVar("T")
_EVENT_PREFIX = b"data: {"
_HEALTH_S, _ABORT_S = 30.0, 5.0


class SGLangClient:
    """Requests to one server; the secret is sent with each and hidden in every error.

    Args:
        name: of the engine, for messages.
        address: http://HOST:PORT.
        secret: "" for none.
        timeout_s: longest time for a control call, and longest silence of the server.
        process: of the server, if it was started here.

    Attributes:
        address: as given.
        silence: limit on the time without a token of any answer.
    """

    def __init__(
        self, name: str, address: str, *, secret: str, timeout_s: float, process: SGLangProcess | None
    ) -> None:
        self.address = address.rstrip("/")
        self._name, self._secret, self._process = name, secret, process
        self.silence = SilenceTimeout(timeout_s)
        self._aborts: set[asyncio.Task[None]] = set()
        # No limit on connections here: the pool decides how many requests run at a time. One connection for
        # each request: the server closes those that are idle for 5 s, which fails the next request on them.
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def close(self) -> None:
        """Close all connections; aborts that were not sent yet are dropped."""
        for task in self._aborts:
            task.cancel()
        await self._session.close()

    async def is_healthy(self) -> bool:
        """Ask the server for its health; False also if it does not answer."""
        timeout = aiohttp.ClientTimeout(total=_HEALTH_S)
        try:
            async with self._session.get(f"{self.address}/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a control call and return the JSON or text of its response.

        Raises:
            EngineError: no response in time, or an error of the server.
            RefusedError: the server refuses the call.
        """
        limit_s = self.silence.limit_s
        try:
            async with self._session.request(
                method, f"{self.address}{path}", json=body, timeout=aiohttp.ClientTimeout(total=limit_s)
            ) as response:
                text = await response.text()
        except asyncio.TimeoutError:
            raise self.error(f"did not answer {path} for {limit_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self.error(f"does not answer {path}: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise self.status_error(response.status, f"{path}: {text[:1000]}")
        return json.loads(text) if response.content_type == "application/json" else text

    async def command(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Send a control call that every server in the right state accepts; a refusal is an EngineError."""
        try:
            await self.request("POST", path, body)
        except RefusedError as error:
            raise EngineError(str(error)) from error

    async def set_weight_version(self, version: int) -> None:
        """Set the version that the server gives with each token."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self.command("/update_weight_version", body)

    def abort(self, request_id: str) -> None:
        """Abort a request without waiting for it, since the caller may be cancelled itself."""

        async def send() -> None:
            with suppress(EngineError, RefusedError):
                await asyncio.wait_for(self.command("/abort_request", {"rid": request_id}), _ABORT_S)

        task = asyncio.create_task(send())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Send a request and yield the events of its response.

        Raises:
            EngineError: the stream broke, or the server is silent for too long on all streams.
            RefusedError: the server refuses the request.
        """
        timeout = aiohttp.ClientTimeout(total=None)
        post = self._session.post(f"{self.address}{path}", json=body, timeout=timeout)
        try:
            async with await self._read(post) as response:
                if response.status != 200:
                    raise self.status_error(response.status, await response.text())
                async for event in self._events(response.content):
                    yield event
        except (aiohttp.ClientError, OSError) as error:
            raise self.error(f"broke an answer off: {type(error).__name__}: {error}") from error

    def status_error(self, status: int, text: str) -> EngineError | RefusedError:
        """Error for an HTTP status: RefusedError if another server would refuse the request, too."""
        if status in (401, 403):
            return RefusedError(f"{self._name} at {self.address} does not accept the secret that it was sent")
        if status < 500 and status != 429:
            return RefusedError(hide_secret(f"{self._name} refuses: {text}", self._secret))
        return self.error(f"answers with {status}: {text}")

    def error(self, message: str) -> EngineError:
        """Build an error that names the engine; if its process has ended, that is the error."""
        try:
            if self._process is not None:
                self._process.check()
        except EngineError as error:
            return error
        return EngineError(hide_secret(f"{self._name} {message}", self._secret))

    async def _events(self, content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
        """Events of a response, in lines of any length: aiohttp limits the length where it reads lines."""
        buffer = b""
        while received := await self._read(content.readany()):
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                if line.startswith(_EVENT_PREFIX):
                    yield json.loads(line[len(_EVENT_PREFIX) - 1 :])

    async def _read(self, reading: Awaitable[T]) -> T:
        """Read from the server within the limit on its silence."""
        try:
            return await self.silence.wait(reading)
        except SilenceError as error:
            raise self.error(str(error)) from None
