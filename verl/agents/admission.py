"""Which groups may be asked for, which make a batch, and which are aborted: the arithmetic of staleness,
without waiting for anything.
"""

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

    At version v of the policy, with b batches taken of B groups each, at most (v + max_staleness + 1 - b) B +
    oversample groups are outstanding, and none if that is for no batch: AReaL,
    https://arxiv.org/abs/2505.24298, equation 3. As each version is followed by one batch, a group that was
    admitted at version v is then needed for the batch of version v + max_staleness at the latest.

    Attributes:
        prompts_per_step: B, groups of a batch.
        max_staleness: steps between the version that learns from a token and the one that sampled it, at
            most.
        oversample: groups beyond those that are needed; as many may be aborted in a step.
        in_order: batches are of the oldest groups, whichever are complete first.
    """

    prompts_per_step: int
    max_staleness: int = 0
    oversample: int = 0
    in_order: bool = False

    def room(self, version: int, *, batches: int, outstanding: int) -> int:
        """Groups that may be admitted now."""
        ahead = version + self.max_staleness + 1 - batches
        return max(0, ahead * self.prompts_per_step + self.oversample - outstanding) if ahead > 0 else 0

    def chosen(self, groups: Sequence[Outstanding], version: int, *, left: int) -> list[int]:
        """Numbers of complete groups for the batch of a version that still needs `left`, those that were
        complete first in front.

        One is passed over if its place is needed by a group that is not complete: of those that may be
        trained on up to version v + k, no more may be left than k batches hold (and `oversample`). So slow
        groups are waited for rather than thrown away.
        """
        ready = sorted(
            (group for group in groups if group.arrival is not None), key=lambda group: group.arrival or 0
        )
        if self.in_order:
            first = min((group.number for group in groups if group.arrival is None), default=None)
            return sorted(group.number for group in ready if first is None or group.number < first)[:left]
        last = {
            group.number: max(0, group.oldest + self.max_staleness - version) for group in groups
        }  # batch that it may be in, from now
        needed = [
            min(
                left,
                max(
                    0,
                    sum(batch <= k for batch in last.values()) - k * self.prompts_per_step - self.oversample,
                ),
            )
            for k in range(self.max_staleness + 1)
        ]
        taken: list[int] = []
        for group in ready:
            after = [max(0, count - (last[group.number] <= k)) for k, count in enumerate(needed)]
            if left - 1 >= max(after):
                left, needed = left - 1, after
                taken.append(group.number)
        return taken

    def too_late(self, groups: Sequence[Outstanding], version: int) -> list[int]:
        """Numbers of those that the batch of a version has left out and no later one may have."""
        return [group.number for group in groups if group.oldest <= version - self.max_staleness]

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
