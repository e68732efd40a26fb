"""vLLM's real server as an engine: ids, logprobs, stops, seeds, secrets, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import torch

from tests.rollout.vllm.bench import (
    ENDS,
    FREE,
    PROMPTS,
    SECRET,
    Bench,
    assert_follows,
    counted,
    serving,
    whole,
)
from tests.tiny import tiny_codec
from verl.rollout.inference_server import EngineError, RefusedError, TokenChunk
from verl.rollout.vllm.server import VLLMServer
from verl.utils.sampling_types import SamplingParams

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Tied head, as the worst case for new weights."""
    with serving("qwen2", tmp_path_factory.mktemp("qwen2")) as bench:
        yield bench


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
        return await asyncio.gather(*(whole(bench.engine.sample(PROMPTS[1], p)) for p in (greedy, hot)))

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
            *(whole(bench.engine.sample(PROMPTS[3], replace(FREE, sample_index=seed))) for seed in seeds)
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


async def running(engine: VLLMServer) -> float:
    """Requests that the server works on or keeps waiting."""
    return await counted(engine, "vllm:num_requests_running", "vllm:num_requests_waiting")


def test_leaving_an_answer_stops_it_in_the_server(bench):
    async def sampled_after_leaving() -> float:
        """Tokens that the server sampled of an answer of 250 that was left after the first."""
        before = await counted(bench.engine, "vllm:generation_tokens_total")
        chunks = bench.engine.sample(PROMPTS[0], SamplingParams(max_tokens=250))
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
                session.request(method, f"{bench.engine.client.address}{path}") as asked,
                session.get(f"{bench.engine.client.address}/health") as health,
            ):
                return asked.status, health.status

    assert bench.run(statuses()) == bench.run(statuses(Authorization=f"Bearer {SECRET}s")) == (401, 200)


def test_the_secret_is_not_on_the_command_line(bench):
    assert SECRET.encode() not in Path(f"/proc/{bench.engine._process.pid}/cmdline").read_bytes()


def test_a_server_that_runs_is_joined_and_left_running(bench):
    engine = VLLMServer(replace(bench.engine.spec, address=bench.engine.client.address))
    bench.run(engine.open())
    assert (
        engine.transports == bench.engine.transports == ("shm", "group", "disk", "direct", "ipc")
        and engine.num_ranks == 1
    )
    assert_follows(bench, bench.run(whole(engine.sample(PROMPTS[0], FREE))), PROMPTS[0])
    bench.run(engine.close())
    bench.run(bench.engine.check())
    wrong = VLLMServer(replace(bench.engine.spec, address=bench.engine.client.address, secret="wrong"))
    with pytest.raises(EngineError, match="401 to /version"):
        bench.run(wrong.open())


def test_a_server_that_hangs_is_an_error_after_its_time(bench):
    engine = VLLMServer(replace(bench.engine.spec, address=bench.engine.client.address, timeout_s=1.5))
    bench.run(engine.open())
    pid = bench.engine._process.pid
    os.killpg(pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match="been silent for 1.5 s"):
            bench.run(whole(engine.sample(PROMPTS[0], FREE)))
        with pytest.raises(EngineError, match="does not answer to /health"):
            bench.run(engine.check())
    finally:
        os.killpg(pid, signal.SIGCONT)
        bench.run(engine.close())
    bench.answer(PROMPTS[0])
