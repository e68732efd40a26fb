"""The policy as a role: writes its logprobs and is trained by the policy loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, PLANNED_METRICS, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import Objective, TrainEngine
from verl.engines.hf.models import PolicyModel, entropies, target_logprobs
from verl.engines.micro_batches import MicroBatches, mean_over, run_updates
from verl.engines.roles.base import Learner
from verl.engines.roles.columns import (
    pad_response,
    policy_logprobs,
    policy_reads,
    read_columns,
    response_columns,
    stacked_columns,
)
from verl.engines.roles.loss_weights import plan_rows

_AT_FIRST = ("kl", "kl_sampler", "sampler_gap", "sampler_gap_max")


def sum_squared_probs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """[M] sum of the squared probabilities of the vocabulary, from log_probs [M, V]."""
    return log_probs.mul(2).exp().sum(-1)


# Columns [M] that the policy writes before the first update, from log_probs [M, V] and the sampled tokens [M].
POLICY_COLUMNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "trainer_logprobs": target_logprobs,
    "sum_squared_probs": sum_squared_probs,
}


class PolicyWorker(Learner):
    """The policy: writes `trainer_logprobs`, and learns.

    Args:
        engine: of a `PolicyModel`.
        algorithm: what to minimise.
        temperature: of the sampler, so that both speak of one distribution.
        epochs: passes over the rows.
        chunk: positions whose logits are in memory at once.
    """

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int
    ) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        # Greedy answers have the logprobs of the model's own distribution.
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._reads = policy_reads(algorithm)
        self._reads_top = "top_logprobs" in algorithm.policy_loss.columns

    @property
    def model(self) -> PolicyModel:
        """The policy itself."""
        assert isinstance(self.engine.model, PolicyModel)
        return self.engine.model

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`trainer_logprobs` and those of `POLICY_COLUMNS` that a function reads, under the current weights."""
        names = [n for n in POLICY_COLUMNS if n == "trainer_logprobs" or n in self._algorithm.reads]

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return (torch.stack([POLICY_COLUMNS[name](log_probs, targets) for name in names], 1),)

        written = self.engine.infer(batch, plan_rows(plan), lambda inputs: self._reduced(inputs, outputs)[0])
        columns = stacked_columns(written, batch, len(names)).unbind(-1)
        return response_columns(batch, dict(zip(names, columns, strict=True)))

    @register(PLANNED)
    def write_reference(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`ref_logprobs` of the policy without its low-rank additions: the model that it started from."""
        with self.engine.disable_adapter():
            logprobs = policy_logprobs(
                self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk
            )
        return response_columns(batch, {"ref_logprobs": logprobs})

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan, kl_coef: float) -> dict[str, float]:
        """Minimises the policy loss."""
        needs_whole = self._algorithm.needs_whole_minibatch
        before = self._write_gradients if needs_whole and not self._has_whole_minibatches(plan) else None
        updates = run_updates(self.engine, batch, plan, self._objective(kl_coef), self._epochs, before)
        # Estimated on tokens of the policy that is measured; by the later updates it has moved away from that
        # which drew them.
        return mean_over(updates) | {name: updates[0][name] for name in _AT_FIRST if name in updates[0]}

    @register(PLANNED_METRICS)
    @override
    def accumulate(self, batch: Batch, plan: BatchPlan, kl_coef: float, first_row: int) -> None:
        if self._algorithm.needs_whole_minibatch:
            raise ValueError(
                f"need whole updates for {self._algorithm.policy_loss.name}, whose statistics are over all rows of one"
            )
        super().accumulate(batch, plan, kl_coef, first_row)

    def _objective(self, kl_coef: float) -> Objective:
        algorithm = self._algorithm

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            top_ids = [rows.ragged("teacher_top_ids").values.to(self.model.device)] if self._reads_top else []
            logprobs, entropy, *top = self._reduced(inputs, self._outputs, *top_ids)
            columns = read_columns(rows, self._reads, logprobs.device) | {
                "logprobs": pad_response(logprobs, inputs)
            }
            if top:
                columns["top_logprobs"] = pad_response(top[0], inputs)
            return algorithm.policy_objective(columns, pad_response(entropy, inputs), kl_coef)

        return objective

    def _reduced(
        self, inputs: ModelInput, outputs: Callable[..., tuple[Tensor, ...]], *columns: Tensor
    ) -> tuple[Tensor, ...]:
        return self.model.reduce_vocab(
            inputs, outputs, *columns, temperature=self._temperature, chunk=self._chunk
        )

    def _outputs(self, log_probs: Tensor, targets: Tensor, *top_ids: Tensor) -> tuple[Tensor, ...]:
        entropy = entropies(log_probs, with_grad=self._algorithm.entropy_coef != 0)
        return (target_logprobs(log_probs, targets), entropy, *(log_probs.gather(1, ids) for ids in top_ids))

    def _has_whole_minibatches(self, plan: BatchPlan) -> bool:
        """Whether each update is a single micro-batch of this rank alone, whose own forward pass gives the
        statistics.
        """
        single = all(sum(map(bool, plan_rows(BatchPlan([minibatch])))) <= 1 for minibatch in plan.minibatches)
        return len(self.engine.gather_over_data(single)) == 1 and single

    def _write_gradients(self, batch: Batch, micro_batches: MicroBatches) -> dict[str, float]:
        """Adds the gradients of a loss over the whole minibatch, from logprobs under the weights as they are
        now.

        The columns of the minibatch's rows on all ranks come together on each, in the order of the step.
        """

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return (target_logprobs(log_probs, targets),)

        current = self.engine.infer(batch, micro_batches, lambda inputs: self._reduced(inputs, outputs)[0])
        rows = sorted(row for micro in micro_batches for row in micro)
        ids = batch.row_ids[rows]
        columns = read_columns(batch, self._reads - {"loss_gradients", "weighted_losses"}, current.device) | {
            "logprobs": current
        }
        own = {name: column[rows] for name, column in columns.items()} | {"row_ids": ids}
        together = _in_order(self.engine.gather_over_data(own))
        mine = torch.isin(together.pop("row_ids"), ids)
        gradients, losses, monitors = self._algorithm.minibatch_gradients(together)
        for name, values in (("loss_gradients", gradients), ("weighted_losses", losses)):
            column = torch.zeros_like(current)
            column[torch.tensor(rows, dtype=torch.int64)[ids.argsort()]] = values[mine][:, : column.shape[1]]
            batch.write(name, column)
        return {name: float(value) for name, value in monitors.items()}


def _in_order(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns [b, T, ...] of several ranks as one, padded to the longest row, in the order of `row_ids` [b]."""
    parts = [part for part in parts if len(part["row_ids"])]
    order = torch.cat([part["row_ids"] for part in parts]).argsort()

    def joined(columns: Sequence[Tensor]) -> Tensor:
        if columns[0].ndim == 1:
            return torch.cat(list(columns))[order]
        width = max(column.shape[1] for column in columns)
        padded = [column.new_zeros(len(column), width, *column.shape[2:]) for column in columns]
        for target, column in zip(padded, columns, strict=True):
            target[:, : column.shape[1]] = column
        return torch.cat(padded)[order]

    return {name: joined([part[name] for part in parts]) for name in parts[0]}
