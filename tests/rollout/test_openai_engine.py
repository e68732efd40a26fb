"""Engines behind HTTP: `verl serve` as an engine whose weights follow, and any server with OpenAI's
interface.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
import torch
from aiohttp import web
from safetensors.torch import save_file
from torch import Tensor

from tests.rollout.pool.pools import generate
from tests.rollout.servers import KEY, SECRET, next_logprobs, running, tiny_model
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.engine import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
    request_seed,
)
from verl.rollout.openai_engine import HTTPEngine
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.network import free_port
from verl.utils.sampling_types import Completion, SamplingParams
from verl.utils.tokens import TextCodec
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.process_group import broadcast, open_group
from verl.weight_sync.types import TensorInfo, WeightChunk

T = TypeVar("T")
PROMPT = [40, 50, 60, 70]
LONG = SamplingParams(max_tokens=600, temperature=0.5)
LOOP = asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, T]) -> T:
    """In the one loop in which the engines live; nothing here takes half a minute."""
    return LOOP.run_until_complete(asyncio.wait_for(work, 60))


def policy(folder: Path) -> PolicyModel:
    return PolicyModel(load_language_model(str(folder)), "fp32")


def own_answer(model: PolicyModel, folder: Path, params: SamplingParams, seed: int) -> Completion:
    engine = EmbeddedEngine(model, TextCodec.load(str(folder)))
    return generate(engine, [PROMPT], [SamplingParams(**{**vars(params), "seed": seed})])[0][0]


async def answer(
    engine: InferenceServer, params: SamplingParams, *, seed: int = 0, prompt: list[int] = PROMPT
) -> list[TokenChunk]:
    return [chunk async for chunk in engine.sample(prompt, replace(params, seed=seed), number=0)]


def ids(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def logprobs(chunks: list[TokenChunk]) -> list[float]:
    return [logprob for chunk in chunks for logprob in chunk.logprobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("http") / "model")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of other weights of the same model."""
    return [tiny_model(tmp_path_factory.mktemp("http") / "model", seed=seed) for seed in (1, 2, 3)]


def spec(folder: Path, log: Path, **changes: Any) -> ServerSpec:
    options = {"max_slots": 4, "device": "cpu", "threads": 1}
    return ServerSpec(
        **{"name": "one", "model": str(folder), "log": log, "timeout_s": 20.0, "options": options, **changes}
    )


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    # An answer takes a fraction of a second: some of it is to be seen before its end.
    with running({"model": str(folder), "name": "tiny", "max_slots": 4, "pace_s": 0.01}) as url:
        yield url


@pytest.fixture(scope="module")
def joined(folder, address, tmp_path_factory) -> Iterator[EmbeddedServer]:
    engine = EmbeddedServer(
        spec(
            folder, tmp_path_factory.mktemp("log") / "engine.log", address=address, secret=SECRET, options={}
        )
    )
    run(engine.open())
    yield engine
    run(engine.close())
    assert requests.get(f"{address}/health").ok


@pytest.fixture
def served(joined, folder) -> EmbeddedServer:
    """With the weights of the folder as version 0."""
    run(update(joined, [WeightChunk((), "disk", {"folder": folder})], 0))
    return joined


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to(dtype)
        for name, parameter in load_language_model(str(folder)).named_parameters()
    }


def expected(tensors: dict[str, Tensor]) -> str:
    return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


def infos(tensors: dict[str, Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    )


def packed(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()])


def shm_parts(tensors: dict[str, Tensor], folder: Path, *, num_parts: int = 2) -> list[WeightChunk]:
    """The tensors dealt out over files, with the odd ones in the second: their bytes are aligned to nothing."""
    parts = []
    for i in range(num_parts):
        own = dict(list(tensors.items())[i::num_parts])
        path = folder / f"part-{i}"
        path.write_bytes(bytes(packed(own).tolist()))
        parts.append(WeightChunk(infos(own), "shm", {"path": str(path)}))
    return parts


async def update(engine: InferenceServer, parts: list[WeightChunk], version: int) -> str:
    await engine.pause()
    await engine.begin_update()
    for part in parts:
        await engine.load(part)
    found = await engine.end_update(version)
    await engine.resume()
    return found


def has_weights_of(engine: InferenceServer, folder: Path, version: int) -> bool:
    """Whether it answers as the embedded engine with these weights does."""
    chunks = run(answer(engine, SamplingParams(max_tokens=30), seed=version))
    completion = own_answer(policy(folder), folder, SamplingParams(max_tokens=30), version)
    assert {chunk.version for chunk in chunks} == {version}
    assert logprobs(chunks) == pytest.approx(completion.logprobs, abs=1e-5)
    return ids(chunks) == completion.token_ids


def test_an_answer_is_that_of_the_embedded_engine_in_chunks(served, folder):
    params = SamplingParams(
        max_tokens=60, temperature=0.9, top_p=0.95, top_k=60, min_p=0.001, stop=("ab", "0"), stop_ids=(30, 31)
    )
    for seed in (0, 1, 2**63 - 1):
        chunks = run(answer(served, params, seed=seed))
        completion = own_answer(policy(folder), folder, params, seed)
        assert ids(chunks) == completion.token_ids and logprobs(chunks) == pytest.approx(
            completion.logprobs, abs=1e-5
        )
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
            completion.finish_reason
        ]


def test_another_engine_goes_on_with_an_answer_as_this_one_would_have(served):
    whole = ids(run(answer(served, LONG, seed=3)))
    rest = run(answer(served, LONG, seed=3, prompt=[*PROMPT, *whole[:9]]))
    assert served.position_seeded and ids(rest)[: len(whole) - 9] == whole[9:]


def test_a_prompt_that_does_not_fit_is_refused(served):
    with pytest.raises(
        RefusedError, match="context is 1024 tokens, but the prompt has 1000 and the answer may get 100"
    ):
        run(answer(served, SamplingParams(max_tokens=100), prompt=[5] * 1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_through_shared_memory(served, others, tmp_path, dtype):
    tensors = weights(others[0], dtype)
    assert run(update(served, shm_parts(tensors, tmp_path), 1)) == expected(tensors)
    if dtype == torch.float32:
        assert has_weights_of(served, others[0], 1)


def test_weights_come_from_a_folder(served, others):
    tensors = weights(others[1])
    part = WeightChunk(infos(tensors), "disk", {"folder": others[1]})
    assert run(update(served, [part], 2)) == expected(tensors)
    assert has_weights_of(served, others[1], 2)


def test_weights_come_over_a_group(served, others):
    tensors, port = weights(others[2]), free_port()

    async def send() -> str:
        place = {"num_ranks": 2, "backend": "gloo"}
        opened = asyncio.to_thread(open_group, "127.0.0.1", port, rank=0, timeout_s=20, **place)
        group, _ = await asyncio.gather(
            opened, served.join_group(address="127.0.0.1", port=port, first_rank=1, **place)
        )
        await served.begin_update()
        sent = asyncio.to_thread(broadcast, group, packed(tensors))
        await asyncio.gather(sent, served.load(WeightChunk(infos(tensors), "group")))
        return await served.end_update(3)

    assert run(send()) == expected(tensors)
    assert has_weights_of(served, others[2], 3)


async def torn(engine: InferenceServer, parts: list[WeightChunk]) -> None:
    await engine.begin_update()
    await engine.load(parts[0])
    await engine.end_update(9)


def test_an_update_that_lacks_tensors_is_an_error_and_the_next_one_repairs_it(served, others, tmp_path):
    tensors = weights(others[0])
    parts = shm_parts(tensors, tmp_path)
    assert run(update(served, parts, 1)) == expected(tensors)
    # The tensors of the update before do not count.
    with pytest.raises(
        EngineError, match="need all weights in an update, but 1. were not sent: model.layers"
    ):
        run(torn(served, parts))
    with pytest.raises(EngineError, match="the last update of the weights was not completed"):
        run(served.check())
    with pytest.raises(EngineError, match="the last update of the weights was not completed"):
        run(answer(served, SamplingParams()))
    assert run(update(served, parts, 2)) == expected(tensors)
    run(served.check())
    assert has_weights_of(served, others[0], 2)


def test_weights_that_do_not_fit_are_errors(served, folder, tmp_path):
    tensors = weights(folder)
    name = next(iter(tensors))
    wrong = {
        "no such tensor": {**tensors, "other": torch.ones(3)},
        "the model has one of shape": {**tensors, name: torch.ones(3)},
    }
    for message, sent in wrong.items():
        with pytest.raises(EngineError, match=message):
            run(update(served, shm_parts(sent, tmp_path), 5))
    (part,) = shm_parts(tensors, tmp_path, num_parts=1)
    Path(part.location["path"]).write_bytes(b"too short")
    with pytest.raises(EngineError, match="bytes of weights in"):
        run(update(served, [part], 5))
    assert run(update(served, shm_parts(tensors, tmp_path), 6)) == expected(tensors)
    with pytest.raises(EngineError, match="need begin_update before end_update"):
        run(served.end_update(7))
    assert has_weights_of(served, folder, 6)


def test_weights_that_give_no_finite_logits_fail_requests_until_better_ones_come(served, folder, tmp_path):
    tensors = weights(folder)
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    run(update(served, shm_parts(broken, tmp_path), 4))
    with pytest.raises(EngineError, match="one failed: the model's logits are not finite"):
        run(answer(served, SamplingParams()))
    run(served.check())
    run(update(served, shm_parts(tensors, tmp_path), 5))
    assert has_weights_of(served, folder, 5)


def test_a_running_request_is_kept_while_paused_and_goes_on(served, folder):
    async def paused() -> tuple[list[TokenChunk], list[TokenChunk]]:
        chunks: list[TokenChunk] = []

        async def collect() -> None:
            chunks.extend(
                [
                    chunk
                    async for chunk in _noted(served.sample(PROMPT, replace(LONG, seed=4), number=0), chunks)
                ][:0]
            )

        task = asyncio.create_task(collect())
        while not chunks:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        await served.pause()
        await asyncio.sleep(0.1)  # what was on its way
        before = list(chunks)
        await asyncio.sleep(0.4)
        assert chunks == before and not task.done()
        await served.resume()
        await task
        return before, chunks

    before, chunks = run(paused())
    assert 0 < len(ids(before)) < len(ids(chunks))
    assert ids(chunks) == own_answer(policy(folder), folder, LONG, 4).token_ids


async def _noted(chunks: AsyncIterator[TokenChunk], into: list[TokenChunk]) -> AsyncIterator[TokenChunk]:
    async for chunk in chunks:
        into.append(chunk)
        yield chunk


async def answer_over_update(
    engine: InferenceServer, parts: list[WeightChunk], version: int
) -> list[TokenChunk]:
    """An answer in the midst of which new weights come."""
    chunks: list[TokenChunk] = []
    async for chunk in engine.sample(PROMPT, replace(LONG, seed=8), number=0):
        if not chunks:
            await update(engine, parts, version)
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("recompute", [True, False])
def test_an_answer_goes_on_with_new_weights_and_caches_as_chosen(served, folder, others, tmp_path, recompute):
    engine = EmbeddedServer(
        spec(
            folder,
            tmp_path / "log",
            address=served.spec.address,
            secret=SECRET,
            options={"recompute": recompute},
        )
    )
    run(engine.open())
    try:
        chunks = run(answer_over_update(engine, shm_parts(weights(others[0]), tmp_path), 1))
    finally:
        run(engine.close())
    versions = [chunk.version for chunk in chunks for _ in chunk.token_ids]
    assert versions == sorted(versions) and set(versions) == {0, 1}
    first, whole = versions.index(1), ids(chunks)
    by_old, by_new = (own_logprobs(model, whole) for model in (folder, others[0]))
    found = torch.tensor(logprobs(chunks))
    torch.testing.assert_close(found[:first], by_old[:first], atol=1e-4, rtol=0)
    # With the caches of the old weights, what follows is of neither policy.
    assert (float((found - by_new)[first:].abs().max()) < 1e-4) is recompute


def own_logprobs(folder: Path, answer_ids: list[int]) -> Tensor:
    model = policy(folder)
    with torch.no_grad():
        logits = (
            model.transformer(torch.tensor([[*PROMPT, *answer_ids]])).logits[0, len(PROMPT) - 1 : -1]
            / LONG.temperature
        )
    return logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).squeeze(1)


def test_additions_replace_those_before(served, folder, tmp_path):
    tensors = weights(folder)
    run(update(served, shm_parts(tensors, tmp_path), 10))
    for version in (11, 12):
        additions = tmp_path / str(version)
        additions.mkdir()
        torch.manual_seed(version)
        target = "model.layers.1.mlp.up_proj"
        down, up = torch.randn(2, 32), torch.randn(96, 2)
        files = {
            f"base_model.model.{target}.lora_A.weight": down,
            f"base_model.model.{target}.lora_B.weight": up,
        }
        save_file(files, additions / "adapter_model.safetensors")
        (additions / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3})
        )
        assert run(served.load_lora_adapter(additions, version)) == expected(files)
    model = policy(folder)
    with torch.no_grad():
        model.transformer.get_parameter(f"{target}.weight").add_(1.5 * up @ down)
    chunks = run(answer(served, SamplingParams(max_tokens=20), seed=1))
    torch.testing.assert_close(
        torch.tensor(logprobs(chunks)), next_logprobs(model, PROMPT, ids(chunks)), atol=1e-4, rtol=0
    )
    assert {chunk.version for chunk in chunks} == {12}
    # All weights anew, without additions.
    run(update(served, shm_parts(tensors, tmp_path), 13))
    assert has_weights_of(served, folder, 13)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_an_engine_that_is_killed_or_stopped_is_an_error_and_closing_leaves_no_process(folder, tmp_path):
    engine = EmbeddedServer(spec(folder, tmp_path / "log", timeout_s=6.0))
    run(engine.open())
    pid = engine.pid
    for number, at_once in ((signal.SIGSTOP, False), (signal.SIGKILL, True)):
        start_s = time.monotonic()
        with pytest.raises(EngineError):
            run(answer_until_signal(engine, number))
        assert (time.monotonic() - start_s < 5.5) is at_once
        with pytest.raises(EngineError):
            run(engine.check())
        if not at_once:
            os.kill(pid, signal.SIGCONT)
    run(engine.close())
    run(engine.close())
    assert not is_alive(pid)


async def answer_until_signal(engine: EmbeddedServer, number: int) -> None:
    sent = False
    async for _ in engine.sample(PROMPT, SamplingParams(max_tokens=1000, temperature=0.01), number=0):
        if not sent:
            os.kill(engine.pid, number)
            sent = True


def test_an_engine_that_cannot_start_says_why(tmp_path):
    engine = EmbeddedServer(spec(tmp_path / "nowhere", tmp_path / "log"))
    with pytest.raises(EngineError, match="one has ended with code 1\n.*\n(.*\n)*.*nowhere"):
        run(engine.open())
    with pytest.raises(
        ValueError, match="the engine served has no option 'max_slot'; did you mean max_slots"
    ):
        EmbeddedServer(spec(tmp_path, tmp_path / "log", options={"max_slot": 1}))


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
def test_a_server_that_gives_token_ids_is_asked_for_them(served, address, folder, monkeypatch, suffix):
    monkeypatch.setenv("FAR_KEY", KEY)
    params = SamplingParams(max_tokens=20, temperature=0.8, top_k=40, min_p=0.01, stop_ids=(30,), stop=("q",))
    chunk = one_chunk(
        http_engine(folder, address + suffix, api_key_env="FAR_KEY", processed_logprobs=True), params, seed=5
    )
    completion = own_answer(policy(folder), folder, params, request_seed(replace(params, seed=5), 0))
    assert list(chunk.token_ids) == completion.token_ids and chunk.finish_reason == completion.finish_reason
    assert list(chunk.logprobs) == pytest.approx(completion.logprobs, abs=1e-5) and chunk.text is None


def test_logprobs_that_may_be_of_another_distribution_are_left_out(served, address, folder, monkeypatch):
    monkeypatch.setenv("FAR_KEY", KEY)
    engine = http_engine(folder, address, api_key_env="FAR_KEY")
    warm, plain = (
        one_chunk(engine, SamplingParams(max_tokens=8, temperature=0.8)),
        one_chunk(engine, SamplingParams(max_tokens=8)),
    )
    assert warm.token_ids and warm.logprobs is None
    assert len(plain.token_ids) == len(plain.logprobs)


def test_a_chat_gets_the_prompts_text_and_gives_text(served, address, folder, monkeypatch):
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
    served, address, folder, monkeypatch
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
    repeat = lambda i, request: web.Response(status=503, text=f"bad key {request.headers['Authorization']}")  # noqa: E731
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
