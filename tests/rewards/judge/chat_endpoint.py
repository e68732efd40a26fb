"""A chat endpoint on loopback that plays replies, and keeps the requests that it got."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from verl.utils.network import LOOPBACK

Body = dict[str, Any]


@dataclass(frozen=True)
class Play:
    """One response: a status, headers, and a text as its body; `hangs` sends none."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False


@dataclass
class ChatEndpoint:
    """Requests and responses of the endpoint.

    Attributes:
        address: base URL.
        replies: of the next requests; then those of `answer`.
        answer: reply to a request.
        bodies: of the requests.
        keys: their `Authorization`.
        most_at_once: most requests that it had at a time.
    """

    address: str = ""
    replies: list[Play] = field(default_factory=list)
    answer: Callable[[Body], Play] = lambda body: said('{"score": 7}')
    bodies: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    @property
    def texts(self) -> list[str]:
        """The questions."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    async def handle(self, http: web.Request) -> web.Response:
        """Answer a request."""
        body = await http.json()
        self.bodies.append(body)
        self.keys.append(http.headers.get("Authorization"))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            play = self.replies.pop(0) if self.replies else self.answer(body)
            await (asyncio.Event().wait() if play.hangs else asyncio.sleep(0))
        finally:
            self._now -= 1
        kind = "text/html" if play.text.startswith("<") else "application/json"
        return web.Response(text=play.text, status=play.status, headers=play.headers, content_type=kind)


def said(
    text: str | None, *, tokens: tuple[int, int] = (100, 10), reason: str = "stop", **message: Any
) -> Play:
    """A chat completion with a text."""
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "finish_reason": reason, "message": message}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Play(json.dumps({"choices": [choice], "usage": usage}))


@contextmanager
def chat_endpoint(replies: Sequence[Play] = ()) -> Iterator[ChatEndpoint]:
    """An endpoint that serves inside the block, in a thread."""
    endpoint = ChatEndpoint(replies=list(replies))
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", endpoint.handle)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, LOOPBACK, 0)
        await site.start()
        endpoint.address = f"http://{LOOPBACK}:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield endpoint
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
