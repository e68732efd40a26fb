"""A run that trains one model on the device of this process, and needs no other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from verl.config.run import RunConfig
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import check_model, load_language_model
from verl.engines.local import LocalEngine
from verl.trainer.base import BaseTrainer
from verl.trainer.checkpoint_store import Save
from verl.utils.tokens import TextCodec


class SingleModelTrainer(BaseTrainer):
    """A model on a device, and a loop over `step()`.

    Args:
        config: of the run.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: its tokenizer; none: the one saved with the model.
        console: for people; none: standard output.

    Attributes:
        policy_engine: the model with its optimizer.
    """

    def __init__(
        self,
        config: RunConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__(config, device=config.device, console=console)
        model = self._model(actor_model)
        path = config.policy.path or str(model.transformer.config.name_or_path)
        self.codec = codec or TextCodec.load(path, system_prompt=config.data.system_prompt)
        model.to(self.device).check_forward()
        self.policy_engine = LocalEngine(model, config.policy, device=self.device, total_updates=config.steps)

    @property
    @override
    def model_config(self) -> PretrainedConfig:
        return self.policy_engine.model.transformer.config

    @property
    @override
    def saves(self) -> Mapping[str, Save]:
        return {"policy": self.policy_engine.save}

    @override
    def load_models(self, folder: Path) -> None:
        self.policy_engine.load(folder / "policy")

    @override
    def export(self, folder: Path) -> None:
        self.policy_engine.export(folder)

    def _model(self, actor_model: PreTrainedModel | str | None) -> Backbone:
        """What learns, in fp32, from what was given or from `config.policy.path`."""
        source = policy_source(self.config, actor_model)
        return PolicyModel(
            load_language_model(source) if isinstance(source, str) else source.float(),
            self.config.policy.precision,
        )


def policy_source(config: RunConfig, given: PreTrainedModel | str | None) -> PreTrainedModel | str:
    """Where the policy comes from: what was given, else `policy.path`.

    Raises:
        ValueError: neither is there, or no model where it should be.
    """
    source = given if given is not None else config.policy.path
    if source is None:
        raise ValueError(
            "need policy.path: the folder or hub name of a causal language model (verl make-model makes a small one)"
        )
    if isinstance(source, str):
        check_model(source)
    return source
