"""Training a reward model, a transformer with a scalar head, on pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from verl.algorithms.preference_losses import REWARD_LOSSES, calibration
from verl.algorithms.returns import bind_as
from verl.config.run import RewardModelConfig
from verl.data.batch import Batch, ModelInput
from verl.data.columns import readable_by
from verl.engines.hf.models import RewardModel
from verl.engines.hf.pretrained import as_reward_model, load_reward_model
from verl.rewards.model_scoring import last_scores, rows_to_score
from verl.trainer.base import Metrics
from verl.trainer.pairwise_trainer import PairwiseTrainer, check_pair_loss, prompts_and_answers
from verl.utils.sampling_types import Prompt

_COLUMNS = readable_by("reward_loss")


class RewardModelTrainer(PairwiseTrainer):
    """Trains a model to score the better of two answers higher.

    It starts from a causal language model, whose LM head is replaced by a scalar head of zeros, or continues
    from a reward model.

    Args:
        config: settings of the run, from `load_run(RewardModelConfig, ...)`.
        actor_model: the first model as a loaded one, a folder or a hub name; none: from `config.policy.path`.
        options: codec, console, callbacks, train_dataset and test_dataset of `SingleModelTrainer`.

    Raises:
        ValueError: settings contradict each other, or a model or file cannot be read.
    """

    config: RewardModelConfig
    kind = "reward model"

    def __init__(
        self,
        config: RewardModelConfig,
        actor_model: PreTrainedModel | str | None = None,
        **options: Any,
    ) -> None:
        self.loss = check_pair_loss(bind_as("reward_loss", config.loss, REWARD_LOSSES), _COLUMNS)
        super().__init__(config, actor_model, **options)
        # Transformers finds the last token of a padded answer by it; without one it scores single rows only.
        self.reward_model.set_default_pad_id(self.codec.tokenizer.pad_token_id)

    @property
    def reward_model(self) -> RewardModel:
        """The model of the engine."""
        assert isinstance(self.policy_engine.model, RewardModel)
        return self.policy_engine.model

    @override
    def build_model(self, source: PreTrainedModel | str) -> RewardModel:
        if self.config.policy.lora.quantize != "none":
            raise ValueError("need policy.lora.quantize=none for a reward model, got 4bit; leave it out")
        model = (
            load_reward_model(source, new_head=True) if isinstance(source, str) else as_reward_model(source)
        )
        return RewardModel(model, self.config.policy.precision)

    @override
    def encode(self, pairs: list[Prompt]) -> Batch:
        """Both answers of each pair as rows; the model does not read the last token, see `rows_to_score`."""
        prompts, answers = prompts_and_answers(pairs)
        return rows_to_score(prompts, answers, codec=self.codec, pad_id=self.reward_model.pad_id)

    @override
    def token_values(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Scores; there are no entropies."""
        return self.reward_model.token_scores(inputs), None

    @override
    def row_columns(self, rows: Batch, values: Tensor) -> dict[str, Tensor]:
        return {
            "rewards": last_scores(values, rows.response_lengths),
            "tokens": self.answer_tokens(rows).to(values.device),
        }

    @override
    def answer_tokens(self, rows: Batch) -> Tensor:
        return rows.response_lengths - 1  # without the token that is not read

    @override
    def calibration_metrics(self, columns: Mapping[str, Tensor]) -> Metrics:
        """Calibration of the probability that an answer is the better one, sigmoid of the score difference.

        Every pair counts in both orders: on chosen answers alone, a model that is always certain would seem
        calibrated.
        """
        difference = columns["chosen_rewards"] - columns["rejected_rewards"]
        labels = torch.cat([torch.ones_like(difference), torch.zeros_like(difference)])
        measured = calibration(torch.cat([difference, -difference]).sigmoid(), labels)
        return {
            "eval/calibration_error": measured["expected_calibration_error"],
            "eval/brier_score": measured["brier_score"],
        }
