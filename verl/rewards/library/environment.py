"""The reward that the environment or the program of an episode gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.data.trajectory import Trajectory


def environment(trajectory: Trajectory) -> dict[str, Any]:
    """Reward of the environment or program of an episode, with the rewards of its turns.

    The rewards of turns are added to that of the whole episode.

    Raises:
        ValueError: the answer is no episode, or it was given no reward.
    """
    episode = trajectory.episode
    if episode is None:
        raise ValueError(
            "need an episode for the reward of its environment, got a single answer; set agent.environment "
            "or agent.program"
        )
    if episode.reward is None and not episode.turn_rewards:
        raise ValueError(
            "the environment or program gave no reward; let it return one, or name functions in "
            "rewards.functions"
        )
    reward = episode.reward if episode.reward is not None else 0.0
    named = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    return {**named, "turn_rewards": list(episode.turn_rewards)} if episode.turn_rewards else named
