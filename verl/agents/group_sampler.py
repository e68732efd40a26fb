"""One group: a prompt is encoded, answered, decoded and rewarded, and its rewards are shaped by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from verl.agents.episodes.driver import EpisodeDriver, SingleAnswer
from verl.agents.episodes.runner import EpisodeRunner, treatment_of
from verl.agents.episodes.turn_sampler import TurnSampler
from verl.agents.groups import has_no_signal, is_environment_failure
from verl.agents.row_sampling import check_row_sampling, with_row_sampling
from verl.algorithms.registry import BoundFunction
from verl.config.run import PreferenceConfig, SFTConfig, TrainerConfig
from verl.data.trajectory import Trajectory
from verl.rewards.functions import RewardFunctions
from verl.rewards.shaping import overlong_penalty
from verl.rollout.group_sampling import Sampler
from verl.utils.chat.turn_probe import probe_turns
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec, is_text


class GroupSampler:
    """Samples and rewards groups.

    Args:
        engine: answers prompts.
        codec: of the policy.
        rewards: scores answers; None: nothing reads a reward.
        config: sampling, algorithm and seed are read.
        greedy_baseline: answer each prompt once more with its most likely answer, for `greedy_rewards`.
        by_parts: a group of equal rewards has a signal if the parts that they are the sum of differ.
        length_penalty: adds to the rewards of a group according to the lengths of its answers.
        driver: plays episodes of several turns; None: each answer is one turn.
        context: tokens that the policy reads at most; None: the engine checks it.
        turns: see `EpisodeRunner`.
    """

    def __init__(
        self,
        engine: Sampler,
        codec: TextCodec,
        rewards: RewardFunctions | None,
        config: TrainerConfig,
        *,
        greedy_baseline: bool = False,
        by_parts: bool = False,
        length_penalty: BoundFunction | None = None,
        driver: EpisodeDriver | None = None,
        context: int | None = None,
        turns: TurnSampler | None = None,
    ) -> None:
        self.engine = engine
        self._episodes = EpisodeRunner(
            engine, codec, config.agent, driver=driver, context=context, turns=turns
        )
        self.by_parts = by_parts
        self._codec, self._rewards, self._config = codec, rewards, config
        self._greedy_baseline, self._length_penalty = greedy_baseline, length_penalty

    @property
    def reward_names(self) -> str:
        """Names of the reward functions."""
        return ", ".join(self._rewards.names) if self._rewards else "no reward function"

    @property
    def has_episodes(self) -> bool:
        """True if answers may have several turns."""
        return not isinstance(self._episodes.driver, SingleAnswer)

    def check_data(self, prompts: Sequence[Prompt]) -> list[str]:
        """Check rows and chat template for episodes; see `DataCollector.check_data`."""
        driver = self._episodes.driver
        driver.check_data(prompts)
        if not self.has_episodes:
            return []
        texts = [prompt for prompt in prompts if is_text(prompt)]
        notes = []
        if texts and driver.offers_tools:
            notes.append(
                f"{len(texts)} of {len(prompts)} prompts are texts, to which no chat template is applied, so "
                "the model is not shown the tools there; describe them in the text, or give chat messages"
            )
        if len(texts) < len(prompts):
            notes += probe_turns(self._codec, has_tools=driver.offers_tools)
        return notes

    def close(self) -> None:
        """End what plays episodes."""
        self._episodes.driver.close()

    def params(self, samples: int, *, number: int, attempt: int = 0) -> SamplingParams:
        """Sampling parameters of group `number`; each attempt has other random numbers."""
        seed = (self._config.seed << 32) + (attempt << 26) + number
        return replace(sampling_params(self._config, self._codec, samples), seed=seed)

    def row_params(self, prompt: Prompt, params: SamplingParams, *, trains: bool) -> SamplingParams:
        """The parameters with those of the prompt's row over them.

        Raises:
            ValueError: see `check_row_sampling`.
        """
        check_row_sampling([prompt], self._config, trains=trains)
        return with_row_sampling(params, prompt, self._codec)

    def greedy_params(self, params: SamplingParams) -> SamplingParams | None:
        """Parameters of the most likely answer to the same prompt; None if its reward is not read."""
        if not self._greedy_baseline:
            return None
        return replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, n=1)

    async def sample(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        attempt: int = 0,
        only: Sequence[int] | None = None,
        start_seed: int | None = None,
    ) -> list[Trajectory]:
        """The group of a prompt, without rewards; see `EpisodeRunner.run_group`."""
        return await self._episodes.run_group(
            prompt, params, attempt=attempt, only=only, start_seed=start_seed
        )

    async def answer(self, prompt: Prompt, params: SamplingParams) -> list[Trajectory]:
        """A group outside of training: episodes whose environment fails are played again at once.

        As often as `pipeline.retries` says for environments.
        """
        group = await self.sample(prompt, params)
        for attempt in range(1, self._config.pipeline.retries["environment"] + 1):
            failed = [i for i, t in enumerate(group) if is_environment_failure(t.outcome)]
            if not failed:
                break
            numbers = [params.sample_index + i for i in failed]
            again = await self.sample(prompt, params, attempt=attempt, only=numbers)
            for place, trajectory in zip(failed, again, strict=True):
                group[place] = trajectory
        return group

    def text_of(self, trajectory: Trajectory) -> str:
        """The answer as text, all turns and what the environment wrote between them."""
        return self._codec.decode(list(trajectory.response_ids))

    def reward(self, trajectories: Sequence[Trajectory]) -> None:
        """Reward answers in place; one that fails gets an outcome. Several threads may call this at once."""
        if self._rewards:
            self._rewards.attempt(trajectories)

    def check_failed(self, trajectories: Sequence[Trajectory], *, of: int | None = None) -> None:
        """Check the share of answers without a reward, of all given ones, or of that many.

        Raises:
            RuntimeError: it is above `rewards.max_failed_share`.
        """
        if self._rewards:
            self._rewards.check_failed(trajectories, of=of)

    def has_no_signal(self, group: Sequence[Trajectory]) -> bool:
        """True if the algorithm learns nothing from a group."""
        return has_no_signal(group, by_parts=self.by_parts)

    def finish(self, group: Sequence[Trajectory], baseline: Trajectory | None) -> None:
        """Shape the rewards of a group by length, and note the reward of its greedy answer."""
        # First: the overlong penalty would hide which answers are right.
        self._compare_lengths(group)
        for trajectory in group:
            self._shape_length(trajectory)
            if trajectory.episode and treatment_of(trajectory.episode, self._config.agent) == "mask":
                trajectory.mask_all()
        if baseline is None:
            return
        self._shape_length(baseline)
        for trajectory in group:
            trajectory.greedy_reward = baseline.reward
            if baseline.reward is None and trajectory.outcome == "ok":
                trajectory.outcome = "no_baseline"
                trajectory.detail = f"the greedy answer has no reward: {baseline.detail}"

    def _compare_lengths(self, group: Sequence[Trajectory]) -> None:
        rewarded = [t for t in group if t.reward is not None]
        if not self._length_penalty or not rewarded:
            return
        columns = {
            "rewards": torch.tensor([t.reward for t in rewarded], dtype=torch.float64),
            "num_tokens": torch.tensor([t.num_sampled_tokens for t in rewarded]),
        }
        for trajectory, added in zip(rewarded, self._length_penalty(columns).tolist(), strict=True):
            _add_reward(trajectory, "length", added)

    def _shape_length(self, trajectory: Trajectory) -> None:
        algorithm = self._config.algorithm
        if algorithm.mask_truncated and trajectory.truncated:
            trajectory.mask_all()
        if not algorithm.overlong_buffer_tokens or trajectory.reward is None:
            return
        added = overlong_penalty(
            len(trajectory.response_ids),
            max_tokens=trajectory.prompt.sampling.get("max_tokens", self._config.sampling.max_tokens),
            buffer_tokens=algorithm.overlong_buffer_tokens,
            penalty=algorithm.overlong_penalty,
        )
        _add_reward(trajectory, "overlong", added)


def sampling_params(
    config: TrainerConfig | SFTConfig | PreferenceConfig, codec: TextCodec, samples: int
) -> SamplingParams:
    """Sampling parameters of the settings for `samples` answers to a prompt, with seed 0.

    Stop texts that are special or added tokens are stop ids, too: engines look for texts without these.
    """
    s = config.sampling
    stop_ids = tuple(dict.fromkeys([*s.stop_ids, *codec.token_ids_of(s.stop)]))
    return SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        max_tokens=s.max_tokens,
        n=samples,
        stop=s.stop,
        stop_ids=stop_ids,
    )


def evaluation_params(
    config: TrainerConfig | SFTConfig | PreferenceConfig, codec: TextCodec, samples: int
) -> SamplingParams:
    """Sampling parameters of an evaluation: those of `sampling_params`, except what `evaluation` sets."""
    e, params = config.evaluation, sampling_params(config, codec, samples)
    return replace(
        params,
        temperature=e.temperature,
        top_p=params.top_p if e.top_p is None else e.top_p,
        max_tokens=e.max_tokens or params.max_tokens,
        repetition_penalty=e.repetition_penalty or params.repetition_penalty,
    )


def _add_reward(trajectory: Trajectory, name: str, value: float) -> None:
    """Add to a reward, as a reward function of weight 1 would."""
    assert trajectory.reward is not None
    trajectory.reward += value
    trajectory.scores[name] = value
    trajectory.parts.append((1.0, value))
