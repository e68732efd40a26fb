"""Client of the token stream: requests answers from `verl serve` and hands out their tokens."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import aiohttp

from verl.rollout.inference_server import EngineError, RefusedError, TokenChunk
from verl.rollout.server.token_messages import dump_json, unpack_message
from verl.utils.sampling_types import SamplingParams

WebSocket = aiohttp.ClientWebSocketResponse[bool]


class PendingAnswer:
    """An answer that the server generates, as its one reader sees it.

    Attributes:
        error: why no more tokens will arrive; None: none has occurred.
    """

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.prompt_ids, self.params = prompt_ids, params
        self.error: EngineError | RefusedError | None = None
        self._chunks: deque[TokenChunk] = deque()
        self._arrived = asyncio.Event()

    def add(self, chunk: TokenChunk) -> None:
        """Keep new tokens for the reader."""
        self._chunks.append(chunk)
        self._arrived.set()

    def fail(self, error: EngineError | RefusedError) -> None:
        """Let `next` raise once all tokens are read."""
        self.error = error
        self._arrived.set()

    async def next(self) -> TokenChunk:
        """Wait for the next tokens; raise the error if none will arrive."""
        while not self._chunks:
            if self.error is not None:
                raise self.error
            self._arrived.clear()
            await self._arrived.wait()
        return self._chunks.popleft()

    def follows(self, other: PendingAnswer) -> bool:
        """True if this is the next answer to the same prompt with the same parameters."""
        next_params = replace(other.params, sample_index=other.params.sample_index + 1)
        return self.params == next_params and self.prompt_ids == other.prompt_ids


class TokenStreamClient:
    """Samples answers over one connection, opened on first use and again after it broke.

    Answers requested at about the same time go out in one message, and those to one prompt as one request, so
    that the server computes the prompt once.

    Args:
        name: of the engine, for messages.
        connect: opens the connection, or raises `EngineError`.
        timeout_s: longest silence of the server while answers are pending.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[WebSocket]],
        *,
        timeout_s: float,
    ) -> None:
        self._name, self._connect, self._timeout_s = name, connect, timeout_s
        self._slots = itertools.count()
        # By the number of the answer on the connection.
        self._pending: dict[int, PendingAnswer] = {}
        self._unsent: dict[int, PendingAnswer] = {}
        self._aborted: list[int] = []
        self._connection: asyncio.Task[None] | None = None
        self._has_messages = asyncio.Event()
        self._last_received_s = 0.0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        """Sample one answer, see `InferenceServer.sample`."""
        loop, slot = asyncio.get_running_loop(), next(self._slots)
        answer = PendingAnswer(prompt_ids, params)
        if not self._pending:
            self._last_received_s = loop.time()
        self._pending[slot] = self._unsent[slot] = answer
        self._has_messages.set()
        if self._connection is None or self._connection.done():
            self._connection = loop.create_task(self._run_connection())
        is_finished = False
        try:
            while not is_finished:
                chunk = await answer.next()
                is_finished = chunk.finish_reason is not None
                yield chunk
        finally:
            self._pending.pop(slot, None)
            was_sent = self._unsent.pop(slot, None) is None
            if not is_finished and was_sent and answer.error is None:
                self._aborted.append(slot)
                self._has_messages.set()

    async def close(self) -> None:
        """Close the connection and fail all pending answers."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cancel()
            with suppress(asyncio.CancelledError, EngineError):
                await connection
        self._fail_all(EngineError(f"{self._name} is closed"))

    async def _run_connection(self) -> None:
        """Serve one connection until it ends; answers that are pending then have failed."""
        socket, error = None, EngineError(f"{self._name} ended the connection")
        tasks: list[asyncio.Task[None]] = []
        try:
            socket = await asyncio.wait_for(self._connect(), self._timeout_s)
            works = (self._send(socket), self._receive(socket), self._watch_silence())
            tasks = [asyncio.create_task(work) for work in works]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except EngineError as caught:
            error = caught
        except asyncio.TimeoutError:
            error = self._silence_error()
        except (aiohttp.ClientError, OSError, RuntimeError) as caught:
            reason = f"{type(caught).__name__}: {caught}"
            error = EngineError(f"{self._name} cannot be asked for answers: {reason}")
        finally:
            # Before the first await: a request that comes from here on opens another connection.
            self._connection = None
            self._fail_all(error)
            for task in tasks:
                task.cancel()
                # One error is reported; retrieving the others keeps asyncio from logging them.
                task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if socket is not None:
                await socket.close()

    async def _send(self, socket: WebSocket) -> None:
        while True:
            await self._has_messages.wait()
            self._has_messages.clear()
            unsent, self._unsent = self._unsent, {}
            aborted, self._aborted = self._aborted, []
            await socket.send_str(dump_json({"ask": group_requests(unsent), "drop": aborted}))

    async def _receive(self, socket: WebSocket) -> None:
        async for message in socket:
            self._last_received_s = asyncio.get_running_loop().time()
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            try:
                self._dispatch(message.data)
            except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
                excerpt = repr(message.data[:500])
                raise EngineError(f"{self._name} sends an invalid message: {excerpt}") from error

    async def _watch_silence(self) -> None:
        """Raise EngineError once the server has been silent for too long while answers are pending."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            if self._pending and loop.time() - self._last_received_s > self._timeout_s:
                raise self._silence_error()

    def _silence_error(self) -> EngineError:
        return EngineError(f"{self._name} gave no sign of life in time while answers were pending")

    def _dispatch(self, content: bytes) -> None:
        """Hand the tokens and failures of a message to their answers, unless these were aborted meanwhile."""
        head, ids, logprobs = unpack_message(content)
        start = 0
        for slot, version, count, reason, num_reused in head.get("tokens", ()):
            own = slice(start, start + count)
            start += count
            if slot in self._pending:
                chunk = TokenChunk(ids[own], logprobs[own], reason, version, num_reused=num_reused)
                self._pending[slot].add(chunk)
        for slots, is_refusal, message in head.get("failed", ()):
            error = RefusedError(message) if is_refusal else EngineError(f"{self._name} failed: {message}")
            for slot in slots:
                if slot in self._pending:
                    self._pending[slot].fail(error)

    def _fail_all(self, error: EngineError) -> None:
        self._unsent, self._aborted = {}, []
        for answer in self._pending.values():
            answer.fail(error)
        self._pending = {}


def group_requests(answers: dict[int, PendingAnswer]) -> list[tuple[int, dict[str, Any]]]:
    """Merge consecutive answers to one prompt into one completion request.

    Args:
        answers: by their number on the connection.

    Returns:
        Number of the first answer and body of each request.
    """
    runs: list[list[tuple[int, PendingAnswer]]] = []
    for slot, answer in answers.items():
        last_slot, last = runs[-1][-1] if runs else (None, None)
        if last_slot is not None and last is not None and slot == last_slot + 1 and answer.follows(last):
            runs[-1].append((slot, answer))
        else:
            runs.append([(slot, answer)])
    return [(run[0][0], completion_body(run[0][1], n=len(run))) for run in runs]


def completion_body(answer: PendingAnswer, *, n: int) -> dict[str, Any]:
    """Body of a completion request for an answer and the `n` - 1 that follow it."""
    params = answer.params
    return {
        "prompt": list(answer.prompt_ids),
        "n": n,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        "seed": params.seed,
        "first_answer": params.sample_index,
    }
