"""Rows of the table of sampled answers."""

from __future__ import annotations

from typing import Any

from verl.data.batch import Trajectory


def sample_row(trajectory: Trajectory) -> dict[str, Any]:
    """One answer as a row: prompt, response, reference answer, reward, scores and sizes."""
    t = trajectory
    content = t.prompt.content
    logprobs = t.rollout_logprobs or []
    return {
        "prompt": content if isinstance(content, str) else content[-1].get("content", ""),
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
