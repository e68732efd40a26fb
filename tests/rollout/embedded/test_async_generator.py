"""Continuous batching step by step: requests submitted and aborted between tokens, as in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.tiny import random_prompts, shared_policy, tiny_codec, tiny_policy
from verl.engines.hf.models import PolicyModel
from verl.rollout.embedded.async_generator import AsyncGenerator, GenerationRequest
from verl.rollout.embedded.continuous_batch import ContinuousBatch
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import SamplingParams

PROMPTS = random_prompts([3, 70, 1, 9, 30, 2])
ENDS = tuple(range(20, 26))
PARAMS = [SamplingParams(max_tokens=20, n=2, stop_ids=ENDS, seed=i) for i in range(len(PROMPTS))]


def expected(policy: PolicyModel) -> list[list[list[int]]]:
    groups = EmbeddedEngine(policy, tiny_codec()).generate(PROMPTS, PARAMS)
    return [[list(c.token_ids) for c in group] for group in groups]


def stepwise(
    policy: PolicyModel, *, slots: int, between: Callable[[ContinuousBatch, int], None], num_first: int
) -> list[list[list[int]]]:
    """Answers to the first prompts, and to those that `between` adds before each step."""
    batch = ContinuousBatch(policy, tiny_codec(), slots=slots, first_slots=1)
    answers: list[list[list[int]]] = [[[] for _ in range(p.n)] for p in PARAMS]
    for i in range(num_first):
        batch.add(i, PROMPTS[i], PARAMS[i])
    with policy.forward_mode():
        step = 0
        while not batch.is_idle:
            between(batch, step)
            for row in batch.step():
                answers[row.prompt_id][row.sample_index].append(row.tokens[-1])
            step += 1
    return answers


@pytest.mark.parametrize("slots", [2, 5, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_prompts_added_one_by_one_get_the_answers_of_one_call(family, slots):
    def ask(batch: ContinuousBatch, step: int) -> None:
        if 2 <= step < 2 + len(PROMPTS) - 1:
            batch.add(step - 1, PROMPTS[step - 1], PARAMS[step - 1])

    policy = shared_policy(family)
    assert stepwise(policy, slots=slots, between=ask, num_first=1) == expected(policy)


def test_aborted_answers_change_no_others():
    def abort(batch: ContinuousBatch, step: int) -> None:
        if step == 3:
            batch.abort(1)
            batch.abort(5)  # still waits
            assert {row.prompt_id for row in batch.rows} <= {0, 2, 3, 4}

    policy = shared_policy()
    answers, whole = stepwise(policy, slots=5, between=abort, num_first=6), expected(policy)
    assert [answers[i] for i in (0, 2, 3, 4)] == [whole[i] for i in (0, 2, 3, 4)]
    assert answers[5] == [[], []] and all(len(a) <= 3 for a in answers[1])


@pytest.mark.parametrize("step", [0, 3], ids=["waiting", "running"])
def test_one_answer_to_a_prompt_can_be_aborted(step):
    def abort(batch: ContinuousBatch, at: int) -> None:
        if at == step:
            batch.abort(1, {0})

    policy = shared_policy()
    answers, whole = stepwise(policy, slots=64, between=abort, num_first=6), expected(policy)
    assert answers[1][0] == whole[1][0][:step]
    answers[1][0] = whole[1][0]
    assert answers == whole


def test_the_cache_of_an_idle_batch_can_be_freed():
    policy = shared_policy()
    batch = ContinuousBatch(policy, tiny_codec(), slots=8, first_slots=2)
    batch.add(0, PROMPTS[0], SamplingParams(max_tokens=3, n=8))
    with policy.forward_mode():
        while not batch.is_idle:
            batch.step()
            batch.free_cache()  # does nothing while answers run
    assert batch.cache.num_slots == 2 and batch.cache.is_empty


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_a_cache_recomputed_with_the_same_weights_changes_nothing(family):
    policy = shared_policy(family)
    answers = stepwise(
        policy, slots=64, between=lambda batch, step: step and batch.recompute_cache(), num_first=6
    )
    assert answers == expected(policy)


async def tokens_of(request: GenerationRequest) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while not request.is_finished:
        for answer, token in await request.wait_tokens(5.0):
            found.setdefault(answer, []).append(token.token_id)
    return found


def test_a_thread_pauses_between_two_tokens_until_each_reason_is_resumed():
    policy = tiny_policy()

    async def asked() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        thread = AsyncGenerator(policy, tiny_codec(), max_slots=3)
        await thread.pause("one")
        await thread.pause("other")
        request, second = thread.submit(PROMPTS[:3], PARAMS[:3]), thread.submit(PROMPTS[3:], PARAMS[3:])
        await thread.resume("one", recompute=True)
        beats = thread.num_heartbeats
        assert await request.wait_tokens(1.2) == [] and thread.num_heartbeats > beats
        # The model is not in use: changes of the weights take effect.
        assert await thread.update_weights(lambda: "done") == "done"
        with pytest.raises(ZeroDivisionError):
            await thread.update_weights(lambda: 1 // 0)
        await thread.resume("other", recompute=True)
        answers = await asyncio.gather(tokens_of(request), tokens_of(second))
        thread.close()
        return answers[0], answers[1]

    first, second = asyncio.run(asked())
    flat = [ids for group in expected(policy) for ids in group]
    assert [first[i] for i in range(6)] + [second[i] for i in range(6)] == flat
