"""HTTP client of one inference server: JSON calls, WebSockets, errors, and a timeout on silence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp

from verl.rollout.inference_server import EngineError

T = TypeVar("T")
_READ_BUFFER_BYTES = 2**24


class HTTPStatusError(EngineError):
    """A server answered with a status other than 2xx.

    Attributes:
        status: of HTTP.
        retry_after_s: seconds to wait before the next request, if the server asks for it.
    """

    def __init__(self, message: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s

    @property
    def is_permanent(self) -> bool:
        """True if the same request would fail again."""
        return 400 <= self.status < 500 and self.status not in (408, 409, 425, 429)


class NoResponseError(EngineError):
    """A server has not answered a request in time."""


class SilenceError(EngineError):
    """A server has sent nothing for too long."""


class HTTPClient:
    """JSON over HTTP to one server; the API key is sent with each request and hidden in every error.

    Args:
        name: of the engine, for messages.
        address: base URL, http://HOST:PORT with or without a path.
        api_key: sent as `Authorization: Bearer`; "": none.
        use_proxy: go through the proxy that the environment names, if it names one.
    """

    def __init__(self, name: str, address: str, *, api_key: str, use_proxy: bool = False) -> None:
        self._name, self._address, self._api_key = name, address.rstrip("/"), api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No limit on connections here: the server or the pool decides how many requests run at a time.
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(limit=0), trust_env=use_proxy
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def json(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the JSON object of its response.

        Raises:
            HTTPStatusError: a status other than 2xx.
            NoResponseError: no response in time.
            EngineError: no connection, or a response that is not a JSON object.
        """
        async with self._request(method, path, body, timeout_s) as response:
            content = await response.read()
        excerpt = hide_secret(repr(content[:200].decode(errors="replace")), self._api_key)
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise EngineError(f"{self._name} answers {path} with invalid JSON: {excerpt}") from error
        if not isinstance(answer, dict):
            raise EngineError(f"{self._name} answers {path} with JSON that is not an object: {excerpt}")
        return answer

    async def websocket(self, path: str, max_bytes: int) -> aiohttp.ClientWebSocketResponse[bool]:
        """Open a WebSocket for messages of at most `max_bytes` in both directions.

        Raises:
            EngineError: the server cannot be reached or refuses.
        """
        try:
            # Short, since a stopped server never answers the closing message.
            timeout = aiohttp.ClientWSTimeout(ws_close=0.5)
            return await self._session.ws_connect(
                self._address + path, max_msg_size=max_bytes, timeout=timeout
            )
        except aiohttp.WSServerHandshakeError as error:
            raise EngineError(f"{self._name} answers {path} with status {error.status}") from error
        # RuntimeError: the session was closed meanwhile.
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise self._unreachable(path, error) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Any, timeout_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            options = {"read_bufsize": _READ_BUFFER_BYTES, "allow_redirects": False}
            async with self._session.request(
                method, self._address + path, json=body, timeout=timeout, **options
            ) as response:
                if not 200 <= response.status < 300:
                    reason = hide_secret(error_message(await response.content.read(2**16)), self._api_key)
                    raise HTTPStatusError(
                        f"{self._name} answers {path} with status {response.status}: {reason[:1000]}",
                        response.status,
                        parse_retry_after(response.headers.get("Retry-After")),
                    )
                yield response
        except EngineError:
            raise
        except asyncio.TimeoutError as error:
            raise NoResponseError(f"{self._name} gave no sign of life at {path} in time") from error
        # RuntimeError: the session was closed meanwhile.
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            raise self._unreachable(path, error) from error

    def _unreachable(self, path: str, error: Exception) -> EngineError:
        reason = hide_secret(f"{type(error).__name__}: {error}", self._api_key)
        return EngineError(f"{self._name} cannot be reached at {path}: {reason}")


class SilenceTimeout:
    """Limit on the time in which a server sends nothing on any of its streams; a pause suspends it.

    One stream may be silent for long while others are served, so a response on any of them counts for all.

    Args:
        limit_s: longest silence.

    Attributes:
        is_paused: the server is paused and may be silent.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.is_paused = False
        self._last_received_s = 0.0

    def pause(self) -> None:
        """Allow silence until `resume`."""
        self.is_paused = True

    def resume(self) -> None:
        """Count silence again, from now on."""
        self.is_paused, self._last_received_s = False, time.monotonic()

    async def wait(self, reading: Awaitable[T]) -> T:
        """Return the result of an awaitable that reads from the server, which is cancelled otherwise.

        Raises:
            SilenceError: the server has sent nothing for `limit_s`.
        """
        task = asyncio.ensure_future(reading)
        start_s = time.monotonic()
        try:
            while not task.done():
                silent_s = time.monotonic() - max(start_s, self._last_received_s)
                if silent_s >= self.limit_s and not self.is_paused:
                    raise SilenceError(f"has been silent for {self.limit_s:g} s")
                # In a pause the remaining time may be negative; the end of the pause is then noticed late.
                await asyncio.wait({task}, timeout=max(self.limit_s - silent_s, self.limit_s / 4))
            result = task.result()
        finally:
            task.cancel()
        self._last_received_s = time.monotonic()
        return result


def hide_secret(text: str, secret: str) -> str:
    """Replace a secret in a text: some servers repeat it in their errors and logs; "": there is none."""
    return text.replace(secret, "***") if secret else text


def error_message(content: str | bytes) -> str:
    """Message inside an error response, whose JSON differs between servers; else the text itself."""
    text = content if isinstance(content, str) else content.decode(errors="replace")
    try:
        error = json.loads(text)
    except ValueError:
        return text
    while isinstance(error, dict) and (
        inner := error.get("error") or error.get("message") or error.get("detail")
    ):
        error = inner
    return error if isinstance(error, str) else json.dumps(error)


def parse_retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which has seconds or a date; None if it has neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def num_reused(response: Mapping[str, Any]) -> int | None:
    """Prompt tokens from the server's prefix cache, by the usage in a response of OpenAI's API.

    None: the server does not say.
    """
    details = (response.get("usage") or {}).get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    return None if cached is None else int(cached)
