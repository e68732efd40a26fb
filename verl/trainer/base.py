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
from transformers import PreTrainedModel

from verl.config import to_yaml
from verl.data.dataset import LoadReport, PromptLoader, drop_long_prompts, load_prompts
from verl.engines.base import TrainEngine
from verl.engines.checkpoint import CheckpointStore, load_state, only_run_in
from verl.engines.local import LocalEngine
from verl.engines.models import Backbone, PolicyModel, load_language_model, save_model
from verl.settings import RunConfig
from verl.utils.device import keep_freed_memory, memory_bytes, pick_device, rng_state, seed_everything, set_rng_state, synchronize
from verl.utils.rollout import Prompt
from verl.utils.tokens import TextCodec
from verl.utils.tracking import Clock, Tracker, check_sinks

Metrics = dict[str, float]

# What may change between a run and its continuation; everything else would make it another run.
_MAY_CHANGE = ("steps", "output_dir", "evaluation", "eval_every_steps", "checkpoint", "tracking")


class BaseTrainer(ABC):
    """A policy on a device, and a loop over `step()`.

    Args:
        config: of the run.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: its tokenizer; none: the one saved with the model.
        console: for people; none: standard output.
    """

    def __init__(
        self,
        config: RunConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        seed_everything(config.seed)
        self.config = config
        self.device = pick_device(config.device)
        keep_freed_memory()
        self.version = 0
        self.clock = Clock(partial(synchronize, self.device))
        self._console = console
        model = self._model(actor_model)
        path = config.policy.path or str(model.transformer.config.name_or_path)
        self.codec = codec or TextCodec.load(path, stop_ids=self._stop_ids(), system_prompt=config.data.system_prompt)
        model.to(self.device).check_forward()
        self.policy_engine = LocalEngine(model, config.policy, device=self.device, total_updates=self._total_updates())
        self.engines: dict[str, TrainEngine] = {"policy": self.policy_engine}
        self.loader: PromptLoader | None = None

    @abstractmethod
    def step(self) -> Metrics:
        """One optimizer-visible step; advances `version`."""

    @abstractmethod
    def load_train_data(self) -> LoadReport:
        """Makes `loader`."""

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0: never."""
        return 0

    @property
    def eval_at_start(self) -> bool:
        """Whether to evaluate before the first step."""
        return False

    def evaluate(self) -> Metrics:
        """Metrics on held-out data; none if the run has none."""
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """Rows for the table of samples of the last step."""
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the engines; plain numbers, texts and tensors."""
        assert self.loader is not None
        return {"version": self.version, "loader": self.loader.state_dict(), "rng": rng_state(), "config": self._frozen_settings()}

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
        """
        config, folder = self.config, Path(self.config.output_dir)
        check_sinks(config.tracking.sinks)
        report = self.load_train_data()
        store = CheckpointStore(folder / "checkpoints", keep=config.checkpoint.keep)
        resumed = self._resume(store)
        with only_run_in(folder):
            tracker = Tracker(config.tracking, folder, total_steps=config.steps, first_step=self.version + 1, console=self._console)
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
        while self.version < self.config.steps:
            history.append(self._tracked_step(tracker))
            if self._due(self.config.checkpoint.every_steps) or self.version == self.config.steps:
                tracker.event(f"checkpoint: {store.save(self.version, self.engines, self.state())}")
        return history

    def save_model(self, folder: Path) -> None:
        """Writes the policy and its tokenizer in Hugging Face format."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.policy_engine.model, folder)
        self.codec.tokenizer.save_pretrained(folder)

    def read_prompts(self, source: str | None, split: Literal["train", "test"]) -> tuple[list[Prompt], LoadReport]:
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
        context = self.policy_engine.model.transformer.config.get_text_config().max_position_embeddings
        for row in rows:
            longest = len(self.codec.encode_prompt(row)) + max(len(self.codec.encode_answer(answer)) for answer in answers_of(row))
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
        metrics = self.step()
        seconds = time.perf_counter() - start
        metrics |= {"seconds": seconds, "tokens_per_s": metrics.get("tokens", 0.0) / seconds}
        metrics |= self.clock.take() | self.step_limit(seconds)
        metrics |= {f"memory/{name}_bytes": value for name, value in memory_bytes(self.device).items()}
        if self._due(self.eval_every) or (self.eval_every and self.version == config.steps):
            metrics |= self._timed_evaluation()
        _log(tracker, self.version, metrics)
        if self._due(config.tracking.samples_every_steps) and (rows := self.samples()):
            tracker.samples(self.version, rows)
        return metrics

    def _timed_evaluation(self) -> Metrics:
        return self.evaluate() | {"time/evaluate_s": sum(self.clock.take().values())}

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
        for name, engine in self.engines.items():
            engine.load(folder / name)
        self.load_state(state)
        return folder

    def _frozen_settings(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.model_dump(mode="json").items() if k not in _MAY_CHANGE}

    def _model(self, actor_model: PreTrainedModel | str | None) -> Backbone:
        """What learns, in fp32, from what was given or from `config.policy.path`."""
        return PolicyModel(self._transformer(actor_model), self.config.policy.precision)

    def _transformer(self, actor_model: PreTrainedModel | str | None) -> PreTrainedModel:
        if isinstance(actor_model, str):
            return load_language_model(actor_model)
        if actor_model is not None:
            return actor_model.float()  # the optimizer's small steps are lost in 16-bit weights
        if self.config.policy.path is None:
            raise ValueError("need policy.path: the folder or hub name of a causal language model (verl make-model makes a small one)")
        return load_language_model(self.config.policy.path)

    def _stop_ids(self) -> tuple[int, ...]:
        return ()

    def _total_updates(self) -> int:
        return self.config.steps


def _log(tracker: Tracker, step: int, metrics: Metrics) -> None:
    """Metrics to every sink, and those of an evaluation, which the table of steps has no room for, as a line for people."""
    tracker.log(step, metrics)
    shown = [f"{name.removeprefix('eval/')} {metrics[name]:.4g}" for name in metrics if name.startswith("eval/")]
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
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)]
    return [] if old == new else [f"{prefix} was {old}, is {new}"]
