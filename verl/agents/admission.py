"""The arithmetic of staleness: groups that may be admitted, that make a batch, and that are aborted; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Outstanding(Protocol):
    """A group that was admitted and not yet trained on.

    Attributes:
        number: of the group, in the order of admission.
        oldest: version of the policy that sampled its oldest token, or may sample it.
        arrival: its place among the groups that are complete; None: it is in flight.
    """

    number: int
    oldest: int
    arrival: int | None


@dataclass(frozen=True)
class Admission:
    """Bound on how far generation runs ahead of training.

    At version v of the policy, with b batches taken of B groups each, at most (v + max_staleness + 1 - b) B +
    oversample groups are outstanding, and none if that is for no batch: AReaL,
    https://arxiv.org/abs/2505.24298, equation 3. As each version is followed by one batch, a group that was
    admitted at version v is then needed for the batch of version v + max_staleness at the latest.

    Attributes:
        prompts_per_step: B, groups of a batch.
        max_staleness: most steps between the version that learns from a token and the one that sampled it.
        oversample: groups beyond those that are needed; as many may be aborted in a step.
        in_order: a batch has the oldest groups, whichever are complete first.
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
        """Numbers of complete groups for a batch that still needs `left`, the first complete ones first.

        A complete group is passed over if a group in flight needs its place: of the groups that may be
        trained on up to version v + k, no more may be left than k batches hold (and `oversample`). So the
        batch waits for slow groups instead of dropping them.
        """
        ready = sorted(
            (group for group in groups if group.arrival is not None), key=lambda group: group.arrival or 0
        )
        if self.in_order:
            first = min((group.number for group in groups if group.arrival is None), default=None)
            return sorted(group.number for group in ready if first is None or group.number < first)[:left]
        # The last batch that each group may be in, counted from this one.
        last = {group.number: max(0, group.oldest + self.max_staleness - version) for group in groups}
        needed = []
        for k in range(self.max_staleness + 1):
            num_due = sum(batch <= k for batch in last.values())
            needed.append(min(left, max(0, num_due - k * self.prompts_per_step - self.oversample)))
        taken: list[int] = []
        for group in ready:
            after = [max(0, count - (last[group.number] <= k)) for k, count in enumerate(needed)]
            if left - 1 >= max(after):
                left, needed = left - 1, after
                taken.append(group.number)
        return taken

    def too_late(self, groups: Sequence[Outstanding], version: int) -> list[int]:
        """Numbers of groups that the batch of a version left out and that no later batch may have."""
        return [group.number for group in groups if group.oldest <= version - self.max_staleness]

    def check(self, groups: Sequence[Outstanding], version: int) -> None:
        """Check that no group becomes too stale by a new version.

        Raises:
            RuntimeError: one does.
        """
        stale = [group for group in groups if group.oldest < version - self.max_staleness]
        if stale:
            told = ", ".join(f"{group.number} of version {group.oldest}" for group in stale[:5])
            raise RuntimeError(
                f"need groups of at most {self.max_staleness} steps before version {version}, got {told}; "
                "this "
                "is a fault of the pipeline"
            )
