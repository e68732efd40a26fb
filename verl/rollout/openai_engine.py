"""Engines behind HTTP: what all of them need of a client, and the engine for any server with OpenAI's
interface.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from typing_extensions import override

from verl.rollout.engine import EngineError, InferenceServer, RefusedError, ServerSpec, TokenChunk, seed_of
from verl.utils.sampling_types import FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

_MAX_EVENT_BYTES = 2**24
_MAX_BACKOFF_S = 30.0
_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class StatusError(EngineError):
    """A server answered with a status that is no success.

    Attributes:
        status: of HTTP.
        retry_after_s: how long it asks to wait, if it does.
    """

    def __init__(self, message: str, status: int, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s

    @property
    def is_refusal(self) -> bool:
        """Whether the same request would never be answered."""
        return 400 <= self.status < 500 and self.status not in (408, 409, 425, 429)


class Connection:
    """JSON over HTTP to one server; the key is sent along and never told.

    Args:
        name: of the engine, for messages.
        address: http://HOST:PORT or more.
        key: sent as `Authorization: Bearer`; "": none.
    """

    def __init__(self, name: str, address: str, *, key: str) -> None:
        self._name, self._address, self._key = name, address.rstrip("/"), key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The number of requests at a time is the server's affair, or the pool's.
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(limit=0), trust_env=False
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def json(self, method: str, path: str, body: Any = None, *, timeout_s: float) -> dict[str, Any]:
        """The JSON object of the answer.

        Raises:
            StatusError: another status than 2xx.
            EngineError: no answer, or none that is a JSON object.
        """
        async with self._request(method, path, body, aiohttp.ClientTimeout(total=timeout_s)) as response:
            content = await response.read()
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise EngineError(
                f"{self._name} answers {path} with what is no JSON: {self._shown(content)}"
            ) from error
        if not isinstance(answer, dict):
            raise EngineError(
                f"{self._name} answers {path} with JSON that is no object: {self._shown(content)}"
            )
        return answer

    async def events(self, path: str, body: Any, *, timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream; it must send something, at least a comment, within each `timeout_s`.

        Raises:
            StatusError: another status than 2xx.
            EngineError: the stream broke, or says an error.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        async with self._request("POST", path, body, timeout) as response:
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data:"):
                    yield self._event(line.removeprefix(b"data:"))
        raise EngineError(f"{self._name} ended a stream before its end")

    async def socket(self, path: str, max_bytes: int) -> aiohttp.ClientWebSocketResponse[bool]:
        """A connection for messages of at most so many bytes in both directions.

        Raises:
            EngineError: there is none.
        """
        try:
            # The message that says goodbye is not waited for long: a server that is stopped sends none.
            timeout = aiohttp.ClientWSTimeout(ws_close=0.5)
            return await self._session.ws_connect(
                self._address + path, max_msg_size=max_bytes, timeout=timeout
            )
        except aiohttp.WSServerHandshakeError as error:
            raise EngineError(f"{self._name} answers {path} with status {error.status}") from error
        except (
            aiohttp.ClientError,
            OSError,
            RuntimeError,
        ) as error:  # RuntimeError: the session was closed meanwhile
            raise EngineError(
                f"{self._name} cannot be asked at {path}: {self._hidden(f'{type(error).__name__}: {error}')}"
            ) from error

    def _event(self, content: bytes) -> dict[str, Any]:
        try:
            event = json.loads(content)
        except ValueError as error:
            raise EngineError(f"{self._name} streams what is no JSON: {self._shown(content)}") from error
        if not isinstance(event, dict) or "error" in event:
            raise EngineError(f"{self._name} failed: {self._message(content)}")
        return event

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Any, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            options = {"read_bufsize": _MAX_EVENT_BYTES, "allow_redirects": False}
            async with self._session.request(
                method, self._address + path, json=body, timeout=timeout, **options
            ) as response:
                if not 200 <= response.status < 300:
                    content = await response.content.read(2**16)
                    message = (
                        f"{self._name} answers {path} with status {response.status}: {self._message(content)}"
                    )
                    raise StatusError(
                        message, response.status, _retry_after_s(response.headers.get("Retry-After"))
                    )
                yield response
        except EngineError:
            raise
        except asyncio.TimeoutError as error:
            raise EngineError(f"{self._name} gave no sign of life at {path} in time") from error
        except (
            aiohttp.ClientError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError: the session was closed meanwhile
            raise EngineError(
                f"{self._name} cannot be asked at {path}: {self._hidden(f'{type(error).__name__}: {error}')}"
            ) from error

    def _message(self, content: bytes) -> str:
        """What an error object says, whatever its form; else the text itself."""
        try:
            said = json.loads(content)
        except ValueError:
            return self._shown(content)
        while isinstance(said, dict) and (
            inner := said.get("error") or said.get("message") or said.get("detail")
        ):
            said = inner
        return self._hidden(said if isinstance(said, str) else json.dumps(said))[:1000]

    def _shown(self, content: bytes) -> str:
        return self._hidden(repr(content[:200].decode(errors="replace")))

    def _hidden(self, text: str) -> str:
        """Some servers repeat the key that they were given."""
        return text.replace(self._key, "***") if self._key else text


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a header with seconds or a date; None if it says neither."""
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


@dataclass(frozen=True)
class HTTPOptions:
    """Options of the engine `http`.

    Attributes:
        model: name of the model in requests.
        chat: ask chat completions with the prompt's text as one message of the user; else completions.
        api_key_env: name of the environment variable that has the key; none: no key.
        retries: of a request that failed in a way that may pass: status 429 or 5xx, no connection, no answer.
        backoff: seconds before the first retry, doubled for each further one, up to 30.
        max_concurrency: requests at a time.
        processed_logprobs: its logprobs are those of the distribution that was drawn from, after temperature
            and truncation, as vLLM's with `--logprobs-mode processed_logprobs` and those of `verl serve`;
            else they are taken only at temperature 1 without truncation, where both are the same.
        extra: further fields of the body.
    """

    model: str
    chat: bool = False
    api_key_env: str | None = None
    retries: int = 5
    backoff: float = 0.5
    max_concurrency: int = 64
    processed_logprobs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> HTTPOptions:
        """From settings.

        Raises:
            ValueError: an unknown option, a missing one, or one out of bounds.
        """
        return options_of(cls, options, "http")

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff <= 0 or self.max_concurrency < 1:
            raise ValueError(f"need retries >= 0, backoff > 0 and max_concurrency >= 1, got {self}")

    def key(self) -> str:
        """The key.

        Raises:
            ValueError: the variable is not set.
        """
        if self.api_key_env is None:
            return ""
        if not os.environ.get(self.api_key_env):
            raise ValueError(
                f"need the key of the server in the environment variable {self.api_key_env}, which is not set"
            )
        return os.environ[self.api_key_env]


def options_of(kind: type, options: Mapping[str, Any], engine: str) -> Any:
    """A dataclass from options of the same names.

    Raises:
        ValueError: an unknown name, with the nearest one that is known, or one is missing.
    """
    known = [option.name for option in fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
            raise ValueError(f"the engine {engine} has no option {name!r}; did you mean {near[0]}?")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"options of the engine {engine} are incomplete: {error}") from error


class HTTPEngine(InferenceServer):
    """Any server with OpenAI's interface, at `spec.address` with or without /v1; its weights are its own.

    Where it takes token ids and gives them back with logprobs, as vLLM and `verl serve` do, chunks have both;
    else the text of the whole answer alone. A request that may be answered later is retried, all within
    `spec.timeout_s`. See `HTTPOptions`.
    """

    syncs_weights = False

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._options = HTTPOptions.of(spec.options)
        # Somebody else's server has no business with the secret of the run.
        self._key = self._options.key()
        if spec.address is None:
            raise ValueError(f"need the address of the server of engine {spec.name}")
        self._base = spec.address.rstrip("/").removesuffix("/v1") + "/v1"
        self._gives_ids = not self._options.chat
        self._connection: Connection | None = None

    @override
    async def open(self) -> None:
        self._codec = TextCodec.load(self.spec.model)
        self._places = asyncio.Semaphore(self._options.max_concurrency)
        self._connection = Connection(self.spec.name, self._base, key=self._key)
        deadline = time.monotonic() + self.spec.start_timeout_s
        while True:
            try:
                return await self.check()
            except EngineError:
                if time.monotonic() > deadline:
                    await self.close()
                    raise
            await asyncio.sleep(self._options.backoff)

    async def check(self) -> None:
        """See `InferenceServer.check`; a server that answers, if only with a refusal, is well, but for one that
        refuses the key.
        """
        try:
            await self._connected().json("GET", "/models", timeout_s=self.spec.timeout_s)
        except StatusError as error:
            if error.status in (401, 403) or not error.is_refusal:
                raise

    @override
    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        """See `InferenceServer.sample`; one chunk."""
        async with self._places:
            yield await self._answered(list(prompt_ids), params, seed_of(params, number))

    def _connected(self) -> Connection:
        if self._connection is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._connection

    async def _answered(self, prompt_ids: list[int], params: SamplingParams, seed: int) -> TokenChunk:
        deadline = time.monotonic() + self.spec.timeout_s
        attempt = 0
        while True:
            try:
                answer = await self._asked_once(prompt_ids, params, seed, deadline)
                return self._chunk(answer, params)
            except StatusError as error:
                if error.is_refusal and self._gives_ids and "return_token_ids" in str(error):
                    self._gives_ids = False  # It knows texts only.
                    continue
                if error.is_refusal:
                    raise RefusedError(str(error)) from error
                await self._wait(attempt, error, error.retry_after_s or 0.0, deadline)
            except EngineError as error:
                await self._wait(attempt, error, 0.0, deadline)
            attempt += 1

    async def _wait(self, attempt: int, error: EngineError, least_s: float, deadline: float) -> None:
        """Waits before the next attempt.

        Raises:
            EngineError: there is none.
        """
        growing_s = min(_MAX_BACKOFF_S, self._options.backoff * 2**attempt)
        # At random, so that requests that failed together do not come back together.
        wait_s = least_s + growing_s * random.uniform(0.5, 1.0)
        if attempt >= self._options.retries or time.monotonic() + wait_s >= deadline:
            raise EngineError(
                f"{error} (attempt {attempt + 1}; {self._options.retries} retries within {self.spec.timeout_s:g} s)"
            ) from error
        await asyncio.sleep(wait_s)

    async def _asked_once(
        self, prompt_ids: list[int], params: SamplingParams, seed: int, deadline: float
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._options.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed,
            "n": 1,
        }
        # Not everyone knows these.
        body |= {"top_k": params.top_k} if params.top_k else {}
        body |= {"min_p": params.min_p} if params.min_p else {}
        body |= {"stop": list(params.stop)} if params.stop else {}
        if self._options.chat:
            path, body["messages"] = (
                "/chat/completions",
                [{"role": "user", "content": self._codec.decode_prompt(prompt_ids)}],
            )
        elif self._gives_ids:
            path = "/completions"
            body |= {
                "prompt": prompt_ids,
                "logprobs": 0,
                "return_token_ids": True,
                "stop_token_ids": list(params.stop_ids),
            }
        else:
            path, body["prompt"] = "/completions", self._codec.decode_prompt(prompt_ids)
        left_s = max(0.001, deadline - time.monotonic())
        return await self._connected().json("POST", path, {**body, **self._options.extra}, timeout_s=left_s)

    def _chunk(self, answer: Mapping[str, Any], params: SamplingParams) -> TokenChunk:
        """The answer as a chunk.

        Raises:
            EngineError: it is none.
        """
        try:
            choice = answer["choices"][0]
            reason = _FINISH.get(choice["finish_reason"], "stop")
            text = choice["message"]["content"] if self._options.chat else choice["text"]
            ids = choice.get("token_ids")
            logprobs = ids and choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self.spec.name} answers without {error}: {json.dumps(answer)[:500]}"
            ) from error
        if ids and logprobs and len(ids) == len(logprobs) <= params.max_tokens:
            is_plain = params.temperature == 1 and not params.truncates
            return TokenChunk(
                tuple(ids), tuple(logprobs) if is_plain or self._options.processed_logprobs else None, reason
            )
        if not isinstance(text, str):
            raise EngineError(f"{self.spec.name} answers without a text: {json.dumps(answer)[:500]}")
        return TokenChunk(finish_reason=reason, text=text)
