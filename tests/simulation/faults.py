"""Faults of modelled engines, drawn from a seed at each place that an engine passes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

# Commands of `InferenceServer`.
COMMANDS = ("pause", "resume", "begin_update", "load", "end_update", "check", "sleep", "wake")
# Kinds of faults, and the places where they can happen.
# kill: the process ends, and with it all requests. late: the same, but sent tokens still arrive for a while.
# hang: the process stops and never answers again. silence: one call or stream never answers.
# slow: it takes many times as long, but less than the time limit.
# lost: it is done, but the reply is lost. unheard: it is not even done.
# garbage: a chunk that no policy can sample. torn: some of the loaded weights are not those that were sent.
# twice: a request runs twice, once for nobody.
PLACES: Mapping[str, tuple[str, ...]] = {
    "kill": ("open", "sample", "chunk", *COMMANDS),
    "late": ("chunk", *COMMANDS),
    "hang": ("open", "sample", "chunk", *COMMANDS),
    "silence": ("sample", "chunk", *COMMANDS),
    "slow": ("open", "sample", "chunk", "close", *COMMANDS),
    "lost": ("sample", "chunk", *COMMANDS),
    "unheard": COMMANDS,
    "garbage": ("chunk",),
    "torn": ("load", "end_update"),
    "twice": ("sample",),
}
HARMLESS = ("slow", "twice")


class Faults:
    """Random faults, drawn at each place that an engine passes.

    Args:
        seed: of the random numbers.
        rates: probability of each kind at each of its places.
        limit: faults after which none happens any more; harmless ones do not count.

    Attributes:
        random: source of all random numbers of a run's engines.
        left: faults that may still happen.
        happened: counts by kind and place.
    """

    def __init__(self, seed: int, rates: Mapping[str, float], *, limit: int = 8) -> None:
        self.random = random.Random(seed)
        self.left = limit
        self.happened: Counter[str] = Counter()
        self._by_place = {
            place: [(kind, rate) for kind, rate in rates.items() if place in PLACES[kind]]
            for place in {place for places in PLACES.values() for place in places}
        }
        self._chances = {place: sum(rate for _, rate in kinds) for place, kinds in self._by_place.items()}

    @classmethod
    def of(cls, seed: int, *, limit: int = 8) -> Faults:
        """Some kinds of faults, with different rates: runs of different seeds have different problems."""
        rng = random.Random(seed)
        kinds = [kind for kind in PLACES if rng.random() < 0.5]
        return cls(
            seed, {kind: rng.choice((0.002, 0.01, 0.05)) for kind in kinds}, limit=rng.randint(0, limit)
        )

    @classmethod
    def none(cls) -> Faults:
        """No faults."""
        return cls(0, {})

    def draw(self, place: str) -> str:
        """The fault that happens at a place, or ""."""
        number = self.random.random()
        if number >= self._chances[place]:
            return ""
        for kind, rate in self._by_place[place]:
            number -= rate
            if number < 0 and (kind in HARMLESS or self.left > 0):
                self.left -= kind not in HARMLESS
                self.happened[f"{kind} at {place}"] += 1
                return kind
        return ""
