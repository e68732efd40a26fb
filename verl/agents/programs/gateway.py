"""HTTP server on the loopback interface through which agents speak to the policy: a path for each episode."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from verl.agents.programs.chat_messages import canonical
from verl.agents.programs.program_session import ProgramSession
from verl.agents.programs.responses_api import response_body, response_events, responses_request
from verl.agents.programs.turn_answer import ProgramAnswer, completion_body, completion_events, encoded_events
from verl.agents.programs.turn_request import ProgramRequest, chat_request, completion_request
from verl.rollout.server.http_json import errors_as_json, read_json
from verl.rollout.server.openai_request import APIError
from verl.utils.chat.turn_rendering import Message
from verl.utils.event_loops import BackgroundLoop
from verl.utils.network import LOOPBACK

T = TypeVar("T")
_MAX_BODY_BYTES = 2**26
# A stream whose answer takes longer begins without it; a comment follows at each interval.
_HEARTBEAT_S = 5.0
_HEARTBEAT = b": alive\n\n"
# OpenAI's clients ask no further where they read this.
_NO_RETRY = {"x-should-retry": "false"}
# Answers that are kept for a client that lost one.
_MAX_KEPT = 16


@dataclass(eq=False)
class Exchange:
    """One request, and its answer once it is there.

    Attributes:
        future: of the turns.
        body: of the answer; None: not yet.
        is_delivered: the client has read the answer, as far as that can be known.
    """

    future: asyncio.Future[list[ProgramAnswer]]
    body: bytes | None = None
    is_delivered: bool = False


@dataclass(eq=False)
class Access:
    """The way of one program to its episode.

    Attributes:
        session: the episode.
        url: OPENAI_BASE_URL of the program.
        key: OPENAI_API_KEY of the program.
        exchanges: the last requests.
        histories: messages of each response of the responses API, by its id.
    """

    session: ProgramSession
    url: str
    key: str
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    histories: dict[str, list[Message]] = field(default_factory=dict)

    def keep(self, name: str, exchange: Exchange) -> None:
        """Keep an exchange in place of the oldest."""
        self.exchanges.pop(name, None)
        self.exchanges[name] = exchange
        while len(self.exchanges) > _MAX_KEPT:
            self.exchanges.pop(next(iter(self.exchanges)))


class Gateway:
    """The server, in a thread of its own, so that it answers while generation blocks the loop of the engine.

    Attributes:
        loop: of the server; programs run in it, too.
    """

    def __init__(self) -> None:
        self.loop = BackgroundLoop("agent gateway")
        self._accesses: dict[str, Access] = {}
        self._runner: web.AppRunner | None = None
        self._address = self.loop.run(self._start())

    @contextmanager
    def opened(self, session: ProgramSession) -> Iterator[Access]:
        """Let requests of an episode in, until the end of the block."""
        name = f"{session.live.start.episode_id}-{secrets.token_hex(4)}"
        access = Access(session, f"{self._address}/e/{name}/v1", secrets.token_urlsafe(24))
        self._accesses[name] = access
        try:
            yield access
        finally:
            del self._accesses[name]
            session.live.count("environment_s", -session.close())

    def close(self) -> None:
        """End the server and its thread; may be called again."""
        if not self.loop.is_closed:
            self.loop.run(self._stop())
            self.loop.close()

    async def _start(self) -> str:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[no_retries, errors_as_json])
        at = "/e/{episode}"
        app.add_routes(
            [
                web.get(f"{at}/v1/models", self.models),
                web.get(f"{at}/v1/models/{{name:.+}}", self.model),
                web.post(f"{at}/v1/chat/completions", self.chat_completions),
                web.post(f"{at}/v1/completions", self.completions),
                web.post(f"{at}/v1/responses", self.responses),
                web.post(f"{at}/reward", self.reward),
            ]
        )
        # A handler is cancelled when its client leaves, which cancels the sampling.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, 0)
        await site.start()
        (address,) = self._runner.addresses
        return f"http://{LOOPBACK}:{address[1]}"

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def models(self, http: web.Request) -> web.StreamResponse:
        """GET /models: the policy, which answers under every name."""
        self._access(http)
        return web.json_response({"object": "list", "data": [model_object("policy")]})

    async def model(self, http: web.Request) -> web.StreamResponse:
        """GET /models/NAME."""
        self._access(http)
        return web.json_response(model_object(http.match_info["name"]))

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """POST /chat/completions."""
        access, body = self._access(http), await read_json(http)
        live = access.session.live
        request = chat_request(body, live.params, live.codec)
        return await respond(http, access, body, request=request, reply=completion_reply)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /completions."""
        access, body = self._access(http), await read_json(http)
        live = access.session.live
        request = completion_request(body, live.params, live.codec)
        return await respond(http, access, body, request=request, reply=completion_reply)

    async def responses(self, http: web.Request) -> web.StreamResponse:
        """POST /responses."""
        access, body = self._access(http), await read_json(http)
        live = access.session.live
        request, history = responses_request(body, live.params, live.codec, earlier=access.histories)

        def reply(answers: list[ProgramAnswer]) -> bytes | dict[str, Any]:
            (answer,) = answers
            whole = response_body(answer)
            access.histories[whole["id"]] = [*history, answer.message]
            return encoded_events(response_events(whole), ends_with_done=False) if request.streams else whole

        return await respond(http, access, body, request=request, reply=reply)

    async def reward(self, http: web.Request) -> web.StreamResponse:
        """POST /reward: a number, or an object as reward functions return it."""
        access, reward = self._access(http), await read_json(http)
        if isinstance(reward, bool) or not isinstance(reward, int | float | dict):
            raise APIError("need a number, or an object with a reward, as the body")
        await result_in_loop_of(access.session, access.session.take_reward(reward))
        return web.json_response({"reward": reward})

    def _access(self, http: web.Request) -> Access:
        """The access of a request; raise APIError if its key is not that of the episode in its path."""
        access = self._accesses.get(http.match_info["episode"])
        given = http.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        # An unknown episode takes as long as a wrong key, and has the same answer.
        is_right = hmac.compare_digest(given, (access.key if access else secrets.token_urlsafe(24)).encode())
        if access is None or not is_right:
            raise APIError(
                "need OPENAI_BASE_URL and OPENAI_API_KEY of an episode that runs; this one is over, or the "
                "key is another's",
                status=401,
                code="invalid_api_key",
            )
        return access


@web.middleware
async def no_retries(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Tell clients not to repeat a request that was refused, since its answer would be the same."""
    response = await handler(request)
    if response.status >= 400:
        response.headers.update(_NO_RETRY)
    return response


def model_object(name: str) -> dict[str, Any]:
    """The policy in the list of models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "verl"}


def completion_reply(answers: list[ProgramAnswer]) -> bytes | dict[str, Any]:
    """Body of completions of both kinds, or their events."""
    if answers[0].request.streams:
        return encoded_events(completion_events(answers), ends_with_done=True)
    return completion_body(answers)


async def result_in_loop_of(session: ProgramSession, work: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine in the loop of an episode; raise APIError if the episode ends before."""
    return await result_of(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, session.loop)))


async def result_of(waiting: asyncio.Future[T]) -> T:
    """Result of a future, which is cancelled with the caller; raise APIError if it was cancelled itself."""
    try:
        await asyncio.wait([waiting])
    except asyncio.CancelledError:
        waiting.cancel()
        raise
    if waiting.cancelled():
        raise APIError("this episode is over", code="episode_over")
    return waiting.result()


async def respond(
    http: web.Request,
    access: Access,
    body: Any,
    *,
    request: ProgramRequest,
    reply: Callable[[list[ProgramAnswer]], bytes | dict[str, Any]],
) -> web.StreamResponse:
    """Answer a request; a repeated one whose answer was lost gets the same answer.

    Args:
        http: the request.
        access: of its program.
        body: of the request.
        request: the same, parsed.
        reply: makes the body of the answer.
    """
    name, is_repeated = name_of(http, body)
    known = access.exchanges.get(name)
    if known is not None and known.body is not None and (is_repeated or not known.is_delivered):
        return await deliver(http, known, request)
    if known is not None and known.body is None and is_repeated:
        known.future.cancel()  # its client has given up
        await asyncio.wait([known.future])
    work = asyncio.run_coroutine_threadsafe(access.session.answer(request), access.session.loop)
    exchange = Exchange(asyncio.wrap_future(work))
    access.keep(name, exchange)
    stream = await begun_stream(http, exchange.future) if request.streams else None
    try:
        whole = reply(await result_of(exchange.future))
    except APIError as error:
        if stream is None:
            raise
        await stream.write(encoded_events([error.as_json()], ends_with_done=False))
        return stream
    exchange.body = whole if isinstance(whole, bytes) else canonical(whole).encode()
    return await deliver(http, exchange, request, stream)


def name_of(http: web.Request, body: Any) -> tuple[str, bool]:
    """Name of a request, equal for its repetitions, and True if the client says that it is one."""
    key = http.headers.get("Idempotency-Key")
    if key:
        return key, True
    count = http.headers.get("x-stainless-retry-count", "0")  # of OpenAI's clients
    digest = hashlib.sha256(f"{http.path} {canonical(body)}".encode()).hexdigest()
    return digest, count.isdecimal() and int(count) > 0


async def begun_stream(http: web.Request, waiting: asyncio.Future[Any]) -> web.StreamResponse | None:
    """A stream with comments until the answer is there; None if it comes soon, and may still be an error."""
    stream = None
    try:
        while not (await asyncio.wait([waiting], timeout=_HEARTBEAT_S))[0]:
            stream = stream or await event_stream(http)
            await stream.write(_HEARTBEAT)
    except (asyncio.CancelledError, ConnectionError):
        waiting.cancel()
        raise
    return stream


async def event_stream(http: web.Request) -> web.StreamResponse:
    """A response of server-sent events, begun."""
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await stream.prepare(http)
    return stream


async def deliver(
    http: web.Request, exchange: Exchange, request: ProgramRequest, stream: web.StreamResponse | None = None
) -> web.StreamResponse:
    """Send an answer, and note that it arrived."""
    assert exchange.body is not None
    if stream is None and request.streams:
        stream = await event_stream(http)
    if stream is None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(exchange.body))}
        stream = web.StreamResponse(headers=headers)
        await stream.prepare(http)
    await stream.write(exchange.body)
    await stream.write_eof()
    exchange.is_delivered = http.transport is not None and not http.transport.is_closing()
    return stream
