"""HTTP to one SGLang server: control, and streams that may be silent while it is paused but not otherwise."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp

from verl.rollout.engine import EngineError, RefusedError

_Heard = TypeVar("_Heard")
_EVENT = b"data: {"
_READY_S = 30.0


class Client:
    """Requests to one server, the secret sent along and never told.

    Args:
        name: of the engine, for messages.
        address: http://HOST:PORT.
        secret: "" for none.
        timeout_s: longest silence.
        check: raises if the process of the server has ended, with the end of its log.

    Attributes:
        is_paused: whether it may be silent.
    """

    def __init__(
        self, name: str, address: str, *, secret: str, timeout_s: float, check: Callable[[], None]
    ) -> None:
        self._name, self._address, self._secret = name, address.rstrip("/"), secret
        self._timeout_s, self._check = timeout_s, check
        self._heard_s = 0.0
        self.is_paused = False
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        # How many requests run at a time is decided elsewhere. A connection for each: the server closes those
        # that wait for 5 s, which fails the next request on them.
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(limit=0, force_close=True)
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    def resumed(self) -> None:
        """From now on silence counts again."""
        self.is_paused, self._heard_s = False, time.monotonic()

    async def is_ready(self) -> bool:
        """Whether it answers that it is well."""
        try:
            async with self._session.get(
                f"{self._address}/health", timeout=aiohttp.ClientTimeout(total=_READY_S)
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON, or text, of an endpoint of control.

        Raises:
            EngineError: no answer in time, or an error of the server.
            RefusedError: it does not do that.
        """
        limit = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._session.request(
                method, f"{self._address}{path}", json=body, timeout=limit
            ) as response:
                text = await response.text()
        except asyncio.TimeoutError:
            raise self.failed(f"did not answer {path} for {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self.failed(f"does not answer {path}: {type(error).__name__}: {error}") from error
        if response.status != 200:
            raise self.refused(response.status, f"{path}: {text[:1000]}")
        return json.loads(text) if response.content_type == "application/json" else text

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What the server streams.

        Raises:
            EngineError: the stream broke, or nothing came from the server for too long, on any stream.
            RefusedError: the server will not answer this.
        """
        post = self._session.post(
            f"{self._address}{path}", json=body, timeout=aiohttp.ClientTimeout(total=None)
        )
        try:
            async with await self._heard(post) as response:
                if response.status != 200:
                    raise self.refused(response.status, await response.text())
                async for line in self._lines(response.content):
                    yield json.loads(line)
        except (aiohttp.ClientError, OSError) as error:
            raise self.failed(f"broke an answer off: {type(error).__name__}: {error}") from error

    async def _lines(self, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        """The JSON of each event; a line has no bound here, and aiohttp sets one where it reads lines."""
        buffer = b""
        while read := await self._heard(content.readany()):
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                if line.startswith(_EVENT):
                    yield line[len(_EVENT) - 1 :]

    def refused(self, status: int, text: str) -> EngineError | RefusedError:
        """The error for a status of HTTP."""
        if status in (401, 403):
            return RefusedError(f"{self._name} at {self._address} does not take the secret that it was sent")
        if status < 500 and status != 429:
            return RefusedError(self.told(f"{self._name} refuses: {text}"))
        return self.failed(f"answers with {status}: {text}")

    def failed(self, what: str) -> EngineError:
        """The error for what it does, with the end of its log if it has ended."""
        try:
            self._check()
        except EngineError as error:
            return EngineError(self.told(str(error)))
        return EngineError(self.told(f"{self._name} {what}"))

    def told(self, text: str) -> str:
        """A text without the secret."""
        return text.replace(self._secret, "<secret>") if self._secret else text

    async def _heard(self, reading: Awaitable[_Heard]) -> _Heard:
        """The result, unless the server is silent for too long."""
        task = asyncio.ensure_future(reading)
        since_s = time.monotonic()
        try:
            while True:
                await asyncio.wait({task}, timeout=self._timeout_s / 4)
                now_s = time.monotonic()
                if task.done():
                    self._heard_s = now_s
                    return task.result()
                if not self.is_paused and now_s - max(since_s, self._heard_s) > self._timeout_s:
                    raise self.failed(f"has been silent for {self._timeout_s:g} s")
        finally:
            task.cancel()
