"""The policy as a role: writes its logprobs and is trained by the policy loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, PLANNED_METRICS, register
from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import Objective, TrainEngine
from verl.engines.hf.models import PolicyModel, Reduce, entropies, target_logprobs
from verl.engines.minibatches import (
    MicroBatches,
    mean_over_updates,
    named_as_learned,
    plan_rows,
    run_updates,
)
from verl.engines.roles.role_columns import (
    concat_by_row_id,
    pad_response,
    policy_logprobs,
    policy_reads,
    read_columns,
    response_columns,
    stacked_columns,
)
from verl.engines.roles.role_worker import Learner

# Metrics of the first update alone, see `PolicyWorker.update`.
_OF_FIRST_UPDATE = ("kl", "kl_sampler", "sampler_gap", "sampler_gap_max", "kl_off_policy")


def sum_squared_probs(vocab_logprobs: Tensor, targets: Tensor) -> Tensor:
    """[m], sums of the squared probabilities of the vocabulary, from logprobs [m, V]."""
    return vocab_logprobs.mul(2).exp().sum(-1)


# Columns that the policy writes before the first update, [m] from vocabulary logprobs [m, V] and ids [m].
POLICY_COLUMNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "trainer_logprobs": target_logprobs,
    "sum_squared_probs": sum_squared_probs,
}


class PolicyWorker(Learner):
    """The policy: writes `trainer_logprobs` and is trained.

    Args:
        engine: trains a `PolicyModel`.
        algorithm: defines the loss.
        temperature: of the sampler, so that both use one distribution; 0 (greedy) counts as 1.
        epochs: passes over the rows of a step.
        chunk: tokens whose logits are in memory at a time.
    """

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int | None
    ) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._reads = policy_reads(algorithm)

    @property
    def model(self) -> PolicyModel:
        """The policy model."""
        assert isinstance(self.engine.model, PolicyModel)
        return self.engine.model

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`trainer_logprobs` and the `POLICY_COLUMNS` that a function reads, under the current weights."""
        names = [n for n in POLICY_COLUMNS if n == "trainer_logprobs" or n in self._algorithm.reads]

        def outputs(vocab_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return (torch.stack([POLICY_COLUMNS[name](vocab_logprobs, targets) for name in names], 1),)

        rows = plan_rows(plan)
        written = self.engine.infer(batch, rows, lambda inputs: self._reduce_vocab(inputs, outputs)[0])
        columns = stacked_columns(written, batch, len(names)).unbind(-1)
        return response_columns(batch, dict(zip(names, columns, strict=True)))

    @register(PLANNED)
    def write_reference(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`ref_logprobs` of the policy with its reference adapter, or without any: as before training."""
        with self.engine.as_reference():
            logprobs = policy_logprobs(
                self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk
            )
        return response_columns(batch, {"ref_logprobs": logprobs})

    @override
    def objective(self, kl_coef: float) -> Objective:
        algorithm = self._algorithm
        reads_top = "top_logprobs" in algorithm.policy_loss.columns

        def outputs(vocab_logprobs: Tensor, targets: Tensor, *top_ids: Tensor) -> tuple[Tensor, ...]:
            entropy = entropies(vocab_logprobs, with_grad=algorithm.entropy_coef != 0)
            top = (vocab_logprobs.gather(1, ids) for ids in top_ids)
            return target_logprobs(vocab_logprobs, targets), entropy, *top

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            top_ids = [rows.ragged("teacher_top_ids").values.to(self.model.device)] if reads_top else []
            logprobs, entropy, *top = self._reduce_vocab(inputs, outputs, *top_ids)
            columns = read_columns(rows, self._reads, logprobs.device)
            columns["logprobs"] = pad_response(logprobs, inputs)
            if top:
                columns["top_logprobs"] = pad_response(top[0], inputs)
            return algorithm.policy_objective(columns, pad_response(entropy, inputs), kl_coef)

        return objective

    @register(PLANNED_METRICS)
    @override
    def update(self, batch: Batch, plan: BatchPlan, kl_coef: float) -> dict[str, float]:
        needs_prepare = self._algorithm.needs_whole_minibatch and not self._has_whole_minibatches(plan)
        updates = run_updates(
            self.engine,
            batch,
            plan,
            self.objective(kl_coef),
            epochs=self._epochs,
            prepare=self._write_loss_gradients if needs_prepare else None,
        )
        # These are estimated on tokens that the measured policy has sampled; after the first update it has
        # moved away from the policy that sampled them.
        later = [
            {name: value for name, value in update.items() if name not in _OF_FIRST_UPDATE}
            for update in updates[1:]
        ]
        return self._named(mean_over_updates([updates[0], *later]))

    @register(PLANNED_METRICS)
    @override
    def accumulate(self, batch: Batch, plan: BatchPlan, kl_coef: float, first_row: int) -> None:
        if self._algorithm.needs_whole_minibatch:
            raise ValueError(
                f"need whole updates for {self._algorithm.policy_loss.name}, whose statistics are over all "
                "rows of one"
            )
        super().accumulate(batch, plan, kl_coef, first_row)

    @override
    def _named(self, metrics: dict[str, float]) -> dict[str, float]:
        # Entropy and clip share of the rows that are left are not those of the policy's answers.
        return named_as_learned(metrics) if self._algorithm.skip_zero_advantages else metrics

    def _reduce_vocab(self, inputs: ModelInput, reduce: Reduce, *columns: Tensor) -> tuple[Tensor, ...]:
        return self.model.reduce_vocab(
            inputs, reduce, *columns, temperature=self._temperature, chunk=self._chunk
        )

    def _has_whole_minibatches(self, plan: BatchPlan) -> bool:
        """True if each update is one micro-batch of one rank, whose forward pass sees the whole minibatch."""
        single = all(sum(bool(rows) for rows in minibatch[0]) <= 1 for minibatch in plan.minibatches)
        return len(self.engine.gather_over_data(single)) == 1 and single

    def _write_loss_gradients(self, batch: Batch, micro_batches: MicroBatches) -> dict[str, float]:
        """Write the gradients of a loss over the whole minibatch, from logprobs under the current weights.

        The columns of the minibatch's rows are gathered from all ranks, in the order of the step, so every
        rank computes the same loss. The update then backpropagates these gradients by micro-batches.

        Returns:
            Sums of the monitors over the minibatch.
        """

        def outputs(vocab_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return (target_logprobs(vocab_logprobs, targets),)

        logprobs = self.engine.infer(
            batch, micro_batches, lambda inputs: self._reduce_vocab(inputs, outputs)[0]
        )
        rows = sorted(row for micro in micro_batches for row in micro)
        ids = batch.row_ids[rows]
        columns = read_columns(batch, self._reads - {"loss_gradients", "weighted_losses"}, logprobs.device)
        columns["logprobs"] = logprobs
        local = {name: column[rows] for name, column in columns.items()} | {"row_ids": ids}
        minibatch = concat_by_row_id(self.engine.gather_over_data(local))
        is_local = torch.isin(minibatch.pop("row_ids"), ids)
        gradients, losses, monitors = self._algorithm.minibatch_gradients(minibatch)
        # The gathered rows are in the order of their ids.
        rows_by_id = torch.tensor(rows, dtype=torch.int64)[ids.argsort()]
        for name, values in (("loss_gradients", gradients), ("weighted_losses", losses)):
            column = torch.zeros_like(logprobs)
            column[rows_by_id] = values[is_local][:, : column.shape[1]]
            batch.write(name, column)
        return {name: float(value) for name, value in monitors.items()}
