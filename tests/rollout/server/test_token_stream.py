"""The token stream: a client, and a server with a tiny model in the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.tiny import random_prompts, shared_policy, tiny_codec
from verl.rollout.embedded.async_generator import AsyncGenerator, Token
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.inference_server import EngineError, RefusedError, TokenChunk
from verl.rollout.server.openai_request import APIError, ParsedRequest, RequestParser
from verl.rollout.server.token_client import TokenStreamClient
from verl.rollout.server.token_messages import Failure, pack_message, unpack_message
from verl.rollout.server.token_stream import TokenStreamServer
from verl.utils.sampling_types import SamplingParams

PROMPTS = random_prompts([3, 9, 2, 6])
PARAMS = SamplingParams(max_tokens=20, n=3, stop_ids=tuple(range(20, 26)))
ENDLESS = SamplingParams(max_tokens=200, stop_ids=())
SLOW_S = 60.0


@dataclass
class Both:
    """The two sides of a connection, and what was asked."""

    client: TokenStreamClient
    thread: AsyncGenerator
    streams: TokenStreamServer
    bodies: list[dict[str, Any]]
    refuses: bool = False

    def check(self) -> None:
        if self.refuses:
            raise APIError("not now", status=503)


class RecordingParser:
    """Records the bodies that it parses."""

    def __init__(self, parser: RequestParser) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._parser = parser

    def parse(self, body: Any, *, is_chat: bool) -> ParsedRequest:
        self.bodies.append(body)
        return self._parser.parse(body, is_chat=is_chat)


@asynccontextmanager
async def client_of(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], *, timeout_s: float
) -> AsyncIterator[TokenStreamClient]:
    app = web.Application()
    app.router.add_get("/answers", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        client = TokenStreamClient(
            "one", lambda: session.ws_connect(server.make_url("/answers")), timeout_s=timeout_s
        )
        yield client
        await client.close()


@asynccontextmanager
async def both_sides(*, pace_s: float = SLOW_S, slots: int = 64) -> AsyncIterator[Both]:
    thread = AsyncGenerator(shared_policy(), tiny_codec(), max_slots=slots)
    parser = RecordingParser(RequestParser("tiny", tiny_codec(), 256, 100))
    streams = TokenStreamServer(thread, parser, check=lambda: both.check(), pace_s=pace_s)
    async with client_of(streams.serve, timeout_s=20.0) as client:
        both = Both(client, thread, streams, parser.bodies)
        yield both
    thread.close()


async def chunks_of(
    client: TokenStreamClient, prompt: list[int], params: SamplingParams, number: int = 0
) -> list[TokenChunk]:
    return [chunk async for chunk in client.sample(prompt, replace(params, sample_index=number))]


def ids(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def expected(params: SamplingParams) -> list[list[int]]:
    groups = EmbeddedEngine(shared_policy(), tiny_codec()).generate(
        PROMPTS, [replace(params, seed=i) for i in range(len(PROMPTS))]
    )
    return [list(c.token_ids) for group in groups for c in group]


async def all_answers(client: TokenStreamClient, params: SamplingParams) -> list[list[TokenChunk]]:
    asked = [
        chunks_of(client, p, replace(params, seed=i), n)
        for i, p in enumerate(PROMPTS)
        for n in range(params.n)
    ]
    return list(await asyncio.gather(*asked))


def test_a_message_is_bytes_that_lose_nothing():
    tokens = [Token(7, -0.1, 3, (), None), Token(2**40, -1e-300, 3, (), "stop")]
    head, token_ids, logprobs = unpack_message(pack_message([(5, tokens)], [Failure([8, 9], True, "no")]))
    assert head == {"tokens": [[5, 3, 2, "stop", 0]], "failed": [[[8, 9], True, "no"]]}
    assert token_ids == (7, 2**40) and logprobs == (-0.1, -1e-300)


def test_answers_are_those_of_the_embedded_engine_and_a_prompt_is_asked_once():
    async def work() -> tuple[list[list[TokenChunk]], list[dict[str, Any]]]:
        async with both_sides() as both:
            return await all_answers(both.client, PARAMS), both.bodies

    answers, bodies = asyncio.run(work())
    assert [ids(chunks) for chunks in answers] == expected(PARAMS)
    # What has ended is sent at once, and before its end nothing is.
    assert all(len(chunks) == 1 for chunks in answers)
    assert [(body["prompt"], body["n"]) for body in bodies] == [(prompt, 3) for prompt in PROMPTS]


def test_tokens_come_before_the_end_as_often_as_is_wished():
    async def work() -> list[list[TokenChunk]]:
        async with both_sides(pace_s=0.0) as both:
            return await all_answers(both.client, replace(ENDLESS, n=1))

    answers = asyncio.run(work())
    assert all(len(chunks) > 1 for chunks in answers)
    assert [ids(chunks) for chunks in answers] == expected(replace(ENDLESS, n=1))
    assert all(chunk.finish_reason is None for chunks in answers for chunk in chunks[:-1])


def test_an_answer_that_is_left_ends_in_the_server_and_its_siblings_go_on():
    async def left(both: Both) -> None:
        async with aclosing(both.client.sample(PROMPTS[0], replace(ENDLESS, sample_index=1))) as chunks:
            async for _ in chunks:
                break

    async def work() -> tuple[list[list[TokenChunk]], int]:
        async with both_sides(pace_s=0.0, slots=8) as both:
            asked = [chunks_of(both.client, PROMPTS[0], ENDLESS, number) for number in (0, 2)]
            first, _, third = await asyncio.gather(asked[0], left(both), asked[1])
            await both.thread.pause("a look")
            return [first, third], both.thread.num_running

    answers, running = asyncio.run(work())
    (group,) = EmbeddedEngine(shared_policy(), tiny_codec()).generate(PROMPTS[:1], [replace(ENDLESS, n=3)])
    assert [ids(chunks) for chunks in answers] == [list(group[0].token_ids), list(group[2].token_ids)]
    assert running == 0


def test_a_pause_lets_what_was_sampled_come():
    async def work() -> TokenChunk:
        async with both_sides() as both:
            chunks = both.client.sample(PROMPTS[0], ENDLESS)
            first = asyncio.ensure_future(anext(chunks))
            while both.thread.num_running == 0:
                await asyncio.sleep(0.01)
            await both.thread.pause("pause")
            both.streams.flush()
            chunk = await first
            await chunks.aclose()
            return chunk

    chunk = asyncio.run(work())
    assert 0 < len(chunk.token_ids) < ENDLESS.max_tokens and chunk.finish_reason is None


def test_what_cannot_be_asked_is_refused_and_what_cannot_be_now_has_failed():
    async def work() -> list[list[TokenChunk]]:
        async with both_sides() as both:
            with pytest.raises(
                RefusedError, match="context is 256 tokens, but the prompt has 3 and the answer may get 300"
            ):
                await chunks_of(both.client, PROMPTS[0], replace(PARAMS, max_tokens=300))
            both.refuses = True
            with pytest.raises(EngineError, match="one failed: not now"):
                await chunks_of(both.client, PROMPTS[0], PARAMS)
            both.refuses = False
            return await all_answers(both.client, PARAMS)

    assert [ids(chunks) for chunks in asyncio.run(work())] == expected(PARAMS)


def test_a_connection_that_breaks_fails_its_answers_and_the_next_ones_get_another():
    num_connections = 0

    async def handler(http: web.Request) -> web.StreamResponse:
        nonlocal num_connections
        num_connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        await socket.receive()
        if num_connections == 2:
            await socket.send_bytes(pack_message([(2, [Token(9, -1.0, 0, (), "stop")])], []))
        return socket

    async def work() -> list[TokenChunk]:
        async with client_of(handler, timeout_s=20.0) as client:
            broken = [chunks_of(client, PROMPTS[0], PARAMS, number) for number in (0, 1)]
            errors = await asyncio.gather(*broken, return_exceptions=True)
            assert [str(error) for error in errors] == ["one ended the connection"] * 2
            return await chunks_of(client, PROMPTS[0], PARAMS)

    assert asyncio.run(work()) == [TokenChunk((9,), (-1.0,), "stop", 0, num_reused=0)]


async def silent(http: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(http)
    async for _ in socket:
        pass
    return socket


async def garbling(http: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(http)
    await socket.send_bytes(b"\1\0\0\0{")
    await socket.receive()
    return socket


@pytest.mark.parametrize(
    ("handler", "message"),
    [(silent, "one gave no sign of life in time"), (garbling, "one sends an invalid message")],
)
def test_a_server_that_is_silent_or_sends_garbage_is_an_error(handler, message):
    async def work() -> None:
        async with client_of(handler, timeout_s=0.2) as client:
            await chunks_of(client, PROMPTS[0], PARAMS)

    with pytest.raises(EngineError, match=message):
        asyncio.run(work())


def test_a_client_that_is_closed_ends_its_answers():
    async def work() -> BaseException:
        async with client_of(silent, timeout_s=20.0) as client:
            asked = asyncio.ensure_future(chunks_of(client, PROMPTS[0], PARAMS))
            await asyncio.sleep(0.05)
            await client.close()
            (error,) = await asyncio.gather(asked, return_exceptions=True)
            return error

    assert str(asyncio.run(work())) in ("one is closed", "one ended the connection")
