"""Sampled answers as rows of a table, for people."""

from __future__ import annotations

from typing import Any

from verl.data.batch import Trajectory


def sample_row(trajectory: Trajectory) -> dict[str, Any]:
    """One answer for a table: prompt, response, reference, reward, scores."""
    t = trajectory
    prompt = (
        t.prompt.content if isinstance(t.prompt.content, str) else t.prompt.content[-1].get("content", "")
    )
    logprobs = t.rollout_logprobs or []
    return {
        "prompt": prompt,
        "response": t.text,
        "reference": t.prompt.answer,
        "reward": t.reward,
        "scores": t.scores,
        "truncated": t.truncated,
        "tokens": len(t.response_ids),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "group": t.group,
        "outcome": t.outcome,
    }
