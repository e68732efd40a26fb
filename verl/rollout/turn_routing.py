"""Turns of episodes over the ranks that generate: a turn goes to the rank that has its history."""

from __future__ import annotations

from collections.abc import Sequence

from verl.rollout.embedded.prefix_cache import PrefixIndex
from verl.utils.sampling_types import SampleRequest, groups_of

# Of the histories whose ranks are remembered, 16 MiB.
_MAX_TOKENS = 1 << 22


class TurnRouting:
    """Assigns requests to ranks: a history that begins with an earlier one to its rank, others evenly.

    Requests for consecutive answers to one prompt go to one rank, which computes the prompt once.

    Args:
        num_ranks: that generate by themselves; ranks that generate together count as one.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        # Rank of each, and tokens of the first prompt of its episode, which its siblings share.
        self._histories: PrefixIndex[tuple[int, int]] = PrefixIndex(_MAX_TOKENS)
        self._rank_of: dict[int, int] = {}  # of each request in generation
        self._loads = [0] * num_ranks

    def assign(self, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
        """New requests of each rank."""
        assigned: list[list[SampleRequest]] = [[] for _ in range(self._num_ranks)]
        for group in groups_of(requests):
            rank = self._rank_for(group[0])
            assigned[rank] += group
            self._rank_of |= dict.fromkeys((request.number for request in group), rank)
            self._loads[rank] += len(group)
        return assigned

    def forget(self, numbers: Sequence[int]) -> list[list[int]]:
        """Requests of each rank that are answered, or that nobody waits for any more."""
        by_rank: list[list[int]] = [[] for _ in range(self._num_ranks)]
        for number in numbers:
            if (rank := self._rank_of.pop(number, None)) is not None:
                by_rank[rank].append(number)
                self._loads[rank] -= 1
        return by_rank

    def _rank_for(self, request: SampleRequest) -> int:
        if self._num_ranks == 1:
            return 0
        found = self._histories.find(request.prompt_ids)
        if found is not None and found.length >= found.value[1]:
            rank, first = found.value
        else:  # another prompt, which may have the same system message
            rank, first = self._loads.index(min(self._loads)), len(request.prompt_ids)
        if not self._histories.has(request.prompt_ids):
            self._histories.keep(request.prompt_ids, (rank, first))
        return rank
