"""Turns of episodes in a pool: each episode stays on one engine, also where its siblings do not fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.rollout.pool.test_inference_pool import Free, with_pool
from verl.rollout.inference_server import EngineError, TokenChunk
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import PrefixAffinity, SamplingParams

ONE = SamplingParams(max_tokens=2)


class Noting(Free):
    """Notes the number of the episode of each request, the first id of its prompt; may fail once."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.asked: list[int] = []
        self.fails_at: int | None = None

    async def sample(self, prompt_ids: Any, params: SamplingParams) -> AsyncIterator[TokenChunk]:
        self.asked.append(prompt_ids[0])
        async for chunk in super().sample(prompt_ids, params):
            yield chunk
            if len(prompt_ids) == self.fails_at:
                raise EngineError("died in the middle of a turn")


async def play(pool: InferencePool, episode: int, group: PrefixAffinity, turns: int = 4) -> list[int]:
    """Tokens of an episode, with one given token behind each turn."""
    history, affinity = [100 + episode], PrefixAffinity(group=group)
    for turn in range(turns):
        answer = await pool.sample(history, ONE, affinity)
        assert len(answer.token_ids) == len(answer.logprobs or ()) == 2
        history += [*answer.token_ids, turn]
        for _ in range(episode % 3):  # tools take their time
            await asyncio.sleep(0)
    return history


@pytest.mark.parametrize(("episodes", "engines"), [(3, 3), (8, 3), (11, 3)])
def test_an_episode_stays_on_one_engine(episodes, engines):
    async def test(pool: InferencePool) -> None:
        group = PrefixAffinity()
        histories = await gather_all([play(pool, i, group) for i in range(episodes)])
        assert all(len(history) == 1 + 4 * 3 for history in histories)
        asked = [replica.engine.asked for replica in pool.replicas]
        on = {i: {e for e, own in enumerate(asked) if 100 + i in own} for i in range(episodes)}
        assert all(len(own) == 1 for own in on.values())
        # Siblings begin together as far as they fit.
        assert max(len(set(own)) for own in asked) == min(4, episodes)

    with_pool(test, count=engines, make=Noting)


def test_an_episode_stays_where_it_moved_when_its_engine_failed():
    async def test(pool: InferencePool) -> None:
        first, second = (replica.engine for replica in pool.replicas)
        first.fails_at = 4  # in the second turn
        history = await play(pool, 7, PrefixAffinity())
        # The tokens before the failure stay, and the turn goes on from them.
        assert history == [107, 51, 52, 0, 54, 55, 1, 57, 58, 2, 60, 61, 3]
        assert first.asked == [107] * 2 and second.asked == [107] * 3

    with_pool(test, count=2, make=Noting)
