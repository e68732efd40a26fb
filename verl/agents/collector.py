"""Prompts in, rewarded trajectories out: encode, generate, decode, reward, drop what failed, replace dead groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from verl.algorithms.binding import Bound
from verl.data.batch import Batch, Trajectory
from verl.rewards.functions import RewardFunctions, overlong_penalty
from verl.settings import TrainerConfig
from verl.utils.rollout import Completion, Prompt, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tracking import Clock

PromptLike = Prompt | str | list[dict[str, Any]]


@dataclass
class Collected:
    """The answers of one step.

    Attributes:
        trajectories: those that have a reward, groups together.
        rows: the same as a batch.
        metrics: means over all answers that were generated.
    """

    trajectories: list[Trajectory]
    rows: Batch
    metrics: dict[str, float]


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
        length_penalty: Bound | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.engine = engine
        self.dispatched = 0  # prompts ever sent out; the seed of an answer hangs on it, so it belongs into a checkpoint
        self._codec = codec
        self._rewards = rewards
        self._config = config
        self._greedy_baseline = greedy_baseline
        self._by_parts = by_parts
        self._length_penalty = length_penalty
        self._clock = clock or Clock()

    def collect(
        self, prompts: Sequence[PromptLike], *, samples: int, refill: Callable[[int], Sequence[PromptLike]] | None = None
    ) -> Collected:
        """Answers every prompt `samples` times and rewards the answers.

        Args:
            prompts: texts, chat messages or `Prompt`s.
            samples: answers per prompt.
            refill: gives n more prompts; with it and `algorithm.dynamic_sampling`, groups without any spread of rewards
                are replaced, at most `algorithm.max_resamples` times.

        Raises:
            RuntimeError: no answer has a reward, or too many have none.
        """
        algorithm = self._config.algorithm
        everything = groups = self._groups(prompts, samples, first=0)
        alive = [g for g in groups if not is_dead(g, by_parts=self._by_parts)] if algorithm.dynamic_sampling and refill else groups
        draws = 0
        while refill and len(alive) < len(prompts) and algorithm.dynamic_sampling and draws < algorithm.max_resamples:
            draws += 1
            groups = self._groups(refill(len(prompts) - len(alive)), samples, first=len(everything))
            everything = [*everything, *groups]
            alive += [g for g in groups if not is_dead(g, by_parts=self._by_parts)]
        kept = [t for group in (alive or everything) for t in group if t.outcome == "ok"]
        if not kept:
            raise RuntimeError("no answer of this step has a reward, so there is nothing to learn from; see the outcomes in the samples")
        metrics = collection_metrics(everything, by_parts=self._by_parts) | {"resample_draws": float(draws)}
        return Collected(kept, Batch.from_trajectories(kept), metrics)

    def answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[list[Trajectory]]:
        """One group of rewarded trajectories per prompt."""
        with self._clock.phase("generate"):
            ids = [self._codec.encode_prompt(p) for p in prompts]
            answers = self.engine.generate(ids, params)
        groups = [
            [self._trajectory(prompt, prompt_ids, answer, wanted, group) for answer in completions]
            for group, (prompt, prompt_ids, completions, wanted) in enumerate(zip(prompts, ids, answers, params, strict=True))
        ]
        if self._rewards:
            with self._clock.phase("reward"):
                self._rewards.score([t for group in groups for t in group])
        return groups

    def _groups(self, prompts: Sequence[PromptLike], samples: int, *, first: int) -> list[list[Trajectory]]:
        """Rewarded groups for training, numbered from `first`, with length shaping and greedy baselines."""
        asked = [as_prompt(p, i) for i, p in enumerate(prompts)]
        sampling = sampling_params(self._config, samples)
        params = [replace(sampling, seed=(self._config.seed << 32) + self.dispatched + i) for i in range(len(asked))]
        self.dispatched += len(asked)
        groups = self.answer(asked, params)
        for number, group in enumerate(groups, start=first):
            # First: which answers are right is not yet hidden by the overlong penalty.
            self._compare_lengths(group)
            for trajectory in group:
                trajectory.group = number
                self._shape_length(trajectory)
        if self._greedy_baseline:
            self._write_greedy(asked, params, groups)
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

    def _write_greedy(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], groups: Sequence[Sequence[Trajectory]]) -> None:
        """Notes the reward of the most likely answer to each prompt; without it, its group cannot be used."""
        greedy = self.answer(prompts, [replace(p, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, n=1) for p in params])
        for (baseline,), group in zip(greedy, groups, strict=True):
            self._shape_length(baseline)
            for trajectory in group:
                trajectory.greedy_reward = baseline.reward
                if baseline.reward is None and trajectory.outcome == "ok":
                    trajectory.outcome, trajectory.detail = "no_baseline", f"the greedy answer has no reward: {baseline.detail}"

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

    def _trajectory(self, prompt: Prompt, prompt_ids: list[int], answer: Completion, params: SamplingParams, group: int) -> Trajectory:
        length = len(answer.token_ids)
        return Trajectory(
            prompt,
            prompt_ids,
            answer.token_ids,
            [True] * length,
            answer.logprobs,
            [answer.version] * length if answer.versions is None else list(answer.versions),
            group,
            truncated=answer.finish_reason == "length",
            text=self._codec.answer_text(answer.token_ids, params.stop) if answer.text is None else answer.text,
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


def is_dead(group: Sequence[Trajectory], *, by_parts: bool = False) -> bool:
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
        metrics["dead_groups_share"] = _mean([is_dead(g, by_parts=by_parts) for g in groups])
    for name in sorted({name for t in rewarded for name in t.scores}):
        key = name if name == "accuracy" else f"score/{name}"
        metrics[key] = _mean([t.scores[name] for t in rewarded if name in t.scores])
    failures = Counter(t.outcome for t in answers if t.outcome != "ok")
    return metrics | {f"outcome/{outcome}": float(count) for outcome, count in failures.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
