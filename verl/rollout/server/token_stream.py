"""Many answers over one connection: what a trainer asks of a server of its own and what comes back, in few
messages.

Messages go over a WebSocket. To the server JSON objects: `ask`, a list of [number of the first answer on this
connection, a body as for completions], whose answers are numbered on from there; and `drop`, numbers of
answers that are not wanted any more. Back come bytes: the length of a JSON object as 4 bytes, the object,
then all new ids as 8 bytes each and their logprobs likewise, all little-endian. In the object are `tokens`, a
list of [number, version, how many of the ids, finish reason or null], and `failed`, a list of [numbers,
whether it is a refusal, message]; an empty one says that the model is alive. As bytes, because thousands of
numbers in JSON keep the interpreter of the trainer busy.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp import web

from verl.rollout.embedded.async_generator import AsyncGenerator, Request, Token
from verl.rollout.engine import EngineError, RefusedError, TokenChunk
from verl.rollout.server.openai_protocol import APIError, RequestParser
from verl.utils.sampling_types import SamplingParams

PATH = "/control/answers"
MAX_MESSAGE_BYTES = 2**26
_BEAT_S = 1.0


class _Wanted:
    """An answer on its way, as the client sees it."""

    def __init__(self, prompt_ids: Sequence[int], params: SamplingParams, number: int) -> None:
        self.prompt_ids, self.params, self.number = prompt_ids, params, number
        self.failure: EngineError | RefusedError | None = None
        self._chunks: deque[TokenChunk] = deque()
        self._arrived: asyncio.Future[None] | None = None

    def take(self, chunk: TokenChunk) -> None:
        self._chunks.append(chunk)
        self._wake()

    def fail(self, error: EngineError | RefusedError) -> None:
        self.failure = error
        self._wake()

    async def next(self) -> TokenChunk:
        while not self._chunks:
            if self.failure is not None:
                raise self.failure
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return self._chunks.popleft()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


class AnswerClient:
    """Asks for answers over a connection that is opened when it is first needed, and again after it broke.

    What is asked at about the same time goes out in one message, and answers to one prompt as one request, so
    that the server computes the prompt once.

    Args:
        name: of the engine, for messages.
        connect: opens the connection, or raises `EngineError`.
        timeout_s: longest time without a sign of life while answers are on their way.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse[bool]]],
        *,
        timeout_s: float,
    ) -> None:
        self._name, self._connect, self._timeout_s = name, connect, timeout_s
        self._numbers = itertools.count()
        self._wanted: dict[int, _Wanted] = {}
        self._asked: dict[int, _Wanted] = {}  # not yet sent
        self._dropped: list[int] = []
        self._work: asyncio.Task[None] | None = None
        self._to_send = asyncio.Event()
        self._heard_s = 0.0

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        """See `ServedEngine.sample`."""
        wanted, place = _Wanted(prompt_ids, params, number), next(self._numbers)
        self._ask(place, wanted)
        is_over = False
        try:
            while not is_over:
                chunk = await wanted.next()
                is_over = chunk.finish_reason is not None
                yield chunk
        finally:
            self._wanted.pop(place, None)
            if not is_over and self._asked.pop(place, None) is None and wanted.failure is None:
                self._dropped.append(place)
                self._to_send.set()

    async def close(self) -> None:
        """Ends the connection and all answers."""
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            with suppress(asyncio.CancelledError, EngineError):
                await work
        self._fail_all(EngineError(f"{self._name} is closed"))

    def _ask(self, place: int, wanted: _Wanted) -> None:
        loop = asyncio.get_running_loop()
        if not self._wanted:
            self._heard_s = loop.time()
        self._wanted[place] = self._asked[place] = wanted
        self._to_send.set()
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._talk())

    async def _talk(self) -> None:
        """Holds a connection as long as it lasts; answers that are on their way then have failed."""
        socket, error = None, EngineError(f"{self._name} ended the connection")
        works: list[asyncio.Task[None]] = []
        try:
            socket = await asyncio.wait_for(self._connect(), self._timeout_s)
            works = [
                asyncio.create_task(work)
                for work in (self._send(socket), self._receive(socket), self._watch())
            ]
            done, _ = await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            for work in done:
                work.result()
        except EngineError as caught:
            error = caught
        except asyncio.TimeoutError:
            error = self._silence()
        except (aiohttp.ClientError, OSError, RuntimeError) as caught:
            error = EngineError(
                f"{self._name} cannot be asked for answers: {type(caught).__name__}: {caught}"
            )
        finally:
            # Before anything is awaited: whoever asks from here on gets a connection of its own.
            self._work = None
            self._fail_all(error)
            for work in works:
                work.cancel()
                work.add_done_callback(
                    lambda ended: ended.cancelled() or ended.exception()
                )  # one error is enough
            if socket is not None:
                await socket.close()

    async def _send(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            asked, self._asked = self._asked, {}
            dropped, self._dropped = self._dropped, []
            await socket.send_str(_dumped({"ask": _asks(asked), "drop": dropped}))

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        loop = asyncio.get_running_loop()
        async for message in socket:
            self._heard_s = loop.time()
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            try:
                self._take(message.data)
            except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
                raise EngineError(
                    f"{self._name} sends what are no answers: {message.data[:500]!r}"
                ) from error

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            if self._wanted and loop.time() - self._heard_s > self._timeout_s:
                raise self._silence()

    def _silence(self) -> EngineError:
        return EngineError(f"{self._name} gave no sign of life in time while answers were on their way")

    def _take(self, content: bytes) -> None:
        head, ids, logprobs = _unpacked(content)
        start = 0
        for place, version, count, reason in head.get("tokens", ()):
            own = slice(start, start + count)
            start += count
            if place in self._wanted:  # else it was dropped meanwhile
                self._wanted[place].take(TokenChunk(ids[own], logprobs[own], reason, version))
        for places, is_refusal, told in head.get("failed", ()):
            error = RefusedError(told) if is_refusal else EngineError(f"{self._name} failed: {told}")
            for place in places:
                if place in self._wanted:
                    self._wanted[place].fail(error)

    def _fail_all(self, error: EngineError) -> None:
        self._asked, self._dropped = {}, []
        for wanted in self._wanted.values():
            wanted.fail(error)
        self._wanted = {}


def _asks(asked: dict[int, _Wanted]) -> list[tuple[int, dict[str, Any]]]:
    """Answers that follow one another, to one prompt, in one."""
    runs: list[list[tuple[int, _Wanted]]] = []
    for place, wanted in asked.items():
        last_place, last = runs[-1][-1] if runs else (-2, wanted)
        syncs_weights = place == last_place + 1 and wanted.number == last.number + 1
        if syncs_weights and wanted.params == last.params and wanted.prompt_ids == last.prompt_ids:
            runs[-1].append((place, wanted))
        else:
            runs.append([(place, wanted)])
    return [(run[0][0], _body(run[0][1], len(run))) for run in runs]


def _body(first: _Wanted, count: int) -> dict[str, Any]:
    params = first.params
    return {
        "prompt": list(first.prompt_ids),
        "n": count,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_ids),
        "seed": params.seed,
        "first_answer": first.number,
    }


class _Asked:
    """Answers that were asked for together, as the server sees them; tokens that were not sent yet are by
    answer.
    """

    def __init__(self, first: int, count: int, request: Request) -> None:
        self.first, self.request = first, request
        self.open = dict.fromkeys(range(count))
        self.tokens: dict[int, list[Token]] = {}
        self.ended: list[int] = []

    def collect(self) -> bool:
        """Looks for new tokens; whether it has some that were not sent."""
        for answer, token in self.request.taken():
            self.tokens.setdefault(answer, []).append(token)
            if token.finish_reason is not None:
                self.ended.append(answer)
        return bool(self.tokens)

    def take(self, *, everything: bool) -> list[tuple[int, list[Token]]]:
        """What is to be sent of answers that have ended, or of all: the number of each, and tokens of one
        version.
        """
        numbers = list(self.tokens) if everything else self.ended
        parts = [part for answer in numbers if answer in self.open for part in self._parts(answer)]
        for answer in self.ended:
            self.open.pop(answer, None)
        self.tokens = (
            {}
            if everything
            else {answer: tokens for answer, tokens in self.tokens.items() if answer not in self.ended}
        )
        self.ended = []
        return parts

    def _parts(self, answer: int) -> list[tuple[int, list[Token]]]:
        runs = itertools.groupby(self.tokens[answer], key=lambda token: token.version)
        return [(self.first + answer, list(run)) for _, run in runs]


class AnswerStreams:
    """Server of `AnswerClient`s.

    Answers that have ended are sent at once, all with what came meanwhile, and those that go on each
    `pace_s`: a message costs more than many tokens, and a client that loses the server loses no more than
    what came in that time.

    Args:
        thread: of the model.
        reader: of requests.
        check: raises `APIError` while nothing may be asked.
        pace_s: see above.
    """

    def __init__(
        self, thread: AsyncGenerator, reader: RequestParser, *, check: Callable[[], None], pace_s: float
    ) -> None:
        self._thread, self._reader, self._check, self._pace_s = thread, reader, check, pace_s
        self._streams: dict[_Stream, None] = {}

    async def serve(self, http: web.Request) -> web.WebSocketResponse:
        """One connection, as long as it lasts."""
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, compress=False)
        await socket.prepare(http)
        stream = _Stream(self._thread, self._reader, self._check, self._pace_s)
        self._streams[stream] = None
        sending = asyncio.create_task(stream.send_to(socket))
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                stream.obey(json.loads(message.data))
        finally:
            del self._streams[stream]
            stream.end()
            sending.cancel()
        return socket

    def flush(self) -> None:
        """Sends what there is of all answers."""
        for stream in self._streams:
            stream.flush()


class _Stream:
    """One connection of `AnswerStreams`."""

    def __init__(
        self, thread: AsyncGenerator, reader: RequestParser, check: Callable[[], None], pace_s: float
    ) -> None:
        self._thread, self._reader, self._check, self._pace_s = thread, reader, check, pace_s
        self._asked: list[_Asked] = []
        self._failed: list[tuple[list[int], bool, str]] = []
        self._arrived = asyncio.Event()
        self._is_due = False

    def obey(self, message: dict[str, Any]) -> None:
        """What the client wants."""
        for first, body in message["ask"]:
            self._ask(first, body)
        if dropped := set(message["drop"]):
            for asked in self._asked:
                self._drop(asked, dropped)

    def flush(self) -> None:
        """Sends what there is of all answers."""
        self._is_due = True
        self._arrived.set()

    def end(self) -> None:
        """Takes all requests back."""
        for asked in self._asked:
            self._thread.drop(asked.request)

    async def send_to(self, socket: web.WebSocketResponse) -> None:
        """Sends as long as the connection lasts."""
        loop, num_beats = asyncio.get_running_loop(), self._thread.num_beats
        sent_s, due_s = loop.time(), math.inf
        while True:
            await self._wait(max(0.0, min(sent_s + _BEAT_S, due_s) - loop.time()))
            now_s, has_tokens = loop.time(), self._collect()
            due_s = min(due_s, now_s + self._pace_s) if has_tokens else math.inf
            everything = has_tokens and (self._is_due or now_s >= due_s)
            has_ended = any(asked.ended for asked in self._asked)
            is_alive = now_s >= sent_s + _BEAT_S and self._thread.num_beats != num_beats
            if everything or has_ended or self._failed or is_alive:
                await socket.send_bytes(self._message(everything=everything))
                sent_s, num_beats = now_s, self._thread.num_beats
            due_s, self._is_due = math.inf if everything else due_s, False

    async def _wait(self, limit_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(limit_s, self._arrived.set)
        try:
            await self._arrived.wait()
        finally:
            timer.cancel()
        self._arrived.clear()

    def _ask(self, first: int, body: dict[str, Any]) -> None:
        try:
            self._check()
            read = self._reader.read(body, is_chat=False)
        except APIError as refusal:
            self._failed.append(
                (list(range(first, first + int(body["n"]))), refusal.status < 500, str(refusal))
            )
            self._arrived.set()
            return
        request = Request(read.num_answers, pace_s=self._pace_s, arrived=self._arrived)
        self._thread.ask(read.prompts, read.params, first_answer=read.first_answer, request=request)
        self._asked.append(_Asked(first, read.num_answers, request))

    def _drop(self, asked: _Asked, places: set[int]) -> None:
        own = [answer for answer in asked.open if asked.first + answer in places]
        if not own:
            return
        for answer in own:
            del asked.open[answer]
        self._thread.drop(asked.request, own if asked.open else None)

    def _collect(self) -> bool:
        """Looks for new tokens, and for answers that have failed; whether there are tokens that were not
        sent.
        """
        for asked in self._asked:
            if asked.request.failure is not None and asked.open:
                self._failed.append(
                    ([asked.first + answer for answer in asked.open], False, asked.request.failure)
                )
                asked.open = {}
        return sum(asked.collect() for asked in self._asked) > 0  # all are to be asked

    def _message(self, *, everything: bool) -> bytes:
        parts = [part for asked in self._asked for part in asked.take(everything=everything)]
        for asked in self._asked:
            if not asked.open:
                self._thread.drop(asked.request)
        self._asked = [asked for asked in self._asked if asked.open]
        failed, self._failed = self._failed, []
        return _packed(parts, failed)


def _packed(parts: Sequence[tuple[int, list[Token]]], failed: Sequence[Any]) -> bytes:
    """The message of a server, see above."""
    told = [(place, run[-1].version, len(run), run[-1].finish_reason) for place, run in parts]
    head = _dumped({name: found for name, found in (("tokens", told), ("failed", failed)) if found}).encode()
    tokens = [token for _, run in parts for token in run]
    numbers = struct.pack(
        f"<{len(tokens)}q{len(tokens)}d", *(t.token_id for t in tokens), *(t.logprob for t in tokens)
    )
    return struct.pack("<I", len(head)) + head + numbers


def _unpacked(content: bytes) -> tuple[dict[str, Any], tuple[int, ...], tuple[float, ...]]:
    """The object, the ids and the logprobs in the message of a server."""
    (length,) = struct.unpack_from("<I", content)
    start = 4 + length
    count = (len(content) - start) // 16
    numbers = struct.unpack_from(f"<{count}q{count}d", content, start)
    return json.loads(content[4:start]), numbers[:count], numbers[count:]


def _dumped(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))
