"""Trajectories: one answer with all its turns, and the record of its episode."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl.utils.sampling_types import Completion, Prompt


@dataclass
class Segment:
    """Tokens of an episode whose history was not rewritten on the way; each segment is a row of a batch.

    Attributes:
        prompt_ids: tokens before the first answer.
        response_ids: every token after these, those of tools and environment included.
        response_mask: True where the policy sampled the token.
        rollout_logprobs: of the sampling distribution, 0 where masked; None if the answer came as text.
        versions: policy version that sampled each token.
        states: number of the environment's state before the turn of each token, see `state_number`; 0 where
            masked; empty: there is no environment.
    """

    prompt_ids: list[int]
    response_ids: Sequence[int]
    response_mask: list[bool]
    rollout_logprobs: Sequence[float] | None
    versions: list[int]
    states: list[int] = field(default_factory=list)


@dataclass
class EpisodeRecord:
    """Messages, ending and counts of an episode, for rewards, readers and fine-tuning; plain values alone.

    Attributes:
        messages: the whole conversation, the prompt's messages included, results of tools as role `tool`.
        tools: schemas of the tools that were offered.
        ending: answer (the policy ended it), environment (it is over), or the limit that ended it, see
            `agent.endings`.
        reward: of the environment or program, as reward functions return it; None: it gave none.
        turn_rewards: of the environment, one for each turn; empty: it gave none.
        counts: numbers by name: turns, calls, calls of each failure, tokens by source, prompt tokens that
            were computed and reused, seconds in tools; averaged over episodes.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    ending: str = "answer"
    reward: float | Mapping[str, Any] | None = None
    turn_rewards: list[float] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)


@dataclass
class Trajectory:
    """One answer with all its turns.

    Attributes:
        prompt: the question.
        prompt_ids: its tokens.
        response_ids: every token after the prompt, those of the environment included.
        response_mask: True where the policy sampled the token; only those are trained on.
        rollout_logprobs: of the sampling distribution, 0 where masked; None if the answer came as text.
        versions: policy version that sampled each token.
        group: number of its prompt within the step; siblings share it.
        truncated: cut off at the length limit.
        text: the decoded answer, for rewards and human readers; never tokenized again.
        reward: weighted sum of the scores; None until rewarded.
        scores: value of each reward function, and `accuracy` where it has one.
        turn_rewards: part of the reward for each turn, in order; a turn is a run of sampled tokens.
        parts: weight and value of each reward function, in the order of the settings; (0, 0) for one that
            does not apply.
        greedy_reward: of the most likely answer to the same prompt, if an advantage reads it.
        extras: what reward functions log for the table of samples: numbers and texts by name.
        logged: metrics that reward functions log for the rows of their call.
        outcome: "ok", or why there is no reward, e.g. "reward_timeout".
        detail: human-readable cause of another outcome than "ok".
        earlier: segments before the last one, whose tokens are the trajectory's own; a new one begins where
            the history was rewritten, as when an agent shortens its context.
        episode: its messages, tools and counts; None: a single answer.
        is_last_segment: False for a row of an earlier segment.
        states: as in `Segment`.
    """

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: Sequence[int]
    response_mask: list[bool]
    rollout_logprobs: Sequence[float] | None
    versions: list[int]
    group: int
    truncated: bool = False
    text: str = ""
    reward: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] = field(default_factory=list)
    parts: list[tuple[float, float]] = field(default_factory=list)
    greedy_reward: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    outcome: str = "ok"
    detail: str = ""
    earlier: list[Segment] = field(default_factory=list)
    episode: EpisodeRecord | None = None
    is_last_segment: bool = True
    states: list[int] = field(default_factory=list)

    @classmethod
    def begin(cls, prompt: Prompt, prompt_ids: Sequence[int], *, group: int) -> Trajectory:
        """A trajectory without an answer yet, for `add_turn` and `add_observation`."""
        return cls(prompt, [*prompt_ids], [], [], [], [], group)

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, those that the next turn continues."""
        return [*self.prompt_ids, *self.response_ids]

    def add_turn(self, completion: Completion) -> None:
        """Append tokens that the policy sampled, which are trained on."""
        count = len(completion.token_ids)
        assert completion.logprobs is not None, "need an engine that gives tokens with their logprobs"
        self._extend(completion.token_ids, completion.logprobs, mask=True)
        self.versions += completion.versions or [completion.version] * count

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the environment wrote, which are not trained on."""
        self._extend(token_ids, [0.0] * len(token_ids), mask=False)
        self.versions += [self.versions[-1] if self.versions else 0] * len(token_ids)

    @property
    def num_turns(self) -> int:
        """Runs of sampled tokens, of all segments."""
        return sum(len(turn_ends(row)) for row in self.rows())

    @property
    def num_response_tokens(self) -> int:
        """Tokens behind the prompts of all segments."""
        return len(self.response_ids) + sum(len(segment.response_ids) for segment in self.earlier)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that the policy sampled; all of a single answer, masked or not."""
        if self.episode is None:
            return self.num_response_tokens
        return sum(sum(row.response_mask) for row in self.rows())

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts of all segments."""
        return len(self.prompt_ids) + sum(len(segment.prompt_ids) for segment in self.earlier)

    @property
    def all_versions(self) -> list[int]:
        """Policy versions of the tokens of all segments."""
        return [*(v for segment in self.earlier for v in segment.versions), *self.versions]

    def rows(self) -> list[Trajectory]:
        """A trajectory for each segment, with the rewards of its own turns; itself if there is one alone."""
        if not self.earlier:
            return [self]
        rows, rewards = [], list(self.turn_rewards)
        own = Segment(
            self.prompt_ids,
            self.response_ids,
            self.response_mask,
            self.rollout_logprobs,
            self.versions,
            self.states,
        )
        for segment in (*self.earlier, own):
            row = replace(self, **vars(segment), earlier=[], is_last_segment=segment is own)
            count = len(turn_ends(row))
            row.turn_rewards, rewards = rewards[:count], rewards[count:]
            rows.append(row)
        rows[-1].turn_rewards += rewards  # more rewards than turns are reported there
        return rows

    def mask_all(self) -> None:
        """Leave all tokens out of training; the reward still counts in comparisons with siblings."""
        self.response_mask = [False] * len(self.response_mask)
        for segment in self.earlier:
            segment.response_mask = [False] * len(segment.response_mask)

    def _extend(self, token_ids: Sequence[int], logprobs: Sequence[float], *, mask: bool) -> None:
        self.response_ids = [*self.response_ids, *token_ids]
        self.rollout_logprobs = [*(self.rollout_logprobs or ()), *logprobs]
        self.response_mask += [mask] * len(token_ids)


def state_number(state: str) -> int:
    """Number of 63 bits that stands for a state, the same in every process and run."""
    digest = hashlib.blake2b(state.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def turn_ends(trajectory: Trajectory) -> list[int]:
    """Position of the last token of each turn; a turn is a run of sampled tokens."""
    mask = trajectory.response_mask
    return [i for i, sampled in enumerate(mask) if sampled and (i + 1 == len(mask) or not mask[i + 1])]


def at_turn_ends(trajectory: Trajectory) -> list[float]:
    """The reward of each turn at its last token, 0 at the other tokens of the response.

    A trajectory that is masked as a whole has no turns, and its rewards of turns are left out.

    Raises:
        ValueError: more or fewer rewards than turns.
    """
    mask, ends = trajectory.response_mask, turn_ends(trajectory)
    rewards = trajectory.turn_rewards or [0.0] * len(ends)
    if ends and len(rewards) != len(ends):
        raise ValueError(
            f"need a reward for each of {len(ends)} turns, got {len(rewards)}; give 0 to a turn without one"
        )
    placed = [0.0] * len(mask)
    for end, reward in zip(ends, rewards, strict=False):
        placed[end] = reward
    return placed
