"""HTTP client of one vLLM server: control calls, and streams of answers that are silent during a pause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

import aiohttp

from verl.rollout.http_client import SilenceError, SilenceTimeout, error_message
from verl.rollout.inference_server import EngineError, RefusedError
from verl.rollout.server_process import ServerProcess

T = TypeVar("T")
# The server understood the request, and another one would refuse it, too.
_REFUSALS = (400, 413, 422)
# A line of a stream may repeat a long prompt.
_LINE_BYTES = 2**24
_MAX_MESSAGE = 2000


class VLLMClient:
    """Requests to one server.

    Args:
        name: of the engine, for messages.
        address: http://HOST:PORT.
        secret: sent with every request; "": none.
        timeout_s: longest time for a control call, and longest silence of the server.
        process: of the server, if it was started here.

    Attributes:
        address: as given.
        session: with the secret in its headers.
        silence: limit on the time without a token of any answer.
    """

    def __init__(
        self, name: str, address: str, *, secret: str, timeout_s: float, process: ServerProcess | None
    ) -> None:
        self.address = address.rstrip("/")
        self._name, self._timeout_s, self._process = f"vLLM server {name}", timeout_s, process
        self.silence = SilenceTimeout(timeout_s)
        # A connection for each request: vLLM closes those that are idle for 5 s and those of some errors,
        # which fails the next request on them.
        self.session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(),
            read_bufsize=_LINE_BYTES,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self.session.close()

    def check_process(self) -> None:
        """Raise EngineError, with the end of the log, if the server was started here and has ended."""
        if self._process is not None:
            self._process.check()

    def error(self, message: str, *, with_log: bool = False) -> EngineError:
        """Build an error that names the server, with the end of its log if it was started here."""
        log = self._process.last_lines() if with_log and self._process else ""
        return EngineError(f"{self._name} {message}{log}")

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send a control call and return the JSON object of its response; {} if the response is not JSON.

        Raises:
            EngineError: an error status, no response in time, or a server that has ended.
        """
        limit = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s)
        try:
            async with self.session.request(
                method, f"{self.address}{path}", json=body, params=query, timeout=limit
            ) as response:
                content = await response.text()
        # RuntimeError: the session was closed meanwhile.
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, RuntimeError) as error:
            self.check_process()
            raise self.error(f"does not answer to {path}: {type(error).__name__} {error}") from error
        if response.status != 200:
            reason = error_message(content)[:_MAX_MESSAGE]
            message = f"answered {response.status} to {path}: {reason}"
            raise self.error(message, with_log=response.status >= 500)
        return self._parse_object(content) if content.startswith("{") else {}

    async def collective_rpc(self, method: str, *arguments: str, **named: Any) -> list[Any]:
        """Call a method of the workers on all ranks, and return the result of each."""
        body = {"method": method, "args": arguments, "kwargs": named}
        return list((await self.request("POST", "/collective_rpc", body=body))["results"])

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Request a streamed completion and yield its events; leaving the iteration aborts it in the server.

        Raises:
            EngineError: the stream broke, or the server is silent for too long on all streams.
            RefusedError: the server refuses the request.
        """
        response = await self._read(self.session.post(f"{self.address}/v1/completions", json=body))
        try:
            if response.status != 200:
                raise refusal(response.status, await self._read(response.text()))
            while line := await self._read(response.content.readline()):
                content = line.removeprefix(b"data:").strip()
                if not content or content == b"[DONE]":
                    continue
                event = self._parse_object(content)
                if error := event.get("error"):
                    raise refusal(int(error.get("code") or 500), str(error.get("message")))
                yield event
        finally:
            # The server notices that the connection of an unfinished answer is closed, and aborts it.
            response.close()

    def _parse_object(self, content: str | bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise self.error(f"sent invalid JSON: {content[:200]!r}") from error
        if not isinstance(parsed, dict):
            raise self.error(f"sent JSON that is not an object: {content[:200]!r}")
        return parsed

    async def _read(self, reading: Awaitable[T]) -> T:
        """Read from the server within the limit on its silence."""
        try:
            return await self.silence.wait(reading)
        except SilenceError as error:
            raise self.error(str(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.check_process()
            raise self.error(f"broke off: {type(error).__name__} {error}") from error


def refusal(status: int, content: str) -> EngineError | RefusedError:
    """Error of a request that got an error status: RefusedError if another server would refuse it, too."""
    message = f"vLLM answered {status}: {error_message(content)[:_MAX_MESSAGE]}"
    return RefusedError(message) if status in _REFUSALS else EngineError(message)
