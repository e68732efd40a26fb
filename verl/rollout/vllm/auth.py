"""ASGI middleware that requires a secret on every path of a vLLM server; imports the standard library alone.

vLLM's own API key guards only the paths under /v1, not those that change weights. The secret comes from the
environment of the server, since every user of a machine can read its command lines.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# Set in the environment of a server that a run starts: its secret, and that all its processes end with the
# first one.
SECRET_VARIABLE, OWNED_VARIABLE = "VERL_SERVER_SECRET", "VERL_SERVER_OWNED"
# Paths without a secret: they say if the server is healthy, and nothing else.
_OPEN_PATHS = ("/health",)

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequireSecret:
    """Answers 401 to requests without `Authorization: Bearer SECRET`.

    Used by `--middleware verl.rollout.vllm.auth.RequireSecret`.

    Args:
        app: the application behind it.

    Raises:
        RuntimeError: the environment has no secret, so that nothing would be protected.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        secret = os.environ.get(SECRET_VARIABLE, "")
        if not secret:
            raise RuntimeError(f"need the secret of the server in the environment variable {SECRET_VARIABLE}")
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in _OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            body = b'{"error": "need the secret as Authorization: Bearer"}'
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            # 1008: policy violation.
            await send({"type": "websocket.close", "code": 1008})
