"""What the commands `verl ledger` and `verl doctor` print; loads no PyTorch, so that they answer at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.monitoring.doctor import diagnose
from verl.monitoring.ledger_report import LedgerReport, lines_of_group, read_ledger
from verl.monitoring.wait_tracker import span
from verl.monitoring.watchdog import RunSnapshot, last_snapshot
from verl.utils.process_id import process_state

_NUM_STEPS, _NUM_NAMED = 10, 50


def ledger(args: argparse.Namespace) -> int:
    """`verl ledger RUN`; 1 if a group is missing or twice, or the file contradicts itself."""
    console, folder = Console(), Path(args.run_folder)
    report = read_ledger(folder)
    if args.group is not None:
        return _group(console, report, folder, args.group)
    _out(console, f"{report.counts.dispatched} groups sent out, up to step {report.step}")
    console.print(_fates(report))
    for title, causes in (("last failure", report.causes), ("last retry", report.retry_causes)):
        for failure, cause in causes.items():
            _out(console, f"{title}, {failure}: {cause}")
    if report.staleness:
        total = sum(report.staleness.values())
        mean = sum(age * num for age, num in report.staleness.items()) / total
        _out(
            console,
            f"oldest token of a group trained on: {mean:.2f} versions behind, at most {max(report.staleness)}",
        )
    console.print(_last_steps(report))
    return _verdict(console, report)


def doctor(args: argparse.Namespace) -> int:
    """`verl doctor RUN`; 1 if it neither works nor has finished."""
    console = Console()
    look, now = last_snapshot(Path(args.run_folder)), time.time()
    found = diagnose(look, process_state(look.process), now)
    _out(console, f"{args.run_folder}: {found.story}")
    if look.state != "finished":
        console.print(_stages(look))
    if look.parts and look.state != "finished":
        table = Table("part", "state", "last failure")
        for part in look.parts:
            table.add_row(_text(part.name), _text(part.state), _text(part.cause.partition("\n")[0]))
        console.print(table)
    _out(console, f"likely cause: {found.cause}")
    return 0 if found.is_well else 1


def _group(console: Console, report: LedgerReport, folder: Path, number: int) -> int:
    """What became of one group."""
    if not 0 <= number < report.counts.dispatched:
        raise ValueError(f"need a group from 0 to {report.counts.dispatched - 1}, got {number}")
    lines = lines_of_group(folder, number)
    for line in lines:
        _out(console, f"group {number}: {_story(line)}")
    if number in report.open:
        _out(console, f"group {number}: {report.open[number]}, as of step {report.step}")
    elif not lines:
        is_before = number not in report.missing
        _out(
            console,
            f"group {number}: {'ended before this file begins' if is_before else 'missing: nothing is known of it'}",
        )
    return 1 if number in report.missing or number in report.twice else 0


def _story(line: Mapping[str, Any]) -> str:
    """The line of a group in words."""
    parts = [f"prompt {line['prompt']}", f"{line['fate']}{_because(line)} in step {line['step']}"]
    parts.append(f"{line['attempts']} attempt{'s' if line['attempts'] > 1 else ''}")
    if line["versions"]:
        oldest, newest = line["versions"]
        parts.append(
            f"sampled by version {oldest}"
            if oldest == newest
            else f"sampled by versions {oldest} to {newest}"
        )
    parts += [f"{num} x {failure}: {cause}" for failure, (num, cause) in line.get("retries", {}).items()]
    return ", ".join(parts)


def _because(line: Mapping[str, Any]) -> str:
    if not line["reason"]:
        return ""
    return f" ({line['reason']}{': ' if line.get('cause') else ''}{line.get('cause', '')})"


def _fates(report: LedgerReport) -> Table:
    counts, total = report.counts, max(report.counts.dispatched, 1)
    rows = [
        ("trained on", counts.trained),
        ("being answered", counts.answering),
        ("waiting for training", counts.waiting),
    ]
    rows += [(f"dropped: {reason}", num) for reason, num in sorted(counts.dropped.items())]
    rows += [(f"failed: {failure}", num) for failure, num in sorted(counts.failed.items())]
    rows += [("missing", len(report.missing))] if report.missing else []
    table = Table("fate", "groups", "share")
    for name, num in rows:
        table.add_row(_text(name), str(num), f"{num / total:.1%}")
    table.add_section()
    retries = [(f"tried again after: {failure}", num) for failure, num in sorted(counts.retries.items())]
    for name, num in [*retries, *([("sent again after a restart", counts.again)] if counts.again else [])]:
        table.add_row(_text(name), str(num), "")
    return table


def _last_steps(report: LedgerReport) -> Table:
    """What each of the last steps added, and what was under way after it."""
    table = Table(
        "step",
        "sent out",
        "trained",
        "dropped",
        "failed",
        "tried again",
        "being answered",
        "waiting",
        title="the last steps",
    )
    steps = report.steps[-_NUM_STEPS - 1 :]
    before = [*([{}] if len(report.steps) <= _NUM_STEPS else []), *steps]
    for last, step in zip(before, before[1:], strict=False):
        added = [
            _total(step[name]) - _total(last.get(name, 0))
            for name in ("dispatched", "trained", "dropped", "failed", "retries")
        ]
        table.add_row(*map(str, [step["step"], *added, step["answering"], step["waiting"]]))
    return table


def _total(value: int | Mapping[str, int]) -> int:
    return value if isinstance(value, int) else sum(value.values())


def _verdict(console: Console, report: LedgerReport) -> int:
    """Says whether all adds up."""
    if report.num_before:
        _out(
            console,
            f"{report.num_before} groups ended before this file begins: the run went on from the checkpoint of another folder",
        )
    if report.num_cut_off:
        _out(
            console,
            f"{report.num_cut_off} lines at the end count for nothing: the commit of a step was cut off, or is being written",
        )
    for told, numbers in (("missing", report.missing), ("twice", report.twice)):
        if numbers:
            _out(console, f"{told}: {len(numbers)} groups: {_named(numbers)}")
    for difference in report.differences[:_NUM_NAMED]:
        _out(console, difference)
    _out(
        console,
        "every group is there once, and the sums are right"
        if report.adds_up
        else "the ledger does not add up",
    )
    return 0 if report.adds_up else 1


def _named(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _NUM_NAMED} more" if len(numbers) > _NUM_NAMED else ""
    return ", ".join(map(str, numbers[:_NUM_NAMED])) + more


def _stages(look: RunSnapshot) -> Table:
    table = Table("stage", "waits for", "since", "limit", "moved")
    for stage in look.waits.stages:
        if not stage.waits:
            table.add_row(_text(stage.stage), "nothing", "", "", f"{span(stage.moved_s)} ago")
        for wait in stage.waits[:1]:
            more = f" (the first of {stage.num_waits} waits)" if stage.num_waits > 1 else ""
            limit = "" if wait.limit_s is None else span(wait.limit_s)
            table.add_row(
                _text(stage.stage),
                _text(wait.what + more),
                span(wait.for_s),
                limit,
                f"{span(stage.moved_s)} ago",
            )
    return table


def _text(text: str) -> Text:
    return Text(_printable(text))


def _printable(text: str) -> str:
    """Without what could steer the terminal: engines and functions say of themselves what they want."""
    return "".join(c if c.isprintable() else " " for c in text)


def _out(console: Console, text: str) -> None:
    console.out(_printable(text), highlight=False)
