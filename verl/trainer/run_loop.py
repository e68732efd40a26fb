"""A run around the steps of a trainer: resume, log, evaluate, checkpoint, write the model."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from verl.config.loader import to_yaml
from verl.controller.worker_group import append_trace
from verl.data.dataset import LoadReport
from verl.monitoring.sinks import check_sinks
from verl.monitoring.tracking import Tracker
from verl.monitoring.watchdog import Watchdog
from verl.trainer.base import BaseTrainer, Metrics
from verl.trainer.checkpoint_store import CheckpointStore, load_state, only_run_in


class RunLoop:
    """Runs a trainer from its newest checkpoint, or its start, to its last step.

    Args:
        trainer: whose steps are run.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer, self._config = trainer, trainer.config
        self._folder = Path(trainer.config.output_dir)
        self._store = CheckpointStore(self._folder / "checkpoints", keep=self._config.checkpoint.keep)

    def run(self) -> list[Metrics]:
        """Run all steps that are left, and write the model; returns the metrics of each step."""
        trainer, config, folder = self._trainer, self._config, self._folder
        check_sinks(config.tracking.sinks)
        trainer.run_folder = folder
        report = trainer.load_train_data()
        resumed = self._resume()
        watchdog = Watchdog(trainer.waits, folder, trainer.stall_limit_s, dependencies=trainer.dependencies)
        with only_run_in(folder), watchdog:
            tracker = Tracker(
                config.tracking,
                folder,
                total_steps=config.steps,
                first_step=trainer.version + 1,
                console=trainer.console,
            )
            (folder / "config.yaml").write_text(to_yaml(config))
            tracker.event(_summary(report))
            self._print_notes(tracker)
            if resumed:
                tracker.event(f"resumed from {resumed}, after step {trainer.version}")
            with closing(tracker):
                history = self._steps(tracker)
            trainer.save_model(folder / "model")
        return history

    def _steps(self, tracker: Tracker) -> list[Metrics]:
        trainer, config, store = self._trainer, self._config, self._store
        history = []
        if trainer.version == 0 and trainer.eval_at_start:
            _log(tracker, 0, self._evaluation())
        try:
            while trainer.version < config.steps:
                history.append(self._logged_step(tracker))
                if self._is_due(config.checkpoint.every_steps) or trainer.version == config.steps:
                    self._begin_checkpoint()
                if done := store.poll():
                    tracker.event(f"checkpoint: {done}")
        finally:  # also of a run that fails: the checkpoint that is being written is completed
            if done := store.finish():
                tracker.event(f"checkpoint: {done}")
        return history

    def _begin_checkpoint(self) -> None:
        trainer = self._trainer
        with trainer.waits.track("update", "a checkpoint"):
            self._store.begin(trainer.version, trainer.models.saves, trainer.state())

    def _logged_step(self, tracker: Tracker) -> Metrics:
        trainer, config, start = self._trainer, self._config, time.perf_counter()
        try:
            metrics = trainer.step()
        finally:
            self._print_notes(tracker)
        trainer.waits.mark_progress("update")
        seconds = time.perf_counter() - start
        if trainer.loader:
            metrics["epoch"] = trainer.loader.epochs
        metrics |= {"seconds": seconds, "tokens_per_s": metrics.get("tokens", 0.0) / seconds}
        metrics |= trainer.clock.take() | trainer.step_limit(seconds)
        metrics |= {f"memory/{name}_bytes": value for name, value in trainer.models.memory().items()}
        append_trace(self._folder / "timeline.json", trainer.timeline.take())
        if self._is_due(trainer.eval_every) or (trainer.eval_every and trainer.version == config.steps):
            metrics |= self._evaluation()
        _log(tracker, trainer.version, metrics)
        if self._is_due(config.tracking.samples_every_steps) and (rows := trainer.samples()):
            tracker.samples(trainer.version, rows)
        return metrics

    def _print_notes(self, tracker: Tracker) -> None:
        while self._trainer.notes:
            tracker.event(self._trainer.notes.pop(0))

    def _evaluation(self) -> Metrics:
        trainer, start = self._trainer, time.perf_counter()
        with trainer.waits.track("update", "an evaluation"):
            metrics = trainer.evaluate()
        trainer.clock.take()  # its phases are not of a step
        return metrics | {"time/evaluate_s": time.perf_counter() - start}

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self._trainer.version % every_steps == 0

    def _resume(self) -> Path | None:
        """Load the checkpoint that the settings ask for, if any."""
        trainer, choice = self._trainer, self._config.checkpoint.resume
        folder = {"auto": self._store.newest(), "never": None}.get(choice, Path(choice))
        if folder is None:
            return None
        state = load_state(folder)
        changed = _differences(state["config"], trainer.fixed_settings()) if choice == "auto" else []
        if changed:
            raise ValueError(
                f"{folder} is of a run with other settings ({'; '.join(changed[:5])}); take another "
                f"output_dir, or checkpoint.resume=never to start anew, or checkpoint.resume={folder} to go "
                "on "
                "with the new settings"
            )
        trainer.release_devices()  # generation holds weights from before
        trainer.models.load(folder)
        trainer.load_state(state)
        return folder


def _log(tracker: Tracker, step: int, metrics: Metrics) -> None:
    """Log to every sink, and an evaluation as a line, for which the table of steps has no room."""
    tracker.log(step, metrics)
    shown = [
        f"{name.removeprefix('eval/')} {metrics[name]:.4g}" for name in metrics if name.startswith("eval/")
    ]
    if shown:
        tracker.event(f"evaluation after step {step}: {', '.join(shown)}")


def _summary(report: LoadReport) -> str:
    """One line on the data."""
    parts = [f"{report.num_rows} rows from {report.source}", f"longest prompt {report.longest} tokens"]
    if report.num_too_long:
        parts.append(f"{report.num_too_long} longer than data.max_prompt_tokens dropped")
    if report.num_malformed:
        parts.append(f"{report.num_malformed} malformed skipped, first: {report.problems[0]}")
    return "\n".join([", ".join(parts), *report.notes])


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys with both values, where two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix} was {old}, is {new}"]
    lines = []
    for key in {**old, **new}:
        lines += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    return lines
