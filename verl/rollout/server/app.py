"""`verl serve`: a policy behind OpenAI's API over HTTP, with control endpoints for a trainer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from verl.engines.hf.models import PolicyModel, Precision
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.async_generator import AsyncGenerator, GenerationRequest, Token
from verl.rollout.server.http_json import Handler, errors_as_json, read_json
from verl.rollout.server.openai_request import APIError, RequestParser
from verl.rollout.server.openai_response import IncrementalDetokenizer, ResponseWriter
from verl.rollout.server.token_messages import PATH
from verl.rollout.server.token_stream import TokenStreamServer
from verl.rollout.server.weight_control import WeightControlAPI
from verl.rollout.server.weight_loader import WeightLoader
from verl.utils.device import pick_device
from verl.utils.network import is_loopback
from verl.utils.tokens import TextCodec

_LOG = logging.getLogger(__name__)
# A stream without new tokens sends a comment at this interval, as long as the model is alive.
_HEARTBEAT_S = 1.0
_HEARTBEAT_COMMENT = b": alive\n\n"
# Between two events of a stream: all new tokens share one, since an event costs more than a token of a small
# model.
_PACE_S = 0.02
_MAX_BODY_BYTES = 2**26


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server.

    Attributes:
        model: folder or hub name of a causal language model with its tokenizer.
        host: address to listen on; another than the loopback interface needs an API key.
        port: to listen on.
        name: of the model in requests; None: `model`.
        max_slots: answers generated at a time; further ones wait.
        prefix_tokens: see `AsyncGenerator`.
        precision: of the forward pass; weights are kept in fp32.
        device: auto, cpu or cuda.
        api_key: required on every path but /health; "": none is required.
        secret: opens the control endpoints, and is an API key; "": there are no control endpoints.
        group_timeout_s: longest wait for the other ranks of a process group.
        pace_s: seconds between two messages to a trainer with tokens of running answers.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    max_slots: int = 256
    prefix_tokens: int | None = None
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
        if not (self.api_key or self.secret or is_loopback(self.host)):
            raise ValueError(
                f"need a key to serve on {self.host}, which others can reach; put one into the environment"
                " variable that --api-key-env names, or serve on 127.0.0.1"
            )


class Server:
    """The web application: one model, its generation thread, and its paths."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._codec = TextCodec.load(options.model)
        model = PolicyModel(load_language_model(options.model), options.precision).to(
            pick_device(options.device)
        )
        model.requires_grad_(False)
        model.check_forward()
        model.num_ids = self._codec.num_ids
        config = model.transformer.config.get_text_config()
        name = options.name or options.model
        self._parser = RequestParser(name, self._codec, model.context, config.vocab_size)
        self._loader = WeightLoader(model.transformer)
        self._generator = AsyncGenerator(
            model, self._codec, max_slots=options.max_slots, prefix_tokens=options.prefix_tokens
        )
        self._created_s = int(time.time())

    def app(self) -> web.Application:
        """Build the application; needs a running event loop."""
        middlewares = [errors_as_json, self.require_key]
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=middlewares)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{name:.+}", self.model),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
            ]
        )
        if self._options.secret:
            streams = TokenStreamServer(
                self._generator, self._parser, check=self._check_weights, pace_s=self._options.pace_s
            )
            control = WeightControlAPI(
                self._generator,
                self._loader,
                streams,
                group_timeout_s=self._options.group_timeout_s,
            )
            app.add_routes([web.get(PATH, streams.serve), *control.routes()])
        return app

    def close(self) -> None:
        """End the generation thread."""
        self._generator.close()

    @web.middleware
    async def require_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests without a key; control endpoints take the secret alone."""
        options = self._options
        is_control = bool(options.secret) and request.path.startswith("/control/")
        keys = [key for key in ([options.secret] if is_control else [options.api_key, options.secret]) if key]
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # All keys are compared, in constant time, so that the time of a response says nothing about them.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if keys and request.path != "/health" and not any(matches):
            raise APIError(
                "need the key of this server as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return await handler(request)

    async def health(self, _: web.Request) -> web.StreamResponse:
        """GET /health: 200 if the server answers requests."""
        self._check_weights()
        if not self._generator.is_alive:
            raise APIError("the thread of the model has ended", status=503)
        return web.json_response({"status": "ok"})

    async def models(self, _: web.Request) -> web.StreamResponse:
        """GET /v1/models: the one model."""
        return web.json_response({"object": "list", "data": [self._model_object()]})

    async def model(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/models/NAME."""
        name = http.match_info["name"]
        if name.lstrip("/") != self._parser.name.lstrip("/"):
            raise APIError(f"the model {name!r} does not exist", status=404, code="model_not_found")
        return web.json_response(self._model_object())

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._answer(http, is_chat=False)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._answer(http, is_chat=True)

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._parser.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "verl",
            "max_model_len": self._parser.context,
            "weight_version": self._generator.version,
        }

    def _check_weights(self) -> None:
        """Raise APIError if the last update ended incomplete; during an update, requests wait."""
        if self._loader.is_torn and not self._loader.is_open:
            raise APIError(
                "the last update of the weights was not completed; the next one repairs them", status=503
            )

    async def _answer(self, http: web.Request, *, is_chat: bool) -> web.StreamResponse:
        parsed = self._parser.parse(await read_json(http), is_chat=is_chat)
        self._check_weights()
        parser = self._parser
        writer = ResponseWriter.create(parsed, parser.name, parser.codec, parser.token_texts)
        request = self._generator.submit(
            parsed.prompts,
            parsed.params,
            num_top_logprobs=parsed.num_top_logprobs or 0,
            first_sample_index=parsed.first_answer,
        )
        try:
            if parsed.streams:
                return await self._stream(http, writer, request)
            answers: list[list[Token]] = [[] for _ in range(parsed.num_answers)]
            while not request.is_finished:
                for answer, token in await request.wait_tokens(_HEARTBEAT_S):
                    answers[answer].append(token)
            return web.json_response(writer.body(answers))
        finally:
            # Reached also when the client has left, as that cancels this task.
            self._generator.abort(request)

    async def _stream(
        self, http: web.Request, writer: ResponseWriter, request: GenerationRequest
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(http)
        stop, num_answers = writer.request.params[0].stop, writer.request.num_answers
        detokenizers = [IncrementalDetokenizer(self._codec, stop) for _ in range(num_answers)]
        await response.write(encode_events(writer.first_events()) or _HEARTBEAT_COMMENT)
        num_beats = self._generator.num_heartbeats
        try:
            while not request.is_finished:
                events = token_events(writer, detokenizers, await request.wait_tokens(_HEARTBEAT_S))
                if events or self._generator.num_heartbeats != num_beats:
                    await response.write(encode_events(events) or _HEARTBEAT_COMMENT)
                num_beats = self._generator.num_heartbeats
                await asyncio.sleep(0 if request.is_finished else _PACE_S)
            last = writer.last_events([detokenizer.tokens for detokenizer in detokenizers])
            await response.write(encode_events(last) + b"data: [DONE]\n\n")
        except RuntimeError as error:  # the status is already sent
            await response.write(encode_events([APIError(str(error), status=500).as_json()]))
        await response.write_eof()
        return response


def token_events(
    writer: ResponseWriter,
    detokenizers: Sequence[IncrementalDetokenizer],
    tokens: Sequence[tuple[int, Token]],
) -> list[dict[str, Any]]:
    """Events for new tokens, one for each answer and weight version."""
    runs: dict[tuple[int, int], list[Token]] = {}
    for answer, token in tokens:
        runs.setdefault((answer, token.version), []).append(token)
    events = [writer.token_event(answer, detokenizers[answer], run) for (answer, _), run in runs.items()]
    return [event for event in events if event is not None]


def encode_events(events: Sequence[dict[str, Any]]) -> bytes:
    """Encode objects as server-sent events."""
    encoded = (json.dumps(event, separators=(",", ":")).encode() for event in events)
    return b"".join(b"data: " + event + b"\n\n" for event in encoded)


async def run_server(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM, in a running event loop; see `serve`."""
    server = Server(options)
    # A handler is cancelled when its client leaves, which aborts the request.
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
    """Serve until SIGINT or SIGTERM.

    Raises:
        ValueError: the model does not exist or cannot be run.
        RuntimeError: the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_server(options))


def serve_from(args: argparse.Namespace) -> None:
    """Run `verl serve`.

    Args:
        args: options of `ServeOptions` by name; `api_key_env` and `secret_env` name the environment variables
            with the API key and with a trainer's secret.
    """
    options = {name: vars(args)[name] for name in ("model", "host", "port", "name", "max_slots", "precision")}
    secret, api_key = (os.environ.get(name, "") for name in (args.secret_env, args.api_key_env))
    serve(ServeOptions(**options, secret=secret, api_key=api_key))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m verl.rollout.server.app`, as a trainer starts it.

    Options are one JSON argument; secrets are in the environment variables that the other options name.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", type=json.loads, help="fields of ServeOptions")
    for name, meaning in (
        ("secret", "the secret of the control endpoints"),
        ("api-key", "the key that every path but /health requires"),
    ):
        parser.add_argument(
            f"--{name}-env", default=None, help=f"name of the environment variable with {meaning}"
        )
    args = parser.parse_args(argv)
    secret, api_key = (os.environ[name] if name else "" for name in (args.secret_env, args.api_key_env))
    serve(ServeOptions(**args.options, secret=secret, api_key=api_key))


if __name__ == "__main__":
    main()
