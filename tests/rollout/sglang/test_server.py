"""SGLang behind the contract of engines: a real server on this machine, its logprobs compared with the
trainer's own forward.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import torch
from safetensors.torch import save_file

from tests.rollout.ranks import move, moved, policy_ranks
from tests.tiny import kept_by_hand, random_prompts, tiny_codec, tiny_transformer
from verl.rollout.engine import EngineError, RefusedError, ServerSpec, TokenChunk
from verl.rollout.pool.broadcast import Broadcaster
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.sglang.options import flags
from verl.rollout.sglang.server import SGLangServer
from verl.rollout.sglang.stream import SGLangStream
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.layout import num_elements
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo, WeightChunk

SECRET = "s3cret-of-the-tests"
FAMILY = "qwen2"
PROMPTS = random_prompts([3, 11, 1, 6])
LONG = SamplingParams(max_tokens=200)
# Room for an answer that takes seconds.
CONTEXT = 4096
Result = TypeVar("Result")


@dataclass
class Running:
    """A server, the loop that asks it, and the weights that it was last given."""

    engine: SGLangServer
    loop: asyncio.AbstractEventLoop
    model: Any
    version: int = 0

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def answer(self, prompt: Sequence[int], params: SamplingParams, *, seed: int = 0) -> TokenChunk:
        return self.run(whole(self.engine, prompt, params, seed=seed))


async def whole(
    engine: SGLangServer, prompt: Sequence[int], params: SamplingParams, *, seed: int = 0
) -> TokenChunk:
    """All chunks of an answer as one."""
    ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.sample(prompt, params, number=seed):
        ids.extend(chunk.token_ids)
        logprobs.extend(chunk.logprobs)
    return TokenChunk(ids, logprobs, chunk.finish_reason, chunk.version)


def spec_of(folder: Path, *, family: str = FAMILY, **changes: Any) -> ServerSpec:
    model = folder / "model"
    if not model.exists():
        tiny_transformer(family, max_position_embeddings=CONTEXT).save_pretrained(model)
        tiny_codec().tokenizer.save_pretrained(model)
    options = {
        "max_running_requests": 16,
        "enable_lora": True,
        "max_lora_rank": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
    }
    spec = ServerSpec(
        "sglang-0",
        str(model),
        options,
        secret=SECRET,
        log=folder / "engine.log",
        timeout_s=20,
        start_timeout_s=300,
    )
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    engine = SGLangServer(spec_of(tmp_path_factory.mktemp("sglang")))
    loop.run_until_complete(engine.open())
    yield Running(engine, loop, tiny_transformer(FAMILY))
    pid = engine._process.pid
    loop.run_until_complete(engine.close())
    loop.close()
    assert gone(pid)


def gone(group: int) -> bool:
    """Killed processes take a moment to be gone."""
    give_up = time.monotonic() + 30
    while left_in_group(group) and time.monotonic() < give_up:
        time.sleep(0.1)
    return left_in_group(group) == []


def left_in_group(group: int) -> list[str]:
    """Processes of a group that are alive."""
    rows = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [row for row in rows if int(row.split()[0]) == group and not row.split()[1].startswith("Z")]


def expected_logprobs(
    model: Any, prompt: Sequence[int], ids: Sequence[int], params: SamplingParams
) -> list[float]:
    """By the trainer's own forward, of the distribution that each id was drawn from."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = []
    for row, token in zip(logits / (params.temperature or 1.0), ids, strict=True):
        probs = row.softmax(-1)
        kept = kept_by_hand(probs.tolist(), params) if params.temperature > 0 else set(range(len(probs)))
        assert token in kept
        expected.append(float(probs[token].log() - probs[sorted(kept)].sum().log()))
    return expected


def assert_is_of(running: Running, prompt: Sequence[int], answer: TokenChunk, params: SamplingParams) -> None:
    expected = expected_logprobs(running.model, prompt, answer.token_ids, params)
    torch.testing.assert_close(torch.tensor(list(answer.logprobs)), torch.tensor(expected), atol=1e-4, rtol=0)


pytestmark = pytest.mark.sglang


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
    running.engine._max_kept = 50  # as if the vocabulary were larger than the server's limit
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
        running.engine._max_kept = 4096
    # and the server's own refusal, in the stream, of what we would not ask
    body = running.engine._request(PROMPTS[0], SamplingParams(top_k=5), 0)
    body["sampling_params"]["top_k"] = 5000

    async def asked() -> None:
        answer = SGLangStream(truncates=True)
        async for event in running.engine._asked.events("/generate", body):
            running.engine._read(answer, event)

    with pytest.raises(RefusedError, match="top_k=5000"):
        running.run(asked())


async def until(condition: Any, *, limit_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        if await condition():
            return True
        await asyncio.sleep(0.05)
    return False


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
            async with aclosing(engine.sample(PROMPTS[1], params, number=0)) as chunks:
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
    assert not engine._running


async def is_idle(engine: SGLangServer) -> bool:
    """A cache can be flushed while no request needs it."""
    try:
        await engine._command("/flush_cache")
    except EngineError:
        return False
    return True


def test_every_endpoint_refuses_without_the_secret(running):
    # Those are for probes of health and metrics, and say nothing else.
    open_to_all = {"/health", "/health_generate", "/ready"}
    address = running.engine._asked._address

    async def statuses() -> dict[str, int]:
        paths = (await running.engine._ask("GET", "/openapi.json"))["paths"]
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
    assert SECRET not in running.engine._asked.told(running.engine.spec.log.read_text())
    assert not list(running.engine._folder.glob("*.yaml"))


def changed_model(seed: int) -> Any:
    return tiny_transformer(FAMILY, seed=seed)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """As a Hugging Face folder has them: a tied head is not among them."""
    is_tied = model.config.tie_word_embeddings
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not is_tied
    }


def parts_of(tensors: dict[str, torch.Tensor], folder: Path, count: int = 3) -> list[WeightChunk]:
    """The tensors in some files, as the pool writes them."""
    names = list(tensors)
    parts = []
    for number in range(count):
        infos = tuple(
            TensorInfo(name, tuple(tensors[name].shape), "float32") for name in names[number::count]
        )
        path = folder / f"part-{number}-{time.monotonic_ns()}"
        make_file(path, num_bytes_of(infos))
        content = torch.cat([tensors[info.name].view(-1).view(torch.uint8) for info in infos])
        map_file(path, len(content), for_writing=True).copy_(content)
        parts.append(WeightChunk(infos, "shm", {"path": str(path)}))
    return parts


def print_of(tensors: dict[str, torch.Tensor]) -> str:
    return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


async def updated(running: Running, parts: Sequence[WeightChunk], *, group: Broadcaster | None = None) -> str:
    """An update of a server as the pool makes it."""
    engine = running.engine
    running.version += 1
    await engine.pause()
    await engine.begin_update()
    for part in parts:
        await (engine.load(part) if group is None else group.send(part, engine))
    got = await engine.end_update(running.version)
    await engine.resume()
    return got


async def through_group(running: Running, parts: Sequence[WeightChunk]) -> str:
    """An update by broadcasts, as the pool makes it for an engine on another machine."""
    return await updated(running, parts, group=await Broadcaster.connect(running.engine))


def assert_serves(running: Running, model: Any) -> None:
    running.model = model
    answer = running.answer(PROMPTS[1], SamplingParams(max_tokens=20))
    assert answer.version == running.version
    assert_is_of(running, PROMPTS[1], answer, SamplingParams(max_tokens=20))


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
        running.run(updated(running, [replace(part, where={"path": str(tmp_path / "gone")})]))
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
            async for chunk in running.engine.sample(PROMPTS[0], params, number=number):
                chunks.append(chunk)

        task = asyncio.create_task(read())
        assert await until(lambda: _more(chunks, 5))
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
            running.engine.sample(PROMPTS[1], SamplingParams(temperature=0, max_tokens=3000), number=0)
        ) as chunks:
            await anext(chunks)
        assert await updated(running, parts_of(tensors_of(model), tmp_path)) == print_of(tensors_of(model))
        assert await until(lambda: is_idle(running.engine))

    running.run(through())
    assert_serves(running, model)


async def _more(chunks: list[TokenChunk], count: int) -> bool:
    return len(chunks) >= count


def test_a_request_that_comes_during_a_pause_waits_longer_than_silence_is_allowed(running):
    async def waits() -> TokenChunk:
        engine = running.engine
        await engine.pause()
        patience_s, engine._asked._timeout_s = engine._asked._timeout_s, 1.0
        try:
            task = asyncio.create_task(whole(engine, PROMPTS[0], SamplingParams(max_tokens=3, temperature=0)))
            await asyncio.sleep(2.5)
            assert not task.done()
        finally:
            engine._asked._timeout_s = patience_s
            await engine.resume()
        return await task

    assert len(running.run(waits()).token_ids) == 3


def lora_folder(folder: Path, *, seed: int) -> tuple[Path, Any]:
    """Low-rank additions in PEFT format, and a model with them added to its weights."""
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


def test_low_rank_additions_are_taken_in_place_of_those_before(running, tmp_path):
    engine = running.engine
    running.run(updated(running, parts_of(tensors_of(changed_model(6)), tmp_path)))
    for seed in (1, 2):
        folder, model, expected = lora_folder(tmp_path / f"additions-{seed}", seed=seed)
        running.version += 1

        async def taken(folder: Path = folder) -> str:
            await engine.pause()
            got = await engine.load_lora_adapter(folder, running.version)
            await engine.resume()
            return got

        assert running.run(taken()) == expected
        assert_serves(running, model)
    engine._additions, running.model = None, changed_model(6)


def test_it_sleeps_and_wakes(running):
    running.run(running.engine.sleep())
    running.run(running.engine.sleep())
    running.run(running.engine.wake())
    running.run(running.engine.wake())
    assert len(running.answer(PROMPTS[0], SamplingParams(temperature=0, max_tokens=3)).token_ids) == 3


def test_it_does_not_sleep_while_it_answers(running):
    async def asked() -> None:
        async with aclosing(running.engine.sample(PROMPTS[0], LONG, number=0)) as chunks:
            await anext(chunks)
            with pytest.raises(
                RuntimeError, match="need an idle engine before it sleeps, but sglang-0 has 1 requests"
            ):
                await running.engine.sleep()

    running.run(asked())


def test_a_server_that_runs_is_joined_and_stays(running):
    joined = SGLangServer(replace(running.engine.spec, name="joined", address=running.engine._asked._address))

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
        replace(running.engine.spec, name="joined", address=running.engine._asked._address, secret="another")
    )
    with pytest.raises(ValueError, match="joined at .* does not take the secret that it was sent"):
        running.run(joined.open())


def test_a_server_that_is_stopped_is_found_after_its_silence(running):
    engine = running.engine
    patience_s, engine._asked._timeout_s = engine._asked._timeout_s, 2.0
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
        engine._asked._timeout_s = patience_s
    running.run(engine.check())


def test_a_server_that_is_killed_is_found_at_once_and_can_be_started_again(running):
    """The last one with this server."""
    engine = running.engine

    async def through() -> float:
        async with aclosing(engine.sample(PROMPTS[0], LONG, number=0)) as chunks:
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


def test_an_unknown_option_is_an_error_in_the_words_of_sglang(tmp_path):
    engine = SGLangServer(spec_of(tmp_path, options={"tensor_paralel": 2}))
    with pytest.raises(ValueError, match="unrecognized arguments: --tensor-paralel 2"):
        asyncio.run(engine.open())


def test_options_of_the_run_are_not_those_of_the_engine(tmp_path):
    engine = SGLangServer(spec_of(tmp_path, options={"port": 1, "api-key": "x"}))
    with pytest.raises(
        ValueError, match="need engine options that the run does not choose itself, got api_key, port"
    ):
        asyncio.run(engine.open())


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="need a folder with a model for SGLang"):
        SGLangServer(ServerSpec("sglang-0", str(tmp_path)))


def test_an_interpreter_without_sglang_is_an_error_with_its_log(tmp_path):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(EngineError, match="No module named"):
        asyncio.run(SGLangServer(spec_of(tmp_path, python=str(bare))).open())


def test_options_become_flags():
    options = {
        "tp_size": 2,
        "enable_lora": True,
        "lora_paths": None,
        "log": False,
        "dims": ["a", 1],
        "override": {"a": 1},
    }
    assert flags(options) == ["--tp-size", "2", "--enable-lora", "--dims", "a", "1", "--override", '{"a": 1}']


def event_of(ids: list[int], logprobs: list[float], total: int, **meta: Any) -> dict[str, Any]:
    entries = [[value, token, None] for value, token in zip(logprobs, ids, strict=True)]
    return {
        "output_ids": ids,
        "meta_info": {
            "completion_tokens": total,
            "output_token_logprobs": entries,
            "finish_reason": None,
            **meta,
        },
    }


@pytest.mark.parametrize("deltas", [True, False])
def test_deltas_and_everything_so_far_are_read_alike(deltas):
    steps, answer, chunks = [[7], [8, 9], [], [5]], SGLangStream(truncates=False), []
    so_far: list[int] = []
    for number, new in enumerate(steps):
        so_far += new
        ids = new if deltas else list(so_far)
        end = {"finish_reason": {"type": "length"}} if number == 3 else {}
        chunks += answer.take(
            event_of(ids, [-float(token) for token in ids], len(so_far), weight_version="default", **end)
        )
    assert [(chunk.token_ids, chunk.logprobs) for chunk in chunks] == [
        ((7,), (-7.0,)),
        ((8, 9), (-8.0, -9.0)),
        ((5,), (-5.0,)),
    ]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"] and answer.is_finished
    assert {chunk.version for chunk in chunks} == {None}


def test_the_last_tokens_are_told_apart_by_their_versions():
    answer = SGLangStream(truncates=False)
    assert [chunk.version for chunk in answer.take(event_of([4], [-1.0], 1, weight_version="2"))] == [2]
    spans = [{"version": "2", "start": 0, "end": 2}, {"version": "3", "start": 2, "end": 4}]
    end = {"weight_version": "3", "weight_versions": spans, "finish_reason": {"type": "stop", "matched": 5}}
    chunks = answer.take(event_of([6, 7, 5], [-1.0, -2.0, -3.0], 4, **end))
    assert [(chunk.token_ids, chunk.version, chunk.finish_reason) for chunk in chunks] == [
        ((6,), 2, None),
        ((7, 5), 3, "stop"),
    ]


@pytest.mark.parametrize(
    "event",
    [
        event_of([4], [-1.0], 2),
        event_of([4], [-1.0], 1, output_token_logprobs=[[-1.0, 5, None]]),
        event_of([4], [-1.0], 1, finish_reason={"type": "stop", "matched": "NaN happened"}),
    ],
    ids=["lost", "other ids", "NaN"],
)
def test_events_that_cannot_be_are_errors(event):
    with pytest.raises(ValueError):
        SGLangStream(truncates=False).take(event)
