"""Prompts in, rewarded trajectories out: encode, generate, decode, reward, drop what failed, replace dead
groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from verl.algorithms.registry import BoundFunction
from verl.config.run import TrainerConfig
from verl.data.batch import Batch, Trajectory
from verl.monitoring.tracking import Clock
from verl.rewards.functions import RewardFunctions, overlong_penalty
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Completion, Prompt, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

PromptLike = Prompt | str | list[dict[str, Any]]


@dataclass
class RolloutBatch:
    """The answers of one step.

    Attributes:
        trajectories: those that have a reward, groups together.
        rows: the same as a batch.
        metrics: means over all answers that were generated.
        finish: makes the updates, where the answers were learned from as they came; returns further metrics.
    """

    trajectories: list[Trajectory]
    rows: Batch
    metrics: dict[str, float]
    finish: Callable[[], dict[str, float]] | None = None


class DataCollector:
    """Turns prompts into rewarded groups.

    Args:
        engine: answers prompts.
        codec: of the policy.
        rewards: scores answers; None: nothing reads a reward.
        config: sampling, algorithm and seed are read.
        greedy_baseline: answer each prompt once more with its most likely answer, for `greedy_rewards`.
        by_parts: a group of equal rewards is not dead if the parts that they are the sum of differ.
        length_penalty: adds to the rewards of a group what its answers' lengths are worth.
        clock: takes the seconds of `generate` and `reward`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        codec: TextCodec,
        rewards: RewardFunctions | None,
        config: TrainerConfig,
        *,
        greedy_baseline: bool = False,
        by_parts: bool = False,
        length_penalty: BoundFunction | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.engine = engine
        self.dispatched = (
            0  # prompts ever sent out; the seed of an answer hangs on it, so it belongs into a checkpoint
        )
        self._codec = codec
        self._rewards = rewards
        self._config = config
        self._greedy_baseline = greedy_baseline
        self._by_parts = by_parts
        self._length_penalty = length_penalty
        self.clock = clock or Clock()

    def collect(
        self,
        prompts: Sequence[PromptLike],
        *,
        samples: int,
        refill: Callable[[int], Sequence[PromptLike]] | None = None,
    ) -> RolloutBatch:
        """Answers every prompt `samples` times and rewards the answers.

        Args:
            prompts: texts, chat messages or `Prompt`s.
            samples: answers per prompt.
            refill: gives n more prompts; with it and `algorithm.dynamic_sampling`, groups without any spread
                of rewards are replaced, at most `algorithm.max_resamples` times.

        Raises:
            RuntimeError: no answer has a reward, or too many have none.
        """
        algorithm = self._config.algorithm
        everything = groups = self._groups(prompts, samples)
        alive = (
            [g for g in groups if not self.has_no_signal(g)]
            if algorithm.dynamic_sampling and refill
            else groups
        )
        draws = 0
        while (
            refill
            and len(alive) < len(prompts)
            and algorithm.dynamic_sampling
            and draws < algorithm.max_resamples
        ):
            draws += 1
            groups = self._groups(refill(len(prompts) - len(alive)), samples)
            everything = [*everything, *groups]
            alive += [g for g in groups if not self.has_no_signal(g)]
        collected = self.collected(alive or everything, everything)
        collected.metrics["resample_draws"] = float(draws)
        return collected

    def collected(
        self, groups: Sequence[Sequence[Trajectory]], everything: Sequence[Sequence[Trajectory]]
    ) -> RolloutBatch:
        """What a step learns from: the answers of `groups` that have a reward, with metrics over everything,
        by which groups are numbered.

        Raises:
            RuntimeError: no answer has a reward.
        """
        for number, group in enumerate(everything):
            for trajectory in group:
                trajectory.group = number
        kept = [t for group in groups for t in group if t.outcome == "ok"]
        if not kept:
            raise RuntimeError(
                "no answer of this step has a reward, so there is nothing to learn from; see the outcomes in the samples"
            )
        return RolloutBatch(
            kept, Batch.from_trajectories(kept), collection_metrics(everything, by_parts=self._by_parts)
        )

    def answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[list[Trajectory]]:
        """One group of rewarded trajectories per prompt.

        Raises:
            RuntimeError: too many answers have no reward.
        """
        groups = self.sample(prompts, params)
        answers = [t for group in groups for t in group]
        with self.clock.phase("reward"):
            self.reward(answers)
        self.check_failed(answers)
        return groups

    def sample(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[list[Trajectory]]:
        """One group of trajectories without rewards per prompt."""
        with self.clock.phase("generate"):
            ids = [self._codec.encode_prompt(p) for p in prompts]
            answers = self.engine.generate(ids, params)
        return [self.trajectories(*group) for group in zip(prompts, ids, answers, params, strict=True)]

    async def sample_from(
        self, fleet: InferencePool, prompt: Prompt, params: SamplingParams
    ) -> list[Trajectory]:
        """The group of one prompt, in the loop of some engines."""
        ids = self._codec.encode_prompt(prompt)
        return self.trajectories(prompt, ids, await fleet.answer(ids, params), params)

    def reward(self, trajectories: Sequence[Trajectory]) -> None:
        """Rewards answers, in place; one that fails says why. Several threads may do so at once."""
        if self._rewards:
            self._rewards.attempt(trajectories)

    @property
    def reward_names(self) -> str:
        """The functions that reward, for people."""
        return ", ".join(self._rewards.names) if self._rewards else "no reward function"

    def check_failed(self, trajectories: Sequence[Trajectory]) -> None:
        """Refuses answers of which too many have no reward.

        Raises:
            RuntimeError: they have none.
        """
        if self._rewards:
            self._rewards.check_failed(trajectories)

    def params(self, samples: int, *, number: int, draw: int = 0) -> SamplingParams:
        """How the prompt of a group is answered in its `draw`-th try: other tries have other random numbers."""
        return replace(
            sampling_params(self._config, samples), seed=(self._config.seed << 32) + (draw << 26) + number
        )

    def greedy_params(self, params: SamplingParams) -> list[SamplingParams]:
        """How the most likely answer to the same prompt is sampled, if it is read; else nothing."""
        return (
            [replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, n=1)]
            if self._greedy_baseline
            else []
        )

    def has_no_signal(self, group: Sequence[Trajectory]) -> bool:
        """Whether a group teaches nothing."""
        return has_no_signal(group, by_parts=self._by_parts)

    def finish(self, group: Sequence[Trajectory], baseline: Trajectory | None) -> None:
        """Adds to the rewards of a group what lengths are worth, and notes the reward of the most likely
        answer, if it is read.
        """
        # First: which answers are right is not yet hidden by the overlong penalty.
        self._compare_lengths(group)
        for trajectory in group:
            self._shape_length(trajectory)
        if baseline is not None:
            self._write_greedy(group, baseline)

    def _groups(self, prompts: Sequence[PromptLike], samples: int) -> list[list[Trajectory]]:
        """Rewarded groups for training."""
        asked = [as_prompt(p, i) for i, p in enumerate(prompts)]
        params = [self.params(samples, number=self.dispatched + i) for i in range(len(asked))]
        self.dispatched += len(asked)
        groups = self.answer(asked, params)
        greedy = [g for p in params for g in self.greedy_params(p)]
        baselines = (
            [baseline for (baseline,) in self.answer(asked, greedy)] if greedy else [None] * len(asked)
        )
        for group, baseline in zip(groups, baselines, strict=True):
            self.finish(group, baseline)
        return groups

    def _compare_lengths(self, group: Sequence[Trajectory]) -> None:
        rewarded = [t for t in group if t.reward is not None]
        if not self._length_penalty or not rewarded:
            return
        columns = {
            "rewards": torch.tensor([t.reward for t in rewarded], dtype=torch.float64),
            "num_tokens": torch.tensor([len(t.response_ids) for t in rewarded]),
        }
        for trajectory, added in zip(rewarded, self._length_penalty(columns).tolist(), strict=True):
            _add_reward(trajectory, "length", added)

    def _write_greedy(self, group: Sequence[Trajectory], baseline: Trajectory) -> None:
        """Notes the reward of the most likely answer; without it, its group cannot be used."""
        self._shape_length(baseline)
        for trajectory in group:
            trajectory.greedy_reward = baseline.reward
            if baseline.reward is None and trajectory.outcome == "ok":
                trajectory.outcome, trajectory.detail = (
                    "no_baseline",
                    f"the greedy answer has no reward: {baseline.detail}",
                )

    def _shape_length(self, trajectory: Trajectory) -> None:
        algorithm = self._config.algorithm
        if algorithm.mask_truncated and trajectory.truncated:
            trajectory.response_mask = [False] * len(trajectory.response_mask)
        if not algorithm.overlong_buffer_tokens or trajectory.reward is None:
            return
        added = overlong_penalty(
            len(trajectory.response_ids),
            max_tokens=self._config.sampling.max_tokens,
            buffer_tokens=algorithm.overlong_buffer_tokens,
            penalty=algorithm.overlong_penalty,
        )
        _add_reward(trajectory, "overlong", added)

    def trajectories(
        self, prompt: Prompt, prompt_ids: list[int], answers: Sequence[Completion], params: SamplingParams
    ) -> list[Trajectory]:
        """The answers to a prompt, without rewards."""
        return [self._trajectory(prompt, prompt_ids, answer, params) for answer in answers]

    def _trajectory(
        self, prompt: Prompt, prompt_ids: list[int], answer: Completion, params: SamplingParams
    ) -> Trajectory:
        length = len(answer.token_ids)
        return Trajectory(
            prompt,
            prompt_ids,
            answer.token_ids,
            [True] * length,
            answer.logprobs,
            [answer.version] * length if answer.versions is None else list(answer.versions),
            0,
            truncated=answer.finish_reason == "length",
            text=self._codec.decode_answer(answer.token_ids, params.stop)
            if answer.text is None
            else answer.text,
        )


def _add_reward(trajectory: Trajectory, name: str, value: float) -> None:
    """Adds to a reward, as a reward function of weight 1 would."""
    assert trajectory.reward is not None
    trajectory.reward += value
    trajectory.scores[name] = value
    trajectory.parts.append((1.0, value))


def as_prompt(prompt: PromptLike, index: int) -> Prompt:
    """A prompt from a text or chat messages; a `Prompt` stays as it is."""
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt, index=index)


def sampling_params(config: TrainerConfig, samples: int) -> SamplingParams:
    """What is asked of the engine for one prompt, with seed 0."""
    s = config.sampling
    return SamplingParams(s.temperature, s.top_p, s.top_k, s.min_p, s.max_tokens, samples, s.stop, s.stop_ids)


def has_no_signal(group: Sequence[Trajectory], *, by_parts: bool = False) -> bool:
    """Whether a group teaches nothing: fewer than two rewards, or all equal, `by_parts` part by part."""
    return len({(t.reward, *t.parts) if by_parts else t.reward for t in group if t.outcome == "ok"}) < 2


def collection_metrics(groups: Sequence[Sequence[Trajectory]], *, by_parts: bool = False) -> dict[str, float]:
    """Means over all answers; reward and scores over those that have one."""
    answers = [t for group in groups for t in group]
    rewarded = [t for t in answers if t.reward is not None]
    metrics = {
        **({"reward": _mean([t.reward for t in rewarded if t.reward is not None])} if rewarded else {}),
        "response_tokens": _mean([len(t.response_ids) for t in answers]),
        "prompt_tokens": _mean([len(t.prompt_ids) for t in answers]),
        "tokens": float(sum(len(t.prompt_ids) + len(t.response_ids) for t in answers)),
        "truncated_share": _mean([t.truncated for t in answers]),
        "failed_share": _mean([t.outcome != "ok" for t in answers]),
    }
    if rewarded and any(len(g) > 1 for g in groups):  # a single answer has no siblings to differ from
        metrics["dead_groups_share"] = _mean([has_no_signal(g, by_parts=by_parts) for g in groups])
    for name in sorted({name for t in rewarded for name in t.scores}):
        key = name if name == "accuracy" else f"score/{name}"
        metrics[key] = _mean([t.scores[name] for t in rewarded if name in t.scores])
    failures = Counter(t.outcome for t in answers if t.outcome != "ok")
    return metrics | {f"outcome/{outcome}": float(count) for outcome, count in failures.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
