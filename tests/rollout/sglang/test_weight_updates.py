"""Weights of SGLang's real server: every transport, torn updates, kept requests, LoRA adapters, two ranks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.rollout.ranks import move, moved, policy_ranks
from tests.rollout.sglang.bench import (
    FAMILY,
    PROMPTS,
    Running,
    assert_is_of,
    assert_serves,
    changed_model,
    expected_logprobs,
    gone,
    is_idle,
    parts_of,
    print_of,
    serving,
    spec_of,
    tensors_of,
    through_group,
    until,
    updated,
)
from tests.tiny import tiny_transformer
from verl.rollout.inference_server import EngineError, TokenChunk
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.sglang.server import SGLangServer
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.layout import num_elements
from verl.weight_sync.types import TensorInfo, WeightChunk

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(spec_of(tmp_path_factory.mktemp("sglang"))) as running:
        yield running


def test_weights_come_through_shared_memory(running, tmp_path):
    model = changed_model(1)
    got = running.run(updated(running, parts_of(tensors_of(model), tmp_path)))
    assert got == print_of(tensors_of(model))
    assert_serves(running, model)


def test_weights_come_over_a_group(running, tmp_path):
    model = changed_model(2)
    assert running.run(through_group(running, parts_of(tensors_of(model), tmp_path))) == print_of(
        tensors_of(model)
    )
    assert_serves(running, model)


def test_weights_come_from_a_folder(running, tmp_path):
    model = changed_model(3)
    model.save_pretrained(tmp_path)
    assert running.run(updated(running, [WeightChunk((), "disk", {"folder": str(tmp_path)})])) == print_of(
        tensors_of(model)
    )
    assert_serves(running, model)


def test_a_torn_update_is_seen_and_repaired(running, tmp_path):
    model = changed_model(4)
    parts = parts_of(tensors_of(model), tmp_path)
    assert running.run(updated(running, parts[:2])) != print_of(tensors_of(model))
    assert running.run(updated(running, parts)) == print_of(tensors_of(model))
    assert_serves(running, model)


def test_an_update_that_was_never_ended_does_not_keep_the_next_one_out(running, tmp_path):
    model = changed_model(5)
    running.run(running.engine.begin_update())
    assert running.run(updated(running, parts_of(tensors_of(model), tmp_path))) == print_of(tensors_of(model))
    assert_serves(running, model)


def test_weights_that_cannot_be_taken_are_an_error_that_says_why_and_the_server_lives(running, tmp_path):
    part = parts_of(tensors_of(running.model), tmp_path)[0]
    wrong = TensorInfo(part.tensors[0].name, (3, 3), "float32")
    with pytest.raises(EngineError, match="could not take weights: FileNotFoundError"):
        running.run(updated(running, [replace(part, location={"path": str(tmp_path / "gone")})]))
    with pytest.raises(EngineError, match="could not take weights: "):
        running.run(updated(running, [replace(part, tensors=(wrong,))]))
    got = running.run(updated(running, parts_of(tensors_of(running.model), tmp_path)))
    assert got == print_of(tensors_of(running.model))
    assert_serves(running, running.model)


def test_a_pause_keeps_requests_which_go_on_with_the_new_weights(running, tmp_path):
    params = SamplingParams(max_tokens=220, temperature=1.0)

    async def through(after: Any, number: int) -> tuple[list[TokenChunk], int]:
        chunks: list[TokenChunk] = []

        async def read() -> None:
            async for chunk in running.engine.sample(PROMPTS[0], replace(params, sample_index=number)):
                chunks.append(chunk)

        task = asyncio.create_task(read())
        assert await until(lambda: has_chunks(chunks, 5))
        await running.engine.pause()
        await asyncio.sleep(0.3)
        at_pause = len(chunks)
        got = await updated(running, parts_of(tensors_of(after), tmp_path))
        assert got == print_of(tensors_of(after))
        await task
        return chunks, at_pause

    running.run(
        updated(running, parts_of(tensors_of(running.model), tmp_path))
    )  # from here on it knows its version
    # An answer that happens to end before the pause shows nothing, so another one is asked for.
    for number in range(1, 9):
        before, after = running.model, changed_model(5 + number)
        chunks, at_pause = running.run(through(after, number))
        running.model = after
        ids = [token for chunk in chunks for token in chunk.token_ids]
        num_old = sum(len(chunk.token_ids) for chunk in chunks[:at_pause])
        if num_old < len(ids):
            break
    assert chunks[-1].finish_reason in ("stop", "length")
    logprobs = torch.tensor([value for chunk in chunks for value in chunk.logprobs])
    version, versions = running.version, [chunk.version for chunk in chunks for _ in chunk.token_ids]
    assert 5 <= num_old < len(ids) and versions == [version - 1] * num_old + [version] * (len(ids) - num_old)
    old, new = (
        torch.tensor(expected_logprobs(model, PROMPTS[0], ids, SamplingParams())) for model in (before, after)
    )
    # Tokens after the update are drawn with a cache of the new weights, those of the prompt included.
    torch.testing.assert_close(logprobs, torch.cat([old[:num_old], new[num_old:]]), atol=1e-4, rtol=0)


def test_requests_that_are_left_before_an_update_do_not_come_back_after_it(running, tmp_path):
    model = changed_model(7)

    async def through() -> None:
        async with aclosing(
            running.engine.sample(PROMPTS[1], SamplingParams(temperature=0, max_tokens=3000))
        ) as chunks:
            await anext(chunks)
        assert await updated(running, parts_of(tensors_of(model), tmp_path)) == print_of(tensors_of(model))
        assert await until(lambda: is_idle(running.engine))

    running.run(through())
    assert_serves(running, model)


async def has_chunks(chunks: list[TokenChunk], count: int) -> bool:
    return len(chunks) >= count


def lora_folder(folder: Path, *, seed: int) -> tuple[Path, Any]:
    """A LoRA adapter in PEFT format, and a model with it merged into its weights."""
    generator = torch.Generator().manual_seed(seed)
    model, tensors = tiny_transformer(FAMILY, seed=6), {}
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "v_proj"):
            linear = layer.self_attn.get_submodule(name)
            down = torch.randn(4, linear.in_features, generator=generator) * 0.3
            up = torch.randn(linear.out_features, 4, generator=generator) * 0.3
            linear.weight.data += 2.0 * up @ down
            key = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, model, fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


def test_a_lora_adapter_replaces_the_one_before(running, tmp_path):
    engine = running.engine
    running.run(updated(running, parts_of(tensors_of(changed_model(6)), tmp_path)))
    for seed in (1, 2):
        folder, model, expected = lora_folder(tmp_path / f"adapter-{seed}", seed=seed)
        running.version += 1

        async def taken(folder: Path = folder) -> str:
            await engine.pause()
            got = await engine.load_lora_adapter(folder, running.version)
            await engine.resume()
            return got

        assert running.run(taken()) == expected
        assert_serves(running, model)
    engine._adapter_name, running.model = None, changed_model(6)


def test_two_ranks_take_weights_each_and_answer_as_one(tmp_path):
    loop, model = asyncio.new_event_loop(), tiny_transformer("llama", seed=1)
    spec = spec_of(tmp_path, family="llama", options={"tp_size": 2, "max_running_requests": 8})
    running = Running(SGLangServer(spec), loop, tiny_transformer("llama"))
    loop.run_until_complete(running.engine.open())
    try:
        assert running.engine.num_ranks == 2
        params = SamplingParams(max_tokens=20, top_k=30, top_p=0.9)
        assert_is_of(running, PROMPTS[1], running.answer(PROMPTS[1], params), params)
        assert running.run(updated(running, parts_of(tensors_of(model), tmp_path))) == print_of(
            tensors_of(model)
        )
        assert_serves(running, model)
        model = tiny_transformer("llama", seed=2)
        assert running.run(through_group(running, parts_of(tensors_of(model), tmp_path))) == print_of(
            tensors_of(model)
        )
        assert_serves(running, model)
        takes_slices(running, tmp_path)
    finally:
        group = running.engine._process.pid
        loop.run_until_complete(running.engine.close())
        loop.close()
    assert gone(group)


def takes_slices(running: Running, folder: Path) -> None:
    """From its second update on, each rank gets what it reads alone, whichever way, and the server has the
    weights of the policy.
    """
    engine, model, notes = running.engine, tiny_transformer("llama"), []
    replica = Replica(
        engine,
        max_running=8,
        vocabulary=100,
        clock=time.monotonic,
        on_change=lambda _: None,
        note=notes.append,
    )
    replica._set_state("stale")  # as after a start
    engine.read_ranges = None
    with policy_ranks(engine.spec.model, 2) as group:
        gathered = WeightPublisher(group, "float32", folder / "weights", chunk_bytes=20_000)
        sent = WeightPublisher(group, "float32", folder / "weights", chunk_bytes=20_000, uses_p2p=True)
        num_bytes = sum(tensor.nbytes for tensor in tensors_of(model).values())
        for weights, via in (
            (gathered, "shm"),
            (gathered, "shm"),
            (gathered, "group"),
            (sent, "direct"),
            (sent, "direct"),
        ):
            running.version += 1
            group.call(moved, running.version)
            move(model, running.version)
            engine.spec = replace(engine.spec, transport=via)
            known = engine.read_ranges
            running.run(replica.load_weights(weights.write(running.version)))
            assert_serves(running, model)
            planned = (
                [num_bytes] * 2
                if known is None
                else [4 * sum(num_elements(b) for own in reads.values() for b in own) for reads in known]
            )
            assert engine.received_bytes == planned and replica.transfer.num_bytes == sum(planned)
        # Half of each matrix, where the norms are whole on both: no byte of a matrix travels twice.
        norms = sum(tensor.nbytes for name, tensor in tensors_of(model).items() if "norm" in name)
        assert sum(engine.received_bytes) == num_bytes + norms and notes == []
        # Reads that are not those of now are seen, and everything is sent once more.
        first = tuple(engine.read_ranges[0])[0]
        engine.read_ranges = (
            {**engine.read_ranges[0], first: engine.read_ranges[1][first]},
            engine.read_ranges[1],
        )
        running.version += 1
        running.run(replica.load_weights(sent.write(running.version)))
        assert_serves(running, model)
        assert (
            replica.transfer.num_repaired == 1
            and engine.received_bytes == [num_bytes] * 2
            and "MissingShardError" in notes[0]
        )
        assert engine.read_ranges == known
        for weights in (gathered, sent):
            weights.close()
