"""The sizes of what a run trains and writes, for the lines at its start."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.monitoring.formatting import format_bytes
from verl.trainer.base import BaseTrainer


class RunSizes:
    """Sizes of the models and files of a run, estimated before anything is written.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer, self._config = trainer, trainer.config
        self.num_parameters = parameter_count(trainer.models.model_config)

    def lines(self) -> list[str]:
        """A line on the model, and one on the files that are written."""
        config, trainer = self._config, self._trainer
        settings = config.policy.lora
        lora = f", LoRA adapters of rank {settings.rank}" if settings.is_on else ""
        if settings.path is not None:
            lora = f", the LoRA adapter of {settings.path}"
        name = config.policy.path or str(trainer.models.model_config.name_or_path) or "given"
        model = (
            f"policy: {name}, {self.num_parameters / 1e6:.3g}M parameters{lora}, {config.policy.precision}, "
            f"{trainer.device}"
        )
        return [model, f"writes to {config.output_dir}: {', '.join(self._files())}"]

    def _files(self) -> list[str]:
        config, names = self._config, {"jsonl": "metrics.jsonl", "tensorboard": "tensorboard"}
        files = [names[sink] for sink in config.tracking.sinks if sink in names]
        checkpoint, every = config.checkpoint, config.checkpoint.every_steps
        when = f"every {every} steps, the newest {checkpoint.keep} are kept" if every else "at the end"
        files.append(f"checkpoints ({when}{self._checkpoint_size(each=bool(every))})")
        model_bytes = self._trainer.models.model_bytes()
        return [*files, f"the model (at the end, about {format_bytes(model_bytes)})"]

    def _checkpoint_size(self, *, each: bool) -> str:
        size = format_bytes(self._trainer.models.checkpoint_bytes())
        return f", about {size}{' each' if each else ''}"


def parameter_count(config: PretrainedConfig) -> int:
    """Number of parameters of a language model, tied ones counted once; no memory is taken."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def bytes_on_disk(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
