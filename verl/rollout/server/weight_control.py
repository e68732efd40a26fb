"""Control endpoints of `verl serve` for a trainer: pause, resume and weight updates."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from verl.rollout.embedded.async_generator import AsyncGenerator
from verl.rollout.server.http_json import read_json
from verl.rollout.server.openai_request import APIError
from verl.rollout.server.token_stream import TokenStreamServer
from verl.rollout.server.weight_loader import WeightLoader
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.types import TensorInfo, WeightChunk

Body = dict[str, Any]


class WeightControlAPI:
    """Runs the commands of a trainer, one at a time; each takes and returns a JSON object.

    Args:
        generator: runs the model.
        loader: of its weights.
        streams: connections to trainers.
        group_timeout_s: longest wait for the other ranks of a process group.
    """

    def __init__(
        self,
        generator: AsyncGenerator,
        loader: WeightLoader,
        streams: TokenStreamServer,
        *,
        group_timeout_s: float,
    ) -> None:
        self._generator, self._loader, self._streams = generator, loader, streams
        self._group_timeout_s = group_timeout_s
        self._lock = asyncio.Lock()
        self._commands: dict[str, Callable[[Body], Awaitable[Body]]] = {
            "pause": self.pause,
            "resume": self.resume,
            "join_group": self.join_group,
            "begin_update": self.begin_update,
            "load": self.load,
            "end_update": self.end_update,
            "load_lora_adapter": self.load_lora_adapter,
        }

    def routes(self) -> list[web.RouteDef]:
        """Paths of the endpoints."""
        return [web.get("/control/state", self.state), web.post("/control/{command}", self.run_command)]

    async def state(self, _: web.Request) -> web.StreamResponse:
        """Describe the server: process, weight version and load."""
        return web.json_response(
            {
                "pid": os.getpid(),
                "version": self._generator.version,
                "num_running": self._generator.num_running,
                "shared_memory": shared_memory_id(),
                "is_torn": self._loader.is_torn,
                "num_beats": self._generator.num_heartbeats,
            }
        )

    async def run_command(self, http: web.Request) -> web.StreamResponse:
        """Run the command in the path with the fields of the body."""
        command = self._commands.get(http.match_info["command"])
        if command is None:
            raise APIError(
                f"there is no command {http.match_info['command']!r}; there are {', '.join(self._commands)}",
                status=404,
            )
        body = await read_json(http)
        try:
            async with self._lock:
                return web.json_response(await command(body))
        except (KeyError, TypeError) as error:
            raise APIError(f"the body does not fit: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise APIError(str(error)) from error

    async def pause(self, _: Body) -> Body:
        """Stop between two tokens, and send all tokens that were sampled."""
        await self._generator.pause("pause")
        self._streams.flush()
        return {}

    async def resume(self, body: Body) -> Body:
        """Continue after a pause; `recompute` says if the KV caches of old weights are computed again."""
        await self._generator.resume("pause", recompute=bool(body.get("recompute", True)))
        return {}

    async def join_group(self, body: Body) -> Body:
        """Join the process group that carries weights."""
        # In a thread, since joining blocks until all ranks have joined.
        await asyncio.to_thread(
            self._loader.join_group,
            body["address"],
            body["port"],
            body["rank"],
            num_ranks=body["num_ranks"],
            backend=body["backend"],
            timeout_s=self._group_timeout_s,
        )
        return {}

    async def begin_update(self, _: Body) -> Body:
        """Begin an update of all weights."""
        # Nothing is sampled until all weights have arrived, paused or not.
        await self._generator.pause("update")
        self._loader.begin()
        return {}

    async def load(self, body: Body) -> Body:
        """Load one chunk of the weights."""
        infos = tuple(
            TensorInfo(info["name"], tuple(info["shape"]), info["dtype"]) for info in body["tensors"]
        )
        chunk = WeightChunk(infos, body["via"], body["where"])
        # Received in another thread than the model's, whose heartbeat continues meanwhile.
        tensors = await asyncio.to_thread(self._loader.receive, chunk)
        await self._generator.update_weights(lambda: self._loader.load(tensors))
        return {}

    async def end_update(self, body: Body) -> Body:
        """End an update and sample again; return the fingerprint of the weights."""
        version = int(body["version"])
        fingerprint = await self._generator.update_weights(self._loader.end)
        self._generator.version = version
        await self._generator.resume("update", recompute=True)
        return {"fingerprint": fingerprint}

    async def load_lora_adapter(self, body: Body) -> Body:
        """Replace the LoRA adapter; return the fingerprint of its file."""
        folder, version = Path(body["folder"]), int(body["version"])
        await self._generator.pause("lora_adapter")
        try:
            fingerprint = await self._generator.update_weights(lambda: self._loader.load_lora_adapter(folder))
            self._generator.version = version
        finally:
            await self._generator.resume("lora_adapter", recompute=True)
        return {"fingerprint": fingerprint}
