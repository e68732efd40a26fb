"""Runs episodes over the contract of generation, and turns each into a trajectory, whatever happens in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from verl.agents.environments.session import EpisodeFailure, EpisodeStart
from verl.agents.episodes.driver import EpisodeDriver, SingleAnswer
from verl.agents.episodes.live_episode import EpisodeEnd, EpisodeLimits, LiveEpisode
from verl.agents.episodes.turn_sampler import TurnSampler
from verl.config.agent import AgentConfig, Treatment
from verl.data.trajectory import EpisodeRecord, Trajectory
from verl.rollout.group_sampling import Sampler
from verl.utils.event_loops import gather_all, within
from verl.utils.sampling_types import PrefixAffinity, Prompt, SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.formats import parser_for
from verl.utils.tool_calls.hermes import HermesParser


class EpisodeRunner:
    """Answers prompts by episodes; a single answer is an episode of one turn.

    Args:
        engine: samples the turns.
        codec: of the policy.
        config: limits, and what an episode that a limit ends counts for.
        driver: plays episodes; None: single answers.
        context: tokens that the model reads at most; None: the engine checks it.
        turns: the engine, with an account of its episodes of several turns; None: there is none.

    Attributes:
        driver: as above.
    """

    def __init__(
        self,
        engine: Sampler,
        codec: TextCodec,
        config: AgentConfig,
        *,
        driver: EpisodeDriver | None = None,
        context: int | None = None,
        turns: TurnSampler | None = None,
    ) -> None:
        self.driver = driver or SingleAnswer()
        self._engine, self._codec, self._config = engine, codec, config
        self._is_single = driver is None
        # A single answer is not parsed.
        self._parser = HermesParser() if driver is None else parser_for(codec, config.tool_format)
        self._turns = None if self._is_single else turns
        self._limits = EpisodeLimits(
            max_turns=1 if driver is None else config.max_turns,
            max_calls=config.max_calls,
            max_tokens=None if driver is None else config.max_tokens,
            max_bad_calls=config.max_bad_calls,
            context=context,
            is_single=driver is None,
        )

    async def run_group(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        attempt: int = 0,
        only: Sequence[int] | None = None,
        start_seed: int | None = None,
    ) -> list[Trajectory]:
        """The episodes of a prompt.

        Args:
            prompt: the row of the data.
            params: how turns are sampled; `n` is the number of episodes.
            attempt: number of times that they were begun before.
            only: numbers of the episodes to run; None: all.
            start_seed: of the states that environments start in, equal for siblings; None: that of `params`.
        """
        affinity = PrefixAffinity()
        numbers = range(params.sample_index, params.sample_index + params.n) if only is None else only
        ids = self._codec.encode_prompt(prompt) if self._is_single else None
        seed = params.seed if start_seed is None else start_seed
        starts = [EpisodeStart(prompt, seed, i, attempt, f"{seed:x}-{i}-{attempt}") for i in numbers]
        return await gather_all([self._run(start, params, affinity, ids) for start in starts])

    async def _run(
        self,
        start: EpisodeStart,
        params: SamplingParams,
        affinity: PrefixAffinity,
        prompt_ids: list[int] | None,
    ) -> Trajectory:
        live = LiveEpisode(
            start,
            replace(params, n=1, sample_index=start.number),
            engine=self._turns or self._engine,
            codec=self._codec,
            parser=self._parser,
            limits=self._limits,
            # Each episode stays where its own history is; the first turns share the prompt of the group.
            affinity=affinity if self._is_single else PrefixAffinity(group=affinity),
        )
        if prompt_ids is not None:
            live.begin([], prompt_ids=prompt_ids)
        failure: EpisodeFailure | None = None
        try:
            with self._turns.episode() if self._turns else nullcontext():
                played = self.driver.run(live)
                await (played if self._is_single else within(self._config.timeout_s, played))
        except EpisodeEnd as end:
            live.record.ending = end.ending
        except TimeoutError:
            live.record.ending = "timeout"
        except EpisodeFailure as error:
            failure = error
        return self._ended(live, failure)

    def _ended(self, live: LiveEpisode, failure: EpisodeFailure | None) -> Trajectory:
        """The trajectory of an episode, with what its ending means for the reward."""
        trajectory = live.trajectory()
        ending = live.record.ending
        trajectory.truncated = trajectory.truncated or ending == "max_tokens"
        if failure is not None:
            trajectory.outcome, trajectory.detail = failure.outcome, failure.detail
        elif not live.num_turns:
            trajectory.outcome = "episode_no_answer"
            trajectory.detail = f"the limit {ending} was reached before the first turn"
        elif treatment_of(live.record, self._config) == "fail":
            trajectory.outcome = f"episode_{ending}"
            trajectory.detail = f"the episode reached its limit {ending}, see agent.endings"
        return trajectory


def treatment_of(episode: EpisodeRecord, config: AgentConfig) -> Treatment:
    """Treatment of an episode by its ending; "reward" for one that no limit ended."""
    return next((t for ending, t in config.endings.items() if ending == episode.ending), "reward")
