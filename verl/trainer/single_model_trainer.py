"""Base of trainers of one model, on the device of this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from verl.config.run import RunConfig
from verl.data.batch import Trajectory
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import check_model, load_language_model, model_config_of
from verl.engines.local import LocalEngine
from verl.trainer.base import BaseTrainer, Metrics
from verl.trainer.checkpoint_store import Save
from verl.trainer.run_loop import RunLoop
from verl.utils.device import memory_bytes
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec


@dataclass(frozen=True)
class SingleModel:
    """The models of a run that has one; see `ModelSet`."""

    engine: LocalEngine

    @property
    def model_config(self) -> PretrainedConfig:
        """Configuration of the model."""
        return self.engine.model.transformer.config

    @property
    def saves(self) -> Mapping[str, Save]:
        """The function that begins to write the model, for its folder in a checkpoint."""
        return {"policy": self.engine.save}

    def load(self, folder: Path) -> None:
        """Read the model of a checkpoint."""
        self.engine.load(folder / "policy")

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format, without its tokenizer."""
        self.engine.export(folder)

    def memory(self) -> Metrics:
        """Bytes in use, their peak, and bytes of the device."""
        return memory_bytes(self.engine.model.device)


class SingleModelTrainer(BaseTrainer):
    """A model on a device, and a loop over `step()`.

    Args:
        config: settings of the run.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: tokenizer of the policy; none: the one saved with the model.
        console: destination of human-readable output; none: standard output.

    Attributes:
        kind: of the model that training starts from, for messages.
        policy_engine: the model with its optimizer.
    """

    kind = "causal language model"

    def __init__(
        self,
        config: RunConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__(config, device=config.device, console=console)
        source = policy_source(config, actor_model, self.kind)
        model_config = model_config_of(source)
        path = config.policy.path or str(model_config.name_or_path)
        self.codec = codec or TextCodec.for_run(path, config.data)
        self.read_data_early(model_config)
        model = self.build_model(source)
        model.to(self.device).check_forward()
        self.policy_engine = LocalEngine(
            model, config.policy, device=self.device, total_updates=self.config.steps
        )
        self.models = SingleModel(self.policy_engine)

    def build_model(self, source: PreTrainedModel | str) -> Backbone:
        """The model to train, in fp32; a loaded one is trained in place."""
        return PolicyModel(
            load_language_model(source) if isinstance(source, str) else source.float(),
            self.config.policy.precision,
        )

    def trajectory_of(self, prompt: Prompt, answer: str, *, group: int) -> Trajectory:
        """A trajectory with an answer of the data set, which ends with the end token."""
        response_ids = self.codec.encode_answer(answer, prompt)
        return Trajectory(
            prompt=prompt,
            prompt_ids=self.codec.encode_prompt(prompt),
            response_ids=response_ids,
            response_mask=[True] * len(response_ids),
            rollout_logprobs=None,
            versions=[0] * len(response_ids),
            group=group,
        )

    @override
    def fit(self) -> list[Metrics]:
        return RunLoop(self).run()


def policy_source(
    config: RunConfig, given: PreTrainedModel | str | None, kind: str = "causal language model"
) -> PreTrainedModel | str:
    """The policy as a loaded model, folder or hub name: `given`, else `policy.path`.

    Args:
        config: of the run.
        given: if the caller has a model.
        kind: of the model, for messages.

    Raises:
        ValueError: both are None, or there is no model.
    """
    source = given if given is not None else config.policy.path
    if source is None:
        raise ValueError(
            f"need policy.path: the folder or hub name of a {kind} (verl make-model makes a small one)"
        )
    if isinstance(source, str):
        check_model(source, kind)
    return source
