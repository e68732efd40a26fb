"""`verl serve` as an engine that follows the policy: answers, weights, kept requests, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.rollout.engine_answers import PROMPT, answer, ids, logprobs, own_answer, policy, run
from tests.rollout.servers import SECRET, next_logprobs, running, tiny_model
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.inference_server import (
    EngineError,
    InferenceServer,
    RefusedError,
    ServerSpec,
    TokenChunk,
)
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.process_group import broadcast, open_group
from verl.weight_sync.types import TensorInfo, WeightChunk

LONG = SamplingParams(max_tokens=600, temperature=0.5)


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
    """Chunks with every `num_parts`-th tensor each; the odd sizes in a file leave its tensors unaligned."""
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
                [chunk async for chunk in _noted(served.sample(PROMPT, replace(LONG, seed=4)), chunks)][:0]
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
    async for chunk in engine.sample(PROMPT, replace(LONG, seed=8)):
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


def test_a_lora_adapter_replaces_the_one_before(served, folder, tmp_path):
    tensors = weights(folder)
    run(update(served, shm_parts(tensors, tmp_path), 10))
    for version in (11, 12):
        adapter = tmp_path / str(version)
        adapter.mkdir()
        torch.manual_seed(version)
        target = "model.layers.1.mlp.up_proj"
        down, up = torch.randn(2, 32), torch.randn(96, 2)
        files = {
            f"base_model.model.{target}.lora_A.weight": down,
            f"base_model.model.{target}.lora_B.weight": up,
        }
        save_file(files, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3})
        )
        assert run(served.load_lora_adapter(adapter, version)) == expected(files)
    model = policy(folder)
    with torch.no_grad():
        model.transformer.get_parameter(f"{target}.weight").add_(1.5 * up @ down)
    chunks = run(answer(served, SamplingParams(max_tokens=20), seed=1))
    torch.testing.assert_close(
        torch.tensor(logprobs(chunks)), next_logprobs(model, PROMPT, ids(chunks)), atol=1e-4, rtol=0
    )
    assert {chunk.version for chunk in chunks} == {12}
    # All weights again, without an adapter.
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
    async for _ in engine.sample(PROMPT, SamplingParams(max_tokens=1000, temperature=0.01)):
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
