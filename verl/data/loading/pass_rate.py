"""A curriculum by the pass rates that are measured in the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from verl.data.loading.prompt_sampler import GroupFeedback, PromptSampler, epoch_order, uniforms
from verl.utils.sampling_types import Prompt

# Weight of the newest group in the pass rate of a prompt: old ones are of an older policy.
_NEWEST = 0.5
# Prompts of the window come in turn; each turn is shuffled over this share of it.
_SHUFFLED_SHARE = 0.5


class PassRateWindow(PromptSampler):
    """Draws prompts that the policy answers sometimes: whose pass rate is within a window.

    Prompts that were never tried come first, for a share `untried` of the draws as long as there are any. Of
    the others, a share `retry` is drawn from outside of the window, those drawn the longest ago first, so
    that what was too hard can come back; the rest comes from the window, in turn. Where the window has too
    few, untried prompts take their places, then any that were drawn the longest ago.

    Prompts of intermediate pass rates teach the most: https://arxiv.org/abs/2504.03380. Here the pass rates
    are those of earlier groups, so no answer is sampled only to choose.

    Args:
        prompts: as in `PromptSampler`.
        seed: of random choices.
        shuffle: untried prompts come in a random order, else in the given one.
        low: smallest pass rate of the window, in [0, 1].
        high: largest pass rate of the window, in [0, 1].
        retry: share of the draws among tried prompts that are from outside of the window, in [0, 1].
        untried: share of the draws that are prompts never tried, while there are any, in (0, 1].

    Raises:
        ValueError: an option is out of its bounds.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        shuffle: bool,
        low: float = 0.1,
        high: float = 0.9,
        retry: float = 0.1,
        untried: float = 1.0,
    ) -> None:
        super().__init__(prompts, seed=seed, shuffle=shuffle)
        if not 0 <= low <= high <= 1 or not 0 <= retry <= 1 or not 0 < untried <= 1:
            raise ValueError(
                "need 0 <= low <= high <= 1, 0 <= retry <= 1 and 0 < untried <= 1 in data.curriculum, got "
                f"low {low}, high {high}, retry {retry} and untried {untried}"
            )
        self.low, self.high, self.retry, self.untried = low, high, retry, untried
        self._first = epoch_order(self.num_prompts, seed=seed, epoch=0, shuffle=shuffle)
        self._num_first = 0  # prompts of this order that were drawn
        self._rates = np.full(self.num_prompts, np.nan)
        self._last_drawn = np.full(self.num_prompts, -1, dtype=np.int64)
        self._num_drawn = self._num_chosen = 0
        self._observed: list[float] = []

    @property
    def is_inside(self) -> NDArray[np.bool_]:
        """[num_prompts], True for prompts whose pass rate is in the window."""
        inside: NDArray[np.bool_] = (self._rates >= self.low) & (self._rates <= self.high)
        return inside

    @override
    def draw(self, n: int) -> list[int]:
        num_left = self.num_prompts - self._num_first
        num_old = max(n - num_left, _share(1 - self.untried, self._num_drawn, n))
        drawn = self._tried(num_old)
        num_new = min(n - len(drawn), num_left)
        drawn += self._first[self._num_first : self._num_first + num_new].tolist()
        self._num_first += num_new
        self._note(drawn)
        while len(drawn) < n:  # neither the window nor untried prompts are enough
            others = np.ones(self.num_prompts, dtype=np.bool_)
            others[drawn] = len(drawn) >= self.num_prompts
            further = self._longest_ago(others, n - len(drawn))
            self._note(further)
            drawn += further
        return drawn

    @override
    def observe(self, position: int, feedback: GroupFeedback) -> None:
        rate = feedback.pass_rate
        before = self._rates[position]
        self._rates[position] = rate if math.isnan(before) else before + _NEWEST * (rate - before)
        self._observed.append(rate)

    @override
    def metrics(self) -> dict[str, float]:
        observed, self._observed = self._observed, []
        means = {"curriculum/pass_rate": math.fsum(observed) / len(observed)} if observed else {}
        return means | {
            "curriculum/untried_share": float(np.isnan(self._rates).mean()),
            "curriculum/below_share": float((self._rates < self.low).mean()),
            "curriculum/inside_share": float(self.is_inside.mean()),
            "curriculum/above_share": float((self._rates > self.high).mean()),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "rates": torch.from_numpy(self._rates.copy()),
            "last_drawn": torch.from_numpy(self._last_drawn.copy()),
            "counts": [self._num_first, self._num_drawn, self._num_chosen],
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rates = state["rates"].numpy().copy()
        self._last_drawn = state["last_drawn"].numpy().copy()
        self._num_first, self._num_drawn, self._num_chosen = state["counts"]
        self._observed = []

    def _tried(self, n: int) -> list[int]:
        """Positions of up to n different prompts: of the window, and of a few others with a pass rate."""
        inside, known = self.is_inside, ~np.isnan(self._rates)
        outer = self._longest_ago(known & ~inside, _share(self.retry, self._num_chosen, n))
        self._num_chosen += n
        return [*self._longest_ago(inside, n - len(outer)), *outer]

    def _longest_ago(self, among: NDArray[np.bool_], n: int) -> list[int]:
        """Up to n of these prompts, about those that were drawn the longest ago, in a random order."""
        found = np.flatnonzero(among)
        if not n or not len(found):
            return []
        noise = uniforms(self.seed, self._num_drawn, len(found)) * (_SHUFFLED_SHARE * len(found))
        ordered = found[np.argsort(self._last_drawn[found] + noise, kind="stable")]
        taken: list[int] = ordered[:n].tolist()
        return taken

    def _note(self, drawn: Sequence[int]) -> None:
        for position in drawn:
            self._last_drawn[position] = self._num_drawn
            self._num_drawn += 1


def _share(share: float, before: int, n: int) -> int:
    """Whole number of the next n draws that keeps their share among all."""
    return math.floor((before + n) * share) - math.floor(before * share)
