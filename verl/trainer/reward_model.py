"""Training a reward model on pairs of answers: a transformer with a scalar head, in Transformers' own format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from verl.algorithms.preference import REWARD_LOSSES, calibration
from verl.algorithms.registry import bind
from verl.config.run import RewardModelConfig
from verl.data.batch import Batch, ModelInput
from verl.data.columns import readable_by
from verl.engines.hf.models import RewardModel
from verl.engines.hf.pretrained import as_reward_model, load_reward_model
from verl.rewards.model import last_scores, rows_to_score
from verl.trainer.base import Metrics
from verl.trainer.pairwise_trainer import PairwiseTrainer, answers_of, check_pair_loss
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

_COLUMNS = readable_by("reward_loss")


class RewardModelTrainer(PairwiseTrainer):
    """Teaches a model which of two answers is the better one.

    It starts from a causal language model, whose head of logits is replaced by one of zeros, or goes on with
    a reward model.

    Args:
        config: of the run, from `load_run(RewardModelConfig, ...)`.
        actor_model: the start as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: its tokenizer; none: the one saved with the model.
        console: for people; none: standard output.

    Raises:
        ValueError: settings that do not fit together, or models or files that cannot be read.
    """

    config: RewardModelConfig

    def __init__(
        self,
        config: RewardModelConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        self.loss = check_pair_loss(bind(config.loss, REWARD_LOSSES, columns=_COLUMNS), _COLUMNS)
        super().__init__(config, actor_model, codec=codec, console=console)
        # Transformers finds the last token of an answer by it; without one it scores single rows only.
        self.reward_model.set_default_pad_id(self.codec.tokenizer.pad_token_id)

    @property
    def reward_model(self) -> RewardModel:
        """The model itself."""
        assert isinstance(self.policy_engine.model, RewardModel)
        return self.policy_engine.model

    def encode(self, pairs: list[Prompt]) -> Batch:
        """See `PairwiseTrainer.encode`; the last token of each row is not read, see `rows_to_score`."""
        return rows_to_score(*answers_of(pairs), codec=self.codec, pad_id=self.reward_model.pad_id)

    def token_values(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Scores."""
        return self.reward_model.token_scores(inputs), None

    @override
    def row_columns(self, rows: Batch, values: Tensor) -> dict[str, Tensor]:
        return {
            "rewards": last_scores(values, rows.response_lengths),
            "tokens": self.answer_tokens(rows).to(values.device),
        }

    @override
    def answer_tokens(self, rows: Batch) -> Tensor:
        return rows.response_lengths - 1

    def evaluation(self, columns: Mapping[str, Tensor]) -> Metrics:
        """How far the probability that an answer is the better one, sigmoid of the difference of scores, can
        be trusted.

        Every pair counts in both orders: asked only about chosen answers, a model that is sure of everything
        would look calibrated.
        """
        difference = columns["chosen_rewards"] - columns["rejected_rewards"]
        labels = torch.cat([torch.ones_like(difference), torch.zeros_like(difference)])
        measured = calibration(torch.cat([difference, -difference]).sigmoid(), labels)
        return {
            "eval/calibration_error": measured["expected_calibration_error"],
            "eval/brier_score": measured["brier_score"],
        }

    def _model(self, actor_model: PreTrainedModel | str | None) -> RewardModel:
        source = self.config.policy.path if actor_model is None else actor_model
        if source is None:
            raise ValueError(
                "need policy.path: the folder or hub name of a causal language model or a reward model"
            )
        model = (
            load_reward_model(source, new_head=True) if isinstance(source, str) else as_reward_model(source)
        )
        return RewardModel(model, self.config.policy.precision)
