"""A run around the steps of a trainer: resume, log, evaluate, checkpoint, write the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.config.loader import to_yaml
from verl.controller.worker_group import append_trace
from verl.data.dataset import LoadReport
from verl.monitoring.formatting import format_bytes, format_duration
from verl.monitoring.run_findings import RunFindings
from verl.monitoring.samples import different_samples, sample_lines
from verl.monitoring.sinks import check_sinks
from verl.monitoring.tracking import Tracker
from verl.monitoring.watchdog import Watchdog
from verl.trainer.base import BaseTrainer, Metrics, fixed_settings_of
from verl.trainer.checkpoint_store import CheckpointStore, check_room, load_state, only_run_in
from verl.trainer.evaluation.sample_rows import recorded_row
from verl.trainer.export.exporting import check_destination
from verl.trainer.run.callbacks import Callback, notify
from verl.trainer.run.finite_weights import check_finite, has_learned, naming_good_checkpoint
from verl.trainer.run.run_sizes import RunSizes, bytes_on_disk

# Answers of the first step that are shown.
_NUM_SHOWN = 2


class RunnableTrainer(BaseTrainer):
    """A trainer with the run around its steps: all of it by `fit`, or around a loop of your own by `run`.

    Attributes:
        active_run: the run in progress, if there is one.
        stop_requested: the run ends after the step in progress.
    """

    active_run: TrainerRun | None = None
    stop_requested = False

    @override
    def fit(self) -> list[Metrics]:
        with _started(self, reads_data=True) as run:
            while run.goes_on:
                run.log(self.step())
        return run.history

    def run(self) -> AbstractContextManager[TrainerRun]:
        """A run around a loop of your own, which resumes and writes the same files as `fit`.

        `with trainer.run() as run:` loads the newest checkpoint if there is one; call
        `run.log(metrics)` after each step. At the end of the block the last checkpoint and the model are
        written, but not after an error.

        Raises:
            ValueError: data or checkpoint do not fit the settings.
            RuntimeError: another process writes its run into `config.output_dir`.
        """
        return _started(self, reads_data=self.config.data.train is not None)

    def request_stop(self) -> None:
        """End the run after the step in progress, with evaluation, checkpoint and model."""
        self.stop_requested = True

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the present state into `config.output_dir`, and return its folder.

        Raises:
            RuntimeError: it cannot be written, or another process writes its run there.
        """
        if self.active_run:
            return self.active_run.save_checkpoint()
        folder = Path(self.config.output_dir)
        with only_run_in(folder):
            return _write_checkpoint(self, _store(self))


class TrainerRun:
    """The log, evaluations and checkpoints of a run in progress; from `RunnableTrainer.run`.

    Attributes:
        history: metrics of each step that was logged.
    """

    def __init__(self, trainer: RunnableTrainer, tracker: Tracker, store: CheckpointStore) -> None:
        self._trainer, self._config, self._tracker, self._store = trainer, trainer.config, tracker, store
        self._folder = Path(trainer.config.output_dir)
        self._findings = RunFindings(
            compares_groups=trainer.compares_groups, max_tokens=trainer.reserved_answer_tokens
        )
        self._saved_version: int | None = None
        self._first_version = trainer.version
        self.history: list[Metrics] = []

    @property
    def goes_on(self) -> bool:
        """True if steps are left, and no stop was requested."""
        return self._trainer.version < self._config.steps and not self._trainer.stop_requested

    def log(self, metrics: Mapping[str, float]) -> Metrics:
        """Log a step; evaluate, write samples and a checkpoint where they are due.

        Call it once after each step, such as `update_policy`.

        Args:
            metrics: of the step.

        Returns:
            All metrics of the step, those of an evaluation included.

        Raises:
            ValueError: no step was made since the last call.
            RuntimeError: a callback failed, or a checkpoint cannot be written.
        """
        trainer, tracker = self._trainer, self._tracker
        if trainer.version <= self._logged_version:
            raise ValueError(
                f"need one call of log after each step, got two after step {trainer.version}; call "
                "update_policy first"
            )
        logged = self._with_costs(metrics)
        self._show_notes()
        self._notify("on_step", lambda callback: callback.on_step(trainer, logged))
        if self._is_due(trainer.eval_every, also_last=True):
            logged |= self._evaluation()
        _log(tracker, trainer.version, logged)
        causes = [t.detail or t.outcome for t in trainer.failed]
        for line in self._findings.notes(trainer.version, logged, causes):
            tracker.event(line)
        if self._is_due(self._config.tracking.samples_every_steps, also_last=True, also_first=True):
            self._write_samples()
        if self._config.tracking.episodes:
            self._write_episodes()
        if has_learned(metrics):  # else the weights are those before the step, which may be what is wrong
            self._store.confirm(trainer.version - 1)
            if self._is_due(self._config.checkpoint.every_steps):
                self._begin_checkpoint()
        if done := self._store.poll():
            self._completed(done)
        self.history.append(logged)
        self._begin_step()
        return logged

    def save_checkpoint(self) -> Path:
        """Write a checkpoint now, and return its folder."""
        if before := self._store.finish():
            self._completed(before)
        folder = _write_checkpoint(self._trainer, self._store)
        self._saved_version = self._trainer.version
        self._completed(folder)
        return folder

    def start(self, report: LoadReport | None, resumed: Path | None, replaced: str) -> None:
        """Say what is trained on what and written where, and evaluate before the first step."""
        trainer, tracker = self._trainer, self._tracker
        (self._folder / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
        lines = RunSizes(trainer).lines() if tracker.shows_events else []
        if report:
            lines.append(_summary(report))
        if trainer.eval_every:
            lines.append(_evaluations(trainer))
        if resumed:
            lines.append(f"resumed from {resumed}, after step {trainer.version}")
        room = check_room(
            self._folder,
            checkpoint_bytes=trainer.models.checkpoint_bytes(),
            model_bytes=trainer.models.model_bytes(),
            keep=self._config.checkpoint.keep,
        )
        for line in filter(None, [*lines, replaced, room]):
            tracker.event(line)
        self._show_notes()
        self._notify("on_start", lambda callback: callback.on_start(trainer))
        if trainer.version == 0 and trainer.eval_at_start:
            _log(tracker, 0, self._evaluation())
        self._begin_step()

    def finish(self) -> None:
        """Write the last checkpoint and the model, and sum up."""
        trainer, tracker = self._trainer, self._tracker
        if trainer.version not in (self._first_version, self._saved_version):
            self._begin_checkpoint()
        if trainer.version > self._logged_version:
            tracker.event(
                f"steps {self._logged_version + 1} to {trainer.version} were not logged: call log with the "
                "metrics of each step"
            )
        self.settle()
        check_finite(trainer)
        self._store.prune()
        if self.history and self.goes_on:
            tracker.event(f"ended after step {trainer.version} of {self._config.steps}")
        elif self.history and trainer.stop_requested:
            tracker.event(f"a stop was requested: ended after step {trainer.version} of {self._config.steps}")
        for line in self._findings.summary():
            tracker.event(line)
        with trainer.progress.phase(f"writing the model to {self._folder / 'model'}"):
            trainer.save_model(self._folder / "model", adapter=self._folder / "adapter")
        self._notify("on_end", lambda callback: callback.on_end(trainer))

    def settle(self) -> None:
        """Show the last notes, and complete the checkpoint that is being written; also after an error."""
        self._show_notes()
        if done := self._store.finish():
            self._completed(done)

    def _begin_step(self) -> None:
        trainer = self._trainer
        trainer.waits.mark_progress("update")
        trainer.progress.begin_step(trainer.version + 1, self._config.steps)
        self._logged_version = trainer.version
        self._began_s = time.perf_counter()

    def _with_costs(self, metrics: Mapping[str, float]) -> Metrics:
        """The metrics of a step with its time and memory."""
        trainer, seconds = self._trainer, time.perf_counter() - self._began_s
        trainer.waits.mark_progress("update")
        logged = dict(metrics)
        if trainer.loader:
            logged |= {} if trainer.loader.epochs is None else {"epoch": trainer.loader.epochs}
            logged |= trainer.loader.take_metrics()
        logged |= {"seconds": seconds, "tokens_per_s": logged.get("tokens", 0.0) / seconds}
        logged |= trainer.clock.take() | trainer.step_limit(seconds)
        logged |= {f"memory/{name}_bytes": value for name, value in trainer.models.memory().items()}
        append_trace(self._folder / "timeline.json", trainer.timeline.take())
        return logged

    def _evaluation(self) -> Metrics:
        trainer, start_s = self._trainer, time.perf_counter()
        with trainer.progress.phase(f"evaluating {trainer.held_out}"):
            metrics = trainer.evaluate()
        trainer.clock.take()  # its phases are not of a step
        metrics |= {"time/evaluate_s": time.perf_counter() - start_s}
        self._notify("on_evaluate", lambda callback: callback.on_evaluate(trainer, metrics))
        return metrics

    def _write_samples(self) -> None:
        rows, step = self._trainer.samples(), self._trainer.version
        if not rows:
            return
        path = self._tracker.samples(step, rows)
        if step == 1:
            shown = different_samples(rows, _NUM_SHOWN)
            self._tracker.event(
                f"answers of step 1, with the special tokens that the model reads; more: {path}"
            )
            for line in sample_lines(shown):
                self._tracker.event(line)

    def _write_episodes(self) -> None:
        trainer = self._trainer
        played = [t for t in (*trainer.last, *trainer.failed) if t.episode is not None]
        if played:
            rows = [recorded_row(t, trainer.codec, trainer.version) for t in played]
            self._tracker.episodes(trainer.version, rows)

    def _begin_checkpoint(self) -> None:
        trainer = self._trainer
        with trainer.progress.phase("writing a checkpoint"):
            check_finite(trainer)
            self._saved_version = trainer.version
            self._store.begin(trainer.version, trainer.models.saves, trainer.state())

    def _completed(self, folder: Path) -> None:
        self._tracker.event(f"checkpoint: {folder} ({format_bytes(bytes_on_disk(folder))})")
        self._notify("on_checkpoint", lambda callback: callback.on_checkpoint(self._trainer, folder))

    def _is_due(self, every_steps: int, *, also_last: bool = False, also_first: bool = False) -> bool:
        version = self._trainer.version
        is_end = (also_first and version == 1) or (
            also_last and (version == self._config.steps or self._trainer.stop_requested)
        )
        return every_steps > 0 and (version % every_steps == 0 or is_end)

    def _show_notes(self) -> None:
        while self._trainer.notes:
            self._tracker.event(self._trainer.notes.pop(0))

    def _notify(self, name: str, call: Callable[[Callback], None]) -> None:
        notify(self._trainer.callbacks, name, call)


@contextmanager
def _started(trainer: RunnableTrainer, *, reads_data: bool) -> Iterator[TrainerRun]:
    """A run of the trainer, from its newest checkpoint or its start."""
    folder = Path(trainer.config.output_dir)
    check_sinks(trainer.config.tracking.sinks)
    trainer.run_folder, trainer.stop_requested = folder, False
    check_destination(folder / "model", trainer.config.model_dump(mode="json"))
    report = trainer.load_train_data() if reads_data else None
    config = trainer.config  # its steps are known now
    store = _store(trainer)
    resumed = _resume(trainer, store)
    replaced = "" if resumed else _earlier_run(folder)
    watchdog = Watchdog(trainer.waits, folder, trainer.stall_limit_s, dependencies=trainer.dependencies)
    with only_run_in(folder), watchdog, trainer.progress.live():
        tracker = Tracker(
            config.tracking,
            folder,
            total_steps=config.steps,
            first_step=trainer.version + 1,
            console=trainer.console,
        )
        run = trainer.active_run = TrainerRun(trainer, tracker, store)
        with closing(tracker), naming_good_checkpoint(store):
            try:
                run.start(report, resumed, replaced)
                yield run
                run.finish()
            finally:  # also of a run that fails: the checkpoint that is being written is completed
                trainer.active_run = None
                run.settle()


def _store(trainer: BaseTrainer) -> CheckpointStore:
    config = trainer.config
    return CheckpointStore(Path(config.output_dir) / "checkpoints", keep=config.checkpoint.keep)


def _write_checkpoint(trainer: BaseTrainer, store: CheckpointStore) -> Path:
    """Write a checkpoint to its end."""
    with trainer.progress.phase("writing a checkpoint"):
        check_finite(trainer)
        store.begin(trainer.version, trainer.models.saves, trainer.state())
        folder = store.finish()
    assert folder is not None
    return folder


def _resume(trainer: BaseTrainer, store: CheckpointStore) -> Path | None:
    """Load the checkpoint that the settings ask for, if any."""
    choice = trainer.config.checkpoint.resume
    folder = {"auto": store.newest(), "never": None}.get(choice, Path(choice))
    if folder is None:
        return None
    state = load_state(folder)
    usual = type(trainer.config)().model_dump(mode="json")
    before = fixed_settings_of(state["config"])
    changed = _differences(before, trainer.fixed_settings(), usual) if choice == "auto" else []
    changed = [line for line in changed if not line.startswith("data.test ")]  # it changes no training
    if changed:
        raise ValueError(
            f"{folder} is of a run with other settings ({'; '.join(changed[:5])}); take another "
            f"output_dir, or checkpoint.resume=never to start anew, or checkpoint.resume={folder} to go on "
            "with the new settings"
        )
    with trainer.progress.phase(f"loading {folder}"):
        trainer.release_devices()  # generation holds weights from before
        trainer.models.load(folder)
        trainer.load_state(state)
    store.resume(folder)
    return folder


def _earlier_run(folder: Path) -> str:
    """A line on the run whose files a new run in the same folder replaces; empty if there is none."""
    found = [name for name in ("metrics.jsonl", "model") if (folder / name).exists()]
    return f"starts anew: replaces {' and '.join(found)} of an earlier run in {folder}" if found else ""


def _log(tracker: Tracker, step: int, metrics: Metrics) -> None:
    """Log to every sink, and an evaluation as a line, for which the table of steps has no room."""
    tracker.log(step, metrics)
    if shown := evaluation_words(metrics):
        took = format_duration(metrics["time/evaluate_s"])
        tracker.event(f"evaluation after step {step}: {', '.join(shown)} ({took})")


def evaluation_words(metrics: Metrics) -> list[str]:
    """The metrics of an evaluation for a line: `accuracy 0.41 [0.35, 0.47]`; of several k, the largest."""
    values = {name.removeprefix("eval/"): v for name, v in metrics.items() if name.startswith("eval/")}
    largest = {name.partition("@")[0]: name for name in values if "@" in name}
    words = []
    for name, value in values.items():
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        bounds = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
        is_bound = name.removesuffix("_low").removesuffix("_high") in values.keys() - {name}
        if not is_bound and largest.get(name.partition("@")[0], name) == name:
            words.append(f"{name} {value:.4g}{bounds}")
    return words


def _evaluations(trainer: BaseTrainer) -> str:
    """One line on what is evaluated when."""
    every, when = trainer.eval_every, ["before the first step"] if trainer.eval_at_start else []
    if every < trainer.config.steps:
        often = "after every step" if every == 1 else f"every {every} steps and after the last"
        return f"evaluation: {trainer.held_out}, {', '.join([*when, often])}"
    when.append("after the last step")
    between = "; evaluation.every_steps=N evaluates in between"
    return f"evaluation: {trainer.held_out}, {' and '.join(when)}{between}"


def _summary(report: LoadReport) -> str:
    """One line on the data."""
    if not report.num_rows:
        return f"data: a stream, {report.source}, whose rows are read while the run goes on"
    parts = [f"{report.num_rows} rows from {report.source}", f"longest prompt {report.longest} tokens"]
    if report.num_too_long:
        parts.append(f"{report.num_too_long} longer than data.max_prompt_tokens dropped")
    if report.num_malformed:
        parts.append(f"{report.num_malformed} malformed skipped, first: {report.problems[0]}")
    return "\n".join([f"data: {', '.join(parts)}", *report.notes])


def _differences(old: Any, new: Any, usual: Any, prefix: str = "") -> Sequence[str]:
    """Dotted keys with both values, where two nested dicts differ.

    A setting that the old one lacks, as a version before it wrote none, had its default `usual`.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix} was {old}, is {new}"]
    usual = usual if isinstance(usual, dict) else {}
    lines: list[str] = []
    for key in {**old, **new}:
        default = usual.get(key)
        name = f"{prefix}.{key}" if prefix else key
        lines += _differences(old.get(key, default), new.get(key), default, name)
    return lines
