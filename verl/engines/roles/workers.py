"""What each role does on one rank: the policy, those that judge its tokens, and those that are only read,
over the rows of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import PLANNED, PLANNED_METRICS, SAME_ON_ALL, DispatchMode, broadcast, register
from verl.controller.worker_group import Worker
from verl.data.batch import Batch, ModelInput, Ragged, present_mask
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine, Objective, TrainEngine
from verl.engines.hf.models import PolicyModel, ValueModel, at_targets, entropies
from verl.engines.micro_batches import MicroBatches, counted, mean_over, per_token, run_updates
from verl.utils.device import memory_bytes

# Columns without which no model can run on rows.
MODEL_COLUMNS = ("prompt_ids", "response_ids", "mask")
_OF_MINIBATCH = (
    "weights",
    "row_weights",
    "correction_weights",
    "likelihood_weights",
    "loss_gradients",
    "weighted_losses",
)
_AT_FIRST = ("kl", "kl_sampler", "sampler_gap", "sampler_gap_max")


def _fullest(results: Sequence[dict[str, float]], arguments: object) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in results[0]}


def _all(results: Sequence[bool], arguments: object) -> bool:
    return all(results)


# The same arguments to all ranks; of numbers by name the largest.
FULLEST = DispatchMode("ranks", broadcast, _fullest)


class RoleWorker(Worker):
    """A model on one rank, and what every role can do with it.

    Args:
        engine: of the model.
    """

    engine: ForwardEngine

    def __init__(self, engine: ForwardEngine) -> None:
        self.engine = engine
        self.places = engine.places

    @register(SAME_ON_ALL)
    def model_config(self) -> PretrainedConfig:
        """The configuration of the model."""
        return self.engine.config

    @register(FULLEST)
    def memory(self) -> dict[str, float]:
        """Bytes of the device in use, at most and in all; of the rank that has most."""
        return memory_bytes(self.engine.model.device)

    @register(SAME_ON_ALL)
    def export(self, folder: Path) -> None:
        """Writes the model in Hugging Face format."""
        self.engine.export(folder)


class ColumnWorker(RoleWorker):
    """A role that gives the rows a column before the update."""

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """The columns, as a batch of the same rows."""
        raise NotImplementedError


class Learner(ColumnWorker):
    """A role that is trained.

    Args:
        engine: of the model.
        algorithm: what to minimise.
        epochs: passes over the rows.
    """

    engine: TrainEngine
    _prefix = ""
    _saving: Future[None] | None = None

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, epochs: int) -> None:
        super().__init__(engine)
        self._algorithm = algorithm
        self._epochs = epochs

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan, kl_coef: float) -> dict[str, float]:
        """Runs every update of a step on rows that have their weights.

        Returns:
            Metrics, means over sampled tokens and over updates, the same on all ranks.
        """
        return self._named(
            mean_over(run_updates(self.engine, batch, plan, self._objective(kl_coef), self._epochs))
        )

    @register(PLANNED_METRICS)
    def accumulate(self, batch: Batch, plan: BatchPlan, kl_coef: float, first_row: int) -> None:
        """Runs forward and backward on a portion of the rows of a step of one update; see
        `verl.engines.streaming`.

        Args:
            batch: rows that have their weights, up to the factor that `finish` is given.
            plan: of one minibatch.
            kl_coef: as for `update`, the same for all portions.
            first_row: number of the first row of the portion in the step.

        Raises:
            ValueError: the step has several updates, or its engine makes whole ones only.
        """
        if self._epochs > 1 or len(plan.minibatches) > 1:
            raise ValueError(
                f"need one update for a step in portions, got epochs={self._epochs} and {len(plan.minibatches)} minibatches"
            )
        numbered = batch.only(batch.names)
        numbered.write("row_ids", batch.row_ids + first_row)
        self.engine.accumulate(numbered, plan.minibatches[0][0], counted(self._objective(kl_coef)))

    @register(SAME_ON_ALL)
    def finish(self, scale: float) -> dict[str, float]:
        """Makes the update of the portions since the last one, with their loss times `scale`; returns what
        `update` does.
        """
        return self._named(per_token(self.engine.finish(scale)))

    @register(SAME_ON_ALL)
    def discard(self) -> None:
        """Forgets the portions since the last update."""
        self.engine.discard()

    @register(DispatchMode("ranks", broadcast, _all))
    def accumulates(self) -> bool:
        """Whether the engine takes an update in portions."""
        return self.engine.accumulates

    def _objective(self, kl_coef: float) -> Objective:
        raise NotImplementedError

    def _named(self, metrics: dict[str, float]) -> dict[str, float]:
        return {f"{self._prefix}{name}": value for name, value in metrics.items()}

    @register(SAME_ON_ALL)
    def begin_save(self, folder: Path) -> None:
        """Begins to write weights and optimizer; training may go on at once."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saving = thread.submit(self.engine.save(folder))
        thread.shutdown(wait=False)

    @register(DispatchMode("ranks", broadcast, _all))
    def is_saved(self) -> bool:
        """Whether it is written, or has failed, on every rank."""
        assert self._saving is not None
        return self._saving.done()

    @register(SAME_ON_ALL)
    def finish_save(self) -> None:
        """Waits until it is on the disk, or raises what kept it from it."""
        assert self._saving is not None
        self._saving.result()
        self._saving = None

    @register(SAME_ON_ALL)
    def load(self, folder: Path) -> None:
        """Reads what was saved, at any number of ranks."""
        self.engine.load(folder)


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
        """`trainer_logprobs`, and `sum_squared_probs` if a function reads it: under the weights as they are
        now.
        """
        squares = "sum_squared_probs" in self._algorithm.reads

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            columns = [at_targets(log_probs, targets), *([log_probs.mul(2).exp().sum(-1)] if squares else [])]
            return (torch.stack(columns, 1),)

        written = self.engine.infer(batch, plan_rows(plan), lambda inputs: self._reduced(inputs, outputs)[0])
        names = ["trainer_logprobs", *(["sum_squared_probs"] if squares else [])]
        return over_response(
            batch, dict(zip(names, _several(written, batch, len(names)).unbind(-1), strict=True))
        )

    @register(PLANNED)
    def write_reference(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`ref_logprobs` of the policy without its low-rank additions: the model that it started from."""
        with self.engine.adapter_off():
            logprobs = policy_logprobs(
                self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk
            )
        return over_response(batch, {"ref_logprobs": logprobs})

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
            columns = _columns(rows, self._reads, logprobs.device) | {"logprobs": _padded(logprobs, inputs)}
            if top:
                columns["top_logprobs"] = _padded(top[0], inputs)
            return algorithm.policy_objective(columns, _padded(entropy, inputs), kl_coef)

        return objective

    def _reduced(
        self, inputs: ModelInput, outputs: Callable[..., tuple[Tensor, ...]], *columns: Tensor
    ) -> tuple[Tensor, ...]:
        return self.model.reduced(inputs, outputs, *columns, temperature=self._temperature, chunk=self._chunk)

    def _outputs(self, log_probs: Tensor, targets: Tensor, *top_ids: Tensor) -> tuple[Tensor, ...]:
        entropy = entropies(log_probs, with_grad=self._algorithm.entropy_coef != 0)
        return (at_targets(log_probs, targets), entropy, *(log_probs.gather(1, ids) for ids in top_ids))

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
            return (at_targets(log_probs, targets),)

        current = self.engine.infer(batch, micro_batches, lambda inputs: self._reduced(inputs, outputs)[0])
        rows = sorted(row for micro in micro_batches for row in micro)
        ids = batch.row_ids[rows]
        columns = _columns(batch, self._reads - {"loss_gradients", "weighted_losses"}, current.device) | {
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


class CriticWorker(Learner):
    """The critic: writes `values`, and learns; its metrics are prefixed `critic/`."""

    _prefix = "critic/"

    def __init__(self, engine: TrainEngine, algorithm: Algorithm, *, vf_coef: float, epochs: int) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._vf_coef = vf_coef
        self._reads = critic_reads(algorithm)

    @property
    def model(self) -> ValueModel:
        """The value model itself."""
        assert isinstance(self.engine.model, ValueModel)
        return self.engine.model

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`values`: of the state before each response token."""
        return over_response(
            batch, {"values": self.engine.infer(batch, plan_rows(plan), self.model.token_values)}
        )

    def _objective(self, kl_coef: float) -> Objective:
        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            values = _padded(self.model.token_values(inputs), inputs)
            columns = _columns(rows, self._reads, values.device) | {"new_values": values}
            return self._algorithm.value_objective(columns, self._vf_coef)

        return objective


class ProcessRewardWorker(Learner):
    """The implicit process reward model, a language model: writes `prm_logprobs`, and learns from outcomes,
    as a critic does.
    """

    _prefix = "critic/"

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, *, temperature: float, epochs: int, chunk: int
    ) -> None:
        super().__init__(engine, algorithm, epochs=epochs)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._reads = critic_reads(algorithm)

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`prm_logprobs`."""
        logprobs = policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk)
        return over_response(batch, {"prm_logprobs": logprobs})

    def _objective(self, kl_coef: float) -> Objective:
        model = self.engine.model
        assert isinstance(model, PolicyModel)

        def objective(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs = _padded(
                model.token_logprobs(inputs, temperature=self._temperature, chunk=self._chunk)[0], inputs
            )
            columns = _columns(rows, self._reads, logprobs.device) | {"prm_logprobs": logprobs}
            return self._algorithm.value_objective(columns, 1.0)

        return objective


class ReferenceWorker(ColumnWorker):
    """The policy that must not be left: writes `ref_logprobs`; never trained."""

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int) -> None:
        super().__init__(engine)
        self._temperature = temperature or 1.0
        self._chunk = chunk

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`ref_logprobs`."""
        logprobs = policy_logprobs(self.engine, batch, plan, temperature=self._temperature, chunk=self._chunk)
        return over_response(batch, {"ref_logprobs": logprobs})


class TeacherWorker(ColumnWorker):
    """The model that the policy is distilled from: writes what it thinks of the policy's tokens; never
    trained.
    """

    def __init__(self, engine: ForwardEngine, *, temperature: float, chunk: int, top_k: int) -> None:
        super().__init__(engine)
        self._temperature = temperature or 1.0
        self._chunk = chunk
        self._top_k = top_k

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """`teacher_logprobs`, and with a `top_k` above 0 its `teacher_top_logprobs` and `teacher_top_ids`."""
        model, k = self.engine.model, self._top_k
        assert isinstance(model, PolicyModel)

        def outputs(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            top, ids = log_probs.topk(k, -1)
            # One tensor: fp32 holds every id below 2^24 exactly, more than any vocabulary has.
            return (torch.cat([at_targets(log_probs, targets)[:, None], top, ids.float()], 1),)

        written = self.engine.infer(
            batch,
            plan_rows(plan),
            lambda inputs: model.reduced(inputs, outputs, temperature=self._temperature, chunk=self._chunk)[
                0
            ],
        )
        written = _several(written, batch, 1 + 2 * k)
        columns = {"teacher_logprobs": written[..., 0]}
        if k:
            columns |= {
                "teacher_top_logprobs": written[..., 1 : k + 1],
                "teacher_top_ids": written[..., k + 1 :].long(),
            }
        return over_response(batch, columns)


def policy_logprobs(
    engine: ForwardEngine, batch: Batch, plan: BatchPlan, *, temperature: float, chunk: int
) -> Tensor:
    """[B, T] fp32 logprobs of the response tokens under the engine's model."""
    model = engine.model
    assert isinstance(model, PolicyModel)
    return engine.infer(
        batch,
        plan_rows(plan),
        lambda inputs: model.token_logprobs(inputs, temperature=temperature, chunk=chunk)[0],
    )


def plan_rows(plan: BatchPlan) -> list[list[int]]:
    """All micro-batches of a one-rank plan, minibatch after minibatch."""
    return [rows for minibatch in plan.minibatches for rows in minibatch[0]]


def over_response(batch: Batch, columns: dict[str, Tensor]) -> Batch:
    """A batch of the same rows with the columns [B, T, ...] over their response tokens."""
    present = present_mask(batch.response_lengths)
    return Batch({name: Ragged(column[present], batch.response_lengths) for name, column in columns.items()})


def _several(written: Tensor, batch: Batch, count: int) -> Tensor:
    """[B, T, count] values of tokens that an engine wrote; of a rank without rows it cannot know how many of
    each.
    """
    return written if batch.num_rows else written.new_zeros(0, 0, count)


def policy_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of the policy reads, besides `MODEL_COLUMNS`, where they are there."""
    kl = algorithm.kl.columns if algorithm.kl and not algorithm.kl_in_reward else ()
    correction = algorithm.correction.columns if algorithm.corrects_in_update else ()
    return {*algorithm.policy_loss.columns, *kl, *correction, *_OF_MINIBATCH, "rollout_logprobs"} - {
        "logprobs"
    }


def critic_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of a critic or process reward model reads, besides `MODEL_COLUMNS`."""
    return {*algorithm.value_loss.columns, "weights", "row_weights"} - {"new_values", "prm_logprobs"}


def write_weights(batch: Batch, plan: BatchPlan, algorithm: Algorithm) -> None:
    """Adds what each token and row counts in the loss of its minibatch, whatever the ranks and micro-batches
    are.

    `weights` [B, T] of the aggregation, `row_weights` [B] of the mean over rows, and `likelihood_weights` [B,
    T] of the aggregation over the answers with a reward above 0, if the likelihood counts.
    """
    mask = batch["mask"]
    weights, of_likelihood, of_rows = (
        torch.zeros(mask.shape),
        torch.zeros(mask.shape),
        torch.zeros(batch.num_rows),
    )
    for minibatch in range(len(plan.minibatches)):
        rows = plan.rows_of_minibatch(minibatch)
        weights[rows] = algorithm.aggregation({"mask": mask[rows], "group_ids": batch["group_ids"][rows]})
        of_rows[rows] = mask[rows].any(1) / mask[rows].any(1).sum().clamp(min=1)
        if algorithm.likelihood_coef:
            good = mask[rows] & (batch["rewards"][rows] > 0)[:, None]
            of_likelihood[rows] = algorithm.aggregation({"mask": good, "group_ids": batch["group_ids"][rows]})
    batch.write("weights", weights)
    batch.write("row_weights", of_rows)
    if algorithm.likelihood_coef:
        batch.write("likelihood_weights", of_likelihood)


def with_advantages(batch: Batch, plan: BatchPlan) -> tuple[BatchPlan, dict[str, float]]:
    """The plan without the rows whose advantages are all 0, whose gradient is 0, and their share.

    Of a minibatch of such rows alone the shortest stays: the optimizer must see its gradient of 0.
    """
    alive = (batch["advantages"] != 0).any(1).tolist()
    lengths = batch.num_tokens.tolist()

    def kept(number: int) -> list[list[list[int]]]:
        rows = plan.rows_of_minibatch(number)
        shortest = min(rows, key=lambda row: lengths[row])
        stays = {row for row in rows if alive[row]} or {shortest}
        return [
            [[row for row in micro if row in stays] for micro in micro_batches]
            for micro_batches in plan.minibatches[number]
        ]

    short = BatchPlan([kept(number) for number in range(len(plan.minibatches))])
    num_kept = sum(len(short.rows_of_minibatch(number)) for number in range(len(short.minibatches)))
    return short, {"skipped_rows_share": 1 - num_kept / batch.num_rows}


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


def _columns(batch: Batch, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The named columns that the batch has, with the mask, padded, on the device."""
    return {name: batch[name].to(device) for name in (*names, "mask") if name in batch}


def _padded(values: Tensor, inputs: ModelInput) -> Tensor:
    """[b, T, ...] from [M, ...] response tokens; keeps the gradient."""
    return Ragged(values, inputs.response_lengths.to(values.device)).padded()
