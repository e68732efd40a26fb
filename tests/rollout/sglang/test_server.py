"""SGLang's real server as an engine: ids, logprobs, stops, refusals, secrets, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import aiohttp
import pytest
import torch

from tests.rollout.sglang.bench import (
    CONTEXT,
    PROMPTS,
    SECRET,
    Running,
    assert_is_of,
    gone,
    is_idle,
    serving,
    spec_of,
    until,
    whole,
)
from tests.tiny import tiny_codec
from verl.rollout.http_client import hide_secret
from verl.rollout.inference_server import EngineError, RefusedError, TokenChunk
from verl.rollout.sglang.requests import request_body
from verl.rollout.sglang.server import SGLangServer
from verl.rollout.sglang.stream import SGLangStream
from verl.utils.sampling_types import SamplingParams

pytestmark = pytest.mark.sglang


LONG = SamplingParams(max_tokens=200)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(spec_of(tmp_path_factory.mktemp("sglang"))) as running:
        yield running


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=30),
        SamplingParams(temperature=0.7, max_tokens=30),
        SamplingParams(temperature=0.7, top_k=5, max_tokens=30),
        SamplingParams(temperature=0.7, top_k=1, max_tokens=30),
        SamplingParams(top_k=20, top_p=0.8, max_tokens=30),
        SamplingParams(top_p=0.8, max_tokens=30),
        SamplingParams(temperature=1.3, min_p=0.2, max_tokens=30),
        SamplingParams(temperature=1.3, top_k=10, top_p=0.9, min_p=0.05, max_tokens=30),
        SamplingParams(temperature=0, max_tokens=30),
    ],
    ids=["plain", "temperature", "top_k", "top_k_1", "top_k_top_p", "top_p", "min_p", "all", "greedy"],
)
def test_logprobs_are_those_of_the_trainers_forward(running, params):
    answer = running.answer(PROMPTS[1], params)
    assert len(answer.token_ids) == 30 or answer.token_ids[-1] == 1
    assert_is_of(running, PROMPTS[1], answer, params)


def test_temperature_0_takes_the_most_likely_token(running):
    answer = running.answer(PROMPTS[0], SamplingParams(temperature=0, top_p=0.5, max_tokens=12))
    with torch.no_grad():
        logits = running.model(torch.tensor([[*PROMPTS[0], *answer.token_ids]])).logits[0, 2:-1]
    assert logits.argmax(-1).tolist() == answer.token_ids


def test_requests_that_run_together_keep_their_own_parameters(running):
    all_params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, max_tokens=40, stop_ids=tuple(range(20, 24)))
        for t in (0, 0.6, 1.4)
        for k, p in ((0, 1.0), (7, 1.0), (30, 0.9))
    ]

    async def together() -> list[TokenChunk]:
        return await asyncio.gather(
            *(whole(running.engine, PROMPTS[i % 4], params) for i, params in enumerate(all_params))
        )

    for i, (answer, params) in enumerate(zip(running.run(together()), all_params, strict=True)):
        assert_is_of(running, PROMPTS[i % 4], answer, params)


def test_an_answer_without_an_end_has_max_tokens(running):
    for limit in (1, 2, 7):
        answer = running.answer(PROMPTS[0], SamplingParams(temperature=0, max_tokens=limit))
        assert (answer.finish_reason, len(answer.token_ids), len(answer.logprobs)) == ("length", limit, limit)


def test_a_stop_id_ends_an_answer_and_belongs_to_it(running):
    ends = tuple(range(20, 40))
    answers = [running.answer(prompt, SamplingParams(max_tokens=60, stop_ids=ends)) for prompt in PROMPTS * 2]
    stopped = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(stopped) >= 6
    assert all(a.token_ids[-1] in (*ends, 1) and not {*ends, 1} & {*a.token_ids[:-1]} for a in stopped)


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(running):
    codec = tiny_codec()
    free = running.answer(PROMPTS[1], SamplingParams(temperature=0, max_tokens=30))
    text = codec.decode(free.token_ids)
    stop = text[5:8]
    ended = running.answer(
        PROMPTS[1], SamplingParams(temperature=0, max_tokens=30, stop=(stop, "never such a text"))
    )
    assert ended.finish_reason == "stop" and ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert codec.decode(ended.token_ids).endswith(stop) and stop not in codec.decode(ended.token_ids[:-1])
    assert len(ended.logprobs) == len(ended.token_ids)


def test_special_tokens_are_read_and_given(running):
    # Ids in, ids out: no text is between them, in which a padding token or an unknown one would be lost.
    answer = running.answer([2, 0, 3, 50], SamplingParams(max_tokens=5))
    assert_is_of(running, [2, 0, 3, 50], answer, SamplingParams(max_tokens=5))


@pytest.mark.parametrize(
    "ids, max_tokens", [([5] * (CONTEXT + 50), 4), ([5] * (CONTEXT - 10), 50)], ids=["prompt", "answer"]
)
def test_what_does_not_fit_the_context_is_refused(running, ids, max_tokens):
    with pytest.raises(RefusedError, match="context length"):
        running.answer(ids, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("ids", [[], [5, 5000], [-1]], ids=["none", "beyond", "negative"])
def test_ids_that_the_model_does_not_know_are_refused_before_they_end_the_server(running, ids):
    with pytest.raises(RefusedError, match="need prompt ids from 0 up to 99, at least one"):
        running.answer(ids, SamplingParams())
    running.run(running.engine.check())


def test_a_truncation_that_has_no_logprobs_is_refused_with_what_helps(running):
    engine, info = running.engine, running.engine._info
    # As if the vocabulary were larger than the server's limit.
    engine._info = replace(info, max_kept_tokens=50)
    try:
        with pytest.raises(
            RefusedError,
            match="set sampling.top_k to at most 50, or engine_options.sampling_mask_max_tokens to 100",
        ):
            running.answer(PROMPTS[0], SamplingParams(top_p=0.9))
        assert (
            len(running.answer(PROMPTS[0], SamplingParams(top_p=0.9, top_k=50, max_tokens=3)).token_ids) == 3
        )
    finally:
        engine._info = info
    # The server's own refusal, in the stream, of a request that is not sent otherwise.
    body = request_body(PROMPTS[0], SamplingParams(top_k=5), seed=0, vocab_size=100, info=info)
    body["sampling_params"]["top_k"] = 5000

    async def asked() -> None:
        answer = SGLangStream(truncates=True)
        async for event in engine.client.stream("/generate", body):
            engine._parse_event(answer, event)

    with pytest.raises(RefusedError, match="top_k=5000"):
        running.run(asked())


@pytest.mark.parametrize("cancel", [False, True], ids=["left", "cancelled"])
def test_leaving_the_iteration_aborts_the_request_in_the_server(running, cancel):
    engine, params = running.engine, SamplingParams(temperature=0, max_tokens=3000)
    started_s = time.monotonic()
    assert len(running.answer(PROMPTS[1], params).token_ids) == 3000
    whole_s = time.monotonic() - started_s

    async def left() -> float | None:
        """Seconds until the server had forgotten it; None: it had ended before it was left."""
        first, was_over = asyncio.Event(), []

        async def read() -> None:
            async with aclosing(engine.sample(PROMPTS[1], params)) as chunks:
                async for _ in chunks:
                    first.set()
                    if not cancel:
                        was_over.append(await is_idle(engine))
                        return

        task = asyncio.create_task(read())
        await first.wait()
        if cancel:
            was_over.append(await is_idle(engine))
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left_s = time.monotonic()
        assert await until(lambda: is_idle(engine))
        return None if was_over[0] else time.monotonic() - left_s

    # On a busy machine an answer may be over before it is left.
    tries = (running.run(left()) for _ in range(10))
    assert next(seconds for seconds in tries if seconds is not None) < whole_s / 2
    assert not engine._num_running


def test_every_endpoint_refuses_without_the_secret(running):
    # Those are for probes of health and metrics, and say nothing else.
    open_to_all = {"/health", "/health_generate", "/ready"}
    address = running.engine.client.address

    async def statuses() -> dict[str, int]:
        paths = (await running.engine.client.request("GET", "/openapi.json"))["paths"]
        found = {}
        for secret in ("", "Bearer wrong"):
            async with aiohttp.ClientSession(headers={"Authorization": secret} if secret else {}) as session:
                for path, methods in paths.items():
                    for method in methods:
                        async with session.request(method, address + path, json={}) as response:
                            found[f"{method} {path} {secret}"] = response.status
        return {key: status for key, status in found.items() if key.split()[1] not in open_to_all}

    found = running.run(statuses())
    assert len(found) > 100
    assert {key: status for key, status in found.items() if status not in (401, 403)} == {}


def test_the_secret_is_seen_neither_in_the_processes_nor_by_others_in_the_log(running):
    rows = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout
    assert "sglang" in rows and SECRET not in rows
    assert running.engine.spec.log.stat().st_mode & 0o077 == 0
    assert SECRET not in hide_secret(running.engine.spec.log.read_text(), SECRET)
    assert not list(running.engine._folder.glob("*.yaml"))


def test_a_request_that_comes_during_a_pause_waits_longer_than_silence_is_allowed(running):
    async def waits() -> TokenChunk:
        engine = running.engine
        await engine.pause()
        patience_s, engine.client.silence.limit_s = engine.client.silence.limit_s, 1.0
        try:
            task = asyncio.create_task(whole(engine, PROMPTS[0], SamplingParams(max_tokens=3, temperature=0)))
            await asyncio.sleep(2.5)
            assert not task.done()
        finally:
            engine.client.silence.limit_s = patience_s
            await engine.resume()
        return await task

    assert len(running.run(waits()).token_ids) == 3


def test_it_sleeps_and_wakes(running):
    running.run(running.engine.sleep())
    running.run(running.engine.sleep())
    running.run(running.engine.wake())
    running.run(running.engine.wake())
    assert len(running.answer(PROMPTS[0], SamplingParams(temperature=0, max_tokens=3)).token_ids) == 3


def test_it_does_not_sleep_while_it_answers(running):
    async def asked() -> None:
        async with aclosing(running.engine.sample(PROMPTS[0], LONG)) as chunks:
            await anext(chunks)
            with pytest.raises(
                RuntimeError, match="need an idle engine before it sleeps, but sglang-0 has 1 requests"
            ):
                await running.engine.sleep()

    running.run(asked())


def test_a_server_that_runs_is_joined_and_stays(running):
    joined = SGLangServer(replace(running.engine.spec, name="joined", address=running.engine.client.address))

    async def through() -> TokenChunk:
        await joined.open()
        answer = await whole(joined, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4))
        await joined.close()
        await running.engine.check()
        return answer

    assert len(running.run(through()).token_ids) == 4
    assert joined.syncs_weights and joined.num_ranks == 1


def test_joining_with_a_wrong_secret_is_an_error(running):
    joined = SGLangServer(
        replace(running.engine.spec, name="joined", address=running.engine.client.address, secret="another")
    )
    with pytest.raises(ValueError, match="joined at .* does not accept the secret that it was sent"):
        running.run(joined.open())


def test_a_server_that_is_stopped_is_found_after_its_silence(running):
    engine = running.engine
    patience_s, engine.client.silence.limit_s = engine.client.silence.limit_s, 2.0
    group = engine._process.pid
    started_s = time.monotonic()
    os.killpg(group, signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match="sglang-0 has been silent for 2 s"):
            running.answer(PROMPTS[0], LONG)
        assert 2 <= time.monotonic() - started_s < 30
        with pytest.raises(EngineError, match="sglang-0 did not answer /server_info for 2 s"):
            running.run(engine.check())
    finally:
        os.killpg(group, signal.SIGCONT)
        engine.client.silence.limit_s = patience_s
    running.run(engine.check())


def test_a_server_that_is_killed_is_found_at_once_and_can_be_started_again(running):
    """The last one with this server."""
    engine = running.engine

    async def through() -> float:
        async with aclosing(engine.sample(PROMPTS[0], LONG)) as chunks:
            await anext(chunks)
            os.kill(engine._process.pid, signal.SIGKILL)
            started_s = time.monotonic()
            with pytest.raises(EngineError, match="sglang-0 "):
                async for _ in chunks:
                    pass
            with pytest.raises(EngineError, match="sglang-0 has ended with code -9"):
                await engine.check()
            return time.monotonic() - started_s

    assert running.run(through()) < 30
    group = engine._process.pid
    running.run(engine.close())
    assert gone(group)
    running.loop.run_until_complete(engine.open())
    assert len(running.answer(PROMPTS[0], SamplingParams(temperature=0, max_tokens=3)).token_ids) == 3
