"""vLLM's real server behind the contract of an engine: ids, logprobs, stops, seeds, weights in every way,
secrets, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import random_prompts, tiny_codec, tiny_transformer
from verl.rollout.engine import EngineError, RefusedError, ServerSpec, TokenChunk
from verl.rollout.vllm.options import as_flags
from verl.rollout.vllm.server import VLLMServer
from verl.utils.network import free_port
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import digest, fingerprint, fingerprint_of_ranks
from verl.weight_sync.process_group import broadcast, open_group
from verl.weight_sync.shard_tracking import shard_key, slices_of
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of
from verl.weight_sync.types import TensorInfo, WeightChunk

pytestmark = pytest.mark.vllm

# Plugins of other packages beside vLLM are none of ours.
os.environ.setdefault("VLLM_PLUGINS", "")
# Its kernels for CPUs have no heads of fewer than 32 values.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8}
SECRET = "an open secret"
PROMPTS = random_prompts([3, 11, 1, 6])
ENDS = tuple(range(20, 32))
FREE = SamplingParams(max_tokens=24)


def saved(family: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model that is also in a folder, with its tokenizer."""
    model = tiny_transformer(family, seed=seed, **SIZES)
    model.save_pretrained(folder)
    tiny_codec().tokenizer.save_pretrained(folder)
    return model


class Bench:
    """A server, and the model whose weights it should have."""

    def __init__(self, model: PreTrainedModel, spec: ServerSpec) -> None:
        self.model, self.engine = model, VLLMServer(spec)
        self.loop = asyncio.new_event_loop()

    def run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 300))

    def answer(self, prompt: list[int], params: SamplingParams = FREE, *, seed: int = 0) -> TokenChunk:
        return self.run(whole(self.engine.sample(prompt, params, number=seed)))

    def refresh(self, *, seed: int) -> dict[str, Tensor]:
        """Changes the model, and returns its weights by name as in a folder: a tied head is not among them."""
        fresh = tiny_transformer(
            self.model.config.model_type,
            seed=seed,
            **SIZES,
            tie_word_embeddings=self.model.config.tie_word_embeddings,
        )
        self.model.load_state_dict(fresh.state_dict())
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}


async def whole(chunks: AsyncIterator[TokenChunk]) -> TokenChunk:
    """The chunks of an answer as one."""
    ids, logprobs, reason = [], [], None
    async for chunk in chunks:
        assert reason is None and len(chunk.token_ids) == len(chunk.logprobs)
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        reason = chunk.finish_reason
    assert reason is not None
    return TokenChunk(ids, logprobs, reason)


@contextlib.contextmanager
def serving(family: str, folder: Path, **changes: Any) -> Iterator[Bench]:
    """A server that runs, and leaves no process behind."""
    spec = ServerSpec(
        f"tiny {family}",
        str(folder),
        OPTIONS,
        secret=SECRET,
        log=folder / "engine.log",
        timeout_s=60,
        start_timeout_s=300,
    )
    bench = Bench(
        saved(family, folder),
        replace(spec, **{"options": {**OPTIONS, **changes.pop("options", {})}, **changes}),
    )
    bench.run(bench.engine.open())
    pid = bench.engine._process.pid
    assert processes_of(pid)
    try:
        yield bench
    finally:
        bench.run(bench.engine.close())
        bench.loop.close()
    assert_gone(pid)


def assert_gone(group: int) -> None:
    """Killed processes take a moment to be gone."""
    give_up = time.monotonic() + 30
    while left := processes_of(group):
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def processes_of(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = status.read_text().rpartition(")")[2].split()[:3]
            found += [int(status.parent.name)] if int(of_group) == group and state != "Z" else []
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Tied head, as the worst case for new weights."""
    with serving("qwen2", tmp_path_factory.mktemp("qwen2")) as bench:
        yield bench


def own_logprobs(
    model: PreTrainedModel, prompt: list[int], ids: list[int], params: SamplingParams = FREE
) -> list[float]:
    """Logprobs of an answer by the model's own forward, one truncation rule after the other."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    probs = (logits / (params.temperature or 1)).softmax(-1)
    logprobs = []
    for row, token in zip(probs, ids, strict=True):
        kept = kept_by_hand(row.tolist(), params)
        assert token in kept
        logprobs.append(float((row[token] / row[sorted(kept)].sum()).log()))
    return logprobs


def kept_by_hand(probs: list[float], params: SamplingParams) -> set[int]:
    """Tokens that survive in the order of vLLM: min-p, then top-k of what is left, then the nucleus of that."""
    likely = [token for token in range(len(probs)) if probs[token] >= params.min_p * max(probs)]
    best = sorted(likely, key=lambda token: -probs[token])[: params.top_k or None]
    kept, mass, whole_mass = set(), 0.0, sum(probs[token] for token in best)
    for token in best:
        if mass < params.top_p * whole_mass:
            kept.add(token)
        mass += probs[token]
    return kept


def assert_follows(
    bench: Bench, answer: TokenChunk, prompt: list[int], params: SamplingParams = FREE
) -> None:
    assert answer.logprobs == pytest.approx(
        own_logprobs(bench.model, prompt, list(answer.token_ids), params), abs=1e-4
    )


def infos_of(tensors: Mapping[str, Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    )


def bytes_of(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors.values()])


def shared(tensors: Mapping[str, Tensor], path: Path) -> WeightChunk:
    infos = infos_of(tensors)
    make_file(path, num_bytes_of(infos))
    map_file(path, num_bytes_of(infos), for_writing=True).copy_(bytes_of(tensors))
    return WeightChunk(infos, "shm", {"path": path})


def print_of(tensors: Mapping[str, Tensor]) -> str:
    return fingerprint({name: digest(tensor) for name, tensor in tensors.items()})


async def update(engine: VLLMServer, parts: list[WeightChunk], version: int) -> str:
    await engine.pause()
    try:
        await engine.begin_update()
        for part in parts:
            await engine.load(part)
        return await engine.end_update(version)
    finally:
        await engine.resume()


def test_logprobs_are_those_of_the_models_own_forward(bench):
    for seed, prompt in enumerate(PROMPTS):
        answer = bench.answer(prompt, seed=seed)
        assert answer.finish_reason == "length" and len(answer.token_ids) == 24
        assert_follows(bench, answer, prompt)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=5, max_tokens=24),
        SamplingParams(top_p=0.8, max_tokens=24),
        SamplingParams(temperature=1.5, min_p=0.2, max_tokens=24),
        SamplingParams(temperature=1.3, top_k=10, top_p=0.9, min_p=0.05, max_tokens=24),
        SamplingParams(temperature=0.6, max_tokens=24),
    ],
    ids=["top_k", "top_p", "min_p", "all", "none"],
)
def test_logprobs_are_of_the_truncated_and_renormalized_distribution(bench, params):
    assert_follows(bench, bench.answer(PROMPTS[1], params, seed=5), PROMPTS[1], params)


def test_temperature_0_takes_the_most_likely_token_with_its_own_logprob_beside_other_requests(bench):
    async def both() -> list[TokenChunk]:
        greedy = SamplingParams(0, top_p=0.5, top_k=3, max_tokens=24)
        hot = SamplingParams(2.0, top_k=2, max_tokens=24)
        return await asyncio.gather(
            *(whole(bench.engine.sample(PROMPTS[1], p, number=0)) for p in (greedy, hot))
        )

    answer = bench.run(both())[0]
    assert_follows(bench, answer, PROMPTS[1])
    with torch.no_grad():
        best = bench.model(torch.tensor([PROMPTS[1] + list(answer.token_ids)])).logits[0].argmax(-1)
    assert best[len(PROMPTS[1]) - 1 : -1].tolist() == answer.token_ids


def test_a_stop_id_ends_an_answer_and_belongs_to_it(bench):
    answers = [
        bench.answer(PROMPTS[0], SamplingParams(max_tokens=40, stop_ids=ENDS), seed=seed)
        for seed in range(12)
    ]
    stopped = [a.token_ids for a in answers if a.finish_reason == "stop"]
    assert len(stopped) > 4 and all(ids[-1] in ENDS and not {*ENDS} & {*ids[:-1]} for ids in stopped)


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(bench):
    wanted = SamplingParams(max_tokens=40)
    seed = next(s for s in range(20) if min(bench.answer(PROMPTS[0], wanted, seed=s).token_ids[:9]) > 3)
    free = bench.answer(PROMPTS[0], wanted, seed=seed)
    text = tiny_codec().tokenizer.decode(free.token_ids)
    ended = bench.answer(PROMPTS[0], replace(wanted, stop=(text[4:7], "never such a text")), seed=seed)
    assert ended.finish_reason == "stop" and ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert tiny_codec().tokenizer.decode(ended.token_ids) == text[: text.index(text[4:7]) + 3]
    assert ended.logprobs == pytest.approx(free.logprobs[: len(ended.token_ids)], abs=1e-4)


def test_equal_seeds_give_equal_answers_and_others_differ_in_any_company(bench):
    async def many(seeds: list[int]) -> list[tuple[int, ...]]:
        answers = await asyncio.gather(
            *(whole(bench.engine.sample(PROMPTS[3], FREE, number=seed)) for seed in seeds)
        )
        return [tuple(a.token_ids) for a in answers]

    seeds = [0, 1, 2, 2**63 - 1, *range(10, 30)]
    together = bench.run(many(seeds))
    assert len(set(together)) == len(seeds)
    assert [tuple(bench.answer(PROMPTS[3], seed=seed).token_ids) for seed in seeds[:4]] == together[:4]


def test_a_prompt_that_may_not_fit_is_refused_and_the_engine_lives(bench):
    assert bench.answer([5] * 250, SamplingParams(max_tokens=6)).finish_reason == "length"
    with pytest.raises(RefusedError, match="250 tokens and may get 7 more, but vLLM serves 256"):
        bench.answer([5] * 250, SamplingParams(max_tokens=7))
    with pytest.raises(RefusedError, match="400.*100000"):
        bench.answer([100000], FREE)
    bench.run(bench.engine.check())


async def counted(engine: VLLMServer, *names: str) -> float:
    """The sum of figures of the server."""
    async with engine._http().get(f"{engine._url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(tuple(f"{name}{{" for name in names))
    )


async def running(engine: VLLMServer) -> float:
    """Requests that the server works on or keeps waiting."""
    return await counted(engine, "vllm:num_requests_running", "vllm:num_requests_waiting")


def test_leaving_an_answer_stops_it_in_the_server(bench):
    async def sampled_after_leaving() -> float:
        """Tokens that the server sampled of an answer of 250 that was left after the first."""
        before = await counted(bench.engine, "vllm:generation_tokens_total")
        chunks = bench.engine.sample(PROMPTS[0], SamplingParams(max_tokens=250), number=0)
        await anext(chunks)
        await chunks.aclose()
        while await running(bench.engine):
            await asyncio.sleep(0.01)
        return await counted(bench.engine, "vllm:generation_tokens_total") - before

    whole = bench.answer(PROMPTS[0], SamplingParams(max_tokens=250))
    assert len(whole.token_ids) == 250
    # A machine that is busy may bring the word late, but not every time.
    assert min(bench.run(sampled_after_leaving()) for _ in range(5)) < 250


@pytest.mark.parametrize(
    "path", ["/v1/models", "/collective_rpc", "/pause", "/metrics", "/update_weights", "/version"]
)
def test_every_path_but_health_wants_the_secret(bench, path):
    async def statuses(**headers: str) -> tuple[int, int]:
        async with aiohttp.ClientSession(headers=headers) as session:
            method = "GET" if path in ("/v1/models", "/metrics", "/version") else "POST"
            async with (
                session.request(method, f"{bench.engine._url}{path}") as asked,
                session.get(f"{bench.engine._url}/health") as health,
            ):
                return asked.status, health.status

    assert bench.run(statuses()) == bench.run(statuses(Authorization=f"Bearer {SECRET}s")) == (401, 200)


def test_the_secret_is_not_on_the_command_line(bench):
    assert SECRET.encode() not in Path(f"/proc/{bench.engine._process.pid}/cmdline").read_bytes()


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
                async for chunk in bench.engine.sample(PROMPTS[0], long, number=9):
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


def test_a_server_that_runs_is_joined_and_left_running(bench):
    engine = VLLMServer(replace(bench.engine.spec, address=bench.engine._url))
    bench.run(engine.open())
    assert (
        engine.transports == bench.engine.transports == ("shm", "group", "disk", "direct", "ipc")
        and engine.num_ranks == 1
    )
    assert_follows(bench, bench.run(whole(engine.sample(PROMPTS[0], FREE, number=0))), PROMPTS[0])
    bench.run(engine.close())
    bench.run(bench.engine.check())
    wrong = VLLMServer(replace(bench.engine.spec, address=bench.engine._url, secret="wrong"))
    with pytest.raises(EngineError, match="401 to /version"):
        bench.run(wrong.open())


def test_a_server_that_hangs_is_an_error_after_its_time(bench):
    engine = VLLMServer(replace(bench.engine.spec, address=bench.engine._url, timeout_s=1.5))
    bench.run(engine.open())
    pid = bench.engine._process.pid
    os.killpg(pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match="said nothing for 1.5 s"):
            bench.run(whole(engine.sample(PROMPTS[0], FREE, number=0)))
        with pytest.raises(EngineError, match="does not answer to /health"):
            bench.run(engine.check())
    finally:
        os.killpg(pid, signal.SIGCONT)
        bench.run(engine.close())
    bench.answer(PROMPTS[0])


def test_additions_are_loaded_and_replaced_and_a_killed_server_is_an_error(tmp_path):
    with serving("llama", tmp_path / "llama", options={"enable_lora": True, "max_lora_rank": 8}) as bench:
        answers = []
        for seed in (1, 2):
            folder, adapted = addition(tmp_path, seed)
            printed = bench.run(bench.engine.load_lora_adapter(folder, seed))
            assert printed == print_of(load_file(folder / "adapter_model.safetensors"))
            answers.append(bench.answer(PROMPTS[1]))
            own = own_logprobs(adapted, PROMPTS[1], list(answers[-1].token_ids))
            assert answers[-1].logprobs == pytest.approx(own, abs=1e-4)
        assert answers[0].token_ids != answers[1].token_ids
        bench.run(killed(bench.engine))


def addition(parent: Path, seed: int) -> tuple[Path, PreTrainedModel]:
    """Low-rank additions to the tiny llama in a folder, and the model with them."""
    torch.manual_seed(seed)
    model = get_peft_model(
        tiny_transformer("llama", **SIZES),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(parent / f"additions-{seed}")
    return parent / f"additions-{seed}", model.eval()


async def killed(engine: VLLMServer) -> None:
    """A server that is killed in the middle of an answer fails it and the check at once."""
    # Several, so that some of them have not ended even where this process gets to read them late.
    chunks = [engine.sample(PROMPTS[0], SamplingParams(max_tokens=250), number=number) for number in range(8)]
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
        await whole(engine.sample(PROMPTS[0], FREE, number=0))
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
        halves = replace(shared(weights, tmp_path / "halves"), reads=reads)
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
            bench.run(update(bench.engine, [replace(halves, reads=reads[::-1])], 3))
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


def test_an_unknown_option_is_an_error_in_vllms_own_words(tmp_path):
    saved("llama", tmp_path)
    engine = VLLMServer(ServerSpec("wrong", str(tmp_path), {"no_such_option": 1}, log=tmp_path / "log"))
    with pytest.raises(ValueError, match="unrecognized arguments: --no-such-option"):
        asyncio.run(engine.open())


def test_an_option_that_the_run_sets_itself_is_refused(tmp_path):
    saved("llama", tmp_path)
    engine = VLLMServer(
        ServerSpec("wrong", str(tmp_path), {"port": 1, "logprobs-mode": "raw_logprobs"}, log=tmp_path / "log")
    )
    with pytest.raises(ValueError, match="cannot set logprobs-mode, port"):
        asyncio.run(engine.open())


def test_options_are_passed_on_as_flags():
    options = {"a-b": 2, "c": True, "d": False, "e": {"f": [1]}, "g": ["x", "y"], "h": None, "i": "text"}
    assert as_flags(options) == [
        "--a-b",
        "2",
        "--c",
        "--no-d",
        "--e",
        '{"f": [1]}',
        "--g",
        "x",
        "y",
        "--i",
        "text",
    ]
