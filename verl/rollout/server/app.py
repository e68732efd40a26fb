"""`verl serve`: a policy behind OpenAI's interface over HTTP, with endpoints for new weights if it is started
by a trainer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from verl.engines.hf.models import PolicyModel, Precision
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.async_generator import AsyncGenerator, Request, Token
from verl.rollout.server.openai_protocol import AnswerText, APIError, RequestParser, ResponseWriter
from verl.rollout.server.token_stream import PATH, AnswerStreams
from verl.rollout.server.weight_loader import WeightLoader
from verl.utils.device import pick_device
from verl.utils.tokens import TextCodec
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.types import TensorInfo, WeightChunk

_LOG = logging.getLogger(__name__)
# A stream without tokens says so often that the model is alive.
_HEARTBEAT_S = 1.0
_ALIVE = b": alive\n\n"
# Between two events of a stream: what came meanwhile goes into one, as an event costs more than a token of a
# small model.
_PACE_S = 0.02
_MAX_BODY_BYTES = 2**26
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServeOptions:
    """What is served, where, and to whom.

    Attributes:
        model: folder or hub name of a causal language model with its tokenizer.
        host: address to listen at; another than the loopback interface needs a key.
        port: to listen at.
        name: of the model in requests; none: as `model` is given.
        max_slots: answers generated at a time; further ones wait.
        precision: arithmetic of the forward pass; weights are kept in fp32.
        device: auto, cpu or cuda.
        api_key: asked for on every path but /health; none: nobody is asked.
        secret: opens the endpoints for the trainer, and is a key; none: there are no such endpoints.
        group_timeout_s: longest wait for the others of a process group.
        pace_s: tokens of answers that go on are sent to a trainer so often, together.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    max_slots: int = 256
    precision: Precision = "fp32"
    device: str = "auto"
    api_key: str = ""
    secret: str = ""
    group_timeout_s: float = 60.0
    pace_s: float = 0.1

    def __post_init__(self) -> None:
        if self.max_slots < 1 or self.pace_s < 0:
            raise ValueError(
                f"need at least one slot, and pace_s of at least 0, got {self.max_slots} and {self.pace_s}"
            )
        if not (self.api_key or self.secret or _is_loopback(self.host)):
            raise ValueError(
                f"need a key to serve on {self.host}, which others can reach; put one into the environment variable that --api-key-env "
                "names, or serve on 127.0.0.1"
            )


class Server:
    """The application: one model, its thread, and its paths."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._codec = TextCodec.load(options.model)
        model = PolicyModel(load_language_model(options.model), options.precision).to(
            pick_device(options.device)
        )
        model.requires_grad_(False)
        model.check_forward()
        config = model.transformer.config.get_text_config()
        name = options.name or options.model
        self._reader = RequestParser(name, self._codec, config.max_position_embeddings, config.vocab_size)
        self._intake = WeightLoader(model.transformer)
        self._thread = AsyncGenerator(model, self._codec, max_slots=options.max_slots)
        self._created_s = int(time.time())

    def app(self) -> web.Application:
        """For an event loop that is running."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_as_json, self._with_key])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        if self._options.secret:
            streams = AnswerStreams(
                self._thread, self._reader, check=self._check_weights, pace_s=self._options.pace_s
            )
            control = WeightControlAPI(self._thread, self._intake, self._options, streams)
            app.add_routes([web.get("/control/state", control.state), web.get(PATH, streams.serve)])
            app.add_routes([web.post("/control/{command}", control.obey)])
        return app

    def close(self) -> None:
        """Ends the thread of the model."""
        self._thread.close()

    @web.middleware
    async def _with_key(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        options = self._options
        is_control = bool(options.secret) and request.path.startswith("/control/")
        keys = [key for key in ([options.secret] if is_control else [options.api_key, options.secret]) if key]
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        fits = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if keys and request.path != "/health" and not any(fits):
            raise APIError(
                "need the key of this server as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return await handler(request)

    async def _health(self, _: web.Request) -> web.StreamResponse:
        self._check_weights()
        if not self._thread.is_alive:
            raise APIError("the thread of the model has ended", status=503)
        return web.json_response({"status": "ok"})

    async def _models(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _model(self, http: web.Request) -> web.StreamResponse:
        if http.match_info["name"].lstrip("/") != self._reader.name.lstrip("/"):
            raise APIError(
                f"the model {http.match_info['name']!r} does not exist", status=404, code="model_not_found"
            )
        return web.json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._reader.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "verl",
            "max_model_len": self._reader.context,
            "weight_version": self._thread.version,
        }

    def _check_weights(self) -> None:
        if self._intake.is_torn and not self._intake.is_open:
            raise APIError(
                "the last update of the weights was not completed; the next one repairs them", status=503
            )

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, is_chat=False)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, is_chat=True)

    async def _answer(self, http: web.Request, *, is_chat: bool) -> web.StreamResponse:
        asked = self._reader.read(await _body(http), is_chat=is_chat)
        self._check_weights()
        writer = ResponseWriter.of(asked, self._reader)
        request = self._thread.ask(
            asked.prompts,
            asked.params,
            num_likeliest=asked.num_likeliest or 0,
            first_answer=asked.first_answer,
        )
        try:
            if asked.streams:
                return await self._stream(http, writer, request)
            answers: list[list[Token]] = [[] for _ in range(asked.num_answers)]
            while not request.is_over:
                for answer, token in await request.more(_HEARTBEAT_S):
                    answers[answer].append(token)
            return web.json_response(writer.whole(answers))
        finally:
            # Also when the client has left: then this task is cancelled.
            self._thread.drop(request)

    async def _stream(
        self, http: web.Request, writer: ResponseWriter, request: Request
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(http)
        states = [
            AnswerText(self._codec, writer.asked.params[0].stop) for _ in range(writer.asked.num_answers)
        ]
        await response.write(_events(writer.opening()) or _ALIVE)
        num_beats = self._thread.num_beats
        try:
            while not request.is_over:
                events = _written(writer, states, await request.more(_HEARTBEAT_S))
                if events or self._thread.num_beats != num_beats:
                    await response.write(_events(events) or _ALIVE)
                num_beats = self._thread.num_beats
                await asyncio.sleep(0 if request.is_over else _PACE_S)
            await response.write(
                _events(writer.closing([state.tokens for state in states])) + b"data: [DONE]\n\n"
            )
        except RuntimeError as error:  # it is too late for a status
            await response.write(_events([APIError(str(error), status=500).as_json()]))
        await response.write_eof()
        return response


def _written(
    writer: ResponseWriter, states: Sequence[AnswerText], tokens: Sequence[tuple[int, Token]]
) -> list[dict[str, Any]]:
    """Events for new tokens, one for each answer and version."""
    runs: dict[tuple[int, int], list[Token]] = {}
    for answer, token in tokens:
        runs.setdefault((answer, token.version), []).append(token)
    events = [writer.event(answer, states[answer], run) for (answer, _), run in runs.items()]
    return [event for event in events if event is not None]


class WeightControlAPI:
    """What a trainer asks: pause and resume, and new weights. One command at a time."""

    def __init__(
        self, thread: AsyncGenerator, intake: WeightLoader, options: ServeOptions, streams: AnswerStreams
    ) -> None:
        self._thread, self._intake, self._options, self._streams = thread, intake, options, streams
        self._lock = asyncio.Lock()
        self._commands: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "pause": self._pause,
            "resume": self._resume,
            "join_group": self._join_group,
            "begin_update": self._begin_update,
            "load": self._load,
            "end_update": self._end_update,
            "load_lora_adapter": self._load_additions,
        }

    async def state(self, _: web.Request) -> web.StreamResponse:
        """Who answers, with which weights, and how much it does."""
        state: dict[str, Any] = {
            "pid": os.getpid(),
            "version": self._thread.version,
            "num_running": self._thread.num_running,
        }
        state["shared_memory"] = shared_memory_id()
        return web.json_response(
            {**state, "is_torn": self._intake.is_torn, "num_beats": self._thread.num_beats}
        )

    async def obey(self, http: web.Request) -> web.StreamResponse:
        """Runs a command with the fields of the body."""
        command = self._commands.get(http.match_info["command"])
        if command is None:
            raise APIError(
                f"there is no command {http.match_info['command']!r}; there are {', '.join(self._commands)}",
                status=404,
            )
        body = await _body(http)
        try:
            async with self._lock:
                return web.json_response(await command(body))
        except (KeyError, TypeError) as error:
            raise APIError(f"the body does not fit: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise APIError(str(error)) from error

    async def _pause(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._thread.hold("pause")
        self._streams.flush()
        return {}

    async def _resume(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._thread.release("pause", recompute=bool(body.get("recompute", True)))
        return {}

    async def _join_group(self, body: dict[str, Any]) -> dict[str, Any]:
        place = {
            "num_ranks": body["num_ranks"],
            "backend": body["backend"],
            "timeout_s": self._options.group_timeout_s,
        }
        await asyncio.to_thread(self._intake.join_group, body["address"], body["port"], body["rank"], **place)
        return {}

    async def _begin_update(self, _: dict[str, Any]) -> dict[str, Any]:
        # Until all weights are there, nothing is sampled, paused or not.
        await self._thread.hold("update")
        self._intake.begin()
        return {}

    async def _load(self, body: dict[str, Any]) -> dict[str, Any]:
        infos = tuple(
            TensorInfo(info["name"], tuple(info["shape"]), info["dtype"]) for info in body["tensors"]
        )
        # Beside the thread of the model, which goes on to show that it is alive.
        tensors = await asyncio.to_thread(
            self._intake.received, WeightChunk(infos, body["via"], body["where"])
        )
        await self._thread.with_weights(lambda: self._intake.take(tensors))
        return {}

    async def _end_update(self, body: dict[str, Any]) -> dict[str, Any]:
        version = int(body["version"])
        fingerprint = await self._thread.with_weights(self._intake.end)
        self._thread.version = version
        await self._thread.release("update", recompute=True)
        return {"fingerprint": fingerprint}

    async def _load_additions(self, body: dict[str, Any]) -> dict[str, Any]:
        folder, version = Path(body["folder"]), int(body["version"])
        await self._thread.hold("additions")
        try:
            fingerprint = await self._thread.with_weights(lambda: self._intake.load_lora_adapter(folder))
            self._thread.version = version
        finally:
            await self._thread.release("additions", recompute=True)
        return {"fingerprint": fingerprint}


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        refusal = error
    except web.HTTPException as error:  # an unknown path or method, a body that is too large
        refusal = APIError(f"{error.reason}: {request.method} {request.path}", status=error.status)
    except ConnectionError:  # the client has left
        raise
    except (RuntimeError, OSError) as error:
        _LOG.exception("%s %s failed", request.method, request.path)
        refusal = APIError(f"{type(error).__name__}: {error}", status=500)
    return web.json_response(refusal.as_json(), status=refusal.status)


async def _body(http: web.Request) -> Any:
    try:
        return await http.json()
    except ValueError as error:  # not JSON, or not UTF-8
        raise APIError(f"need JSON as the body: {error}") from error


def _events(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(
        b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(options: ServeOptions) -> None:
    server = Server(options)
    # A handler is cancelled when its client leaves, which takes the request back.
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port).start()
        except OSError as error:
            raise RuntimeError(f"cannot listen at {options.host}:{options.port}: {error}") from error
        _LOG.info("serving %s at http://%s:%d/v1", options.name or options.model, options.host, options.port)
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await ended.wait()
    finally:
        await runner.cleanup()
        server.close()


def serve(options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ValueError: there is no such model, or it cannot be run.
        RuntimeError: the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(options))


def serve_from(args: argparse.Namespace) -> None:
    """`verl serve`: `args` has the options by their names, and `api_key_env` and `secret_env`, the names of
    the environment variables with the key and with the secret of a trainer."""
    options = {name: vars(args)[name] for name in ("model", "host", "port", "name", "max_slots", "precision")}
    secret, api_key = (os.environ.get(name, "") for name in (args.secret_env, args.api_key_env))
    serve(ServeOptions(**options, secret=secret, api_key=api_key))


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m verl.rollout.server.app`, as a trainer starts it: options as JSON, secrets in the
    environment variables that they name.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", type=json.loads, help="fields of ServeOptions")
    for name, meaning in (
        ("secret", "opens the endpoints for the trainer"),
        ("api-key", "asked for on every path but /health"),
    ):
        parser.add_argument(
            f"--{name}-env", default=None, help=f"name of the environment variable with what {meaning}"
        )
    args = parser.parse_args(argv)
    secret, api_key = (os.environ[name] if name else "" for name in (args.secret_env, args.api_key_env))
    serve(ServeOptions(**args.options, secret=secret, api_key=api_key))


if __name__ == "__main__":
    main()
