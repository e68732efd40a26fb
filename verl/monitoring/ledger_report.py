"""A ledger read back from its file: all is counted anew from the lines of the groups and held against what
the run wrote of itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.monitoring.ledger import LEDGER_FILE, LedgerCounts

_FATES = ("trained", "dropped", "failed")


@dataclass
class LedgerReport:
    """What the file of a run says.

    Attributes:
        step: the last one that was committed.
        counts: ends counted from the lines of the groups; what is under way, and retries, as the last commit
            says.
        steps: what each commit wrote, in their order, without the numbers of the groups.
        open: groups under way at the last commit: number -> answering or waiting.
        missing: groups that were sent out, and of which nothing is known.
        twice: groups that ended twice, or ended and are under way.
        differences: where the lines say other than a commit, or cannot be read.
        causes: the last cause of each class of failures that ended groups.
        retry_causes: the same of failures after which groups that have ended since were tried again.
        staleness: groups trained on, by how many versions the oldest of their tokens was behind the one that
            trained.
        num_before: groups that ended before this file begins, in a run that went on in another folder.
        num_cut_off: lines at the end, of a commit that was cut off; they count for nothing.
    """

    step: int = 0
    counts: LedgerCounts = field(default_factory=LedgerCounts)
    steps: list[dict[str, Any]] = field(default_factory=list)
    open: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    causes: dict[str, str] = field(default_factory=dict)
    retry_causes: dict[str, str] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    num_before: int = 0
    num_cut_off: int = 0

    @property
    def adds_up(self) -> bool:
        """Whether every group is there once, and lines and commits agree."""
        return not (self.missing or self.twice or self.differences)


def read_ledger(folder: Path) -> LedgerReport:
    """Counts the ledger of a run anew.

    A last commit that was cut off, or is being written, is left out and told.

    Raises:
        ValueError: there is none in the folder.
    """
    count = _Count()
    for number, line in _lines(folder):
        count.take(number, line)
    return count.report()


def lines_of_group(folder: Path, number: int) -> list[dict[str, Any]]:
    """The lines on which a group ended: one, unless it has not ended, is missing, or is there twice; last
    commit cut off or not.

    Raises:
        ValueError: there is no ledger in the folder.
    """
    return [line for _, line in _lines(folder) if line is not None and line.get("group") == number]


def _lines(folder: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and content of each line; None for one that cannot be read."""
    try:
        with (folder / LEDGER_FILE).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _parsed(line)
    except OSError as error:
        raise ValueError(
            f"need the output_dir of a run that keeps a ledger, got {folder}: {error}"
        ) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    is_line = (
        isinstance(parsed, dict)
        and isinstance(parsed.get("step"), int)
        and ("group" in parsed or "dispatched" in parsed)
    )
    return parsed if is_line else None


class _Count:
    """Counts one line after the other."""

    def __init__(self) -> None:
        self._found = LedgerReport()
        # Of the commit that is not complete yet.
        self._pending: list[tuple[int, dict[str, Any] | None]] = []
        self._ends: dict[str, Counter[str]] = {fate: Counter() for fate in _FATES}
        # How often each group ended: a byte for each, since a run has millions.
        self._seen = bytearray()
        self._last: Mapping[str, Any] = {}

    def take(self, number: int, line: dict[str, Any] | None) -> None:
        """A group counts once the commit that it belongs to is complete."""
        if line is None or "group" in line:
            self._pending.append((number, line))
        elif line.get("base"):
            self._begin(line)
        else:
            self._close(number, line)

    def _begin(self, base: Mapping[str, Any]) -> None:
        """What was before is another course; groups that are not under way have ended."""
        under_way = {*base["answering_groups"], *base["waiting_groups"]}
        self._found = LedgerReport(num_before=base["dispatched"] - len(under_way))
        self._pending = []
        self._ends = {
            "trained": Counter({"": base["trained"]}),
            "dropped": Counter(base["dropped"]),
            "failed": Counter(base["failed"]),
        }
        self._seen = bytearray(number not in under_way for number in range(base["dispatched"]))
        self._last = base

    def _close(self, number: int, summary: dict[str, Any]) -> None:
        self._seen.extend(bytes(max(0, summary["dispatched"] - len(self._seen))))
        for at, line in self._pending:
            problem = self._count(line, summary)
            if problem:
                self._found.differences.append(f"line {at} {problem}")
        self._pending = []
        told = {"trained": summary["trained"], "dropped": summary["dropped"], "failed": summary["failed"]}
        counted = {
            "trained": self._ends["trained"].total(),
            "dropped": dict(self._ends["dropped"]),
            "failed": dict(self._ends["failed"]),
        }
        if told != counted:
            self._found.differences.append(
                f"line {number}, the sum of step {summary['step']}, says {told}, the groups before it {counted}"
            )
        self._last = summary
        self._found.steps.append(
            {name: value for name, value in summary.items() if not name.endswith("_groups")}
        )

    def _count(self, line: dict[str, Any] | None, summary: Mapping[str, Any]) -> str:
        """Counts a group; what is wrong with its line, if anything is."""
        if line is None:
            return "cannot be read"
        number, fate = line["group"], line.get("fate")
        if fate not in _FATES or not isinstance(number, int):
            return f"is of no fate that there is: {fate!r}"
        if not 0 <= number < summary["dispatched"]:
            return f"is of group {number}, which was never sent out"
        self._mark(number)
        self._ends[fate][line.get("reason") or ""] += 1
        if fate == "failed":
            self._found.causes[line["reason"]] = line.get("cause", "")
        for failure, (_, cause) in line.get("retries", {}).items():
            self._found.retry_causes[failure] = cause
        if fate == "trained" and line.get("versions"):
            self._found.staleness[line["step"] - 1 - line["versions"][0]] += 1
        return (
            ""
            if line["step"] == summary["step"]
            else f"is of step {line['step']}, in the commit of step {summary['step']}"
        )

    def _mark(self, number: int) -> None:
        self._seen[number] = min(self._seen[number] + 1, 2)

    def report(self) -> LedgerReport:
        """What was found, once all lines are taken."""
        found, last = self._found, self._last
        found.num_cut_off = len(self._pending)
        if not last:
            return found
        found.step = last["step"]
        found.open = {n: state for state in ("answering", "waiting") for n in last[f"{state}_groups"]}
        for number in found.open:
            self._mark(number)
        found.missing = [number for number, times in enumerate(self._seen) if times == 0]
        found.twice = [number for number, times in enumerate(self._seen) if times > 1]
        found.counts = LedgerCounts(
            last["dispatched"],
            len(last["answering_groups"]),
            len(last["waiting_groups"]),
            self._ends["trained"].total(),
            dict(self._ends["dropped"]),
            dict(self._ends["failed"]),
            last["retries"],
            last["again"],
        )
        return found
