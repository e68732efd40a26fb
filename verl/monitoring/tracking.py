"""Timing of a step's phases, and the tracker that writes metrics and samples."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from verl.config.run import TrackingConfig
from verl.monitoring.progress import print_line
from verl.monitoring.sinks import Run, check_sinks, start_sink
from verl.utils.jsonl import json_line


class Clock:
    """Seconds spent in named phases; no other code measures the time of a step.

    Args:
        wait: called before a phase ends, to wait for its work that is still queued on a GPU.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: str | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose time is added to a phase; phases do not nest, so that their sum is exact."""
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

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a phase that other phases may overlap, such as generation beside tools."""
        self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, as `time/NAME_s`."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


class Tracker:
    """Writes metrics to all chosen sinks.

    A sink that fails during the run is reported once, its failures are counted, and nothing is raised.

    Args:
        config: the sinks and their settings.
        output_dir: folder of the run, made if absent.
        total_steps: last step of the run; steps count from 1.
        first_step: first step to be logged; the metrics of an earlier run from there on are replaced. 0 or 1
            is a new run.
        console: for human-readable lines; None: standard output.

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
        self._is_closed = False
        # An evaluation before step 1 is logged as step 0, which a new run replaces too.
        first_step = first_step if first_step > 1 else 0
        self._run = Run(config, output_dir, total_steps, first_step, console or Console())
        self._sinks = {name: start_sink(name, self._run) for name in config.sinks}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to all sinks; once per step.

        Raises:
            ValueError: one of them is no number.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        for name, sink in self._sinks.items():
            with self._catch_failures(name):
                sink.log(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> Path:
        """Write answers of a step, one per line, to `samples/step-000010.jsonl`; returns the path."""
        return self._write_rows("samples", step, rows)

    def episodes(self, step: int, rows: Sequence[Mapping[str, object]]) -> Path:
        """Write episodes of a step, one per line, to `episodes/step-000010.jsonl`; returns the path."""
        return self._write_rows("episodes", step, rows)

    def _write_rows(self, kind: str, step: int, rows: Sequence[Mapping[str, object]]) -> Path:
        path = self._run.output_dir / kind / f"step-{step:06d}.jsonl"
        with self._catch_failures(kind):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(json_line(row) for row in rows))
        return path

    @property
    def shows_events(self) -> bool:
        """True if the console is a sink."""
        return "console" in self._run.config.sinks

    def event(self, text: str) -> None:
        """Print a line between the steps, such as the path of a checkpoint, if the console is a sink."""
        if self.shows_events:
            print_line(self._run.console, text)

    def close(self) -> None:
        """Close all sinks and report the number of failed writes; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for name, sink in self._sinks.items():
            with self._catch_failures(name):
                sink.close()
        for name, count in self.failures.items():
            self._warn(f"{name}: {count} of its writes failed; the run was not affected")

    @contextlib.contextmanager
    def _catch_failures(self, name: str) -> Iterator[None]:
        # A full disk or a lost connection must not end the run. Rich raises SystemExit on a closed pipe.
        try:
            yield
        except (Exception, SystemExit) as error:
            self.failures[name] += 1
            if self.failures[name] == 1:
                self._warn(f"{name} failed and is skipped where it fails: {type(error).__name__}: {error}")

    def _warn(self, text: str) -> None:
        print_line(self._run.console, text, style="yellow")


def _number(name: str, value: object) -> float:
    """A metric as a number; a callback, or a loop of the user, may have given anything."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"need a number for the metric {name!r}, got {type(value).__name__} ({error}); give "
            "callbacks and the log of a run numbers alone"
        ) from error
