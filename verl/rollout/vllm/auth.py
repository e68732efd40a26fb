"""The door of a vLLM server: an ASGI middleware that asks every request for the secret; imports the standard
library alone.

vLLM's own key guards the paths under /v1 only, not those that change weights. The secret comes from the
environment of the server, since everybody on the machine can read a command line.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# In the environment of a server that a run starts: the secret, and that the server ends when its first
# process does.
SECRET_VARIABLE, OWNED_VARIABLE = "VERL_SERVER_SECRET", "VERL_SERVER_OWNED"
# Says whether the server is well, and nothing else.
_OPEN_PATHS = ("/health",)

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequireSecret:
    """Answers 401 to whoever does not send `Authorization: Bearer SECRET`; takes `--middleware
    verl.rollout.vllm.auth.RequireSecret`.

    Args:
        app: the server behind it.

    Raises:
        RuntimeError: the server's environment has no secret: a door without a lock would look like one.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        secret = os.environ.get(SECRET_VARIABLE, "")
        if not secret:
            raise RuntimeError(f"need the secret of the server in the environment variable {SECRET_VARIABLE}")
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in _OPEN_PATHS):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send(
                {
                    "type": "http.response.start",
                    "status": 401,
                    "headers": [(b"content-type", b"application/json")],
                }
            )
            await send(
                {
                    "type": "http.response.body",
                    "body": b'{"error": "need the secret as Authorization: Bearer"}',
                }
            )
        else:
            await send({"type": "websocket.close", "code": 1008})
