"""Training a policy on pairs of answers directly (DPO, IPO, SimPO), without rewards and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from verl.algorithms.preference_losses import PAIR_LOSSES
from verl.algorithms.returns import bind_as
from verl.config.run import PreferenceConfig
from verl.data.batch import Batch, ModelInput
from verl.data.columns import readable_by
from verl.data.examples import question_of
from verl.engines.hf.models import PolicyModel
from verl.engines.local import LocalForwardEngine, frozen_engine
from verl.trainer.evaluation.eval_sets import interleaved
from verl.trainer.pairwise_trainer import SIDES, PairwiseTrainer, check_pair_loss, prompts_and_answers
from verl.trainer.single_model_trainer import sampled_rows
from verl.utils.sampling_types import Prompt

# A policy has logprobs; rewards are columns of a reward model.
_COLUMNS = readable_by("preference_loss")


class PreferenceTrainer(PairwiseTrainer):
    """Makes the chosen answer of a pair more likely than the rejected one, by the configured loss.

    Args:
        config: settings of the run, from `load_run(PreferenceConfig, ...)`.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        options: codec, console, callbacks, train_dataset and test_dataset of `SingleModelTrainer`.

    Attributes:
        reference: the reference policy; None if the loss does not read its logprobs.

    Raises:
        ValueError: settings contradict each other, or a model or file cannot be read.
    """

    config: PreferenceConfig

    def __init__(
        self,
        config: PreferenceConfig,
        actor_model: PreTrainedModel | str | None = None,
        **options: Any,
    ) -> None:
        self.loss = check_pair_loss(bind_as("preference_loss", config.loss, PAIR_LOSSES), _COLUMNS)
        super().__init__(config, actor_model, **options)
        self.reference: LocalForwardEngine | None = None
        if any("_ref_" in name for name in self.loss.columns):
            policy = self.policy_engine.model
            assert isinstance(policy, PolicyModel)
            self.reference = frozen_engine(policy, config.reference, config.policy, setting="reference")

    @override
    def encode(self, pairs: list[Prompt]) -> Batch:
        prompts, answers = prompts_and_answers(pairs)
        return Batch.from_trajectories(
            [
                self.trajectory_of(prompt, answer, group=row // 2)
                for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        )

    @override
    def write_columns(self, rows: Batch, plan: list[list[int]]) -> None:
        """Adds `ref_logprobs` [B], sums over the answers."""
        if self.reference is None:
            return
        model = self.reference.model
        assert isinstance(model, PolicyModel)
        with self.clock.phase("ref_logprobs"):
            logprobs = self.reference.infer(rows, plan, lambda inputs: self.logprobs(model, inputs)[0])
        rows.write("ref_logprobs", (logprobs * rows["mask"]).sum(1))

    @override
    def token_values(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Logprobs and entropies."""
        model = self.policy_engine.model
        assert isinstance(model, PolicyModel)
        return self.logprobs(model, inputs)

    @override
    def row_columns(self, rows: Batch, values: Tensor) -> dict[str, Tensor]:
        # Messages between the turns of an answer are no part of it.
        logprobs = (values * rows["mask"].to(values.device)).sum(1)
        columns = {"logprobs": logprobs, "tokens": self.answer_tokens(rows).to(values.device)}
        return columns | ({"ref_logprobs": rows["ref_logprobs"].to(values.device)} if self.reference else {})

    @override
    def monitors(
        self, columns: Mapping[str, Tensor], entropy: Tensor | None, step: Batch
    ) -> dict[str, Tensor]:
        """Entropy per token of all answers, and logprobs per token of the answers of each side."""
        assert entropy is not None
        tokens = self.answer_tokens(step).view(-1, 2).sum(0).tolist()
        sides = {
            f"{side}_logprobs": columns[f"{side}_logprobs"].detach().sum() / n
            for side, n in zip(SIDES, tokens, strict=True)
        }
        return {"entropy": entropy.detach().sum() / sum(tokens), **sides}

    @override
    def samples(self) -> list[dict[str, Any]]:
        """Answers of the policy to the prompts of held-out pairs; none without `data.test`."""
        if self.config.data.test is None:
            return []
        pairs = interleaved(self.test_sets)
        questions = [question_of(replace(pair, answer=pair.answer.chosen)) for pair in pairs]
        model = self.policy_engine.model
        assert isinstance(model, PolicyModel)
        return sampled_rows(model, self.codec, questions, self.config)

    def logprobs(self, model: PolicyModel, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        """[M] logprobs and [M] entropies of the response tokens at temperature 1."""
        return model.token_logprobs(inputs, temperature=1.0, chunk=self.config.policy.logits_chunk_tokens)
