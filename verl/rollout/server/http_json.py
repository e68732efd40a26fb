"""JSON over HTTP on the server's side: request bodies and error responses."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from verl.rollout.server.openai_request import APIError

_LOG = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_json(http: web.Request) -> Any:
    """Read the body of a request; raise APIError if it is not JSON."""
    try:
        return await http.json()
    except ValueError as error:  # not JSON, or not UTF-8
        raise APIError(f"need JSON as the body: {error}") from error


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors of a handler with OpenAI's error object."""
    try:
        return await handler(request)
    except APIError as error:
        api_error = error
    except web.HTTPException as error:  # an unknown path or method, a body that is too large
        api_error = APIError(f"{error.reason}: {request.method} {request.path}", status=error.status)
    except ConnectionError:  # the client has left
        raise
    except (RuntimeError, OSError) as error:
        _LOG.exception("%s %s failed", request.method, request.path)
        api_error = APIError(f"{type(error).__name__}: {error}", status=500)
    return web.json_response(api_error.as_json(), status=api_error.status)
