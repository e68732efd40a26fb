"""Sinks of metrics: console, JSON Lines, TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import difflib
import importlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from typing_extensions import override

from verl.config.run import TrackingConfig
from verl.monitoring.formatting import format_countdown, format_number
from verl.utils.jsonl import json_line, truncate_from_step


@dataclass(frozen=True)
class Run:
    """Facts about a run that sinks need: settings, folder, first and last step, and console."""

    config: TrackingConfig
    output_dir: Path
    total_steps: int
    first_step: int
    console: Console

    @property
    def name(self) -> str:
        """The name under which services list the run."""
        return self.config.name or self.output_dir.name


class Sink:
    """A destination of metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        raise NotImplementedError(f"{type(self).__name__} must define log(step, metrics)")

    def close(self) -> None:
        """Write what is still buffered."""


@dataclass(frozen=True)
class _Column:
    """A metric in the console's table; the width includes the gap to its left."""

    title: str
    metric: str
    width: int


class ConsoleSink(Sink):
    """One line per step, at most 80 columns wide up to a million steps; a header every 25 lines."""

    columns = (
        _Column("reward", "reward", 8),
        _Column("accuracy", "accuracy", 9),
        _Column("length", "response_tokens", 7),
        _Column("KL", "kl", 9),
        _Column("entropy", "entropy", 8),
        _Column("tokens/s", "tokens_per_s", 9),
        _Column("seconds", "seconds", 8),
    )
    # Supervised training has no rewards, and its loss takes their place.
    supervised_columns = (_Column("loss", "loss", 8), columns[2], *columns[4:])
    lines_per_header = 25

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._num_lines = 0
        self._recent_s: deque[float] = deque(maxlen=20)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        is_supervised = "loss" in metrics and "reward" not in metrics
        columns = self.supervised_columns if is_supervised else self.columns
        # Such as an evaluation on its own.
        if not any(column.metric in metrics for column in columns):
            return
        total = self.run.total_steps
        width = max(2 * len(str(total)) + 1, len("step"))
        if self._num_lines % self.lines_per_header == 0:
            titles = "".join(f"{column.title:>{column.width}}" for column in columns)
            self.run.console.out(f"{'step':>{width}}{titles}{'left':>9}", style="bold", highlight=False)
        self._num_lines += 1
        if "seconds" in metrics:
            self._recent_s.append(metrics["seconds"])
        # The time to the last step, at the pace of the recent ones.
        pace_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else float("nan")
        left = format_countdown(pace_s * max(total - step, 0))
        values = [format_number(metrics[c.metric]) if c.metric in metrics else "-" for c in columns]
        cells = "".join(f"{value:>{c.width}}" for value, c in zip(values, columns, strict=True))
        self.run.console.out(f"{f'{step}/{total}':>{width}}{cells}{left:>9}", highlight=False)


class JsonlSink(Sink):
    """`metrics.jsonl`, one line per step; numbers that are not finite become null."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        path = run.output_dir / "metrics.jsonl"
        truncate_from_step(path, run.first_step)
        self._file = path.open("ab")

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()

    @override
    def close(self) -> None:
        self._file.close()


class TensorBoardSink(Sink):
    """Event files in `tensorboard/`; points of an earlier run from the first step on are hidden."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        module = load_optional("torch.utils.tensorboard", install="tensorboard")
        self._writer = module.SummaryWriter(
            run.output_dir / "tensorboard", purge_step=run.first_step, flush_secs=10
        )
        if run.config.name or run.config.group:
            names = f"name: {run.name}  \ngroup: {run.config.group or '-'}"  # Markdown
            self._writer.add_text("run", names, max(run.first_step - 1, 0))

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    @override
    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A run on Weights & Biases, the same one after a resume; W&B ignores steps that it already has."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        wandb = load_optional("wandb", install="wandb")
        path = run.output_dir / "wandb_run_id"
        run_id = _previous_id(path, run.first_step) or uuid4().hex
        self._run = wandb.init(
            project=run.config.project,
            name=run.name,
            group=run.config.group,
            dir=str(run.output_dir),
            id=run_id,
            resume="allow",
        )
        path.write_text(run_id)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    @override
    def close(self) -> None:
        self._run.finish()


class MlflowSink(Sink):
    """A run in the MLflow store that MLFLOW_TRACKING_URI names, the same one after a resume."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._mlflow = load_optional("mlflow", install="mlflow")
        path = run.output_dir / "mlflow_run_id"
        self._mlflow.set_experiment(run.config.project)
        self._run = self._mlflow.start_run(
            run_id=_previous_id(path, run.first_step),
            run_name=run.name,
            tags={"group": run.config.group} if run.config.group else None,
        )
        path.write_text(self._run.info.run_id)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow refuses other characters in names, such as the @ of pass@8.
        named = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, run_id=self._run.info.run_id)

    @override
    def close(self) -> None:
        self._mlflow.end_run()


SINKS: dict[str, type[Sink]] = {
    "console": ConsoleSink,
    "jsonl": JsonlSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Check the names of sinks before a run loads or writes anything.

    Raises:
        ValueError: there is no such sink, or its package is not installed.
    """
    for name in names:
        if name not in SINKS:
            near = difflib.get_close_matches(name, SINKS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"need tracking.sinks of {', '.join(SINKS)}, got {name!r}; did you mean {near!r}?"
            )
        if name in ("wandb", "mlflow"):
            load_optional(name, install=name)


def start_sink(name: str, run: Run) -> Sink:
    """The sink of this name, started for a run.

    Raises:
        ValueError: its package is not installed.
        RuntimeError: it could not start.
    """
    try:
        return SINKS[name](run)
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"sink {name!r} could not start: {error}; fix that or take it out of tracking.sinks"
        ) from error


def load_optional(module: str, *, install: str) -> Any:
    """The module of a chosen sink, imported on demand because it is slow to import or not installed.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"need the package {error.name} for this, which is not installed; "
            f"pip install {install}, or do without"
        ) from error


def _previous_id(path: Path, first_step: int) -> str | None:
    """The id that a service gave this run before it was resumed; None for a new run."""
    return path.read_text().strip() if first_step > 0 and path.exists() else None
