"""Audit of a ledger file: groups are counted again from their lines and compared with each commit's sums."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.monitoring.ledger import LEDGER_FILE, STATES, LedgerCounts

_FATES = ("trained", "dropped", "failed")


@dataclass
class LedgerReport:
    """Content of a ledger file.

    Attributes:
        step: the last one that was committed.
        counts: fates as counted from the lines of groups; groups in flight and retries as in the last commit.
        steps: the summary of each commit, in order, without the numbers of groups in flight.
        open_groups: groups in flight at the last commit, as number -> answering or waiting.
        missing: groups that were dispatched, and of which nothing else is recorded.
        twice: groups that ended twice, or ended and are in flight.
        mismatches: where lines contradict a commit, or cannot be parsed.
        causes: the last cause of the failures that ended groups, by class.
        retry_causes: the last cause of the failures that were retried, by class; of groups that have ended.
        staleness: number of groups trained on, by the lag of the oldest version that sampled their tokens.
        num_ended_before: groups that ended before this file begins, if the run began in another folder.
        num_incomplete_lines: lines after the last complete commit; they are not counted.
    """

    step: int = 0
    counts: LedgerCounts = field(default_factory=LedgerCounts)
    steps: list[dict[str, Any]] = field(default_factory=list)
    open_groups: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    causes: dict[str, str] = field(default_factory=dict)
    retry_causes: dict[str, str] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    num_ended_before: int = 0
    num_incomplete_lines: int = 0

    @property
    def adds_up(self) -> bool:
        """True if every group is there once, and lines and commits agree."""
        return not (self.missing or self.twice or self.mismatches)


def read_ledger(folder: Path) -> LedgerReport:
    """Audit the ledger of a run; a last commit that is incomplete is reported, but not counted.

    Raises:
        ValueError: the folder has no ledger.
    """
    audit = LedgerAudit()
    for number, line in _read_lines(folder):
        audit.add(number, line)
    return audit.report()


def lines_of_group(folder: Path, number: int) -> list[dict[str, Any]]:
    """The lines with which a group ended, incomplete commits included: one if the ledger is consistent.

    Raises:
        ValueError: the folder has no ledger.
    """
    return [line for _, line in _read_lines(folder) if line is not None and line.get("group") == number]


def _read_lines(folder: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and content of each line; None for one that cannot be parsed."""
    try:
        with (folder / LEDGER_FILE).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _parse(line)
    except OSError as error:
        raise ValueError(
            f"need the output_dir of a run that keeps a ledger, got {folder}: {error}"
        ) from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if is_row and ("group" in row or "dispatched" in row) else None


class LedgerAudit:
    """Counts a ledger line by line, independently of the sums that it contains."""

    def __init__(self) -> None:
        self._found = LedgerReport()
        # Lines of the commit whose summary has not come yet.
        self._pending: list[tuple[int, dict[str, Any] | None]] = []
        self._ends: dict[str, Counter[str]] = {fate: Counter() for fate in _FATES}
        # How often each group was seen, at most 2: a byte for each, since a run has millions.
        self._seen = bytearray()
        self._last: Mapping[str, Any] = {}

    def add(self, number: int, line: dict[str, Any] | None) -> None:
        """Add a line; groups count once the summary of their commit follows."""
        if line is None or "group" in line:
            self._pending.append((number, line))
        elif line.get("base"):
            self._start_from(line)
        else:
            self._close_commit(number, line)

    def report(self) -> LedgerReport:
        """The result, after all lines were added."""
        found, last = self._found, self._last
        found.num_incomplete_lines = len(self._pending)
        if not last:
            return found
        found.step = last["step"]
        found.open_groups = {n: state for state in STATES for n in last[f"{state}_groups"]}
        for number in found.open_groups:
            self._mark(number)
        found.missing = [number for number, times in enumerate(self._seen) if times == 0]
        found.twice = [number for number, times in enumerate(self._seen) if times > 1]
        found.counts = LedgerCounts(
            dispatched=last["dispatched"],
            answering=len(last["answering_groups"]),
            waiting=len(last["waiting_groups"]),
            trained=self._ends["trained"].total(),
            dropped=dict(self._ends["dropped"]),
            failed=dict(self._ends["failed"]),
            retries=last["retries"],
            again=last["again"],
        )
        return found

    def _start_from(self, base: Mapping[str, Any]) -> None:
        """Forget all lines so far: the run began in another folder, where groups not in flight have ended."""
        in_flight = {*base["answering_groups"], *base["waiting_groups"]}
        self._found = LedgerReport(num_ended_before=base["dispatched"] - len(in_flight))
        self._pending = []
        self._ends = {
            "trained": Counter({"": base["trained"]}),
            "dropped": Counter(base["dropped"]),
            "failed": Counter(base["failed"]),
        }
        self._seen = bytearray(number not in in_flight for number in range(base["dispatched"]))
        self._last = base

    def _close_commit(self, number: int, summary: dict[str, Any]) -> None:
        """Count the lines of a commit and compare them with its summary."""
        self._seen.extend(bytes(max(0, summary["dispatched"] - len(self._seen))))
        for pending_number, line in self._pending:
            problem = self._count(line, summary)
            if problem:
                self._found.mismatches.append(f"line {pending_number} {problem}")
        self._pending = []
        recorded = {fate: summary[fate] for fate in _FATES}
        counted = {
            "trained": self._ends["trained"].total(),
            "dropped": dict(self._ends["dropped"]),
            "failed": dict(self._ends["failed"]),
        }
        if recorded != counted:
            self._found.mismatches.append(
                f"line {number}, the sum of step {summary['step']}, says {recorded}, "
                f"the groups before it {counted}"
            )
        self._last = summary
        self._found.steps.append(
            {name: value for name, value in summary.items() if not name.endswith("_groups")}
        )

    def _count(self, line: dict[str, Any] | None, summary: Mapping[str, Any]) -> str:
        """Count the line of a group; returns a description of its defect, empty without one."""
        if line is None:
            return "cannot be parsed"
        number, fate = line["group"], line.get("fate")
        if fate not in _FATES or not isinstance(number, int):
            return f"has an unknown fate {fate!r}"
        if not 0 <= number < summary["dispatched"]:
            return f"is of group {number}, which was never dispatched"
        self._mark(number)
        self._ends[fate][line.get("reason") or ""] += 1
        if fate == "failed":
            self._found.causes[line["reason"]] = line.get("cause", "")
        for failure, (_, cause) in line.get("retries", {}).items():
            self._found.retry_causes[failure] = cause
        if fate == "trained" and line.get("versions"):
            # Step n trains version n - 1.
            self._found.staleness[line["step"] - 1 - line["versions"][0]] += 1
        is_same_step = line["step"] == summary["step"]
        return "" if is_same_step else f"is of step {line['step']}, in the commit of step {summary['step']}"

    def _mark(self, number: int) -> None:
        self._seen[number] = min(self._seen[number] + 1, 2)
