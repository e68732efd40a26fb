"""What each role does with its engine: the policy, those that judge its tokens, and those that are only read, over the rows of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from verl.algorithms.compose import Algorithm
from verl.data.batch import Batch, ModelInput, Ragged
from verl.data.packing import Plan
from verl.engines.base import ForwardEngine, Objective, TrainEngine
from verl.engines.models import PolicyModel, ValueModel, at_targets, entropies

MicroBatches = Sequence[Sequence[int]]


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
        correction = algorithm.correction.columns if algorithm.corrects_in_update else ()
        of_minibatch = ("correction_weights", "likelihood_weights", "loss_gradients", "weighted_losses")
        self._reads = {*algorithm.policy_loss.columns, *kl, *correction, *of_minibatch, "rollout_logprobs"} - {"logprobs"}
        self._reads_top = "top_logprobs" in algorithm.policy_loss.columns

    @property
    def model(self) -> PolicyModel:
        """The policy itself."""
        assert isinstance(self.engine.model, PolicyModel)
        return self.engine.model

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `trainer_logprobs`, and `sum_squared_probs` if a function reads it: under the weights as they are now."""
        squares = "sum_squared_probs" in self._algorithm.reads

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            columns = [at_targets(log_probs, targets), *([log_probs.mul(2).exp().sum(-1)] if squares else [])]
            return (torch.stack(columns, 1),)

        written = self.engine.infer(batch, plan_rows(plan), lambda inputs: self._reduced(inputs, outputs)[0])
        batch.write("trainer_logprobs", written[..., 0])
        if squares:
            batch.write("sum_squared_probs", written[..., 1])

    def update(self, batch: Batch, plan: Plan) -> dict[str, float]:
        """Minimises the policy loss; the metrics are means over sampled tokens and over updates."""
        algorithm = self._algorithm

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            top_ids = [rows.ragged("teacher_top_ids").values.to(self.model.device)] if self._reads_top else []
            logprobs, entropy, *top = self._reduced(inputs, self._outputs, *top_ids)
            columns = _columns(rows, self._reads, logprobs.device) | {"logprobs": _padded(logprobs, inputs)}
            if top:
                columns["top_logprobs"] = _padded(top[0], inputs)
            return algorithm.policy_objective(columns, _padded(entropy, inputs), self.kl_coef)

        write_weights(batch, plan, algorithm)
        plan, skipped = _with_advantages(batch, plan) if algorithm.skip_zero_advantages else (plan, {})
        before = self._write_gradients if algorithm.needs_whole_minibatch and not _is_whole(plan) else None
        updates = _run_updates(self.engine, batch, plan, objective, self._epochs, before)
        # Estimated on tokens of the policy that is measured; by the later updates it has moved away from that which drew them.
        return _mean(updates) | {name: updates[0][name] for name in ("kl", "kl_sampler") if name in updates[0]} | skipped

    def _reduced(self, inputs: ModelInput, outputs: Callable[..., tuple[Tensor, ...]], *columns: Tensor) -> tuple[Tensor, ...]:
        return self.model.reduced(inputs, outputs, *columns, temperature=self._temperature, chunk=self._chunk)

    def _outputs(self, log_probs: Tensor, targets: Tensor, *top_ids: Tensor) -> tuple[Tensor, ...]:
        entropy = entropies(log_probs, with_grad=self._algorithm.entropy_coef != 0)
        return (at_targets(log_probs, targets), entropy, *(log_probs.gather(1, ids) for ids in top_ids))

    def _write_gradients(self, batch: Batch, micro_batches: MicroBatches) -> dict[str, float]:
        """Adds the gradients of a loss over the whole minibatch, from logprobs under the weights as they are now."""

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return (at_targets(log_probs, targets),)

        current = self.engine.infer(batch, micro_batches, lambda inputs: self._reduced(inputs, outputs)[0])
        rows = sorted(row for micro in micro_batches for row in micro)
        columns = _columns(batch, self._reads - {"loss_gradients", "weighted_losses"}, current.device) | {"logprobs": current}
        gradients, losses, monitors = self._algorithm.minibatch_gradients({name: column[rows] for name, column in columns.items()})
        for name, values in (("loss_gradients", gradients), ("weighted_losses", losses)):
            column = torch.zeros_like(current)
            column[rows] = values
            batch.write(name, column)
        return {name: float(value) for name, value in monitors.items()}


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


class ProcessRewardWorker:
    """The implicit process reward model, a language model: writes `prm_logprobs`, and learns from outcomes."""

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int) -> None:
        self.engine = engine
        self._algorithm = algorithm
        self._temperature = temperature or 1.0
        self._epochs = epochs
        self._chunk = chunk
        self._reads = {*algorithm.value_loss.columns} - {"prm_logprobs"}

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `prm_logprobs`."""
        batch.write("prm_logprobs", policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk))

    def update(self, batch: Batch, plan: Plan) -> dict[str, float]:
        """Minimises the loss of the outcomes; metrics are prefixed `critic/`."""
        model = self.engine.model
        assert isinstance(model, PolicyModel)

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = _padded(model.token_logprobs(inputs, temperature=self._temperature, chunk=self._chunk)[0], inputs)
            columns = _columns(rows, self._reads, logprobs.device) | {"prm_logprobs": logprobs}
            return self._algorithm.value_objective(columns, 1.0)

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


class TeacherWorker:
    """The model that the policy is distilled from: writes what it thinks of the policy's tokens; never trained."""

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int, top_k: int) -> None:
        self.engine = engine
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._top_k = top_k

    def write(self, batch: Batch, plan: Plan) -> None:
        """Adds `teacher_logprobs`, and with a `top_k` above 0 its `teacher_top_logprobs` and `teacher_top_ids`."""
        model, k = self.engine.model, self._top_k
        assert isinstance(model, PolicyModel)

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            top, ids = log_probs.topk(k, -1)
            # One tensor: fp32 holds every id below 2^24 exactly, more than any vocabulary has.
            return (torch.cat([at_targets(log_probs, targets)[:, None], top, ids.float()], 1),)

        written = self.engine.infer(
            batch,
            plan_rows(plan),
            lambda inputs: model.reduced(inputs, outputs, temperature=self._temperature, chunk=self._chunk)[0],
        )
        batch.write("teacher_logprobs", written[..., 0])
        if not k:
            return
        batch.write("teacher_top_logprobs", written[..., 1 : k + 1])
        batch.write("teacher_top_ids", written[..., k + 1 :].long())


def policy_logprobs(engine: ForwardEngine, batch: Batch, plan: Plan, *, temperature: float, chunk: int) -> Tensor:
    """[B, T] fp32 logprobs of the response tokens under the engine's model."""
    model = engine.model
    assert isinstance(model, PolicyModel)
    return engine.infer(batch, plan_rows(plan), lambda inputs: model.token_logprobs(inputs, temperature=temperature, chunk=chunk)[0])


def plan_rows(plan: Plan) -> list[list[int]]:
    """All micro-batches of a one-rank plan, minibatch after minibatch."""
    return [rows for minibatch in plan.minibatches for rows in minibatch[0]]


def write_weights(batch: Batch, plan: Plan, algorithm: Algorithm) -> None:
    """Adds what each token and row counts in the loss of its minibatch, whatever the micro-batches are.

    `weights` [B, T] of the aggregation, `row_weights` [B] of the mean over rows, and `likelihood_weights` [B, T] of the
    aggregation over the answers with a reward above 0, if the likelihood counts.
    """
    mask = batch["mask"]
    weights, of_likelihood, of_rows = torch.zeros(mask.shape), torch.zeros(mask.shape), torch.zeros(batch.num_rows)
    for minibatch in plan.minibatches:
        rows = [row for micro in minibatch[0] for row in micro]
        weights[rows] = algorithm.aggregation({"mask": mask[rows], "group_ids": batch["group_ids"][rows]})
        of_rows[rows] = mask[rows].any(1) / mask[rows].any(1).sum().clamp(min=1)
        if algorithm.likelihood_coef:
            good = mask[rows] & (batch["rewards"][rows] > 0)[:, None]
            of_likelihood[rows] = algorithm.aggregation({"mask": good, "group_ids": batch["group_ids"][rows]})
    batch.write("weights", weights)
    batch.write("row_weights", of_rows)
    if algorithm.likelihood_coef:
        batch.write("likelihood_weights", of_likelihood)


def _is_whole(plan: Plan) -> bool:
    """Whether each update is a single micro-batch, which needs no forward pass of its own for statistics over all of it."""
    return all(sum(bool(rows) for micro_batches in minibatch for rows in micro_batches) <= 1 for minibatch in plan.minibatches)


def _with_advantages(batch: Batch, plan: Plan) -> tuple[Plan, dict[str, float]]:
    """The plan without the rows whose advantages are all 0, whose gradient is 0, and their share.

    Of a minibatch of such rows alone the shortest stays: the optimizer must see its gradient of 0.
    """
    alive = (batch["advantages"] != 0).any(1).tolist()
    lengths = batch.num_tokens.tolist()

    def kept(micro_batches: MicroBatches) -> list[list[int]]:
        rows = [row for micro in micro_batches for row in micro]
        shortest = min(rows, key=lambda row: lengths[row])
        stays = {row for row in rows if alive[row]} or {shortest}
        return [[row for row in micro if row in stays] for micro in micro_batches]

    short = Plan([[kept(micro_batches) for micro_batches in minibatch] for minibatch in plan.minibatches])
    return short, {"skipped_rows_share": 1 - sum(map(len, plan_rows(short))) / batch.num_rows}


def _run_updates(
    engine: TrainEngine,
    batch: Batch,
    plan: Plan,
    objective: Objective,
    epochs: int,
    before: Callable[[Batch, MicroBatches], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Every update of a step; sums of monitors become means over the sampled tokens of their minibatch.

    `before` each update may add columns to the batch, and returns sums of monitors.
    """
    tokens = batch["mask"].sum(1)
    results = []
    for _ in range(epochs):
        for minibatch in plan.minibatches:
            micro_batches = minibatch[0]
            count = max(1, int(tokens[[row for micro in micro_batches for row in micro]].sum()))
            sums = before(batch, micro_batches) if before else {}
            update = engine.update(batch, micro_batches, objective)
            if "loss" in update:  # else it was not finite, and neither are the monitors of it
                update = sums | update
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
    return {name: batch[name].to(device) for name in (*names, "mask", "weights", "row_weights") if name in batch}


def _padded(values: Tensor, inputs: ModelInput) -> Tensor:
    """[b, T, ...] from [M, ...] response tokens; keeps the gradient."""
    return Ragged(values, inputs.response_lengths.to(values.device)).padded()
