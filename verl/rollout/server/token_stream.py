"""Server of the token stream: many answers of one trainer over one connection, in few messages."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

from verl.rollout.embedded.async_generator import AsyncGenerator, GenerationRequest, Token
from verl.rollout.server.openai_request import APIError, RequestParser
from verl.rollout.server.token_messages import MAX_MESSAGE_BYTES, Failure, pack_message

_HEARTBEAT_S = 1.0


class TokenStreamServer:
    """Accepts the connections of `TokenStreamClient`s.

    Unsent tokens of an answer that finishes are sent at once; those of running answers every `pace_s`. A
    message costs more than many tokens, and a client that loses the server loses at most the tokens of that
    time.

    Args:
        generator: runs the model.
        parser: of request bodies.
        check: raises `APIError` while the server accepts no requests.
        pace_s: seconds between messages with tokens of running answers.
    """

    def __init__(
        self, generator: AsyncGenerator, parser: RequestParser, *, check: Callable[[], None], pace_s: float
    ) -> None:
        self._generator, self._parser, self._check, self._pace_s = generator, parser, check, pace_s
        self._streams: set[TokenStream] = set()

    async def serve(self, http: web.Request) -> web.WebSocketResponse:
        """Serve one connection until it ends."""
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(http)
        stream = TokenStream(self._generator, self._parser, check=self._check, pace_s=self._pace_s)
        self._streams.add(stream)
        sending = asyncio.create_task(stream.send_to(socket))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                stream.receive(json.loads(message.data))
        finally:
            self._streams.discard(stream)
            stream.abort_all()
            sending.cancel()
        return socket

    def flush(self) -> None:
        """Send all tokens that were sampled so far."""
        for stream in self._streams:
            stream.flush()


class StreamedRequest:
    """A request on a connection, with the tokens that were not sent yet.

    Attributes:
        first: number of its first answer on the connection.
        request: of the generator.
        open: answers, counted from 0 within the request, that are neither finished nor dropped.
        tokens: new tokens of each answer.
        finished: answers whose last token is among `tokens`.
    """

    def __init__(self, first: int, num_answers: int, request: GenerationRequest) -> None:
        self.first, self.request = first, request
        self.open = set(range(num_answers))
        self.tokens: dict[int, list[Token]] = {}
        self.finished: list[int] = []

    def collect(self) -> bool:
        """Take new tokens from the generator; True if there are tokens that were not sent."""
        for answer, token in self.request.take_tokens():
            self.tokens.setdefault(answer, []).append(token)
            if token.finish_reason is not None:
                self.finished.append(answer)
        return bool(self.tokens)

    def take_runs(self, *, include_running: bool) -> list[tuple[int, list[Token]]]:
        """Take unsent tokens of finished answers, or of all.

        Returns:
            Number of each answer on the connection, and a run of its tokens that have one version.
        """
        runs = []
        for answer in list(self.tokens) if include_running else self.finished:
            tokens = self.tokens.pop(answer)
            if answer in self.open:
                by_version = itertools.groupby(tokens, key=lambda token: token.version)
                runs += [(self.first + answer, list(run)) for _, run in by_version]
        self.open.difference_update(self.finished)
        self.finished = []
        return runs


class TokenStream:
    """One connection of a `TokenStreamServer`, with the same arguments."""

    def __init__(
        self, generator: AsyncGenerator, parser: RequestParser, *, check: Callable[[], None], pace_s: float
    ) -> None:
        self._generator, self._parser, self._check, self._pace_s = generator, parser, check, pace_s
        self._requests: list[StreamedRequest] = []
        self._failures: list[Failure] = []
        # Set by the generator at new tokens, by a failure, and by the timer of `send_to`.
        self._wakeup = asyncio.Event()
        self._flushes = False

    def receive(self, message: dict[str, Any]) -> None:
        """Submit the requests of a message and abort the answers that it drops."""
        for first, body in message["ask"]:
            self._submit(first, body)
        dropped = set(message["drop"])
        for streamed in self._requests:
            own = [answer for answer in streamed.open if streamed.first + answer in dropped]
            if own:
                streamed.open.difference_update(own)
                self._generator.abort(streamed.request, own if streamed.open else None)

    def flush(self) -> None:
        """Send all tokens that were sampled so far."""
        self._flushes = True
        self._wakeup.set()

    def abort_all(self) -> None:
        """Abort all requests."""
        for streamed in self._requests:
            self._generator.abort(streamed.request)

    async def send_to(self, socket: web.WebSocketResponse) -> None:
        """Send tokens, failures and heartbeats until cancelled."""
        loop, num_beats = asyncio.get_running_loop(), self._generator.num_heartbeats
        sent_s, due_s = loop.time(), math.inf
        while True:
            timer = loop.call_at(min(sent_s + _HEARTBEAT_S, due_s), self._wakeup.set)
            try:
                await self._wakeup.wait()
            finally:
                timer.cancel()
            self._wakeup.clear()
            now_s, has_tokens = loop.time(), self._collect()
            due_s = min(due_s, now_s + self._pace_s) if has_tokens else math.inf
            include_running = has_tokens and (self._flushes or now_s >= due_s)
            has_finished = any(streamed.finished for streamed in self._requests)
            # A heartbeat says that the model is alive, not only this event loop.
            beats = now_s >= sent_s + _HEARTBEAT_S and self._generator.num_heartbeats != num_beats
            if include_running or has_finished or self._failures or beats:
                await socket.send_bytes(self._next_message(include_running=include_running))
                sent_s, num_beats = now_s, self._generator.num_heartbeats
            due_s, self._flushes = math.inf if include_running else due_s, False

    def _submit(self, first: int, body: dict[str, Any]) -> None:
        try:
            self._check()
            parsed = self._parser.parse(body, is_chat=False)
        except APIError as error:
            answers = range(first, first + int(body["n"]))
            self._failures.append(Failure(list(answers), error.status < 500, str(error)))
            self._wakeup.set()
            return
        request = GenerationRequest(parsed.num_answers, pace_s=self._pace_s, new_tokens=self._wakeup)
        self._generator.submit(
            parsed.prompts, parsed.params, first_sample_index=parsed.first_answer, request=request
        )
        self._requests.append(StreamedRequest(first, parsed.num_answers, request))

    def _collect(self) -> bool:
        """Collect new tokens and failures of all requests; True if there are tokens that were not sent."""
        for streamed in self._requests:
            if streamed.request.failure is not None and streamed.open:
                answers = [streamed.first + answer for answer in sorted(streamed.open)]
                self._failures.append(Failure(answers, False, streamed.request.failure))
                streamed.open.clear()
        # Not any(), which would skip the requests after the first one with tokens.
        return sum(streamed.collect() for streamed in self._requests) > 0

    def _next_message(self, *, include_running: bool) -> bytes:
        """Pack unsent tokens and failures, and forget the requests that are over."""
        runs = [
            run for streamed in self._requests for run in streamed.take_runs(include_running=include_running)
        ]
        for streamed in self._requests:
            if not streamed.open:
                self._generator.abort(streamed.request)
        self._requests = [streamed for streamed in self._requests if streamed.open]
        failures, self._failures = self._failures, []
        return pack_message(runs, failures)
