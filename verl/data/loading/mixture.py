"""Draws from several sources: in the shares of their weights, and metrics for each of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from verl.data.loading.loader import Loader, check_count, check_identity
from verl.data.loading.prompt_sampler import GroupFeedback, uniforms
from verl.data.loading.prompt_sequence import PromptSequence
from verl.utils.sampling_types import Prompt


@dataclass(frozen=True)
class SourceTable:
    """The source of each prompt, by its index.

    Indices below the last of `ends` are those of rows that are all known, source by source; of streams, rows
    have further indices in turn.

    Attributes:
        names: of the sources, all different; those of streams at the end.
        ends: for each source whose rows are known, the first index behind it.
    """

    names: tuple[str, ...]
    ends: tuple[int, ...]

    def number_of(self, index: int) -> int:
        """Number of the source of a prompt."""
        known = len(self.ends)
        first = self.ends[-1] if known else 0
        if index < first:
            return bisect_right(self.ends, index)
        return known + (index - first) % (len(self.names) - known)

    def first_index(self, number: int) -> int:
        """Index of the first row of a stream; the next ones follow in steps of the number of streams."""
        return (self.ends[-1] if self.ends else 0) + number - len(self.ends)


class SourceMetrics:
    """Metrics of each source: share of the prompts drawn so far, and rewards since the last call.

    Args:
        table: of the sources.
    """

    def __init__(self, table: SourceTable) -> None:
        self.table = table
        self.drawn = [0] * len(table.names)
        self._values: dict[str, list[float]] = {}

    def observe(self, prompt: Prompt, feedback: GroupFeedback) -> None:
        """Take up the rewards of a group."""
        name = self.table.names[self.table.number_of(prompt.index)]
        self._values.setdefault(f"source/{name}/reward", []).extend(feedback.rewards)
        self._values.setdefault(f"source/{name}/accuracy", []).extend(feedback.accuracies)

    def take(self) -> dict[str, float]:
        """The metrics; rewards are means over the answers."""
        values, self._values = self._values, {}
        total = sum(self.drawn)
        shares = zip(self.table.names, self.drawn, strict=True)
        return {f"source/{name}/share": count / total for name, count in shares if total} | {
            name: math.fsum(of_name) / len(of_name) for name, of_name in values.items() if of_name
        }


class ConcatenatedLoader(Loader):
    """Draws of a loader of several sources without weights, with metrics for each source.

    Args:
        loader: of all prompts.
        table: of their sources.
    """

    def __init__(self, loader: Loader, table: SourceTable) -> None:
        self._loader, self._metrics = loader, SourceMetrics(table)

    @property
    @override
    def prompts(self) -> Sequence[Prompt]:
        return self._loader.prompts

    @property
    @override
    def num_prompts(self) -> int | None:
        return self._loader.num_prompts

    @property
    @override
    def epochs(self) -> float | None:
        return self._loader.epochs

    @override
    def take(self, n: int) -> list[Prompt]:
        taken = self._loader.take(n)
        for prompt in taken:
            self._metrics.drawn[self._metrics.table.number_of(prompt.index)] += 1
        return taken

    @override
    def prompt(self, index: int) -> Prompt | None:
        return self._loader.prompt(index)

    @override
    def observe(self, prompt: Prompt, feedback: GroupFeedback) -> None:
        self._loader.observe(prompt, feedback)
        self._metrics.observe(prompt, feedback)

    @override
    def take_metrics(self) -> dict[str, float]:
        return self._loader.take_metrics() | self._metrics.take()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict() | {"drawn": list(self._metrics.drawn)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state)
        self._metrics.drawn = list(state.get("drawn", self._metrics.drawn))


class MixedLoader(Loader):
    """Draws from several sources, whose shares of the prompts follow their weights.

    After t draws, a source of share w has given w t prompts up to one: the draws are those of R. Tijdeman,
    The chairman assignment problem, Discrete Mathematics 32 (1980). Where several sources could be next, the
    seed decides. Each source has its own order, epochs and curriculum.

    Args:
        loaders: of each source.
        weights: of each source, above 0.
        table: of the sources.
        seed: of the choice between sources, at least 0.
    """

    def __init__(
        self, loaders: Sequence[Loader], weights: Sequence[float], table: SourceTable, *, seed: int
    ) -> None:
        self._loaders, self.seed = list(loaders), seed
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self._metrics = SourceMetrics(table)

    @property
    @override
    def prompts(self) -> Sequence[Prompt]:
        return JoinedPrompts([loader.prompts for loader in self._loaders])

    @property
    @override
    def num_prompts(self) -> int | None:
        sizes = [loader.num_prompts for loader in self._loaders]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    @override
    def epochs(self) -> float | None:
        """Prompts drawn, divided by the prompts of all sources; None with a stream that has not ended yet."""
        size = self.num_prompts
        return None if size is None else sum(self._metrics.drawn) / size

    @override
    def take(self, n: int) -> list[Prompt]:
        check_count(n)
        numbers = [self._next_source() for _ in range(n)]
        taken = {number: iter(self._loaders[number].take(k)) for number, k in Counter(numbers).items()}
        return [next(taken[number]) for number in numbers]

    @override
    def prompt(self, index: int) -> Prompt | None:
        return self._loaders[self._metrics.table.number_of(index)].prompt(index)

    @override
    def observe(self, prompt: Prompt, feedback: GroupFeedback) -> None:
        self._loaders[self._metrics.table.number_of(prompt.index)].observe(prompt, feedback)
        self._metrics.observe(prompt, feedback)

    @override
    def take_metrics(self) -> dict[str, float]:
        metrics = self._metrics.take()
        for name, loader in zip(self._metrics.table.names, self._loaders, strict=True):
            metrics |= {} if loader.epochs is None else {f"source/{name}/epoch": loader.epochs}
            metrics |= {f"source/{name}/{key}": value for key, value in loader.take_metrics().items()}
        return metrics

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity,
            "drawn": list(self._metrics.drawn),
            "sources": [loader.state_dict() for loader in self._loaders],
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_identity(state, self._identity)
        self._metrics.drawn = list(state["drawn"])
        for loader, own in zip(self._loaders, state["sources"], strict=True):
            loader.load_state_dict(own)

    @property
    def _identity(self) -> dict[str, Any]:
        return {"names": list(self._metrics.table.names), "shares": self.shares, "seed": self.seed}

    def _next_source(self) -> int:
        """Number of the source of the next prompt."""
        drawn, k = self._metrics.drawn, len(self.shares)
        if k == 1:
            drawn[0] += 1
            return 0
        step = sum(drawn) + 1
        slack = 1 / (2 * k - 2)
        owed = [share * step - count for share, count in zip(self.shares, drawn, strict=True)]
        # Rounded: sums of products of equal shares differ in their last bits.
        ready = [i for i in range(k) if round(owed[i] - slack, 9) >= 0]
        ties = uniforms(self.seed, step, k)
        # The one that would be owed too much the soonest.
        chosen = min(ready, key=lambda i: (round((1 - slack - owed[i]) / self.shares[i], 9), ties[i]))
        drawn[chosen] += 1
        return chosen


class JoinedPrompts(PromptSequence):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Prompt]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @override
    def prompt_at(self, position: int) -> Prompt:
        for part in self._parts:
            if position < len(part):
                return part[position]
            position -= len(part)
        raise IndexError(position)
