"""Turns that continue from the keys and values of earlier ones: exact, bounded, of one version."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.tiny import model_input, random_prompts, shared_policy, tiny_codec, tiny_policy
from verl.engines.hf.models import PolicyModel
from verl.rollout.embedded.async_generator import AsyncGenerator, GenerationRequest, Token
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.embedded.prefix_cache import PrefixIndex
from verl.utils.sampling_types import Completion, SampleRequest, SamplingParams

PROMPTS = random_prompts([9, 40, 17])
GIVEN = random_prompts([5, 1, 30, 8], seed=1)  # behind each turn
TURN = SamplingParams(max_tokens=9, stop_ids=tuple(range(20, 32)), temperature=1.0)


def answers(engine: EmbeddedEngine, requests: Sequence[SampleRequest]) -> dict[int, Completion]:
    """Completions by the numbers of the requests, as `advance` hands them out."""
    found: dict[int, Completion] = {}
    new: Sequence[SampleRequest] = requests
    while len(found) < len(requests):
        for answer in engine.advance(new, ()):
            assert answer.completion is not None, answer.refusal
            found[answer.number] = answer.completion
        new = ()
    return found


def play(engine: EmbeddedEngine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[Completion]]:
    """Episodes of four turns in lock-step: the turns of each."""
    histories, episodes = [list(p) for p in prompts], [list[Completion]() for _ in prompts]
    for turn, given in enumerate(GIVEN):
        asked = [
            SampleRequest(100 * turn + i, history, replace(TURN, seed=i, sample_index=turn << 40))
            for i, history in enumerate(histories)
        ]
        found = answers(engine, asked)
        for i, (episode, history) in enumerate(zip(episodes, histories, strict=True)):
            episode.append(found[100 * turn + i])
            history += [*episode[-1].token_ids, *given]
    return episodes


def check_logprobs(policy: PolicyModel, prompts: Sequence[Sequence[int]], turns: Sequence[Completion]):
    """Compare sampled logprobs with those of the trainer's forward pass."""
    policy.num_ids = tiny_codec().num_ids
    with torch.no_grad(), policy.forward_mode():
        inputs = model_input(prompts, [turn.token_ids for turn in turns])
        expected = policy.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    policy.num_ids = None
    sampled = torch.tensor([logprob for turn in turns for logprob in turn.logprobs or ()])
    torch.testing.assert_close(sampled, expected, atol=2e-5, rtol=0)


def test_the_longest_common_beginning_is_found():
    rng, index, rows = random.Random(0), PrefixIndex[int](10**6), list[list[int]]()
    for number in range(200):
        row = [rng.choice((1, 2, 300)) for _ in range(rng.randint(1, 12))]
        common = [sum(1 for _ in iter_common(row, other)) for other in rows]
        found = index.find(row)
        assert (found.length if found else 0) == max(common, default=0)
        is_known = any(other[: len(row)] == row for other in rows)
        assert index.has(row) == is_known
        if not is_known:
            index.keep(row, number)
            rows = [other for other in rows if row[: len(other)] != other] + [row]
    assert index.num_rows == len(rows) and index.num_tokens == sum(map(len, rows))


def iter_common(one: Sequence[int], other: Sequence[int]):
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


def test_rows_that_were_used_longest_ago_make_room():
    index = PrefixIndex[str](10)
    index.keep([1, 1, 1, 1], "a")
    index.keep([2, 2, 2, 2], "b")
    assert index.find([1, 1, 5]).value == "a"  # used again
    index.keep([3, 3, 3], "c")
    assert index.find([2, 2, 2, 2]) is None and index.num_tokens == 7
    index.keep([1, 1, 1, 1, 6], "longer")  # takes the place of its beginning
    assert index.find([1, 1, 1, 1]).value == "longer" and index.num_rows == 2
    index.keep(list(range(11)), "longer than the limit")
    assert index.num_tokens <= 10 and index.find([0]) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_turns_behind_known_histories_are_those_that_are_computed_whole(family):
    policy = shared_policy(family)
    reusing, whole = (
        play(EmbeddedEngine(policy, tiny_codec(), max_slots=4, prefix_tokens=n)) for n in (None, 0)
    )
    for own, expected in zip(reusing, whole, strict=True):
        assert [turn.token_ids for turn in own] == [turn.token_ids for turn in expected]
        for turn, same in zip(own, expected, strict=True):
            assert turn.logprobs == pytest.approx(same.logprobs, abs=2e-6)
        assert [turn.num_reused for turn in expected] == [0] * 4
    for prompt, own in zip(PROMPTS, reusing, strict=True):
        # All but the last token of the answer before, which was never read, and what followed it.
        history, known = len(prompt), 0
        for turn, given in zip(own, GIVEN, strict=True):
            assert turn.num_reused == known
            known = history + len(turn.token_ids) - 1
            history += len(turn.token_ids) + len(given)


def test_a_family_with_a_recurrent_state_computes_whole_histories():
    (one, *_), (same, *_) = (
        play(EmbeddedEngine(shared_policy("qwen3_next"), tiny_codec(), prefix_tokens=n)) for n in (None, 0)
    )
    assert [turn.num_reused for turn in one] == [0] * 4
    assert [turn.logprobs for turn in one] == [turn.logprobs for turn in same]


@pytest.mark.parametrize("how", ["version", "sleep", "in place"])
def test_nothing_is_kept_over_a_change_of_the_weights(how):
    policy = tiny_policy("qwen2")
    engine = EmbeddedEngine(policy, tiny_codec())
    play(engine)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    if how == "sleep":
        engine.sleep()
    engine.version += how == "version"
    history = [*PROMPTS[1], 7, 7]
    (turn,) = answers(engine, [SampleRequest(0, history, TURN)]).values()
    assert turn.num_reused == 0 and turn.version == engine.version
    check_logprobs(policy, [history], [turn])


def test_siblings_share_their_prompt_and_later_ones_find_it():
    policy = shared_policy("llama")
    engine = EmbeddedEngine(policy, tiny_codec(), max_slots=8)
    prompt = PROMPTS[1]
    group = [SampleRequest(i, list(prompt), replace(TURN, sample_index=i)) for i in range(3)]
    found = answers(engine, group)
    assert [found[i].num_reused for i in range(3)] == [0, len(prompt), len(prompt)]
    (late,) = answers(engine, [SampleRequest(9, list(prompt), replace(TURN, sample_index=3))]).values()
    assert late.num_reused == len(prompt) - 1  # its last state is computed again
    check_logprobs(policy, [prompt] * 4, [*(found[i] for i in range(3)), late])


def test_requests_join_leave_and_are_refused_one_by_one():
    engine = EmbeddedEngine(shared_policy("llama"), tiny_codec(), max_slots=2)
    endless = SamplingParams(max_tokens=200, temperature=1.0)
    first = [SampleRequest(i, PROMPTS[i], replace(endless, seed=i)) for i in range(3)]
    assert engine.advance(first, ()) == []
    short = SampleRequest(3, PROMPTS[0], replace(TURN, max_tokens=2))
    (refused, *rest) = engine.advance([short, SampleRequest(4, [1] * 60, endless)], [0, 2, 77])
    assert refused.completion is None and "need at least one, and at most 256" in refused.refusal
    rest += engine.advance((), ()) if not rest else []
    assert [answer.number for answer in rest] == [3]
    alone = EmbeddedEngine(shared_policy("llama"), tiny_codec())
    (expected,) = answers(alone, [short]).values()
    assert rest[0].completion.token_ids == expected.token_ids


def test_an_error_of_a_step_leaves_nothing_behind():
    engine = EmbeddedEngine(policy := tiny_policy("llama"), tiny_codec())
    answers(engine, [SampleRequest(0, PROMPTS[0], TURN)])
    weight = next(policy.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        engine.advance([SampleRequest(1, PROMPTS[1], TURN)], ())
    with torch.no_grad():
        weight.copy_(before)
    (turn,) = answers(engine, [SampleRequest(2, PROMPTS[0], TURN)]).values()
    assert turn.num_reused == 0


@pytest.mark.parametrize("recompute", [True, False])
def test_a_server_drops_its_rows_with_the_weights(recompute):
    """An answer that goes on over an update is kept only if the new weights have computed its cache."""
    policy = tiny_policy("llama")
    policy.num_ids = tiny_codec().num_ids

    def ask(thread: AsyncGenerator, prompt: Sequence[int], *, max_tokens: int = 9) -> GenerationRequest:
        return thread.submit([prompt], [SamplingParams(max_tokens=max_tokens, temperature=1.0)])

    async def rest_of(request: GenerationRequest) -> list[Token]:
        tokens = []
        while not request.is_finished:
            tokens += [token for _, token in await request.wait_tokens(10.0)]
        return tokens

    async def run() -> None:
        thread = AsyncGenerator(policy, tiny_codec(), max_slots=4)
        try:
            await rest_of(ask(thread, PROMPTS[0]))
            assert (await rest_of(ask(thread, PROMPTS[0])))[0].num_reused == len(PROMPTS[0]) - 1
            running = ask(thread, PROMPTS[1], max_tokens=200)
            first = await running.wait_tokens(10.0)
            await thread.pause("update")
            await thread.update_weights(lambda: None)
            await thread.resume("update", recompute=recompute)
            tokens = [token.token_id for token in [*(t for _, t in first), *await rest_of(running)]]
            assert (await rest_of(ask(thread, PROMPTS[0])))[0].num_reused == 0
            known = len(PROMPTS[1]) + len(tokens) - 1 if recompute else 0
            assert (await rest_of(ask(thread, [*PROMPTS[1], *tokens])))[0].num_reused == known
        finally:
            thread.close()

    asyncio.run(run())
