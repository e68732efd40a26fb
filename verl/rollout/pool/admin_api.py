"""HTTP API on the loopback interface to list, add and remove the engines of a running job, and its client."""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Coroutine, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from aiohttp import web
from typing_extensions import override

from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.utils.sampling_types import Completion, PrefixAffinity, RolloutEngine, SamplingParams

# In the folder of a run: address and secret of its API; readable by the user of the run alone.
ENDPOINT_FILE = "control.json"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
T = TypeVar("T")
NewSpec = Callable[[str, str | None], ServerSpec]


class AdminAPI(RolloutEngine):
    """A pool of engines that `verl engines` can list and change while it is running.

    Args:
        pool: the engines.
        folder: of the run.
        new_spec: spec of an engine with a name, to start, or to join at an address.
    """

    def __init__(self, pool: ThreadedInferencePool, folder: Path, new_spec: NewSpec) -> None:
        self.pool = pool
        self._file = folder / ENDPOINT_FILE
        self._new_spec = new_spec
        self._secret = secrets.token_hex(32)
        self._runner, port = pool.run(self._serve())
        self._endpoint = {"address": f"http://127.0.0.1:{port}", "secret": self._secret}
        self._is_announced = False

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        self._announce()
        return await self.pool.sample(prompt_ids, params, affinity)

    @override
    def sync_weights(self, version: int) -> Coroutine[Any, Any, None]:
        self.version = version
        return self.pool.sync_weights(version)

    @property
    @override
    def needs_weights(self) -> bool:
        return self.pool.needs_weights

    @override
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.pool.run(work)

    @override
    def sleep(self) -> None:
        self.pool.sleep()

    @override
    def take_metrics(self) -> dict[str, float]:
        return self.pool.take_metrics()

    @override
    def close(self) -> None:
        if self.pool.loop.is_closed():
            return
        try:
            if self._is_announced:
                self._file.unlink(missing_ok=True)
            self.pool.run(self._runner.cleanup())
        finally:
            self.pool.close()

    def _announce(self) -> None:
        """Write address and secret at the first request, when the folder is known to be this run's."""
        if self._is_announced:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # An older file may be readable by others.
        self._file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            json.dump(self._endpoint, file)
        self._is_announced = True

    async def _serve(self) -> tuple[web.AppRunner, int]:
        app = web.Application(middlewares=[self._authorize])
        app.router.add_get("/engines", self._list)
        app.router.add_post("/engines", self._add)
        app.router.add_delete("/engines/{name}", self._remove)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._secret.encode()):
            return web.json_response({"error": "need the secret of this run"}, status=401)
        try:
            response: web.StreamResponse = await handler(request)
            return response
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)

    async def _list(self, request: web.Request) -> web.Response:
        now = self.pool.loop.time()
        rows = [
            {
                "name": replica.name,
                "state": replica.state,
                "for_s": round(now - replica.state_since_s, 1),
                "version": replica.version,
                "running": replica.incarnation.num_running,
                "served": replica.num_served,
                "cause": replica.cause,
            }
            for replica in self.pool.inference_pool.replicas
        ]
        return web.json_response({"version": self.pool.version, "engines": rows})

    async def _add(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body.get("name") or f"added-{len(self.pool.inference_pool.replicas)}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"need a name of letters, digits, dots, dashes and underscores, got {name!r}")
        await self.pool.inference_pool.add(self._new_spec(name, body.get("address")))
        return web.json_response({"name": name})

    async def _remove(self, request: web.Request) -> web.Response:
        await self.pool.inference_pool.remove(request.match_info["name"])
        return web.json_response({"name": request.match_info["name"]})


def call_admin_api(
    folder: Path, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Call the API of the run in a folder, and return the reply.

    Raises:
        ValueError: no run with servers is running there, or it refuses.
    """
    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
    except OSError as error:
        raise ValueError(
            f"need the output_dir of a run that works and has servers (rollout.servers), "
            f"got {folder}: {error}"
        ) from error
    headers = {"Authorization": f"Bearer {endpoint['secret']}", "Content-Type": "application/json"}
    request = Request(
        endpoint["address"] + path,
        json.dumps(body).encode() if body is not None else None,
        headers,
        method=method,
    )
    try:
        # Not through a proxy, which would get the secret of the run.
        with build_opener(ProxyHandler({})).open(request, timeout=30) as reply:
            result: dict[str, Any] = json.load(reply)
            return result
    except HTTPError as error:
        text = error.read().decode(errors="replace")
        is_own = text.startswith("{")
        message = json.loads(text)["error"] if is_own else f"the run answers {error.code}: {text[:200]}"
        raise ValueError(message) from error
    except (OSError, HTTPException) as error:
        raise ValueError(f"the run in {folder} does not answer ({error}); it has probably ended") from error
