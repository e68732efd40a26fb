"""Weights of vLLM's real server: every transport, torn updates, kept requests, LoRA adapters, two ranks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.rollout.vllm.bench import (
    FREE,
    PROMPTS,
    SIZES,
    Bench,
    assert_follows,
    assert_gone,
    bytes_of,
    infos_of,
    own_logprobs,
    print_of,
    serving,
    shared,
    update,
    whole,
)
from tests.tiny import tiny_transformer
from verl.rollout.inference_server import EngineError, TokenChunk
from verl.rollout.vllm.server import VLLMServer
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint_of_ranks
from verl.weight_sync.process_group import broadcast, open_group
from verl.weight_sync.shard_tracking import shard_key, slices_of
from verl.weight_sync.shared_memory import map_file, num_bytes_of
from verl.weight_sync.types import WeightChunk

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Tied head, as the worst case for new weights."""
    with serving("qwen2", tmp_path_factory.mktemp("qwen2")) as bench:
        yield bench


def test_weights_come_through_shared_memory_in_parts(bench, tmp_path):
    weights = bench.refresh(seed=1)
    names = list(weights)
    halves = [{name: weights[name] for name in half} for half in (names[:7], names[7:])]
    parts = [shared(half, tmp_path / str(number)) for number, half in enumerate(halves)]
    assert bench.run(update(bench.engine, parts, 1)) == print_of(weights)
    assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])


def test_weights_come_over_a_group(bench):
    weights, port = bench.refresh(seed=2), free_port()
    sender: dict[str, Any] = {}

    def listen() -> None:
        sender["group"] = open_group("127.0.0.1", port, rank=0, num_ranks=2, backend="gloo", timeout_s=30)

    thread = threading.Thread(target=listen)
    thread.start()
    bench.run(
        bench.engine.join_group(address="127.0.0.1", port=port, first_rank=1, num_ranks=2, backend="gloo")
    )
    thread.join()
    for seed in (2, 3):
        weights = bench.refresh(seed=seed)
        thread = threading.Thread(target=broadcast, args=(sender["group"], bytes_of(weights)))
        thread.start()
        assert bench.run(update(bench.engine, [WeightChunk(infos_of(weights), "group")], seed)) == print_of(
            weights
        )
        thread.join()
        assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])


def test_weights_come_from_a_folder(bench, tmp_path):
    weights = bench.refresh(seed=4)
    bench.model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    assert bench.run(
        update(bench.engine, [WeightChunk(infos_of(weights), "disk", {"folder": str(tmp_path)})], 4)
    ) == print_of(weights)
    assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])


def test_weights_in_16_bits_are_named_as_they_were_sent(bench, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in bench.refresh(seed=5).items()}
    assert bench.run(update(bench.engine, [shared(weights, tmp_path / "part")], 5)) == print_of(weights)
    bench.model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])


def test_a_torn_update_is_seen_and_the_next_one_repairs_it(bench, tmp_path):
    weights = bench.refresh(seed=6)
    names = list(weights)
    # Cut within the query, key and value of a layer, which vLLM has as one parameter.
    cut = names.index("model.layers.0.self_attn.k_proj.weight")
    half = shared({name: weights[name] for name in names[:cut]}, tmp_path / "half")
    with pytest.raises(EngineError, match=r"without all weights of \d+ parameters.*qkv_proj"):
        bench.run(update(bench.engine, [half], 6))
    full = shared(weights, tmp_path / "full")
    os.truncate(tmp_path / "full", num_bytes_of(full.tensors) - 1)
    with pytest.raises(EngineError, match="need .* bytes of weights"):
        bench.run(update(bench.engine, [half, full], 6))
    whole_part = shared(weights, tmp_path / "whole")

    async def begin_and_be_gone() -> None:
        await bench.engine.begin_update()
        await bench.engine.load(half)

    bench.run(begin_and_be_gone())
    assert bench.run(update(bench.engine, [whole_part], 6)) == print_of(weights)
    assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])


def test_a_changed_bit_changes_the_fingerprint(bench, tmp_path):
    weights = bench.refresh(seed=7)
    part = shared(weights, tmp_path / "part")
    map_file(tmp_path / "part", 4, for_writing=True)[3] ^= 1
    assert bench.run(update(bench.engine, [part], 7)) != print_of(weights)
    assert bench.run(update(bench.engine, [shared(weights, tmp_path / "right")], 8)) == print_of(weights)


def test_a_request_that_is_paused_goes_on_with_the_weights_of_then(bench, tmp_path):
    before = bench.refresh(seed=8)
    bench.run(update(bench.engine, [shared(before, tmp_path / "before")], 8))
    long = SamplingParams(max_tokens=240)
    free = bench.answer(PROMPTS[0], long, seed=9)

    async def paused() -> tuple[asyncio.Task[TokenChunk], int]:
        """An answer that rests in its midst, and how many tokens of it have come."""
        got: list[TokenChunk] = []

        async def collect() -> TokenChunk:
            async def noted() -> AsyncIterator[TokenChunk]:
                async for chunk in bench.engine.sample(PROMPTS[0], replace(long, sample_index=9)):
                    got.append(chunk)
                    yield chunk

            return await whole(noted())

        task = asyncio.create_task(collect())
        while not got:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
        await bench.engine.pause()
        await asyncio.sleep(0.3)
        return task, sum(len(c.token_ids) for c in got)

    async def interrupted() -> tuple[TokenChunk, int]:
        task, num_before = await paused()
        # On a busy machine an answer may be over before the pause.
        for _ in range(10):
            if num_before < 240:
                break
            await bench.engine.resume()
            await task
            task, num_before = await paused()
        await asyncio.sleep(0.3)
        assert not task.done() and num_before < 240
        await bench.engine.begin_update()
        await bench.engine.load(shared(bench.refresh(seed=10), tmp_path / "after"))
        await bench.engine.end_update(9)
        await bench.engine.resume()
        return await task, num_before

    answer, num_before = bench.run(interrupted())
    ids = list(answer.token_ids)
    assert len(ids) == 240 and ids[:num_before] == free.token_ids[:num_before]
    after = own_logprobs(bench.model, PROMPTS[0], ids, long)
    assert answer.logprobs[num_before:] == pytest.approx(after[num_before:], abs=1e-4)
    assert answer.logprobs[:num_before] == pytest.approx(free.logprobs[:num_before], abs=1e-4)
    # Nothing of the old weights is left in the cache of prompts.
    assert_follows(bench, bench.answer(PROMPTS[0]), PROMPTS[0])


def test_sleep_and_wake_leave_it_usable_after_an_update(bench, tmp_path):
    async def nap() -> None:
        await bench.engine.sleep()
        await bench.engine.wake()

    bench.run(nap())
    weights = bench.refresh(seed=11)
    assert bench.run(update(bench.engine, [shared(weights, tmp_path / "part")], 11)) == print_of(weights)
    assert_follows(bench, bench.answer(PROMPTS[2]), PROMPTS[2])


def test_a_lora_adapter_replaces_the_one_before_and_a_killed_server_is_an_error(tmp_path):
    with serving("llama", tmp_path / "llama", options={"enable_lora": True, "max_lora_rank": 8}) as bench:
        answers = []
        for seed in (1, 2):
            folder, adapted = lora_adapter(tmp_path, seed)
            printed = bench.run(bench.engine.load_lora_adapter(folder, seed))
            assert printed == print_of(load_file(folder / "adapter_model.safetensors"))
            answers.append(bench.answer(PROMPTS[1]))
            own = own_logprobs(adapted, PROMPTS[1], list(answers[-1].token_ids))
            assert answers[-1].logprobs == pytest.approx(own, abs=1e-4)
        assert answers[0].token_ids != answers[1].token_ids
        bench.run(killed(bench.engine))


def lora_adapter(parent: Path, seed: int) -> tuple[Path, PreTrainedModel]:
    """A LoRA adapter of the tiny llama in a folder, and the model with it."""
    torch.manual_seed(seed)
    model = get_peft_model(
        tiny_transformer("llama", **SIZES),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(parent / f"adapter-{seed}")
    return parent / f"adapter-{seed}", model.eval()


async def killed(engine: VLLMServer) -> None:
    """A server that is killed in the middle of an answer fails it and the check at once."""
    # Several, so that some of them have not ended even where this process gets to read them late.
    chunks = [engine.sample(PROMPTS[0], SamplingParams(max_tokens=250, sample_index=i)) for i in range(8)]
    others = [asyncio.create_task(whole(answer)) for answer in chunks[1:]]
    await anext(chunks[0])
    os.kill(engine._process.pid, signal.SIGKILL)
    start = time.monotonic()
    results = await asyncio.gather(whole(chunks[0]), *others, return_exceptions=True)
    failures = [result for result in results if isinstance(result, Exception)]
    assert failures and all(
        isinstance(f, EngineError) and re.search("ended|broke off", str(f)) for f in failures
    )
    with pytest.raises(EngineError):
        await engine.check()
    with pytest.raises(EngineError):
        await whole(engine.sample(PROMPTS[0], FREE))
    assert time.monotonic() - start < 10
    # vLLM's other processes would stay, with all of their memory.
    assert_gone(engine._process.pid)


def test_two_ranks_of_a_server_agree_on_new_weights(tmp_path):
    with serving("llama", tmp_path / "llama", options={"tensor_parallel_size": 2}) as bench:
        assert bench.engine.num_ranks == 2
        weights = bench.refresh(seed=1)
        assert bench.run(update(bench.engine, [shared(weights, tmp_path / "part")], 1)) == print_of(weights)
        assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])
        num_bytes, reads = sum(tensor.nbytes for tensor in weights.values()), bench.engine.read_ranges
        assert bench.engine.received_bytes == [num_bytes] * 2
        # From now on each rank gets its half of every matrix, and the norms.
        weights = bench.refresh(seed=2)
        halves = replace(shared(weights, tmp_path / "halves"), ranges=reads)
        halves_print = fingerprint_of_ranks([digests_of(weights, own) for own in reads])
        assert bench.run(update(bench.engine, [halves], 2)) == halves_print
        assert_follows(bench, bench.answer(PROMPTS[1]), PROMPTS[1])
        # Both ranks have the only head of keys and values.
        twice = sum(
            tensor.nbytes
            for name, tensor in weights.items()
            if any(kind in name for kind in ("norm", "k_proj", "v_proj"))
        )
        assert sum(bench.engine.received_bytes) == num_bytes + twice and bench.engine.read_ranges == reads
        with pytest.raises(EngineError, match="the engine reads .*, of which it was sent"):
            bench.run(update(bench.engine, [replace(halves, ranges=reads[::-1])], 3))
        with pytest.raises(EngineError, match="without all weights of 1 parameters.*: model.norm.weight"):
            bench.run(
                update(
                    bench.engine,
                    [
                        shared(
                            {n: t for n, t in weights.items() if n != "model.norm.weight"}, tmp_path / "cut"
                        )
                    ],
                    4,
                )
            )


def digests_of(weights, reads) -> dict[str, int]:
    return {
        shard_key(name, bounds, shape=tensor.shape): digest(tensor[slices_of(bounds)])
        for name, tensor in weights.items()
        for bounds in reads[name]
    }
