"""The policy of a checkpoint as a Hugging Face model, whatever ranks have written it."""

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
    """Writes weights, low-rank additions merged, configuration and tokenizer.

    Args:
        checkpoint: a folder `step-...` of a run.
        folder: where to.

    Raises:
        ValueError: it is no checkpoint, or the model that its additions belong to, or the tokenizer, is not
            where it was.
    """
    settings = load_state(checkpoint)["config"]["policy"]
    model = _empty_model(checkpoint / "policy", settings)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_saved(checkpoint / "policy").items():
            if name.startswith("model."):
                own[name.removeprefix("model.")].copy_(tensor)
    codec = TextCodec.load(settings["path"]) if settings["path"] else None
    export_model(model, folder)
    if codec:
        codec.tokenizer.save_pretrained(folder)


def _empty_model(saved: Path, settings: dict[str, Any]) -> Backbone:
    """The model that the tensors of a checkpoint go into."""
    lora = LoraConfig(**{**settings["lora"], "targets": tuple(settings["lora"]["targets"])})
    is_judge = json.loads((saved / "progress.json").read_text())["kind"].endswith("RewardModel")
    if lora.rank and settings["path"] is None:
        raise ValueError(
            f"need the model that the low-rank additions in {saved} belong to, but the run was given it without a path"
        )
    if lora.rank:
        start = (
            load_reward_model(settings["path"], new_head=True)
            if is_judge
            else load_language_model(settings["path"])
        )
        add_lora(start, lora)
    else:
        family = AutoModelForSequenceClassification if is_judge else AutoModelForCausalLM
        start = family.from_config(AutoConfig.from_pretrained(saved), dtype=torch.float32)
    return RewardModel(start, "fp32") if is_judge else PolicyModel(start, "fp32")
