"""A run around `step()`: build, resume, evaluate, checkpoint, log; what a step does is left to the trainers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PretrainedConfig

from verl.config.loader import to_yaml
from verl.config.pipeline import STALL_LIMIT_S
from verl.config.run import RunConfig
from verl.controller.worker_group import Timeline, append_trace
from verl.data.dataset import LoadReport, PromptLoader, drop_long_prompts, load_prompts
from verl.monitoring.sinks import check_sinks
from verl.monitoring.tracking import Clock, Tracker
from verl.monitoring.wait_tracker import WaitTracker
from verl.monitoring.watchdog import Dependency, Watchdog
from verl.trainer.checkpoint_store import CheckpointStore, Save, load_state, only_run_in
from verl.utils.device import (
    keep_freed_memory,
    memory_bytes,
    pick_device,
    rng_state,
    seed_everything,
    set_rng_state,
    synchronize,
)
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

Metrics = dict[str, float]

# What may change between a run and its continuation; everything else would make it another run.
_MAY_CHANGE = ("steps", "output_dir", "evaluation", "eval_every_steps", "checkpoint", "tracking", "placement")


class BaseTrainer(ABC):
    """A loop over `step()`, and what surrounds it.

    Args:
        config: of the run.
        device: auto, cpu or cuda, for what this process computes itself.
        console: for people; none: standard output.

    Attributes:
        codec: the tokenizer of the policy.
        device: of this process.
        timeline: what ran where and when.
        notes: what people should hear of, until the next step tells them.
        waits: what is waited for, and since when.
        run_folder: of the run, while `fit` has it.
        version: of the policy, the steps that it has learned.
    """

    codec: TextCodec

    def __init__(self, config: RunConfig, *, device: str, console: Console | None = None) -> None:
        seed_everything(config.seed)
        self.config = config
        self.device = pick_device(device)
        keep_freed_memory()
        self.version = 0
        self.clock = Clock(partial(synchronize, self.device))
        self.timeline = Timeline()
        self.notes: list[str] = []
        self.waits = WaitTracker()
        self.run_folder: Path | None = None
        self.loader: PromptLoader | None = None
        self._console = console

    @abstractmethod
    def step(self) -> Metrics:
        """One optimizer-visible step; advances `version`."""

    @abstractmethod
    def load_train_data(self) -> LoadReport:
        """Makes `loader`."""

    @property
    @abstractmethod
    def model_config(self) -> PretrainedConfig:
        """The configuration of the policy."""

    @property
    @abstractmethod
    def saves(self) -> Mapping[str, Save]:
        """For the folder of each model in a checkpoint, what begins to write it."""

    @abstractmethod
    def load_models(self, folder: Path) -> None:
        """Reads the models of a checkpoint."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the policy in Hugging Face format, without its tokenizer."""

    def close(self) -> None:
        """Gives back what the run holds outside this process; here nothing."""
        return

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0: never."""
        return 0

    @property
    def eval_at_start(self) -> bool:
        """Whether to evaluate before the first step."""
        return False

    @property
    def stall_limit_s(self) -> float:
        """Time in which nothing moves before the run is ended."""
        return STALL_LIMIT_S

    def parts(self) -> Sequence[Dependency]:
        """How what the run depends on is; asked from another thread. Here there is nothing."""
        return ()

    def evaluate(self) -> Metrics:
        """Metrics on held-out data; none if the run has none."""
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """Rows for the table of samples of the last step."""
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the engines; plain numbers, texts and tensors."""
        assert self.loader is not None
        return {
            "version": self.version,
            "loader": self.loader.state_dict(),
            "rng": rng_state(),
            "config": self._frozen_settings(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        assert self.loader is not None
        self.version = state["version"]
        self.loader.load_state_dict(state["loader"])
        set_rng_state(state["rng"])

    def fit(self) -> list[Metrics]:
        """Trains until `config.steps`, from the newest checkpoint if there is one, and writes the model.

        Returns:
            The metrics of each step that was done.

        Raises:
            ValueError: data or checkpoint do not fit the settings.
            RuntimeError: another process writes its run into `config.output_dir`.
            NotFiniteError: see `LocalEngine.update`.
            StalledError: nothing moves any more.
        """
        config, folder = self.config, Path(self.config.output_dir)
        check_sinks(config.tracking.sinks)
        self.run_folder = folder
        report = self.load_train_data()
        store = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
        resumed = self._resume(store)
        with only_run_in(folder), Watchdog(self.waits, folder, self.stall_limit_s, dependencies=self.parts):
            tracker = Tracker(
                config.tracking,
                folder,
                total_steps=config.steps,
                first_step=self.version + 1,
                console=self._console,
            )
            (folder / "config.yaml").write_text(to_yaml(config))
            tracker.event(_summary(report))
            if resumed:
                tracker.event(f"resumed from {resumed}, after step {self.version}")
            with closing(tracker):
                history = self._steps(tracker, store)
            self.save_model(folder / "model")
        return history

    def _steps(self, tracker: Tracker, store: CheckpointStore) -> list[Metrics]:
        """All steps that are left, with their evaluations and checkpoints."""
        history = []
        if self.version == 0 and self.eval_at_start:
            _log(tracker, 0, self._timed_evaluation())
        try:
            while self.version < self.config.steps:
                history.append(self._tracked_step(tracker))
                if self._due(self.config.checkpoint.every_steps) or self.version == self.config.steps:
                    self._begin_checkpoint(store)
                if done := store.poll():
                    tracker.event(f"checkpoint: {done}")
        finally:  # also of a run that fails: what it has reached is not lost
            if done := store.finish():
                tracker.event(f"checkpoint: {done}")
        return history

    def _begin_checkpoint(self, store: CheckpointStore) -> None:
        with self.waits.track("update", "a checkpoint"):
            store.begin(self.version, self.saves, self.state())

    def save_model(self, folder: Path) -> None:
        """Writes the policy and its tokenizer in Hugging Face format."""
        folder.mkdir(parents=True, exist_ok=True)
        self.export(folder)
        self.codec.tokenizer.save_pretrained(folder)

    def read_prompts(
        self, source: str | None, split: Literal["train", "test"]
    ) -> tuple[list[Prompt], LoadReport]:
        """Prompts of a data set that are short enough.

        Raises:
            ValueError: no source, or nothing usable in it.
        """
        if source is None:
            raise ValueError(
                f"need data.{split}: a JSONL, Parquet or Arrow file, a saved data set's folder, or task:NAME such as task:add-2"
            )
        return self.short_enough(*load_prompts(source, self.config.data, split=split))

    def short_enough(self, prompts: list[Prompt], report: LoadReport) -> tuple[list[Prompt], LoadReport]:
        """The prompts of at most `data.max_prompt_tokens`, and the report with what was dropped."""
        lengths = [len(self.codec.encode_prompt(p)) for p in prompts]
        kept, dropped = drop_long_prompts(prompts, lengths, self.config.data.max_prompt_tokens)
        self.check_context(max(n for n in lengths if n <= self.config.data.max_prompt_tokens))
        return kept, replace(report, num_too_long=dropped["num_too_long"], longest=dropped["longest"])

    def check_answers(self, rows: Sequence[Prompt], answers_of: Callable[[Prompt], Sequence[str]]) -> None:
        """Refuses rows whose prompt and answer go beyond the context of the model.

        Raises:
            ValueError: the first such row.
        """
        context = self.model_config.get_text_config().max_position_embeddings
        for row in rows:
            longest = len(self.codec.encode_prompt(row)) + max(
                len(self.codec.encode_answer(answer)) for answer in answers_of(row)
            )
            if longest > context:
                raise ValueError(
                    f"need prompt and answer within the model's context of {context} tokens, got {longest} in row {row.index} of "
                    f"{row.source}; leave it out, or lower data.max_prompt_tokens"
                )

    def check_context(self, prompt_tokens: int) -> None:
        """Refuses prompts of so many tokens, if the policy could not answer them."""
        return

    def _tracked_step(self, tracker: Tracker) -> Metrics:
        config, start = self.config, time.perf_counter()
        try:
            metrics = self.step()
        finally:
            while self.notes:
                tracker.event(self.notes.pop(0))
        self.waits.mark_progress("update")
        seconds = time.perf_counter() - start
        metrics |= {"seconds": seconds, "tokens_per_s": metrics.get("tokens", 0.0) / seconds}
        metrics |= self.clock.take() | self.step_limit(seconds)
        metrics |= {f"memory/{name}_bytes": value for name, value in self.memory().items()}
        append_trace(Path(config.output_dir) / "timeline.json", self.timeline.take())
        if self._due(self.eval_every) or (self.eval_every and self.version == config.steps):
            metrics |= self._timed_evaluation()
        _log(tracker, self.version, metrics)
        if self._due(config.tracking.samples_every_steps) and (rows := self.samples()):
            tracker.samples(self.version, rows)
        return metrics

    def memory(self) -> Metrics:
        """Bytes in use, at most and in all of the device; of the fullest, if there are several."""
        return memory_bytes(self.device)

    def _timed_evaluation(self) -> Metrics:
        with self.waits.track("update", "an evaluation"):
            metrics = self.evaluate()
        return metrics | {"time/evaluate_s": sum(self.clock.take().values())}

    def step_limit(self, seconds: float) -> Metrics:
        """How near the step came to what the machine can do; none if it is not known."""
        return {}

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.version % every_steps == 0

    def _resume(self, store: CheckpointStore) -> Path | None:
        """Loads the checkpoint that the settings ask for, if any."""
        choice = self.config.checkpoint.resume
        folder = {"auto": store.newest(), "never": None}.get(choice, Path(choice))
        if folder is None:
            return None
        state = load_state(folder)
        changed = _differences(state["config"], self._frozen_settings()) if choice == "auto" else []
        if changed:
            raise ValueError(
                f"{folder} is of a run with other settings ({'; '.join(changed[:5])}); take another output_dir, "
                f"or checkpoint.resume=never to start anew, or checkpoint.resume={folder} to go on with the new settings"
            )
        self.load_models(folder)
        self.load_state(state)
        return folder

    def _frozen_settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.model_dump(mode="json").items() if k not in _MAY_CHANGE}


def _log(tracker: Tracker, step: int, metrics: Metrics) -> None:
    """Metrics to every sink, and those of an evaluation, which the table of steps has no room for, as a line
    for people.
    """
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
    return ", ".join(parts)


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys with both values, where two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix} was {old}, is {new}"]
