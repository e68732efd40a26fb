"""Export of a model of a checkpoint as a Hugging Face folder, whatever ranks wrote the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from verl.config.data import DataConfig
from verl.config.roles import LoraConfig
from verl.engines.dcp_checkpoint import read_saved
from verl.engines.hf.adapters import adapter_at, export_adapter
from verl.engines.hf.hf_io import MAX_FILE_BYTES, saved_buffers, write_model
from verl.engines.hf.lora import POLICY, add_lora
from verl.engines.hf.models import Backbone, PolicyModel, RewardModel, ValueModel
from verl.engines.hf.pretrained import load_language_model, load_reward_model, value_model
from verl.trainer.checkpoint_store import CheckpointStore, is_checkpoint, load_state
from verl.trainer.export.base_files import BaseFiles
from verl.trainer.export.model_card import CardFacts, write_card
from verl.utils.hub import find_adapter
from verl.utils.tokens import TextCodec

ExportRole = Literal["policy", "critic"]
# Class of Transformers that a model without LoRA is built by, from its configuration.
_FAMILIES = {
    "PolicyModel": AutoModelForCausalLM,
    "RewardModel": AutoModelForSequenceClassification,
    "ValueModel": AutoModel,
}


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    role: ExportRole = "policy",
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = MAX_FILE_BYTES,
    adapter_only: bool = False,
) -> Path:
    """Write a model of a checkpoint: weights (LoRA merged), configuration, tokenizer and model card.

    Args:
        checkpoint: a folder `step-...` of a run, or the folder of a run, whose newest checkpoint is taken.
        folder: destination; a LoRA adapter alone is written into its folder `adapter`, too.
        role: policy, or critic, whose head is written as `value_head.safetensors`.
        dtype: of the written weights.
        max_file_bytes: size of a weights file; a larger model is written into several, with an index.
        adapter_only: write the LoRA adapter of the policy into `folder`, and nothing else.

    Returns:
        The folder of the checkpoint that was taken.

    Raises:
        ValueError: the folder is no checkpoint, the destination cannot be taken, it has no such role, its
            weights are not finite, or the base model of its LoRA adapter or the tokenizer is missing.
    """
    checkpoint = find_checkpoint(checkpoint)
    state = load_state(checkpoint)
    check_destination(folder, state["config"])
    model = load_checkpoint_model(checkpoint, role, state["config"])
    path = base_path(state["config"]["policy"])
    # Loaded before anything is written: without the tokenizer no half export is left.
    codec = TextCodec.for_run(path, data_settings(state["config"])) if path else None
    base = BaseFiles(**state["base"]) if "base" in state else BaseFiles.of(path or "", path or "")
    has_adapter = bool(model.adapter and role == "policy" and path and find_adapter(path) is None)
    if adapter_only and not has_adapter:
        raise ValueError(
            f"need a LoRA adapter on a base model with a path, but {role} of {checkpoint} has none; leave "
            "--adapter-only out"
        )
    folders = [folder] if adapter_only else [folder, folder / "adapter"][: 1 + has_adapter]
    if not adapter_only:
        write_model(model, folder, dtype=dtype, max_file_bytes=max_file_bytes)
    if has_adapter:
        export_adapter(model, folders[-1], base=path or "")
    for written in folders:
        if codec:
            base.write(written, codec)
    facts = CardFacts(
        kind=type(model).__name__,
        settings=state["config"],
        base=base,
        step=state["version"],
        run_folder=checkpoint.parent.parent,
        num_rows=state.get("num_rows"),
        is_adapter=adapter_only,
    )
    write_card(folder, facts, with_picture=True)
    return checkpoint


def check_destination(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a model can be written into a folder without the loss of one that a run started from.

    Args:
        folder: destination.
        settings: of the run.

    Raises:
        ValueError: the folder is a file, or a model that the settings name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"need a folder to write the model into, got the file {folder}; name another one")
    starts = {"policy.path": base_path(settings["policy"]), "reference": settings.get("reference")}
    starts["critic.path"] = settings.get("critic", {}).get("path")
    for name, path in starts.items():
        if path and folder.exists() and Path(path).is_dir() and folder.samefile(path):
            raise ValueError(
                f"need another folder to write the model into, got {folder}, the {name} of the run, which "
                "would be replaced; name another one"
            )


def base_path(policy: Mapping[str, Any]) -> str | None:
    """Folder or hub name of the model that a policy started from, from its section of the settings."""
    path: str | None = policy["path"]
    adapter = policy["lora"].get("path")
    return path if path is not None or adapter is None else adapter_at(adapter).base


def data_settings(settings: Mapping[str, Any]) -> DataConfig:
    """Settings of a run's data on which its tokenizer and chat template depend."""
    read = ("chat_template", "chat_template_kwargs", "system_prompt")
    return DataConfig(**{name: value for name, value in settings["data"].items() if name in read})


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint itself, or the newest one of the run with this folder.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(folder) or not (folder / "checkpoints").is_dir():
        return folder  # `load_state` refuses what is none
    newest = CheckpointStore(folder / "checkpoints", keep=1).newest()
    if newest is None:
        raise ValueError(
            f"need a complete checkpoint in {folder / 'checkpoints'}, found none; a run writes one every "
            "checkpoint.every_steps and at its end"
        )
    return newest


def load_checkpoint_model(checkpoint: Path, role: ExportRole, settings: Mapping[str, Any]) -> Backbone:
    """A model with the weights of a checkpoint, in fp32.

    Args:
        checkpoint: folder of the checkpoint.
        role: which of its models.
        settings: of the run.

    Raises:
        ValueError: the checkpoint has no such model, it cannot be read, or its weights are not finite.
    """
    saved = checkpoint / role
    if not saved.is_dir():
        roles = ", ".join(sorted(path.name for path in checkpoint.iterdir() if path.is_dir()))
        raise ValueError(f"need a checkpoint with a {role}, but {checkpoint} has {roles} alone")
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in read_saved(saved).items()
        if name.startswith("model.")
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"need weights that are finite, but {name} of {saved} is not; export an older checkpoint"
            )
    base = base_path(settings["policy"])
    if role == "critic":
        base = settings["critic"]["path"] or base
    model = model_for_checkpoint(saved, settings[role], base)
    fill_parameters(model, weights)
    return model


@torch.no_grad()
def fill_parameters(model: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of their names."""
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def model_for_checkpoint(saved: Path, settings: Mapping[str, Any], base: str | None) -> Backbone:
    """A model whose parameters have the names and shapes of a checkpoint.

    Args:
        saved: folder of the model in the checkpoint.
        settings: of its role in the run.
        base: folder or hub name of the model that it started from; None: not known.

    Raises:
        ValueError: the checkpoint has trained weights alone, and the base model is unknown.
    """
    lora = LoraConfig.model_validate(settings["lora"])
    kind = json.loads((saved / "progress.json").read_text())["kind"].rpartition(" ")[2]
    if not lora.is_on:
        config = AutoConfig.from_pretrained(saved)
        model = as_kind(kind, _FAMILIES[kind].from_config(config, dtype=torch.float32))
        if not any(saved_buffers(model.transformer)):
            return model
    if base is None:
        raise ValueError(
            f"need the base model of the weights in {saved}, which training did not change all, but the run "
            "received it without a path"
        )
    # A checkpoint holds what is trained alone: the rest is of the base model.
    is_reward_model = kind == "RewardModel"
    transformer = load_reward_model(base, new_head=True) if is_reward_model else load_language_model(base)
    model = value_model(transformer, "fp32") if kind == "ValueModel" else as_kind(kind, transformer)
    if lora.is_on:
        add_lora(model.transformer, lora)
        model.adapter = POLICY
    return model


def as_kind(kind: str, transformer: Any) -> Backbone:
    """A model of Transformers as the class `kind` of `verl.engines.hf.models`, in fp32."""
    classes: dict[str, Callable[..., Backbone]] = {
        "PolicyModel": PolicyModel,
        "RewardModel": RewardModel,
        "ValueModel": ValueModel,
    }
    return classes[kind](transformer, "fp32")
