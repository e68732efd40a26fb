"""Supervised fine-tuning: cross entropy of reference answers, in packed rows, on the engines of RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.aggregations import token_mean
from verl.config.run import SFTConfig
from verl.data.batch import Batch, ModelInput, Ragged
from verl.data.dataset import LoadReport
from verl.data.examples import RowLimits, answer_row, cut_at_turn, fit_rows, load_examples, question_of
from verl.data.packing import balance
from verl.engines.hf.models import PolicyModel, target_logprobs
from verl.engines.memory_limits import micro_batch_tokens
from verl.trainer.base import Metrics
from verl.trainer.evaluation.eval_sets import EvalSet, interleaved
from verl.trainer.evaluation.measures import over_sets
from verl.trainer.single_model_trainer import SingleModelTrainer, sampled_rows
from verl.utils.sampling_types import Prompt


class SFTTrainer(SingleModelTrainer):
    """Trains a model to repeat reference answers.

    Rows are conversations, of which the assistant's answers are learned, or texts with an answer, see
    `load_examples`. The mean negative log-likelihood of the learned tokens of a step is minimized; the token
    that ends an answer is one of them.
    """

    config: SFTConfig

    @property
    def model(self) -> PolicyModel:
        """The model of the engine."""
        assert isinstance(self.policy_engine.model, PolicyModel)
        return self.policy_engine.model

    @override
    def step(self) -> Metrics:
        assert self.loader is not None
        return self.learn(self.loader.take(self.rows_per_step))

    def learn(self, examples: list[Prompt]) -> Metrics:
        """One update on examples with answers; returns loss (nats per token), entropy and sizes."""
        rows = self.encode(examples)
        # Of the whole step, before it is split: micro-batches then do not change the gradient.
        rows.write("weights", token_mean(rows["mask"]))
        with self.clock.phase("update_policy"):
            metrics = self.policy_engine.update(rows, self._plan(rows), self._objective)
        self.version += 1
        learned_tokens = float(rows["mask"].sum())
        if "entropy" in metrics:  # the engine leaves all metrics out if it skipped the update
            metrics["entropy"] /= learned_tokens
        return metrics | {
            "response_tokens": learned_tokens / rows.num_rows,
            "tokens": float(rows.num_tokens.sum()),
        }

    def encode(self, examples: Sequence[Prompt]) -> Batch:
        """A row for each example."""
        return Batch.from_trajectories(
            [self.trajectory_of(example, example.answer, group=i) for i, example in enumerate(examples)]
        )

    @override
    def read_data(self) -> None:
        examples, report = self.read_examples(self.source("train"), "train")
        if self.config.data.test is not None:
            # Read now: a mistake in them is found before a model is loaded.
            _ = self.test_sets
        self.use_train_rows(examples, report, per_step=self.config.rows_per_step, setting="rows_per_step")

    def read_examples(self, source: Any, split: Literal["train", "test"]) -> tuple[list[Prompt], LoadReport]:
        """Examples of a data set within the limits of `data`.

        Raises:
            ValueError: there is no source, or nothing usable in it.
        """
        if source is None:
            raise ValueError(
                f"need data.{split}: conversations {{messages}} or rows {{prompt, answer}}, as a file, a "
                "saved data set's folder, a data set of the hub (OWNER/NAME), or task:NAME; or "
                f"{split}_dataset in a program"
            )
        data = self.config.data
        return fit_rows(
            *load_examples(source, data, split=split),
            RowLimits.of(data, self.context),
            lambda example: [answer_row(self.codec, example, example.answer)],
            cut=partial(cut_at_turn, self.codec),
            skips=data.on_malformed == "skip",
        )

    @cached_property
    def test_sets(self) -> list[EvalSet]:
        """The held-out examples that are evaluated, by source."""
        return self.held_out_sets(partial(self.read_examples, split="test"), "examples")

    @cached_property
    def test_rows(self) -> dict[str, Batch]:
        """Their rows, by set."""
        return {one.name: self.encode(one.prompts) for one in self.test_sets}

    @override
    def evaluate(self) -> Metrics:
        """Mean loss over the learned tokens of the held-out examples, in nats, for each set.

        Also its exponential, the perplexity, and the share of the tokens that were the most likely ones.
        """
        return over_sets({name: self._measured(rows) for name, rows in self.test_rows.items()})

    def _measured(self, rows: Batch) -> Metrics:
        mask = rows["mask"]
        with self.clock.phase("evaluate"):
            values = self.policy_engine.infer(rows, self._plan(rows), self._logprobs_and_hits)
        logprobs, hits = ((values * mask[:, :, None]).double().sum((0, 1)) / mask.sum()).tolist()
        return {
            "eval/loss": -logprobs,
            "eval/perplexity": math.exp(min(-logprobs, 700.0)),  # beyond it the exponential overflows
            "eval/token_accuracy": hits,
        }

    @override
    def samples(self) -> list[dict[str, Any]]:
        """Answers of the model to the prompts of held-out examples; none without `data.test`."""
        if self.config.data.test is None:
            return []
        questions = [question_of(example) for example in interleaved(self.test_sets)]
        return sampled_rows(self.model, self.codec, questions, self.config)

    def _plan(self, rows: Batch) -> list[list[int]]:
        """Row numbers of micro-batches."""
        role = self.config.policy
        plan = balance(
            rows.num_tokens,
            num_ranks=1,
            micro_batch_tokens=micro_batch_tokens(
                role, self.policy_engine.config, on_cpu=self.device.type == "cpu"
            ),
            micro_batch_rows=role.micro_batch_rows,
        )
        return plan.minibatches[0][0]

    def _objective(self, rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted negative log-likelihood of a micro-batch, and its summed entropy."""
        logprobs, entropy = self.model.token_logprobs(
            inputs, temperature=1.0, chunk=self.config.policy.logits_chunk_tokens
        )
        padded = Ragged(logprobs, inputs.response_lengths.to(logprobs.device)).padded()
        learned = rows.ragged("mask").values.to(entropy.device)
        loss = -(padded * rows["weights"].to(padded.device)).sum()
        return loss, {"entropy": entropy.detach()[learned].sum()}

    def _logprobs_and_hits(self, inputs: ModelInput) -> Tensor:
        """[M, 2], logprob of each response token, and 1 if it is the most likely one."""

        def outputs(vocab_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            hits = (vocab_logprobs.argmax(-1) == targets).float()
            return (torch.stack([target_logprobs(vocab_logprobs, targets), hits], 1),)

        chunk = self.config.policy.logits_chunk_tokens
        return self.model.reduce_vocab(inputs, outputs, temperature=1.0, chunk=chunk)[0]
