"""What each role does with its engine: the policy, the critic and the reference, over the rows of a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from verl.algorithms.compose import Algorithm
from verl.data.batch import Batch, ModelInput, Ragged
from verl.data.packing import Plan
from verl.engines.base import ForwardEngine, Objective, TrainEngine
from verl.engines.models import PolicyModel, ValueModel


class Writer(Protocol):
    """A role that adds a column to the rows before the update."""

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds the column."""


class Learner(Protocol):
    """A role that is trained."""

    def update(self, batch: Batch, plan: Plan) -> dict[str, float]:
        """Runs every update of a step and returns metrics."""


class PolicyWorker:
    """The policy: writes `trainer_logprobs`, and learns.

    Args:
        engine: of a `PolicyModel`.
        algorithm: what to minimise.
        temperature: of the sampler, so that both speak of one distribution.
        epochs: passes over the rows.
        chunk: positions whose logits are in memory at once.
    """

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int) -> None:
        self.engine = engine
        self.kl_coef = 0.0
        self._algorithm = algorithm
        # Greedy answers have the logprobs of the model's own distribution.
        self._temperature = temperature or 1.0
        self._epochs = epochs
        self._chunk = chunk
        kl = algorithm.kl.columns if algorithm.kl and not algorithm.kl_in_reward else ()
        self._reads = {*algorithm.policy_loss.columns, *kl, "correction_weights", "rollout_logprobs"} - {"logprobs"}

    @property
    def model(self) -> PolicyModel:
        """The policy itself."""
        assert isinstance(self.engine.model, PolicyModel)
        return self.engine.model

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `trainer_logprobs`: under the weights as they are now."""
        batch.write("trainer_logprobs", policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk))

    def update(self, batch: Batch, plan: Plan) -> dict[str, float]:
        """Minimises the policy loss; the metrics are means over sampled tokens and over updates."""

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = self.model.token_logprobs(
                inputs, temperature=self._temperature, chunk=self._chunk, entropy_grad=self._algorithm.entropy_coef != 0
            )
            columns = _columns(rows, self._reads, logprobs.device) | {"logprobs": _padded(logprobs, inputs)}
            return self._algorithm.policy_objective(columns, _padded(entropy, inputs), self.kl_coef)

        write_weights(batch, plan, self._algorithm)
        updates = _run_updates(self.engine, batch, plan, objective, self._epochs)
        metrics = _mean(updates)
        # Estimated on tokens of the policy that is measured; by the later updates it has moved away from that which drew them.
        return metrics | {name: updates[0][name] for name in ("kl", "kl_sampler") if name in updates[0]}


class CriticWorker:
    """The critic: writes `values`, and learns."""

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, vf_coef: float, epochs: int) -> None:
        self.engine = engine
        self._algorithm = algorithm
        self._vf_coef = vf_coef
        self._epochs = epochs
        self._reads = {*algorithm.value_loss.columns} - {"new_values"}

    @property
    def model(self) -> ValueModel:
        """The value model itself."""
        assert isinstance(self.engine.model, ValueModel)
        return self.engine.model

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `values`: of the state before each response token."""
        batch.write("values", self.engine.infer(batch, plan_rows(plan), self.model.token_values))

    def update(self, batch: Batch, plan: Plan) -> dict[str, float]:
        """Minimises the value loss; metrics are prefixed `critic/`."""

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            values = _padded(self.model.token_values(inputs), inputs)
            columns = _columns(rows, self._reads, values.device) | {"new_values": values}
            return self._algorithm.value_objective(columns, self._vf_coef)

        write_weights(batch, plan, self._algorithm)
        metrics = _mean(_run_updates(self.engine, batch, plan, objective, self._epochs))
        return {f"critic/{name}": value for name, value in metrics.items()}


class ReferenceWorker:
    """The policy that must not be left: writes `ref_logprobs`; never trained."""

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int) -> None:
        self.engine = engine
        self._temperature = temperature or 1.0
        self._chunk = chunk

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `ref_logprobs`."""
        batch.write("ref_logprobs", policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk))


def policy_logprobs(engine: ForwardEngine, batch: Batch, plan: Plan, *, temperature: float, chunk: int) -> Tensor:
    """[B, T] fp32 logprobs of the response tokens under the engine's model."""
    model = engine.model
    assert isinstance(model, PolicyModel)
    return engine.infer(batch, plan_rows(plan), lambda inputs: model.token_logprobs(inputs, temperature=temperature, chunk=chunk)[0])


def plan_rows(plan: Plan) -> list[list[int]]:
    """All micro-batches of a one-rank plan, minibatch after minibatch."""
    return [rows for minibatch in plan.minibatches for rows in minibatch[0]]


def write_weights(batch: Batch, plan: Plan, algorithm: Algorithm) -> None:
    """Adds `weights`: the share of each token in the loss of its minibatch, whatever the micro-batches are."""
    mask = batch["mask"]
    weights = torch.zeros(mask.shape)
    for minibatch in plan.minibatches:
        rows = [row for micro in minibatch[0] for row in micro]
        weights[rows] = algorithm.aggregation({"mask": mask[rows]})
    batch.write("weights", weights)


def _run_updates(engine: TrainEngine, batch: Batch, plan: Plan, objective: Objective, epochs: int) -> list[dict[str, float]]:
    """Every update of a step; sums of monitors become means over the sampled tokens of their minibatch."""
    tokens = batch["mask"].sum(1)
    results = []
    for _ in range(epochs):
        for minibatch in plan.minibatches:
            micro_batches = minibatch[0]
            count = max(1, int(tokens[[row for micro in micro_batches for row in micro]].sum()))
            update = engine.update(batch, micro_batches, objective)
            own = ("loss", "grad_norm", "lr", "skipped_updates")
            results.append({name: value if name in own else value / count for name, value in update.items()})
    return results


def _mean(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the updates that have it; skipped updates are summed."""
    names = {name: None for update in updates for name in update}
    metrics = {name: _mean_of([u[name] for u in updates if name in u]) for name in names}
    metrics["skipped_updates"] = sum(u["skipped_updates"] for u in updates)
    return metrics


def _mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def _columns(batch: Batch, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The named columns that the batch has, with mask and weights, padded, on the device."""
    return {name: batch[name].to(device) for name in (*names, "mask", "weights") if name in batch}


def _padded(values: Tensor, inputs: ModelInput) -> Tensor:
    """[b, T] from [M] response tokens; keeps the gradient."""
    return Ragged(values, inputs.response_lengths.to(values.device)).padded()
