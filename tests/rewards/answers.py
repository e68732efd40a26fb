"""Answers and reward functions that tests of rewards share."""

from __future__ import annotations

import asyncio

from verl.data.trajectory import Trajectory
from verl.rewards.functions import RewardFunctions
from verl.rewards.reward_function import RewardFunction
from verl.utils.sampling_types import Prompt

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]


def rows(*texts, content="q", answer="a", **columns):
    prompt = Prompt(content, answer=answer, source="set", columns=columns)
    return [Trajectory(prompt, [1], [5, 6], [True, True], None, [0, 0], 0, text=text) for text in texts]


def rewards_of(*functions, timeout_s=5.0, max_failed_share=1.0):
    wrapped = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
    return RewardFunctions(wrapped, timeout_s=timeout_s, max_failed_share=max_failed_share)


def scored(trajectories, *functions, **limits):
    functions_of_run = rewards_of(*functions, **limits)
    functions_of_run.score(trajectories)
    functions_of_run.close()
    return trajectories


def length(prompt, response):
    return len(response)


async def slow_length(prompt, response):
    await asyncio.sleep(0.01)
    return len(response)


def by_trajectory(trajectory):
    return len(trajectory.text)


async def by_trajectory_async(trajectory):
    return len(trajectory.text)


def batched(prompts, completions, **columns):
    return [len(c) for c in completions]


async def batched_async(completions, **columns):
    return [float(len(c)) for c in completions]
