"""Endless draws from prompts that are all known, in the order of epochs or of a curriculum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from verl.config.fields import Choice
from verl.data.loading.curricula import build_sampler
from verl.data.loading.loader import Loader, check_count, check_identity
from verl.data.loading.prompt_sampler import EpochSampler, GroupFeedback
from verl.data.loading.prompt_store import index_at
from verl.utils.sampling_types import Prompt

_EPOCHS = Choice(name="off")


class PromptLoader(Loader):
    """Endless draws of prompts; without a curriculum epoch after epoch, each prompt once per epoch.

    Args:
        prompts: at least one.
        seed: of the order, at least 0.
        shuffle: draw a new random order in each epoch; else the given order.
        curriculum: `data.curriculum`.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, curriculum: Choice = _EPOCHS
    ) -> None:
        if not prompts:
            raise ValueError("need at least one prompt to draw from, got none")
        self._prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._curriculum = curriculum
        self.sampler = build_sampler(curriculum, prompts, seed=seed, shuffle=shuffle)
        self._num_drawn = 0

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return len(self._prompts)

    @property
    @override
    def prompts(self) -> Sequence[Prompt]:
        return self._prompts

    @property
    @override
    def num_prompts(self) -> int:
        return len(self._prompts)

    @override
    def take(self, n: int) -> list[Prompt]:
        check_count(n)
        drawn = self.sampler.draw(n)
        if len(drawn) != n or not all(0 <= i < len(self) for i in drawn):
            raise ValueError(
                f"need {n} positions from 0 to {len(self) - 1} from data.curriculum {self._curriculum.name}, "
                f"got {drawn[:10]}; correct its method draw"
            )
        self._num_drawn += n
        return [self._prompts[i] for i in drawn]

    @property
    @override
    def epochs(self) -> float:
        return self._num_drawn / len(self)

    @override
    def prompt(self, index: int) -> Prompt | None:
        position = self._position(index)
        return None if position is None else self._prompts[position]

    @override
    def observe(self, prompt: Prompt, feedback: GroupFeedback) -> None:
        if type(self.sampler) is EpochSampler:
            return
        position = self._position(prompt.index)
        if position is not None:
            self.sampler.observe(position, feedback)

    @override
    def take_metrics(self) -> dict[str, float]:
        return self.sampler.metrics()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Position in the order, and everything that the order depends on.

        JSON values only, unless a curriculum has others.
        """
        if type(self.sampler) is EpochSampler:
            return self.sampler.state_dict() | self._identity
        return {"sampler": self.sampler.state_dict(), "num_drawn": self._num_drawn} | self._identity

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = {"curriculum": None} | self._identity
        # Checkpoints of earlier versions do not know the columns that rewards read.
        check_identity(state, {key: value for key, value in own.items() if key != "columns" or key in state})
        if isinstance(self.sampler, EpochSampler) and "sampler" not in state:
            self.sampler.load_state_dict(state)
            self._num_drawn = self.sampler.epoch * len(self) + self.sampler.position
            return
        self.sampler.load_state_dict(state["sampler"])
        self._num_drawn = state["num_drawn"]

    def _position(self, index: int) -> int | None:
        """Position of the prompt with this `Prompt.index`."""
        indices, positions = self._sorted_indices
        found = int(np.searchsorted(indices, index))
        return int(positions[found]) if found < len(indices) and indices[found] == index else None

    @cached_property
    def _sorted_indices(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All values of `Prompt.index` in ascending order, and the position of each."""
        count = len(self)
        indices = np.fromiter((index_at(self._prompts, i) for i in range(count)), np.int64, count)
        positions = np.argsort(indices, kind="stable")
        return indices[positions], positions

    @cached_property
    def _identity(self) -> dict[str, Any]:
        digest, columns = hashlib.sha256(), hashlib.sha256()
        for prompt in self._prompts:
            own = [part for part in (prompt.tools, prompt.sampling) if part]
            facts = [prompt.content, prompt.answer, prompt.source, *own]
            facts += [] if prompt.reward is None else [prompt.reward.model_dump()]
            digest.update(_stable_json(facts).encode() + b"\n")
            columns.update(_stable_json(prompt.columns).encode() + b"\n")
        curriculum = {} if self._curriculum.name == "off" else {"curriculum": self._curriculum.model_dump()}
        return {
            "num_prompts": len(self._prompts),
            "fingerprint": digest.hexdigest()[:16],
            "columns": columns.hexdigest()[:16],
            "seed": self.seed,
            "shuffle": self.shuffle,
            **curriculum,
        }


def _stable_json(facts: Any) -> str:
    """JSON text of facts; a dict whose keys JSON does not know is a list of pairs."""
    try:
        return json.dumps(facts, default=_stable_text)
    except TypeError:
        return json.dumps(_with_pairs(facts), default=_stable_text)


def _with_pairs(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [[_with_pairs(key), _with_pairs(item)] for key, item in value.items()]
    return [_with_pairs(item) for item in value] if isinstance(value, list | tuple) else value


def _stable_text(value: Any) -> str:
    """Stand-in for a value that JSON does not know: a hash of bytes, else the name of the type."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else type(value).__name__
