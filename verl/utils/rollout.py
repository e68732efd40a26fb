"""Base class of users' own rollout workers, and the prompts that they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.utils.sampling_types import Prompt

__all__ = ["BaseRolloutWorker", "Prompt"]


class BaseRolloutWorker:
    """Base of users' own workers over any inference server: texts in, texts out.

    A subclass defines `generate(prompts, max_tokens=128)`, as a plain method or as a coroutine. The collector
    tokenizes the texts once and marks the trajectories, and the trainer computes their logprobs.
    """

    def generate(self, prompts: Sequence[str], max_tokens: int = 128) -> Any:
        """One text per prompt, in order, or a coroutine that returns them."""
        raise NotImplementedError(
            f"{type(self).__name__} must define generate(prompts, max_tokens=128) -> list of texts"
        )
