"""Supervised fine-tuning: cross entropy of reference answers, in packed rows, on the engines of RL."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from verl.algorithms.aggregations import token_mean
from verl.config.run import SFTConfig
from verl.data.batch import Batch, ModelInput, Ragged
from verl.data.dataset import load_examples
from verl.data.packing import balance
from verl.engines.hf.models import PolicyModel
from verl.trainer.base import Metrics
from verl.trainer.single_model_trainer import SingleModelTrainer
from verl.utils.sampling_types import Prompt


class SFTTrainer(SingleModelTrainer):
    """Trains a model to repeat reference answers.

    Rows are `{prompt, answer}` or chats `{messages}` that end with the assistant's answer. The end token is
    added to the answer, and the mean negative log-likelihood of the answer's tokens is minimized.
    """

    config: SFTConfig

    @override
    def step(self) -> Metrics:
        assert self.loader is not None
        return self.learn(self.loader.take(self.rows_per_step))

    def learn(self, examples: list[Prompt]) -> Metrics:
        """One update on examples with answers; returns loss (nats per token), entropy and sizes."""
        rows = Batch.from_trajectories(
            [self.trajectory_of(example, str(example.answer), group=i) for i, example in enumerate(examples)]
        )
        # Of the whole step, before it is split: micro-batches then do not change the gradient.
        rows.write("weights", token_mean(rows["mask"]))
        role = self.config.policy
        plan = balance(
            rows.num_tokens,
            num_ranks=1,
            micro_batch_tokens=role.micro_batch_tokens,
            micro_batch_rows=role.micro_batch_rows,
        )
        with self.clock.phase("update_policy"):
            metrics = self.policy_engine.update(rows, plan.minibatches[0][0], self._objective)
        self.version += 1
        answer_tokens = float(rows.response_lengths.sum())
        if "entropy" in metrics:  # the engine leaves all metrics out if it skipped the update
            metrics["entropy"] /= answer_tokens
        return metrics | {
            "response_tokens": answer_tokens / rows.num_rows,
            "tokens": float(rows.num_tokens.sum()),
        }

    @override
    def read_data(self) -> None:
        source = self.config.data.train
        if source is None:
            raise ValueError(
                "need data.train: rows {prompt, answer} or {messages}, as a file, a saved data set's folder, "
                "or task:NAME"
            )
        examples, report = self.short_enough(*load_examples(source, self.config.data, split="train"))
        self.check_answers(examples, lambda example: [str(example.answer)])
        self.use_train_rows(examples, report, per_step=self.config.rows_per_step, setting="rows_per_step")

    @override
    def samples(self) -> list[dict[str, Any]]:
        return []  # fine-tuning samples nothing

    def _objective(self, rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted negative log-likelihood of a micro-batch, and its summed entropy."""
        model = self.policy_engine.model
        assert isinstance(model, PolicyModel)
        logprobs, entropy = model.token_logprobs(
            inputs, temperature=1.0, chunk=self.config.policy.logits_chunk_tokens
        )
        padded = Ragged(logprobs, inputs.response_lengths.to(logprobs.device)).padded()
        return -(padded * rows["weights"].to(padded.device)).sum(), {"entropy": entropy.detach().sum()}
