"""Generation beside tools: the loop goes on, turns join, and errors and interrupts reach those that wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.rollout.pool.pools import group_of, saved
from tests.rollout.ranks import policy_ranks
from tests.tiny import random_prompts, shared_policy, tiny_codec, tiny_policy
from verl.rollout import turn_batching
from verl.rollout.actor_worker import PolicyGenerator
from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.inference_server import RefusedError
from verl.rollout.turn_routing import TurnRouting
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    SampleAnswer,
    SampleRequest,
    SamplingParams,
)

PARAMS = SamplingParams()
PROMPTS = random_prompts([12, 9, 30])


def completion(prompt: Sequence[int]) -> Completion:
    return Completion([len(prompt)], [0.0], "stop")


class Stepwise(BatchGenerator):
    """Answers the oldest request in each call, after `before`; notes what it gets."""

    can_advance = True

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before
        self.calls: list[tuple[list[int], list[int]]] = []
        self.left: list[SampleRequest] = []
        self.num_sleeps = 0

    def generate(self, prompts, params):
        raise AssertionError("episodes are answered by advance")

    def advance(self, requests, dropped):
        self.calls.append(([len(r.prompt_ids) for r in requests], list(dropped)))
        self.left = [r for r in [*self.left, *requests] if r.number not in dropped]
        self.before()
        done, self.left = self.left[:1], self.left[1:]
        return [SampleAnswer(r.number, completion(r.prompt_ids)) for r in done]

    def sleep(self) -> None:
        self.num_sleeps += 1


class Blocking(BatchGenerator):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def generate(self, prompts, params):
        self.sizes.append(sum(p.n for p in params))
        return [[completion(prompt)] * p.n for prompt, p in zip(prompts, params, strict=True)]


async def episode(engine: BatchingEngine, first: int, tool: Callable[[int], object], turns: int = 3):
    """Answers of an episode whose histories grow by one token with each turn."""
    with engine.episode():
        answers = []
        for turn in range(turns):
            answers.append((await engine.sample([0] * (first + turn), PARAMS)).token_ids[0])
            result = tool(turn)
            if result is not None:
                await result
        return answers


def test_tools_run_while_the_generator_does():
    came_back = threading.Event()
    engine = BatchingEngine(Stepwise(lambda: came_back.wait(10) or pytest.fail("the loop stands still")))

    async def tool() -> None:
        with engine.episode():
            await asyncio.sleep(0)
            came_back.set()

    async def run():
        return await gather_all([episode(engine, 1, lambda _: None), tool()])

    assert engine.run(run())[0] == [1, 2, 3]
    engine.close()


def test_turns_join_those_in_generation():
    generator = Stepwise()
    engine = BatchingEngine(generator)
    answers = engine.run(gather_all([episode(engine, 10 * i, lambda _: None) for i in (1, 2)]))
    assert answers == [[10, 11, 12], [20, 21, 22]]
    assert generator.calls == [([10, 20], []), ([11], []), ([21], []), ([12], []), ([22], []), ([], [])]
    engine.close()


def test_single_answers_are_one_call_in_the_thread_of_the_trainer():
    threads: list[str] = []

    class Noted(Blocking):
        def generate(self, prompts, params):
            threads.append(threading.current_thread().name)
            return super().generate(prompts, params)

    engine = BatchingEngine(generator := Noted())
    engine.run(gather_all([engine.sample([1], PARAMS), engine.sample([1, 2], PARAMS)]))
    assert generator.sizes == [2] and threads == ["MainThread"]
    engine.run(episode(engine, 1, lambda _: None, turns=2))
    assert threads[1:] == ["generation"] * 2
    engine.close()


@pytest.mark.parametrize(("share", "sizes"), [(1e9, [4, 4, 4]), (0.0, [4, 2, 2, 2, 2])])
def test_a_blocking_generator_waits_for_episodes_that_are_with_their_tools(monkeypatch, share, sizes):
    monkeypatch.setattr(turn_batching, "_WAIT_SHARE", share)
    engine = BatchingEngine(generator := Blocking())

    async def slow() -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    tools = [lambda _: None, lambda _: None, lambda _: slow(), lambda _: slow()]
    engine.run(gather_all([episode(engine, 10 * i, tool) for i, tool in enumerate(tools, 1)]))
    assert generator.sizes[0] == 4 and sum(generator.sizes) == 12
    assert generator.sizes == sizes if share else len(generator.sizes) > 3
    engine.close()


def test_a_cancelled_turn_is_dropped_and_a_refused_one_is_the_only_one_that_fails():
    class Refusing(Stepwise):
        def advance(self, requests, dropped):
            refused = [r for r in requests if len(r.prompt_ids) > 50]
            done = super().advance([r for r in requests if r not in refused], dropped)
            return [*done, *(SampleAnswer(r.number, None, "too long") for r in refused)]

    engine = BatchingEngine(generator := Refusing())

    async def run() -> list[object]:
        with engine.episode():
            tasks = [asyncio.ensure_future(engine.sample([0] * n, PARAMS)) for n in (1, 2, 3, 99)]
            await tasks[0]
            tasks[2].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, cancelled, refused = engine.run(run())
    assert (first.token_ids, second.token_ids) == ([1], [2])
    assert isinstance(cancelled, asyncio.CancelledError) and isinstance(refused, RefusedError)
    engine.run(episode(engine, 5, lambda _: None, turns=1))
    assert [2] in [dropped for _, dropped in generator.calls]
    engine.close()


def test_an_error_reaches_all_episodes_and_an_interrupt_ends_the_call():
    def fail() -> None:
        raise RuntimeError("broken")

    engine = BatchingEngine(generator := Stepwise(fail))

    async def outcomes() -> list[object]:
        own = [episode(engine, i, lambda _: None) for i in (1, 2)]
        return await asyncio.gather(*own, return_exceptions=True)

    assert [str(error) for error in engine.run(outcomes())] == ["broken"] * 2
    has_begun, ended = threading.Event(), list[str]()

    def forever() -> None:
        has_begun.set()
        try:
            while True:
                time.sleep(0.001)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    async def interrupt() -> None:
        while not has_begun.is_set():
            await asyncio.sleep(0)
        raise KeyboardInterrupt

    generator.before, generator.left = forever, []
    with pytest.raises(KeyboardInterrupt):
        engine.run(gather_all([episode(engine, 1, lambda _: None), interrupt()]))
    assert ended == ["ReportingInterrupt"]
    generator.before, generator.left = (lambda: None), []
    assert engine.run(episode(engine, 1, lambda _: None)) == [1, 2, 3]
    engine.close()


def test_nothing_is_generated_any_more_when_the_policy_learns():
    """A call whose last request was cancelled has ended before `run` returns."""
    has_begun, ended = threading.Event(), list[bool]()

    def late() -> None:
        has_begun.set()
        time.sleep(0.02)
        ended.append(True)

    engine = BatchingEngine(Stepwise(late))

    async def run() -> None:
        with engine.episode():
            turn = asyncio.ensure_future(engine.sample([1], PARAMS))
            while not has_begun.is_set():
                await asyncio.sleep(0)
            turn.cancel()

    engine.run(run())
    assert ended == [True]
    engine.close()


def test_new_weights_put_no_generator_to_sleep_which_may_lose_its_own():
    engine = BatchingEngine(generator := Stepwise())
    engine.run(engine.sync_weights(1))
    assert (generator.version, generator.num_sleeps) == (1, 0)
    engine.sleep()
    assert generator.num_sleeps == 1
    engine.close()


def test_a_turn_goes_to_the_rank_that_has_its_history():
    routing = TurnRouting(2)
    system = list(range(50))
    first = [
        SampleRequest(i, [*system, 100 + i // 2], SamplingParams(sample_index=i % 2, seed=i // 2))
        for i in range(6)
    ]
    by_rank = routing.assign(first)
    assert [[r.number for r in own] for own in by_rank] == [[0, 1, 4, 5], [2, 3]]
    routing.forget(range(6))
    second = [
        SampleRequest(10 + i, [*request.prompt_ids, 7, 8, i], PARAMS) for i, request in enumerate(first)
    ]
    by_rank = routing.assign(second)
    assert [[r.number - 10 for r in own] for own in by_rank] == [[0, 1, 4, 5], [2, 3]]
    assert routing.forget([12, 10, 99]) == [[10], [12]]


async def sampled(engine: BatchingEngine, prompt: Sequence[int], seed: int) -> list[Completion]:
    """Turns of an episode of three turns."""
    history, turns, params = list(prompt), [], SamplingParams(max_tokens=6 + seed, seed=seed)
    with engine.episode():
        for turn in range(3):
            turns.append(await engine.sample(history, replace(params, sample_index=turn << 40)))
            history += [*turns[-1].token_ids, 50 + seed]
    return turns


def episodes_of(generator: BatchGenerator) -> list[list[Completion]]:
    """Turns of four episodes, two of which have the same prompt."""
    engine = BatchingEngine(generator)
    prompts = [PROMPTS[0], PROMPTS[0], *PROMPTS[1:]]
    try:
        return engine.run(gather_all([sampled(engine, prompt, i) for i, prompt in enumerate(prompts)]))
    finally:
        engine.close()


def check_turns(ours: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for turns, others in zip(ours, expected, strict=True):
        assert [list(turn.token_ids) for turn in turns] == [list(turn.token_ids) for turn in others]
        for before, turn in pairwise(turns):
            assert turn.num_reused >= len(before.token_ids) - 1 + 5
        for turn, other in zip(turns, others, strict=True):
            assert turn.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_the_policys_worker_answers_turns_and_drops_what_it_kept_on_sleep():
    policy = shared_policy("llama")
    generator = PolicyGenerator(group := group_of(tiny_policy("llama")))
    check_turns(episodes_of(generator), episodes_of(EmbeddedEngine(policy, tiny_codec())))
    generator.sleep()
    (answer,) = group.worker.advance([SampleRequest(0, PROMPTS[0], SamplingParams(max_tokens=1))], [], 0)
    assert answer.completion.num_reused == 0


@pytest.mark.distributed
def test_each_rank_continues_the_episodes_that_it_began(tmp_path):
    expected = episodes_of(EmbeddedEngine(shared_policy("llama"), tiny_codec()))
    with policy_ranks(saved(tiny_policy("llama"), tmp_path), 2) as ranks:
        check_turns(episodes_of(PolicyGenerator(ranks)), expected)
