"""Output of the commands `verl ledger` and `verl doctor`; imports no PyTorch, so that they answer at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.monitoring.doctor import diagnose
from verl.monitoring.formatting import format_duration, printable
from verl.monitoring.ledger_report import LedgerReport, lines_of_group, read_ledger
from verl.monitoring.watchdog import RunSnapshot, read_snapshot
from verl.utils.process_id import process_state

_MAX_STEPS, _MAX_LISTED = 10, 50


def ledger(args: argparse.Namespace) -> int:
    """Run `verl ledger RUN`; returns 1 if a group is missing or twice, or the file contradicts itself."""
    console, folder = Console(), Path(args.run_folder)
    report = read_ledger(folder)
    if args.group is not None:
        return _print_group(console, report, folder, args.group)
    _print(console, f"{report.counts.dispatched} groups dispatched, up to step {report.step}")
    console.print(_fate_table(report))
    for title, causes in (("last failure", report.causes), ("last retry", report.retry_causes)):
        for failure, cause in causes.items():
            _print(console, f"{title}, {failure}: {cause}")
    if report.staleness:
        total = sum(report.staleness.values())
        mean = sum(age * num for age, num in report.staleness.items()) / total
        lag = f"{mean:.2f} versions behind, at most {max(report.staleness)}"
        _print(console, f"oldest token of a group trained on: {lag}")
    console.print(_step_table(report))
    return _print_verdict(console, report)


def doctor(args: argparse.Namespace) -> int:
    """Run `verl doctor RUN`; returns 1 if the run neither works nor has finished."""
    console = Console()
    run, now = read_snapshot(Path(args.run_folder)), time.time()
    diagnosis = diagnose(run, process_state(run.process), now)
    _print(console, f"{args.run_folder}: {diagnosis.status}")
    if run.state != "finished":
        console.print(_stage_table(run))
    if run.dependencies and run.state != "finished":
        table = Table("part", "state", "last failure")
        for each in run.dependencies:
            _add_row(table, each.name, each.state, each.cause.partition("\n")[0])
        console.print(table)
    _print(console, f"likely cause: {diagnosis.cause}")
    return 0 if diagnosis.is_well else 1


def _print_group(console: Console, report: LedgerReport, folder: Path, number: int) -> int:
    if not 0 <= number < report.counts.dispatched:
        raise ValueError(f"need a group from 0 to {report.counts.dispatched - 1}, got {number}")
    lines = lines_of_group(folder, number)
    for line in lines:
        _print(console, f"group {number}: {_describe_ending(line)}")
    if number in report.open_groups:
        _print(console, f"group {number}: {report.open_groups[number]}, as of step {report.step}")
    elif not lines:
        is_missing = number in report.missing
        state = "missing: nothing is recorded of it" if is_missing else "ended before this file begins"
        _print(console, f"group {number}: {state}")
    return 1 if number in report.missing or number in report.twice else 0


def _describe_ending(line: Mapping[str, Any]) -> str:
    """One sentence from the line of a group."""
    reason = f"{line['reason']}{': ' if line.get('cause') else ''}{line.get('cause', '')}"
    fate = line["fate"] + (f" ({reason})" if line["reason"] else "")
    parts = [f"prompt {line['prompt']}", f"{fate} in step {line['step']}"]
    parts.append(f"{line['attempts']} attempt{'s' if line['attempts'] > 1 else ''}")
    if line["versions"]:
        oldest, newest = line["versions"]
        versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
        parts.append(f"sampled by {versions}")
    parts += [f"{num} x {failure}: {cause}" for failure, (num, cause) in line.get("retries", {}).items()]
    return ", ".join(parts)


def _fate_table(report: LedgerReport) -> Table:
    """Number and share of groups by fate, and the retries."""
    counts, total = report.counts, max(report.counts.dispatched, 1)
    fates = [("trained on", counts.trained), ("being answered", counts.answering)]
    fates.append(("waiting for training", counts.waiting))
    fates += [(f"dropped: {reason}", num) for reason, num in sorted(counts.dropped.items())]
    fates += [(f"failed: {failure}", num) for failure, num in sorted(counts.failed.items())]
    fates += [("missing", len(report.missing))] if report.missing else []
    table = Table("fate", "groups", "share")
    for name, num in fates:
        _add_row(table, name, str(num), f"{num / total:.1%}")
    table.add_section()
    retries = [(f"retried after: {failure}", num) for failure, num in sorted(counts.retries.items())]
    retries += [("dispatched again after a restart", counts.again)] if counts.again else []
    for name, num in retries:
        _add_row(table, name, str(num), "")
    return table


def _step_table(report: LedgerReport) -> Table:
    """Groups that each of the last steps added, and those in flight after it."""
    columns = ("step", "dispatched", "trained", "dropped", "failed", "retried", "being answered", "waiting")
    table = Table(*columns, title="the last steps")
    steps = report.steps[-_MAX_STEPS - 1 :]
    # The counts are sums since the run began, so each step is compared with the one before it.
    previous = [*([{}] if len(report.steps) <= _MAX_STEPS else []), *steps]
    for before, step in zip(previous, previous[1:], strict=False):
        added = [
            _total(step[name]) - _total(before.get(name, 0))
            for name in ("dispatched", "trained", "dropped", "failed", "retries")
        ]
        table.add_row(*map(str, [step["step"], *added, step["answering"], step["waiting"]]))
    return table


def _total(value: int | Mapping[str, int]) -> int:
    return value if isinstance(value, int) else sum(value.values())


def _print_verdict(console: Console, report: LedgerReport) -> int:
    """Print whether all adds up; returns the exit code."""
    if report.num_ended_before:
        _print(
            console,
            f"{report.num_ended_before} groups ended before this file begins: "
            "the run resumed from a checkpoint of another folder",
        )
    if report.num_incomplete_lines:
        _print(
            console,
            f"{report.num_incomplete_lines} lines at the end are not counted: "
            "the commit of a step was interrupted, or is being written",
        )
    for title, numbers in (("missing", report.missing), ("twice", report.twice)):
        if numbers:
            shown = ", ".join(map(str, numbers[:_MAX_LISTED]))
            more = f" and {len(numbers) - _MAX_LISTED} more" if len(numbers) > _MAX_LISTED else ""
            _print(console, f"{title}: {len(numbers)} groups: {shown}{more}")
    for mismatch in report.mismatches[:_MAX_LISTED]:
        _print(console, mismatch)
    sound = "every group is there once, and the sums are right"
    _print(console, sound if report.adds_up else "the ledger does not add up")
    return 0 if report.adds_up else 1


def _stage_table(run: RunSnapshot) -> Table:
    """The first wait of each stage."""
    table = Table("stage", "waits for", "since", "limit", "moved")
    for stage in run.waits.stages:
        moved = f"{format_duration(stage.moved_s)} ago"
        if not stage.waits:
            _add_row(table, stage.stage, "nothing", "", "", moved)
        for wait in stage.waits[:1]:
            more = f" (the first of {stage.num_waits} waits)" if stage.num_waits > 1 else ""
            limit = "" if wait.limit_s is None else format_duration(wait.limit_s)
            _add_row(table, stage.stage, wait.what + more, format_duration(wait.for_s), limit, moved)
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Add cells as plain text: engines and reward functions may put anything into their messages."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _print(console: Console, text: str) -> None:
    console.out(printable(text), highlight=False)
