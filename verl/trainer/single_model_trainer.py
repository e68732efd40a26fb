"""Base of trainers of one model, on the device of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from verl.agents.group_sampler import evaluation_params
from verl.agents.row_sampling import with_row_sampling
from verl.config.run import PairsConfig, PreferenceConfig, SFTConfig
from verl.data.dataset import LoadReport
from verl.data.examples import Answer, answer_row
from verl.data.reading.sources import SourceSetting, sources_of
from verl.data.trajectory import Trajectory
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model, model_config_of, quantization
from verl.engines.local import LocalEngine
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.trainer.base import Metrics
from verl.trainer.build.policy_start import policy_start
from verl.trainer.checkpoint_store import Save
from verl.trainer.evaluation import evaluation_schedule, sample_row
from verl.trainer.evaluation.eval_sets import EvalSet, read_sets
from verl.trainer.run.callbacks import Callback
from verl.trainer.run.run_loop import RunnableTrainer
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

    def not_finite(self) -> list[str]:
        """`policy` if its weights or optimizer states are not all finite, else nothing."""
        return [] if self.engine.has_finite_state() else ["policy"]

    def checkpoint_bytes(self) -> int:
        """Bytes of the model in a checkpoint, about."""
        return self.engine.checkpoint_bytes()

    def model_bytes(self) -> int:
        """Bytes of the weights of the trained model."""
        return self.engine.model_bytes()

    def load(self, folder: Path) -> None:
        """Read the model of a checkpoint."""
        self.engine.load(folder / "policy")

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format, without its tokenizer."""
        self.engine.export(folder)

    def export_adapter(self, folder: Path, base: str) -> None:
        """Write the LoRA adapter alone in PEFT's layout."""
        self.engine.export_adapter(folder, base)

    def memory(self) -> Metrics:
        """Bytes in use, their peak, and bytes of the device."""
        return memory_bytes(self.engine.model.device)


class SingleModelTrainer(RunnableTrainer):
    """A model on a device, and a loop over `step()`.

    Args:
        config: settings of the run.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: tokenizer of the policy; none: the one saved with the model.
        console: destination of human-readable output; none: standard output.
        callbacks: called at fixed points of the run.
        train_dataset: rows in memory in place of `data.train`: a `datasets.Dataset` or `IterableDataset`, a
            pandas DataFrame, a pyarrow Table, or a list of rows, chats or `Prompt`s.
        test_dataset: the same for `data.test`.

    Attributes:
        kind: of the model that training starts from, for messages.
        policy_engine: the model with its optimizer.
    """

    kind = "causal language model"
    config: SFTConfig | PairsConfig

    def __init__(
        self,
        config: SFTConfig | PairsConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
        train_dataset: Any = None,
        test_dataset: Any = None,
    ) -> None:
        given: dict[str, Any] = {"train_dataset": train_dataset, "test_dataset": test_dataset}
        super().__init__(config, device=config.device, console=console, callbacks=callbacks, **given)
        config = self.config
        _check_sources(config)
        self.eval_every, self.eval_at_start = evaluation_schedule(config)
        self.start = policy_start(config, actor_model, self.kind, note=self.notes.append)
        source = self.start.source
        self.codec = codec or TextCodec.for_run(self.start.tokenizer, config.data)
        self.read_data_early(model_config_of(source))
        with self.progress.phase(f"loading {source}" if isinstance(source, str) else ""):
            model = self.build_model(source)
        self.model_kind = type(model).__name__
        model.to(self.device).check_forward()
        self.policy_engine = LocalEngine(
            model, config.policy, device=self.device, total_updates=self.config.steps
        )
        self.models = SingleModel(self.policy_engine)

    def build_model(self, source: PreTrainedModel | str) -> Backbone:
        """The model to train, in fp32; a loaded one is trained in place."""
        policy = self.config.policy
        if isinstance(source, str):
            options = quantization(policy.lora, policy.precision, self.device)
            return PolicyModel(load_language_model(source, **options), policy.precision)
        return PolicyModel(source.float(), policy.precision)

    def trajectory_of(self, prompt: Prompt, answer: Answer, *, group: int) -> Trajectory:
        """A trajectory with an answer of the data set, whose mask is its learned tokens."""
        prompt_ids, response_ids, mask = answer_row(self.codec, prompt, answer)
        return Trajectory(prompt, prompt_ids, response_ids, mask, None, [0] * len(response_ids), group)

    @override
    def fixed_settings(self) -> dict[str, Any]:
        # Sampling makes samples for readers alone.
        return {name: value for name, value in super().fixed_settings().items() if name != "sampling"}

    def held_out_sets(
        self, read: Callable[[SourceSetting | None], tuple[Sequence[Prompt], LoadReport]], kind: str
    ) -> list[EvalSet]:
        """The rows of `data.test` that are evaluated, by source; notes what was left out of them."""
        sets = read_sets(self.source("test"), self.config.evaluation, read, note=self.notes.append)
        self.held_out = ", ".join(f"{len(one.prompts)} {kind} of {one.source}" for one in sets)
        return sets


def _check_sources(config: SFTConfig | PairsConfig) -> None:
    """Raises ValueError for a source with a reward, which nothing reads here."""
    sources = [*sources_of(config.data.train), *sources_of(config.data.test)]
    if rewarded := [source.path for source in sources if source.reward is not None]:
        raise ValueError(
            f"the reward of the source {rewarded[0]} would be ignored: this run rewards no answers; leave it "
            "out"
        )


def sampled_rows(
    model: PolicyModel, codec: TextCodec, prompts: Sequence[Prompt], config: SFTConfig | PreferenceConfig
) -> list[dict[str, Any]]:
    """Rows for the table of samples: an answer to each of the first prompts that leave room for one.

    The seeds are always the same.
    """
    context = model.context
    asked = [(prompt, codec.encode_prompt(prompt)) for prompt in prompts[: config.tracking.num_samples]]
    asked = [(prompt, ids) for prompt, ids in asked if len(ids) < context]
    sampling = evaluation_params(config, codec, 1)
    own = [with_row_sampling(sampling, prompt, codec) for prompt, _ in asked]
    params = [
        replace(wanted, seed=i, max_tokens=min(wanted.max_tokens, context - len(ids)))
        for i, (wanted, (_, ids)) in enumerate(zip(own, asked, strict=True))
    ]
    answers = EmbeddedEngine(model, codec).generate([ids for _, ids in asked], params)
    return [
        sample_row(
            Trajectory(
                prompt,
                ids,
                answer.token_ids,
                [True] * len(answer.token_ids),
                answer.logprobs,
                [answer.version] * len(answer.token_ids),
                group=i,
                truncated=answer.finish_reason == "length",
                text=codec.decode_answer(answer.token_ids, params[i].stop),
            ),
            codec,
        )
        for i, ((prompt, ids), (answer,)) in enumerate(zip(asked, answers, strict=True))
    ]
