"""The engine for any server with OpenAI's API: token ids or texts, refusals, retries, and wrong answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.rollout.engine_answers import PROMPT, answer, own_answer, policy, run
from tests.rollout.servers import KEY, running, tiny_model
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.inference_server import (
    EngineError,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.rollout.openai_engine import HTTPEngine
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.utils.tokens import TextCodec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("http") / "model")


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    # An answer takes a fraction of a second: some of it is to be seen before its end.
    with running({"model": str(folder), "name": "tiny", "max_slots": 4, "pace_s": 0.01}) as url:
        yield url


def http_engine(folder: Path, url: str, **options: Any) -> HTTPEngine:
    return HTTPEngine(
        ServerSpec(
            "far", str(folder), {"model": "tiny", "backoff": 0.05, **options}, address=url, timeout_s=3.0
        )
    )


def one_chunk(engine: HTTPEngine, params: SamplingParams, *, seed: int = 0) -> TokenChunk:
    async def asked() -> list[TokenChunk]:
        await engine.open()
        try:
            return await answer(engine, params, seed=seed)
        finally:
            await engine.close()

    (chunk,) = run(asked())
    return chunk


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_server_that_gives_token_ids_is_asked_for_them(address, folder, monkeypatch, suffix):
    monkeypatch.setenv("FAR_KEY", KEY)
    params = SamplingParams(max_tokens=20, temperature=0.8, top_k=40, min_p=0.01, stop_ids=(30,), stop=("q",))
    chunk = one_chunk(
        http_engine(folder, address + suffix, api_key_env="FAR_KEY", processed_logprobs=True), params, seed=5
    )
    completion = own_answer(policy(folder), folder, params, request_seed(replace(params, seed=5)))
    assert list(chunk.token_ids) == completion.token_ids and chunk.finish_reason == completion.finish_reason
    assert list(chunk.logprobs) == pytest.approx(completion.logprobs, abs=1e-5) and chunk.text is None


def test_logprobs_that_may_be_of_another_distribution_are_left_out(address, folder, monkeypatch):
    monkeypatch.setenv("FAR_KEY", KEY)
    engine = http_engine(folder, address, api_key_env="FAR_KEY")
    warm, plain = (
        one_chunk(engine, SamplingParams(max_tokens=8, temperature=0.8)),
        one_chunk(engine, SamplingParams(max_tokens=8)),
    )
    assert warm.token_ids and warm.logprobs is None
    assert len(plain.token_ids) == len(plain.logprobs)


def test_a_chat_gets_the_prompts_text_and_gives_text(address, folder, monkeypatch):
    monkeypatch.setenv("FAR_KEY", KEY)
    engine = http_engine(folder, address, api_key_env="FAR_KEY", chat=True, extra={"temperature": 0})
    chunk = one_chunk(engine, SamplingParams(max_tokens=12))
    codec = TextCodec.load(str(folder))
    prompt = codec.encode(f"u:{codec.decode_prompt(PROMPT)}\na:")
    (completion,) = EmbeddedEngine(policy(folder), codec).generate(
        [prompt], [SamplingParams(0, max_tokens=12)]
    )[0]
    assert (
        chunk.text == codec.decode(completion.token_ids)
        and not chunk.token_ids
        and chunk.finish_reason == completion.finish_reason
    )


def test_a_refusal_is_told_in_the_servers_own_words_and_a_wrong_key_without_the_key(
    address, folder, monkeypatch
):
    monkeypatch.setenv("FAR_KEY", KEY)
    engine = http_engine(folder, address, api_key_env="FAR_KEY")
    with pytest.raises(
        RefusedError, match="far answers /completions with status 400: this model's context is 1024 tokens"
    ):
        one_chunk(engine, SamplingParams(max_tokens=2000))
    monkeypatch.setenv("FAR_KEY", "wrong key")
    engine = HTTPEngine(
        ServerSpec(
            "far",
            str(folder),
            {"model": "tiny", "api_key_env": "FAR_KEY"},
            address=address,
            start_timeout_s=0.1,
        )
    )
    with pytest.raises(EngineError, match="status 401: need the key") as error:
        run(engine.open())
    assert "wrong key" not in str(error.value)


def test_options_are_checked(folder, monkeypatch):
    monkeypatch.delenv("FAR_KEY", raising=False)
    for options, message in (
        ({"modle": "x"}, "no option 'modle'; did you mean model"),
        ({}, "incomplete"),
        ({"model": "x", "retries": -1}, "need retries >= 0"),
        ({"model": "x", "api_key_env": "FAR_KEY"}, "environment variable FAR_KEY, which is not set"),
    ):
        with pytest.raises(ValueError, match=message):
            HTTPEngine(ServerSpec("far", str(folder), options, address="http://127.0.0.1:1"))
    with pytest.raises(ValueError, match="need the address"):
        HTTPEngine(ServerSpec("far", str(folder), {"model": "x"}))


@asynccontextmanager
async def faulty(reply: Callable[[int, web.Request], Any]) -> AsyncIterator[tuple[str, list[float]]]:
    """The address of a server whose completions are what `reply` makes of the number of the request, and when
    each came.
    """
    came_s: list[float] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        came_s.append(time.monotonic())
        made = reply(len(came_s) - 1, request)
        return await made if asyncio.iscoroutine(made) else made

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete), web.get("/v1/models", no_models)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", free_port())
    await site.start()
    try:
        yield site.name, came_s
    finally:
        await runner.cleanup()


async def no_models(_: web.Request) -> web.Response:
    return web.json_response({})


GOOD = {"choices": [{"text": "fine", "finish_reason": "stop"}]}


def against(
    folder: Path, reply: Callable[[int, web.Request], Any], **options: Any
) -> tuple[TokenChunk, list[float]]:
    """The chunk that an engine gets from a faulty server, and the seconds between its attempts."""

    async def asked() -> tuple[TokenChunk, list[float]]:
        async with faulty(reply) as (url, came_s):
            engine = http_engine(folder, url, **options)
            await engine.open()
            try:
                (chunk,) = await answer(engine, SamplingParams(max_tokens=4))
            finally:
                await engine.close()
            return chunk, [later - earlier for earlier, later in zip(came_s, came_s[1:], strict=False)]

    return run(asked())


def test_a_server_that_asks_to_wait_is_asked_again_after_that_time(folder):
    busy = web.Response
    chunk, waits_s = against(
        folder,
        lambda i, _: busy(status=429, headers={"Retry-After": "1"}) if i == 0 else web.json_response(GOOD),
    )
    assert (
        chunk.text == "fine"
        and chunk.finish_reason == "stop"
        and len(waits_s) == 1
        and 1.0 <= waits_s[0] < 2.0
    )


def test_failures_that_may_pass_are_retried_ever_more_slowly(folder):
    chunk, waits_s = against(
        folder, lambda i, _: web.Response(status=500 + i) if i < 3 else web.json_response(GOOD), backoff=0.1
    )
    assert chunk.text == "fine" and len(waits_s) == 3
    assert all(0.05 * 2**i <= wait_s < 0.1 * 2**i + 3 for i, wait_s in enumerate(waits_s))


def test_after_the_last_retry_the_failure_is_told_without_the_key(folder, monkeypatch):
    monkeypatch.setenv("FAR_KEY", "sk-hidden")

    def repeat(_: int, request: web.Request) -> web.Response:
        return web.Response(status=503, text=f"bad key {request.headers['Authorization']}")

    with pytest.raises(
        EngineError, match=r"status 503: .*\*\*\*.* \(attempt 3; 2 retries within 3 s\)"
    ) as error:
        against(folder, repeat, retries=2, api_key_env="FAR_KEY")
    assert "sk-hidden" not in str(error.value)


def test_a_server_that_hangs_is_given_up_in_time(folder):
    start_s = time.monotonic()
    with pytest.raises(EngineError, match="no sign of life"):
        against(folder, lambda i, _: asyncio.sleep(30, web.Response()))
    assert 2.5 < time.monotonic() - start_s < 30


@pytest.mark.parametrize(
    "body", ["<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"finish_reason": "stop"}]}']
)
def test_an_answer_that_is_none_is_an_error(folder, body):
    with pytest.raises(EngineError, match="far answers"):
        against(folder, lambda i, _: web.Response(text=body), retries=1)


def test_a_server_that_knows_no_token_ids_is_asked_with_texts(folder):
    seen = []

    async def reply(request: web.Request) -> web.Response:
        seen.append(await request.json())
        known = "return_token_ids" not in seen[-1]
        return web.json_response(
            GOOD if known else {"error": {"message": "unknown: return_token_ids"}},
            status=200 if known else 400,
        )

    chunk, _ = against(folder, lambda i, request: reply(request), extra={"user": "me"})
    assert chunk.text == "fine" and [body["prompt"] for body in seen] == [
        PROMPT,
        TextCodec.load(str(folder)).decode_prompt(PROMPT),
    ]
    assert all(body["user"] == "me" for body in seen)


def test_no_more_requests_run_at_a_time_than_allowed(folder):
    running_now, most = 0, 0

    async def reply() -> web.Response:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await asyncio.sleep(0.05)
        running_now -= 1
        return web.json_response(GOOD)

    async def asked() -> int:
        async with faulty(lambda i, _: reply()) as (url, came_s):
            engine = http_engine(folder, url, max_concurrency=3)
            await engine.open()
            await asyncio.gather(*[answer(engine, SamplingParams()) for _ in range(10)])
            await engine.close()
            return len(came_s)

    assert run(asked()) == 10 and most == 3
