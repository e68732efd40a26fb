"""Metrics out: the clock of a step, the sinks that metrics go to, and curves and tables for people."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
import re
import string
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.config.run import TrackingConfig
from verl.utils.jsonl import json_line, truncate_from_step


class Clock:
    """Sums the seconds of named phases, the only place where time is taken.

    Args:
        wait: called before a phase ends, to wait for work that a GPU still has queued from it.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: str | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`. Phases do not nest, so that their sum is never more than the
        step.
        """
        assert self._running is None, (
            f"phase {name!r} began inside phase {self._running!r}; end that one first"
        )
        self._running, start = name, time.perf_counter()
        try:
            yield
            self._wait()
        finally:
            self._running = None
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as `time/NAME_s`."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


@dataclass(frozen=True)
class Run:
    """What a sink is told about the run: its settings, folder, steps, and the console to write on."""

    config: TrackingConfig
    output_dir: Path
    total_steps: int
    first_step: int
    console: Console


class Sink:
    """A place for metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""
        raise NotImplementedError(f"{type(self).__name__} must define log(step, metrics)")

    def close(self) -> None:
        """Writes what is still held back."""


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
    tuning_columns = (_Column("loss", "loss", 8), columns[2], *columns[4:])
    lines_per_header = 25

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._num_lines = 0
        self._recent_s: deque[float] = deque(maxlen=20)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the columns that there are, `-` for the others; nothing if there are none."""
        # Fine-tuning has no rewards, and its loss is what people look for.
        columns = self.tuning_columns if "loss" in metrics and "reward" not in metrics else self.columns
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
        cells = "".join(f"{_cell(metrics, column.metric):>{column.width}}" for column in columns)
        self.run.console.out(f"{f'{step}/{total}':>{width}}{cells}{self._left(step):>9}", highlight=False)

    def _left(self, step: int) -> str:
        """Time to the last step at the pace of the recent ones."""
        if not self._recent_s:
            return "-"
        return _duration(sum(self._recent_s) / len(self._recent_s) * max(self.run.total_steps - step, 0))


class JsonlSink(Sink):
    """`metrics.jsonl`, one line per step; what is not a finite number is null."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        path = run.output_dir / "metrics.jsonl"
        truncate_from_step(path, run.first_step)
        self._file = path.open("ab")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and hands it to the operating system at once."""
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardSink(Sink):
    """Event files in `tensorboard/`; points from the first step on that an earlier run left are hidden."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        module = _load("torch.utils.tensorboard", install="tensorboard")
        self._writer = module.SummaryWriter(
            run.output_dir / "tensorboard", purge_step=run.first_step, flush_secs=10
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandbSink(Sink):
    """A run on Weights & Biases, the same one after a resume; W&B ignores steps that it already has."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        wandb = _load("wandb", install="verl[wandb]")
        path = run.output_dir / "wandb_run_id"
        run_id = _remembered_id(path, run.first_step) or uuid4().hex
        self._run = wandb.init(
            project=run.config.project,
            name=run.output_dir.name,
            dir=str(run.output_dir),
            id=run_id,
            resume="allow",
        )
        path.write_text(run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


class MlflowSink(Sink):
    """A run in the MLflow store that MLFLOW_TRACKING_URI names, the same one after a resume."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._mlflow = _load("mlflow", install="verl[mlflow]")
        path = run.output_dir / "mlflow_run_id"
        self._mlflow.set_experiment(run.config.project)
        self._run = self._mlflow.start_run(
            run_id=_remembered_id(path, run.first_step), run_name=run.output_dir.name
        )
        path.write_text(self._run.info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics."""
        # MLflow refuses other characters in names, such as the @ of pass@8.
        named = {re.sub(r"[^/\w.\- :]", "_", name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, run_id=self._run.info.run_id)

    def close(self) -> None:
        """Marks the run as finished."""
        self._mlflow.end_run()


SINKS: dict[str, type[Sink]] = {
    "console": ConsoleSink,
    "jsonl": JsonlSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}


def check_sinks(names: Sequence[str]) -> None:
    """Finds a sink that cannot be before anything is loaded or written.

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
            _load(name, install=f"verl[{name}]")


class Tracker:
    """Hands metrics to every chosen sink; one that fails while the run goes on is reported once and counted,
    never raised.

    Args:
        config: the sinks and what they need.
        output_dir: folder of the run, made if absent.
        total_steps: last step of the run, counted from 1.
        first_step: first step that will be logged; what an earlier run wrote from there on is replaced. 0 or
            1: a new run.
        console: for people; none: standard output.

    Raises:
        ValueError: no such sink, or its package is not installed.
        RuntimeError: a sink could not start.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output_dir: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
    ) -> None:
        check_sinks(config.sinks)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.failures: Counter[str] = Counter()
        self._closed = False
        # An evaluation before step 1 is logged as step 0, so a run that begins there replaces that one too.
        self._run = Run(
            config, output_dir, total_steps, first_step if first_step > 1 else 0, console or Console()
        )
        self._sinks = {name: _started(name, self._run) for name in config.sinks}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step, once per step, to all sinks."""
        values = {name: float(value) for name, value in metrics.items()}
        for name, sink in self._sinks.items():
            with self._survived(name):
                sink.log(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes answers of a step, one per line, to `samples/step-000010.jsonl`."""
        with self._survived("samples"):
            folder = self._run.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"step-{step:06d}.jsonl").write_bytes(b"".join(json_line(row) for row in rows))

    def event(self, text: str) -> None:
        """A line for people between the steps, such as where a checkpoint went; only if the console is a
        sink.
        """
        if "console" in self._run.config.sinks:
            with self._survived("console"):
                self._run.console.out(text, highlight=False)

    def close(self) -> None:
        """Closes all sinks and says how many writes failed; the second time it does nothing."""
        if self._closed:
            return
        self._closed = True
        for name, sink in self._sinks.items():
            with self._survived(name):
                sink.close()
        for name, count in self.failures.items():
            self._report(f"{name}: {count} of its writes failed; the run was not affected")

    @contextlib.contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        # A full disk or a lost connection must not cost the run. Rich answers a closed pipe with SystemExit.
        try:
            yield
        except (Exception, SystemExit) as error:
            self.failures[name] += 1
            if self.failures[name] == 1:
                self._report(f"{name} failed and is skipped where it fails: {type(error).__name__}: {error}")

    def _report(self, text: str) -> None:
        # The console may be what failed; then there is nobody left to tell.
        with contextlib.suppress(OSError, ValueError, SystemExit):
            self._run.console.out(text, style="yellow", highlight=False)


def terminal_curve(
    series: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    width: int = 72,
    height: int = 14,
    title: str = "",
) -> str:
    """A curve as plain text: one in braille dots, several with a letter each and a legend.

    Values are at 1, 2, ... from left to right; those that are not finite are bridged. Where there are more
    values than dots, neighbours are averaged.

    Args:
        series: values of one curve, or of several by name.
        width: characters of a line, labels included.
        height: lines of the plot, without title, axis and legend.
        title: a line above.

    Returns:
        Lines without a final newline.
    """
    curves = dict(series) if isinstance(series, Mapping) else {"": series}
    finite = [value for values in curves.values() for value in values if math.isfinite(value)]
    if not finite:
        return f"{title}: no finite values".removeprefix(": ")
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 0.5, high + 0.5
    labels = {
        0: _number(high),
        height // 2: _number(high - (high - low) * (height // 2) / max(height - 1, 1)),
        height - 1: _number(low),
    }
    margin = max(len(label) for label in labels.values())
    columns = max(width - margin - 2, 1)
    cells = [[" "] * columns for _ in range(height)]
    longest, letters = max(len(values) for values in curves.values()), string.ascii_lowercase
    for index, values in enumerate(curves.values()):
        dots = _dots(values, longest, low=low, high=high, shape=(height * 4, columns * 2))
        _draw(cells, dots, letter="" if len(curves) == 1 else letters[index % 26])
    lines = [title] if title else []
    lines += [f"{labels.get(row, ''):>{margin}} ┤{''.join(line)}".rstrip() for row, line in enumerate(cells)]
    lines.append(f"{'':>{margin}} └{'─' * columns}")
    lines.append(f"{'':>{margin}}  1{longest:>{max(columns - 1, 1)}}")
    if len(curves) > 1:
        lines.append("   ".join(f"{letters[index % 26]} {name}" for index, name in enumerate(curves)))
    return "\n".join(lines)


def _dots(
    values: Sequence[float], longest: int, *, low: float, high: float, shape: tuple[int, int]
) -> np.ndarray:
    """[rows, columns] bool, the polyline through the values; row 0 is `high`."""
    rows, columns = shape
    dots = np.zeros(shape, dtype=bool)
    given = np.asarray(values, dtype=np.float64)
    positions = np.flatnonzero(np.isfinite(given))
    if not len(positions):
        return dots
    heights = given[positions]
    places = positions.astype(np.float64) * (columns - 1) / max(longest - 1, 1)
    if longest > columns:
        bins = np.round(places).astype(int)
        counts = np.bincount(bins, minlength=columns)
        heights = (np.bincount(bins, weights=heights, minlength=columns) / np.maximum(counts, 1))[counts > 0]
        places = np.flatnonzero(counts).astype(np.float64)
    first, last = math.floor(places[0]), math.ceil(places[-1])
    line = np.interp(np.arange(first, last + 1), places, heights)
    levels = np.round((high - line) / (high - low) * (rows - 1)).astype(int)
    previous = levels[0]
    for column, level in enumerate(levels, start=first):
        # From the dot beside the last one, so that steep parts stay connected.
        dots[min(previous, level) : max(previous, level) + 1, column] = True
        previous = level
    return dots


def _draw(cells: list[list[str]], dots: np.ndarray, *, letter: str) -> None:
    """Puts 4 x 2 dots into each character, as braille or as the letter of the curve."""
    # Bits of the eight dots, https://www.unicode.org/charts/PDF/U2800.pdf.
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    blocks = dots.reshape(len(cells), 4, len(cells[0]), 2)
    codes = np.einsum("aibj,ij->ab", blocks.astype(int), bits)
    for row, column in zip(*np.nonzero(codes), strict=True):
        cells[row][column] = letter or chr(0x2800 + int(codes[row, column]))


def save_curve(
    path: Path, steps: Sequence[float], values: Sequence[float], *, title: str, ylabel: str
) -> None:
    """Writes a PNG of values over steps; needs no display and leaves matplotlib's global state alone."""
    figure = _load("matplotlib.figure", install="matplotlib").Figure(
        figsize=(7, 4), dpi=150, layout="constrained"
    )
    axes = figure.subplots()
    axes.plot(steps, values, linewidth=1.5)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def samples_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """A table of answers from rows with `prompt`, `response`, `reference` and `reward`; what a row lacks
    stays empty.
    """
    table = Table(show_lines=True)
    for title in ("prompt", "answer", "reference"):
        table.add_column(title, overflow="fold")
    table.add_column("reward", justify="right")
    for row in rows:
        texts = [_printable(str(row.get(key, "") or "")) for key in ("prompt", "response", "reference")]
        reward = row.get("reward")
        table.add_row(*texts, Text(_number(reward) if isinstance(reward, (int, float)) else ""))
    return table


def _printable(text: str, *, max_characters: int = 600) -> Text:
    """The text without control characters: what a model wrote must not steer the terminal."""
    shown = text if len(text) <= max_characters else text[:max_characters] + "…"
    return Text("".join(c if c.isprintable() or c == "\n" else " " for c in shown))


def _number(value: float) -> str:
    """About four digits in at most seven characters, the sign included."""
    size = abs(value)
    if not math.isfinite(value) or 0 < size < 5e-4 or size >= 1e12:
        return f"{value:.1e}" if value >= 0 else f"{value:.0e}"
    if size < 1e4:
        return f"{value:.{3 - int(math.log10(max(size, 1)))}f}"
    scale, letter = next(
        (scale, letter) for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= scale
    )
    return f"{value / scale:.1f}{letter}"


def _cell(metrics: Mapping[str, float], name: str) -> str:
    """The metric for the console, `-` if there is none."""
    return _number(metrics[name]) if name in metrics else "-"


def _duration(seconds: float) -> str:
    """Minutes, hours or days, as 4:05, 1:02:03 or 3d 04h."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _remembered_id(path: Path, first_step: int) -> str | None:
    """The id that a service gave this run before; a run that begins anew gets a new one."""
    return path.read_text().strip() if first_step > 0 and path.exists() else None


def _load(module: str, *, install: str) -> Any:
    """The module of a chosen sink or picture: loaded here and only then, because these are slow or optional."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"need the package {error.name} for this, which is not installed; pip install {install}, or do without"
        ) from error


def _started(name: str, run: Run) -> Sink:
    try:
        return SINKS[name](run)
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"sink {name!r} could not start: {error}; mend that or take it out of tracking.sinks"
        ) from error
