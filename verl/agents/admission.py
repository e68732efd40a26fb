"""Which groups may be asked for, which make a batch, and which are aborted: the arithmetic of staleness, without waiting for anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Outstanding(Protocol):
    """A group that was admitted and not yet trained on.

    Attributes:
        number: of the group, in the order of admission.
        oldest: version of the policy that sampled its oldest token, or can have.
        arrival: its place among the groups that are complete; None: it is in flight.
    """

    number: int
    oldest: int
    arrival: int | None


@dataclass(frozen=True)
class Admission:
    """How far generation may be ahead.

    At version v of the policy, with b batches taken of B groups each, at most (v + max_staleness + 1 - b) B + oversample groups are
    outstanding: AReaL, https://arxiv.org/abs/2505.24298, equation 3. As each version is followed by one batch, a group that was admitted
    at version v is then needed for the batch of version v + max_staleness at the latest.

    Attributes:
        prompts_per_step: B, groups of a batch.
        max_staleness: steps between the version that learns from a token and the one that sampled it, at most.
        oversample: groups beyond those that are needed; as many may be aborted in a step.
        in_order: batches are of the oldest groups, whichever are complete first.
    """

    prompts_per_step: int
    max_staleness: int = 0
    oversample: int = 0
    in_order: bool = False

    def room(self, version: int, *, batches: int, outstanding: int) -> int:
        """Groups that may be admitted now."""
        return max(0, (version + self.max_staleness + 1 - batches) * self.prompts_per_step + self.oversample - outstanding)

    def is_due(self, group: Outstanding, version: int) -> bool:
        """Whether it is too stale for any batch after that of this version."""
        return group.oldest <= version - self.max_staleness

    def chosen(self, groups: Sequence[Outstanding], version: int, *, left: int) -> list[int]:
        """Numbers of complete groups for the batch of a version that still needs `left`; those that are due keep their place in it.

        Complete ones that are due come first, then those that were complete first. Places of groups that are due and in flight are
        kept free, but for `oversample` of them.
        """
        ready = [group for group in groups if group.arrival is not None]
        if self.in_order:
            in_flight = [group.number for group in groups if group.arrival is None]
            ready = [group for group in ready if not in_flight or group.number < min(in_flight)]
            return sorted(group.number for group in ready)[:left]
        late = sum(self.is_due(group, version) and group.arrival is None for group in groups)
        due = [group for group in ready if self.is_due(group, version)]
        other = sorted((group for group in ready if group not in due), key=lambda group: group.arrival or 0)
        room = max(0, left - len(due) - max(0, late - self.oversample))
        return [group.number for group in [*sorted(due, key=lambda group: group.number)[:left], *other[:room]]]

    def too_late(self, groups: Sequence[Outstanding], version: int) -> list[int]:
        """Numbers of those that the batch of a version has left out and no later one may have."""
        return [group.number for group in groups if self.is_due(group, version)]

    def check(self, groups: Sequence[Outstanding], version: int) -> None:
        """Refuses that a version is published which makes some of the groups too stale.

        Raises:
            RuntimeError: it does.
        """
        stale = [group for group in groups if group.oldest < version - self.max_staleness]
        if stale:
            told = ", ".join(f"{group.number} of version {group.oldest}" for group in stale[:5])
            raise RuntimeError(
                f"need groups of at most {self.max_staleness} steps before version {version}, got {told}; this is a fault of the pipeline"
            )
