"""Engine for any server with OpenAI's API; the server keeps its own weights."""

from __future__ import annotations

import asyncio
import difflib
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from typing_extensions import override

from verl.rollout.http_client import HTTPClient, HTTPStatusError, num_reused
from verl.rollout.inference_server import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.utils.network import key_from_environment
from verl.utils.sampling_types import FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

_MAX_BACKOFF_S = 30.0
_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True)
class HTTPOptions:
    """Options of the engine `http`.

    Attributes:
        model: name of the model in requests.
        chat: request chat completions, with the prompt's text as one user message; else completions.
        api_key_env: name of the environment variable with the API key; None: no key.
        retries: how often a failed request is sent again after a status of 429 or 5xx, a lost connection or a
            timeout.
        backoff: seconds before the first retry, doubled for each further one, up to 30.
        max_concurrency: requests at a time.
        processed_logprobs: the server's logprobs are those of the distribution that was sampled from, after
            temperature and truncation, as with vLLM's `--logprobs-mode processed_logprobs` and `verl serve`.
            Else they are used only at temperature 1 without truncation, where both distributions are equal.
        extra: further fields of the request body.
    """

    model: str
    chat: bool = False
    api_key_env: str | None = None
    retries: int = 5
    backoff: float = 0.5
    max_concurrency: int = 64
    processed_logprobs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff <= 0 or self.max_concurrency < 1:
            raise ValueError(f"need retries >= 0, backoff > 0 and max_concurrency >= 1, got {self}")


def parse_options(kind: type, options: Mapping[str, Any], *, engine: str) -> Any:
    """Build an options dataclass from the settings of an engine.

    Raises:
        ValueError: an unknown name, with the nearest known one, a missing option, or one out of bounds.
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
    """Any server with OpenAI's API, at `spec.address` with or without /v1. See `HTTPOptions`.

    Servers that take token ids and return them with logprobs, as vLLM and `verl serve` do, give chunks with
    both; others give the text of the whole answer. A request that failed for now is retried, all within
    `spec.timeout_s`.
    """

    syncs_weights = False

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self._options: HTTPOptions = parse_options(HTTPOptions, spec.options, engine="http")
        # The run's own secret is not sent to somebody else's server.
        self._api_key = key_from_environment(self._options.api_key_env, "the server")
        if spec.address is None:
            raise ValueError(f"need the address of the server of engine {spec.name}")
        self._base_url = spec.address.rstrip("/").removesuffix("/v1") + "/v1"
        self._returns_ids = not self._options.chat
        self._open_client: HTTPClient | None = None

    @override
    async def open(self) -> None:
        self._codec = TextCodec.load(self.spec.model)
        self._slots = asyncio.Semaphore(self._options.max_concurrency)
        self._open_client = HTTPClient(self.spec.name, self._base_url, api_key=self._api_key)
        deadline = time.monotonic() + self.spec.start_timeout_s
        while True:
            try:
                return await self.check()
            except EngineError:
                if time.monotonic() > deadline:
                    await self.close()
                    raise
            await asyncio.sleep(self._options.backoff)

    @override
    async def check(self) -> None:
        # A server that refuses this path is well, except if it refuses the key.
        try:
            await self._client.json("GET", "/models", timeout_s=self.spec.timeout_s)
        except HTTPStatusError as error:
            if error.status in (401, 403) or not error.is_permanent:
                raise

    @override
    async def close(self) -> None:
        client, self._open_client = self._open_client, None
        if client is not None:
            await client.close()

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        async with self._slots:
            yield await self._complete(list(prompt_ids), params, request_seed(params))

    @property
    def _client(self) -> HTTPClient:
        if self._open_client is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._open_client

    async def _complete(self, prompt_ids: list[int], params: SamplingParams, seed: int) -> TokenChunk:
        """Request one answer, with retries while the failure may pass."""
        deadline = time.monotonic() + self.spec.timeout_s
        attempt = 0
        while True:
            path, body = self._request(prompt_ids, params, seed)
            left_s = max(0.001, deadline - time.monotonic())
            try:
                return self._parse_response(
                    await self._client.json("POST", path, body, timeout_s=left_s), params
                )
            except HTTPStatusError as error:
                if error.is_permanent and self._returns_ids and "return_token_ids" in str(error):
                    self._returns_ids = False  # this server takes and returns text only
                    continue
                if error.is_permanent:
                    raise RefusedError(str(error)) from error
                await self._back_off(attempt, error, error.retry_after_s or 0.0, deadline)
            except EngineError as error:
                await self._back_off(attempt, error, 0.0, deadline)
            attempt += 1

    async def _back_off(self, attempt: int, error: EngineError, min_wait_s: float, deadline: float) -> None:
        """Wait before the next attempt; raise EngineError if none is left."""
        backoff_s = min(_MAX_BACKOFF_S, self._options.backoff * 2**attempt)
        # Randomized, so that requests that failed together are not sent again together.
        wait_s = min_wait_s + backoff_s * random.uniform(0.5, 1.0)
        if attempt >= self._options.retries or time.monotonic() + wait_s >= deadline:
            limits = f"{self._options.retries} retries within {self.spec.timeout_s:g} s"
            raise EngineError(f"{error} (attempt {attempt + 1}; {limits})") from error
        await asyncio.sleep(wait_s)

    def _request(
        self, prompt_ids: list[int], params: SamplingParams, seed: int
    ) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for one answer."""
        body: dict[str, Any] = {
            "model": self._options.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed,
            "n": 1,
        }
        # Sent only where they have an effect: not every server knows these fields.
        body |= {"top_k": params.top_k} if params.top_k else {}
        body |= {"min_p": params.min_p} if params.min_p else {}
        penalty = params.repetition_penalty
        body |= {"repetition_penalty": penalty} if penalty != 1 else {}
        body |= {"stop": list(params.stop)} if params.stop else {}
        if self._returns_ids:
            body |= {
                "prompt": prompt_ids,
                "logprobs": 0,
                "return_token_ids": True,
                "stop_token_ids": list(params.stop_ids),
            }
            return "/completions", {**body, **self._options.extra}
        text = self._codec.decode_prompt(prompt_ids)
        if self._options.chat:
            body["messages"] = [{"role": "user", "content": text}]
            return "/chat/completions", {**body, **self._options.extra}
        return "/completions", {**body, "prompt": text, **self._options.extra}

    def _parse_response(self, response: Mapping[str, Any], params: SamplingParams) -> TokenChunk:
        """Parse a response into one chunk; raise EngineError if it has no answer."""
        try:
            choice = response["choices"][0]
            reason = _FINISH_REASONS.get(choice["finish_reason"], "stop")
            text = choice["message"]["content"] if self._options.chat else choice["text"]
            ids = choice.get("token_ids")
            logprobs = ids and choice["logprobs"] and choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self.spec.name} answers without {error}: {json.dumps(response)[:500]}"
            ) from error
        if ids and logprobs and len(ids) == len(logprobs) <= params.max_tokens:
            # Logprobs of most servers are those of the model's own distribution.
            is_known = self._options.processed_logprobs or params.is_models_own
            own = tuple(logprobs) if is_known else None
            return TokenChunk(tuple(ids), own, reason, num_reused=num_reused(response))
        if not isinstance(text, str):
            raise EngineError(f"{self.spec.name} answers without a text: {json.dumps(response)[:500]}")
        return TokenChunk(finish_reason=reason, text=text)
