"""Modelled episodes: turns of the policy, with an environment between them that takes time and may die."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.engines import World
from tests.simulation.modelled_policy import VOCABULARY
from verl.agents.environments.session import EpisodeFailure
from verl.agents.episodes.driver import EpisodeDriver
from verl.agents.episodes.live_episode import LiveEpisode
from verl.agents.episodes.runner import EpisodeRunner
from verl.config.agent import AgentConfig
from verl.data.trajectory import Trajectory
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Completion, PrefixAffinity, Prompt, SamplingParams

# Tokens of the environment between two turns; the policy samples none of them.
GIVEN = (5, 6, 7)


class ModelledCodec:
    """The part of a codec that an episode of modelled tokens needs."""

    num_ids = VOCABULARY
    stop_ids: tuple[int, ...] = ()
    closing_ids: tuple[int, ...] = ()

    def prompt_text(self, prompt: Prompt) -> str:
        return ""

    def decode_all(self, ids: Sequence[int]) -> str:
        return ""

    def decode_answer(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        return ""


@dataclass
class Checked:
    """The pool, with each answer checked against what the policy samples for its request."""

    pool: InferencePool
    world: World
    problems: list[str]

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        oldest = self.pool.version
        answer = await self.pool.sample(prompt_ids, params, affinity)
        versions = (oldest, self.pool.version)
        if problem := self.world.problem_of(answer, prompt_ids, params, versions=versions):
            self.problems.append(f"a turn behind {len(prompt_ids)} tokens: {problem}")
        return answer


@dataclass
class ModelledEnvironment(EpisodeDriver):
    """Answers each turn after some time, except that it dies with some probability.

    Attributes:
        rng: of times and deaths.
        turns: of an episode.
        death: probability at each turn.
    """

    rng: random.Random
    turns: int
    death: float
    num_open: int = 0
    prompts: dict[int, list[int]] = field(default_factory=dict)

    async def run(self, live: LiveEpisode) -> None:
        self.num_open += 1
        try:
            live.begin([], prompt_ids=list(self.prompts[live.start.prompt.index]))
            for turn in range(self.turns):
                await live.answer()
                await asyncio.sleep(self.rng.choice((0.0, 0.2, 20.0)))
                if self.rng.random() < self.death:
                    raise EpisodeFailure("environment_crash", "modelled")
                if turn + 1 < self.turns:
                    live.tape.append_given(GIVEN)
        finally:
            self.num_open -= 1

    def runner(self, engine: Checked) -> EpisodeRunner:
        """Runs these episodes on an engine."""
        codec: Any = ModelledCodec()
        return EpisodeRunner(engine, codec, AgentConfig(tool_format="hermes", max_turns=99), driver=self)


def episode_problem(trajectory: Trajectory, turns: int) -> str:
    """What is wrong with the tape of a complete episode, or ""."""
    given = [i for i, sampled in enumerate(trajectory.response_mask) if not sampled]
    found = [trajectory.response_ids[i] for i in given]
    if found != [*GIVEN] * (turns - 1) or not trajectory.response_mask[-1]:
        return f"an episode of {turns} turns with the given tokens {found}"
    lengths = {len(trajectory.response_ids), len(trajectory.versions), len(trajectory.rollout_logprobs or ())}
    if len(lengths) > 1:
        return f"tokens, versions and logprobs of the lengths {lengths}"
    return ""

