"""Trackers whose console is a string, and what they have written."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from verl.config.run import TrackingConfig
from verl.monitoring.tracking import Tracker

METRICS = {
    "reward": 0.25,
    "accuracy": 0.5,
    "response_tokens": 120.0,
    "kl": 0.001,
    "entropy": 2.0,
    "tokens_per_s": 12345.0,
    "seconds": 60.0,
}


def tracker(folder: Path, *sinks: str, console: Console | None = None, **steps: int) -> Tracker:
    return Tracker(
        TrackingConfig(sinks=sinks), folder, console=console or screen(), **{"total_steps": 100} | steps
    )


def screen(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
