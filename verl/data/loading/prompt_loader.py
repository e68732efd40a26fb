"""Endless draws of prompts from a list, epoch after epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from verl.utils.sampling_types import Prompt


class PromptLoader:
    """Endless stream of prompts, epoch after epoch, each prompt once per epoch.

    Two loaders with the same prompts, seed and state give the same prompts.

    Args:
        prompts: at least one.
        seed: of the order, at least 0.
        shuffle: draw a new random order in each epoch; else the given order.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ValueError("need at least one prompt to draw from, got none")
        self.prompts = list(prompts)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, across the end of an epoch if need be."""
        if n < 1:
            raise ValueError(f"need to take at least one prompt, got {n}")
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
            upcoming = self._order[self.position : self.position + n - len(taken)]
            taken += [self.prompts[i] for i in upcoming]
            self.position += len(upcoming)
        return taken

    @property
    def epochs(self) -> float:
        """Passes over the prompts so far, such as 1.5 in the middle of the second."""
        return self.epoch + self.position / len(self)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and everything that the order depends on; JSON values only."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the position at which `state_dict` was taken.

        Raises:
            ValueError: the state is of other prompts, another seed or another order, so that prompts would be
                repeated or left out.
        """
        for key, own in self._identity.items():
            if state.get(key) != own:
                raise ValueError(
                    f"need the prompts and the order that the run began with: {key} was {state.get(key)!r} "
                    f"and is {own!r}; restore the data, data.shuffle and seed, or start afresh with "
                    "checkpoint.resume=never"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position <= len(self)
        ):
            raise ValueError(
                f"need an epoch from 0 and a position from 0 to {len(self)}, got {epoch!r} and {position!r}"
            )
        self.epoch, self.position = epoch, position
        self._order = self._epoch_order()

    @cached_property
    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for prompt in self.prompts:
            own = [part for part in (prompt.tools, prompt.sampling) if part]
            facts = [prompt.content, prompt.answer, prompt.source, *own]
            facts += [] if prompt.reward is None else [prompt.reward.model_dump()]
            digest.update(json.dumps(facts, default=_stable_text).encode() + b"\n")
        return {
            "num_prompts": len(self.prompts),
            "fingerprint": digest.hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _epoch_order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        # NumPy promises that the raw bits of a generator never change; of its permutations it does not.
        generator = np.random.Philox(key=np.array([self.seed, self.epoch], dtype=np.uint64))
        order: list[int] = np.argsort(generator.random_raw(len(self.prompts)), kind="stable").tolist()
        return order


def _stable_text(value: Any) -> str:
    """Stand-in for a value that JSON does not know: a hash of bytes, else the name of the type."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__
