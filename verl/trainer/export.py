"""Export of the policy of a checkpoint as a Hugging Face model, whatever ranks wrote the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from verl.config.roles import LoraConfig
from verl.engines.dcp_checkpoint import read_saved
from verl.engines.hf.hf_io import export_model
from verl.engines.hf.lora import add_lora
from verl.engines.hf.models import Backbone, PolicyModel, RewardModel
from verl.engines.hf.pretrained import load_language_model, load_reward_model
from verl.trainer.checkpoint_store import load_state
from verl.utils.tokens import TextCodec


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write weights (LoRA adapters merged), configuration and tokenizer of a checkpoint's policy.

    Args:
        checkpoint: a folder `step-...` of a run.
        folder: destination.

    Raises:
        ValueError: the folder is no checkpoint, or the base model of its LoRA adapter or the tokenizer is
            missing.
    """
    settings = load_state(checkpoint)["config"]["policy"]
    model = model_for_checkpoint(checkpoint / "policy", settings)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_saved(checkpoint / "policy").items():
            if name.startswith("model."):
                own[name.removeprefix("model.")].copy_(tensor)
    # Loaded before anything is written: without the tokenizer no half export is left.
    codec = TextCodec.load(settings["path"]) if settings["path"] else None
    export_model(model, folder)
    if codec:
        codec.tokenizer.save_pretrained(folder)


def model_for_checkpoint(saved: Path, settings: dict[str, Any]) -> Backbone:
    """A model whose parameters have the names and shapes of a checkpoint.

    Args:
        saved: folder of the policy in the checkpoint.
        settings: section `policy` of the run's settings.

    Raises:
        ValueError: the checkpoint has a LoRA adapter, and the base model is unknown.
    """
    lora = LoraConfig(**{**settings["lora"], "targets": tuple(settings["lora"]["targets"])})
    is_reward_model = json.loads((saved / "progress.json").read_text())["kind"].endswith("RewardModel")
    if lora.rank and settings["path"] is None:
        raise ValueError(
            f"need the base model of the LoRA adapter in {saved}, but the run received it without a path"
        )
    if lora.rank:
        # A checkpoint holds the adapter alone; the other weights are those of the base model.
        base = (
            load_reward_model(settings["path"], new_head=True)
            if is_reward_model
            else load_language_model(settings["path"])
        )
        add_lora(base, lora)
    else:
        family = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
        base = family.from_config(AutoConfig.from_pretrained(saved), dtype=torch.float32)
    return RewardModel(base, "fp32") if is_reward_model else PolicyModel(base, "fp32")
