"""The parts that every trainer has: models, data, state, and a step that the run loop calls."""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from transformers import PretrainedConfig

from verl.config.data import RewardsConfig
from verl.config.loader import with_steps
from verl.config.pipeline import STALL_LIMIT_S
from verl.config.run import RunConfig, TrainerConfig
from verl.controller.worker_group import Timeline
from verl.data.dataset import LoadReport, drop_long_prompts, read_prompts
from verl.data.examples import with_refused
from verl.data.loading.loader import Loader
from verl.data.loading.loader_factory import build_loader, check_test_sources
from verl.data.loading.prompt_limits import PromptLimits
from verl.data.loading.prompt_store import PromptStore, selected
from verl.data.loading.stream_loader import StreamLoader
from verl.data.reading.data_files import Split
from verl.data.reading.memory_rows import EnvironmentRows, name_memory, no_rows, with_environment, with_memory
from verl.data.reading.sources import SourceSetting, sources_of
from verl.data.trajectory import Trajectory
from verl.engines.hf.families import context_length
from verl.engines.optimizer import check_optimizer
from verl.monitoring.formatting import format_bytes
from verl.monitoring.progress import Progress
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.monitoring.watchdog import Dependency
from verl.trainer.build.policy_start import PolicyStart
from verl.trainer.checkpoint_store import Save
from verl.trainer.export.model_card import CardFacts, write_card
from verl.trainer.run.callbacks import Callback
from verl.utils.device import (
    keep_freed_memory,
    pick_device,
    rng_state,
    seed_everything,
    set_rng_state,
    synchronize,
)
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

Metrics = dict[str, float]
# Settings that may differ between a run and its continuation; with other changes it would be another run.
_MAY_CHANGE = (
    "steps",
    "epochs",
    "output_dir",
    "evaluation",
    "eval_every_steps",
    "checkpoint",
    "tracking",
    "placement",
)
# Settings of a model that divide its work, and change memory and time alone.
_OF_MEMORY = {
    "packing",
    "gradient_checkpointing",
    "micro_batch_tokens",
    "micro_batch_rows",
    "logits_chunk_tokens",
}


class ModelSet(Protocol):
    """The models of a run, whatever devices they are on."""

    @property
    def model_config(self) -> PretrainedConfig:
        """Configuration of the policy."""

    @property
    def saves(self) -> Mapping[str, Save]:
        """For the folder of each model in a checkpoint, the function that begins to write it."""

    def not_finite(self) -> list[str]:
        """Models that learn whose weights or optimizer states are not all finite."""

    def checkpoint_bytes(self) -> int:
        """Bytes of the models in a checkpoint, about; with LoRA of the adapters alone."""

    def model_bytes(self) -> int:
        """Bytes of the weights of the trained model, which are fp32."""

    def load(self, folder: Path) -> None:
        """Read the models of a checkpoint."""

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format, without its tokenizer."""

    def export_adapter(self, folder: Path, base: str) -> None:
        """Write the policy's LoRA adapter alone in PEFT's layout, to be put on the model `base`."""

    def memory(self) -> Metrics:
        """Bytes in use, their peak, and bytes of the device; of the fullest, if there are several."""


class BaseTrainer(ABC):
    """A step, and all that the run loop needs of its trainer.

    Args:
        config: of the run.
        device: auto, cpu or cuda, for computation in this process.
        console: for output; none: standard output.
        callbacks: called at fixed points of the run, see `Callback`.
        train_dataset: rows in memory in place of `data.train`, see `rows_in_memory`.
        test_dataset: the same for `data.test`.

    Attributes:
        config: of the run; its `steps` are those of its epochs once `data.train` has been read.
        models: of the run.
        context: tokens that the policy reads at most, prompt and answer together.
        codec: the tokenizer of the policy.
        device: of this process.
        timeline: spans of all calls.
        notes: human-readable lines that the next step logs.
        waits: current waits, for metrics and the watchdog.
        progress: says which part of the run is in progress.
        run_folder: of the run, while `fit` runs.
        rows_per_step: rows of `data.train` in a step, at most all of them where they are not repeated.
        model_kind: class of the trained model in `verl.engines.hf.models`.
        version: of the policy: steps that it has learned.
        start: weights that the policy starts from, and the files beside them.
        eval_every: steps between evaluations; 0: never.
        eval_at_start: evaluate before the first step.
        held_out: size of the held-out data, for readers.
        last, failed: answers of the last step with and without a reward; none where nothing is sampled.
        compares_groups: the advantage compares the answers to one prompt.
        stall_limit_s: seconds without progress after which the run is ended.
        own_rows: gives the rows of the environment of the episodes, see `with_environment`.
        reserved_answer_tokens: tokens of the context that are reserved for the answer to a prompt.
    """

    models: ModelSet
    context: int
    rows_per_step: int
    codec: TextCodec
    start: PolicyStart

    def __init__(
        self,
        config: RunConfig,
        *,
        device: str,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
        train_dataset: Any = None,
        test_dataset: Any = None,
    ) -> None:
        self._in_memory: dict[Split, Any] = {"train": train_dataset, "test": test_dataset}
        self.own_rows: EnvironmentRows = no_rows
        config = name_memory(config, self._in_memory)
        roles = {"policy": config.policy}
        if isinstance(config, TrainerConfig):
            roles["critic"] = config.critic
        for role, settings in roles.items():
            check_optimizer(settings.optimizer, setting=f"{role}.optimizer")
        seed_everything(config.seed)
        self.config, self.seed = config, config.seed
        self.device = pick_device(device)
        keep_freed_memory()
        self.version = 0
        self.clock = Clock(partial(synchronize, self.device))
        self.timeline = Timeline()
        self.notes: list[str] = []
        self.waits = WaitTracker()
        self.callbacks = [*callbacks]
        self.run_folder: Path | None = None
        self.model_kind = "PolicyModel"
        self.loader: Loader | None = None
        self._train_rows: tuple[Sequence[Prompt], LoadReport, Sequence[StreamLoader]] | None = None
        self.eval_every, self.eval_at_start, self.held_out = 0, False, "held-out data"
        self.compares_groups = False
        self.last: list[Trajectory] = []
        self.failed: list[Trajectory] = []
        self.stall_limit_s = STALL_LIMIT_S
        self.reserved_answer_tokens = 0
        self.console = console
        is_shown = "console" in config.tracking.sinks
        self.progress = Progress(self.waits, (console or Console()) if is_shown else None)

    @abstractmethod
    def step(self) -> Metrics:
        """One optimizer-visible step; advances `version`."""

    @abstractmethod
    def read_data(self) -> None:
        """Read `data.train`, and what is evaluated of `data.test`; ends with `use_train_rows`.

        It needs the tokenizer and `context`, but no model.
        """

    def read_data_early(self, model_config: PretrainedConfig) -> Any:
        """Read the data before a model is loaded, if the settings name some; returns `config`.

        So bad data fails at once, and the steps of a run by epochs are known to the learning rate schedule.
        """
        self.context = context_length(model_config)
        self.codec.check_rows(model_config.get_text_config().vocab_size)
        check_test_sources(self.config.data)
        if self.config.data.train is not None or self.config.epochs is not None:
            self.read_data()
        return self.config

    def use_train_rows(
        self,
        rows: Sequence[Prompt],
        report: LoadReport,
        *,
        per_step: int,
        setting: str,
        repeats: bool = False,
        streams: Sequence[StreamLoader] = (),
    ) -> None:
        """Take the rows of `data.train`, which decide the steps of a run by epochs.

        Args:
            rows: all that are usable.
            report: of their source.
            per_step: rows of a step.
            setting: its name.
            repeats: a step of more rows than there are takes some of them again; else it takes all once.
            streams: further rows, which are read while the run goes on.

        Raises:
            ValueError: settings for chats have no effect, or a run with a stream is to end by its epochs.
        """
        self.codec.check_use(rows or [prompt for stream in streams for prompt in stream.prompts])
        self._train_rows = rows, report, streams
        if streams:
            self.rows_per_step = per_step
            if self.config.epochs is not None:
                raise ValueError(
                    f"need steps, not epochs {self.config.epochs:g}, for data.train with a stream, whose "
                    "rows are not counted; set steps"
                )
            return
        self.rows_per_step = per_step if repeats else min(per_step, len(rows))
        passes, epochs = self.rows_per_step / len(rows), self.config.epochs
        if per_step > len(rows):
            taken = f"takes each about {passes:.3g} times" if repeats else "takes all of them"
            self.notes.append(
                f"data.train has {len(rows)} usable rows, fewer than {setting} {per_step}: a step {taken}"
            )
        if epochs is not None:
            # Rounded first: 0.1 is a little more than a tenth.
            self.config = with_steps(self.config, max(1, math.ceil(round(epochs / passes, 6))))
            self.notes.append(
                f"epochs {epochs:g} of {len(rows)} rows, {self.rows_per_step} in a step: "
                f"{self.config.steps} steps"
            )

    def load_train_data(self) -> LoadReport:
        """Make `loader` of the rows of `data.train`, which are read now unless they were before."""
        if self._train_rows is None:
            self.read_data()
        assert self._train_rows is not None, "need use_train_rows at the end of read_data"
        rows, report, streams = self._train_rows
        data = self.config.data
        streamed = [stream.source for stream in streams]
        known = [source for source in sources_of(data.train) if source not in streamed]
        self.loader = build_loader(
            rows, report.ends, [*known, *streamed], data, seed=self.config.seed, streams=streams
        )
        return report

    @abstractmethod
    def fit(self) -> list[Metrics]:
        """Train until `config.steps`, from the newest checkpoint if there is one, and write the model.

        Returns:
            The metrics of each step that was done.

        Raises:
            ValueError: data or checkpoint do not fit the settings.
            RuntimeError: another process writes its run into `config.output_dir`.
            NotFiniteError: see `LocalEngine.update`.
            StalledError: no progress within the limit.
        """

    def save_model(self, folder: Path, *, adapter: Path | None = None) -> None:
        """Write the policy in Hugging Face format, with tokenizer, generation config and model card.

        Args:
            folder: of the whole model, with a LoRA adapter merged.
            adapter: folder of the LoRA adapter alone in PEFT's layout, if one is trained and its base can be
                named.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.models.export(folder)
        self.start.files.write(folder, self.codec)
        facts = CardFacts(
            kind=self.model_kind,
            settings=self.config.model_dump(mode="json"),
            base=self.start.files,
            step=self.version,
            run_folder=self.run_folder,
            num_rows=self.loader.num_prompts if self.loader else None,
        )
        write_card(folder, facts)
        if adapter is not None and self.start.adapter_base is not None:
            self.models.export_adapter(adapter, self.start.adapter_base)
            self.start.files.write(adapter, self.codec)

    def evaluate(self) -> Metrics:
        """Metrics on held-out data; none if the run has none."""
        return {}

    def samples(self) -> list[dict[str, Any]]:
        """Rows for the table of samples of the last step."""
        return []

    def step_limit(self, seconds: float) -> Metrics:
        """Share of the machine's limit that a step of so many seconds reached; none if it is not known."""
        return {}

    def dependencies(self) -> Sequence[Dependency]:
        """State of what the run depends on, such as engines; called from another thread."""
        return ()

    def release_devices(self) -> None:
        """Release device memory that other models need; here nothing."""
        return

    def close(self) -> None:
        """Release what the run holds outside this process; here nothing."""
        return

    def state(self) -> dict[str, Any]:
        """State of a checkpoint besides the models: plain numbers, texts and tensors."""
        return {
            "version": self.version,
            "loader": self.loader.state_dict() if self.loader else None,
            "rng": rng_state(),
            "config": self.fixed_settings(),
            "base": asdict(self.start.files),
            "num_rows": self.loader.num_prompts if self.loader else 0,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.version = state["version"]
        if self.loader and state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
        set_rng_state(state["rng"])

    def fixed_settings(self) -> dict[str, Any]:
        """Settings that must be equal in the continuation of a run."""
        return fixed_settings_of(self.config.model_dump(mode="json"))

    def source(self, split: Split) -> SourceSetting | None:
        """Value of `data.train` or `data.test`, with the rows in memory that stand in it.

        Raises:
            ValueError, TypeError: as `with_memory` and `with_environment` of `verl.data.reading.memory_rows`.
        """
        setting = self.config.data.train if split == "train" else self.config.data.test
        return with_environment(with_memory(setting, self._in_memory[split], split), self.own_rows, split)

    def read_prompts(self, source: SourceSetting | None, split: Split) -> tuple[Sequence[Prompt], LoadReport]:
        """Prompts of a data set that are short enough; those to train on beyond memory are on disk.

        Raises:
            ValueError: no source, nothing usable in it, or prompts that leave no room for an answer.
        """
        if source is None:
            raise ValueError(
                f"need data.{split}: a file of rows (JSON, CSV, Parquet or Arrow), a folder of them, a data "
                "set of the hub (OWNER/NAME), or task:NAME such as task:add-2; or "
                f"{split}_dataset in a program"
            )
        bound = self.config.data.in_memory_mb * 1e6 if split == "train" else math.inf
        prompts = PromptStore(in_memory_bytes=bound)
        rewards = self.config.rewards if isinstance(self.config, TrainerConfig) else RewardsConfig()
        report = read_prompts(prompts, source, self.config.data, split=split, rewards=rewards)
        if prompts.is_on_disk:
            size = format_bytes(prompts.num_bytes)
            self.notes.append(
                f"data.{split}: {len(prompts)} prompts are in a private file of {size} in "
                f"{tempfile.gettempdir()}, as they are more than data.in_memory_mb"
            )
        return self.short_enough(prompts, report)

    def short_enough(
        self, prompts: Sequence[Prompt], report: LoadReport
    ) -> tuple[Sequence[Prompt], LoadReport]:
        """Prompts of at most `data.max_prompt_tokens`, and the report with the number of dropped ones.

        Those that the chat template refuses are an error, or are left out, as `data.on_malformed` says.
        """
        limits, problems = prompt_limits(self), list[str]()
        usable, lengths, rooms = array("q"), array("q"), array("q")
        for position, prompt in enumerate(prompts):
            try:
                length = limits.num_tokens(prompt)
            except ValueError as error:
                problems.append(str(error))
                continue
            usable.append(position)
            lengths.append(length)
            rooms.append(limits.room_of(prompt, length))
        skips = self.config.data.on_malformed == "skip"
        report = with_refused(report, problems, skips=skips, usable=len(usable))
        kept, dropped = drop_long_prompts(usable, lengths, limits.max_prompt_tokens)
        inside = (pair for pair in zip(rooms, lengths, strict=True) if pair[1] <= limits.max_prompt_tokens)
        room, length = max(inside)
        limits.check_room(length, room)
        report = replace(report, num_too_long=dropped["num_too_long"], longest=dropped["longest"])
        return selected(prompts, kept), report


def prompt_limits(trainer: BaseTrainer) -> PromptLimits:
    """Limits of a run on the tokens of prompts."""
    longest = trainer.config.data.max_prompt_tokens
    return PromptLimits(trainer.codec, longest, trainer.context, trainer.reserved_answer_tokens)


def fixed_settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that must be equal in the continuation of a run, of this version or an earlier one."""
    return {
        name: {n: v for n, v in value.items() if n not in _OF_MEMORY} if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _MAY_CHANGE
    }
