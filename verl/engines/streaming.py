"""One update of a step in portions, as groups of rows arrive: equal, to rounding, to the update of all rows.

A portion is made of whole groups. Its rows get loss weights as if they were the whole step. What the other
rows add to the denominators is one factor of the loss, and so of its gradient. It is known when the last
portion has arrived, and applied before gradients are clipped. Weights stay until then, so what is written
before an update (`values`, `trainer_logprobs`) is what it would be for all rows. Algorithms that need all
rows at once are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from verl.algorithms.aggregations import DENOMINATORS, num_rows
from verl.algorithms.dry_run import example_columns
from verl.algorithms.objective import Algorithm
from verl.algorithms.registry import BoundFunction, bind
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.controller.worker_group import Future, MergedMetrics, WorkerGroup
from verl.data.batch import Batch
from verl.data.columns import COLUMNS, written_by
from verl.data.episode_rows import EpisodeRows
from verl.data.packing import BatchPlan
from verl.engines.minibatches import skip_zero_advantages, write_loss_weights
from verl.engines.roles.role_worker import Learner

# Rewards of two groups of two rows: at first one group has equal rewards; then both differ, one of them more.
_REWARDS = ((1.0, 0.0, 3.0, 3.0), (1.0, 0.0, 7.0, 2.0))


def streaming_obstacle(algorithm: Algorithm, config: AlgorithmConfig) -> str | None:
    """The reason why an algorithm needs all rows of a step at once, with its setting; None if it does not.

    A function of rows (advantage, correction, KL) is tried on two groups together and apart, so this also
    holds for a user's own function.
    """
    if config.epochs > 1 or config.minibatches > 1:
        return (
            f"algorithm.epochs={config.epochs} and algorithm.minibatches={config.minibatches} make several "
            "updates of a step, and the second one begins when all of its rows have been learned from"
        )
    if algorithm.needs_whole_minibatch:
        return f"algorithm.policy_loss {algorithm.policy_loss.name} has statistics over all rows of an update"
    if algorithm.aggregation.name not in DENOMINATORS:
        return (
            f"algorithm.aggregation {algorithm.aggregation.name} is none of {', '.join(DENOMINATORS)}, whose "
            "denominators are known"
        )
    if algorithm.likelihood_coef:
        return "algorithm.likelihood_coef has a denominator of its own, the good answers of the whole step"
    if "noise" in algorithm.reads:
        return "a chosen function reads noise, which is drawn for all rows of a step at once"
    chosen = {"advantage": algorithm.advantage, "correction": algorithm.correction}
    if algorithm.kl and algorithm.kl_in_reward:
        chosen["kl.estimator"] = algorithm.kl
    for setting, function in chosen.items():
        if depends_on_other_groups(function):
            options = "".join(f", {name}={value}" for name, value in function.options.items())
            return f"algorithm.{setting} {function.name}{options} has statistics over all groups of a step"
    return None


def depends_on_other_groups(function: BoundFunction) -> bool:
    """True if results for the rows of a group depend on other groups, or on longer rows beside them."""

    def widened(column: Tensor) -> Tensor:
        # One more position, of padding.
        return pad(column, (*[0, 0] * (column.ndim - 2), 0, 1))

    def results(columns: dict[str, Tensor]) -> list[Tensor]:
        result = function(columns)
        return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]

    for rewards in _REWARDS:
        columns = example_columns()
        columns["rewards"] = torch.tensor(rewards)
        columns["reward_parts"] = torch.stack([columns["rewards"], 0.5 * columns["rewards"]], 1)
        shape = columns["mask"].shape
        together = results(
            {
                name: widened(column) if column.shape[:2] == shape else column
                for name, column in columns.items()
            }
        )
        apart = [
            results({name: column[rows] for name, column in columns.items()})
            for rows in (slice(0, 2), slice(2, 4))
        ]
        for whole, *parts in zip(together, *apart, strict=True):
            narrow = whole if whole.ndim == 1 else whole[:, : shape[1]]
            if not torch.allclose(torch.cat(parts), narrow, rtol=1e-4, atol=1e-6, equal_nan=True):
                return True
    return False


class StreamedBatch:
    """The portions of one step so far, and their loss weights.

    Args:
        algorithm: defines the weights; one that has no `streaming_obstacle`.
        num_groups: expected groups of the step. Only the size of the loss before `policy_scale` depends on
            it, so that an fp16 loss scale that fits whole steps fits portions.

    Attributes:
        batches: the portions in the order of their arrival.
    """

    def __init__(self, algorithm: Algorithm, *, num_groups: int) -> None:
        self._algorithm = algorithm
        self._num_groups = num_groups
        self._denominator = bind(Choice(name=algorithm.aggregation.name), DENOMINATORS)
        self._weights, self._row_weights = _RunningDenominator(), _RunningDenominator()
        self._group_ids: set[int] = set()
        self.batches: list[Batch] = []

    def add(self, rows: Batch) -> int:
        """Write `weights` and `row_weights` of a portion, up to the scale of the step.

        Returns:
            The number of its first row in the step.

        Raises:
            ValueError: an earlier portion has rows of one of its groups.
        """
        first_row = sum(batch.num_rows for batch in self.batches)
        episodes = EpisodeRows(rows, ("mask", "group_ids")).episodes
        mask, group_ids = episodes["mask"], episodes["group_ids"]
        ids = set(group_ids.tolist())
        if repeated := sorted(ids & self._group_ids):
            raise ValueError(
                "need whole groups in a portion, and a number of its own for each in the step, got "
                f"{repeated} a second time"
            )
        self._group_ids |= ids
        write_loss_weights(rows, BatchPlan([[[list(range(rows.num_rows))]]]), self._algorithm)
        share = len(ids) / max(1, self._num_groups)
        denominator = int(self._denominator({"mask": mask, "group_ids": group_ids}))
        rows.write("weights", rows["weights"] * self._weights.add(denominator, share))
        rows.write("row_weights", rows["row_weights"] * self._row_weights.add(int(num_rows(mask)), share))
        self.batches.append(rows)
        return first_row

    @property
    def policy_scale(self) -> float:
        """Factor of the policy's loss that makes it the mean of the aggregation over all portions."""
        return self._weights.scale

    @property
    def critic_scale(self) -> float:
        """The same factor for a critic or a process reward model, whose loss may be a mean over rows."""
        values, _ = self._algorithm.value_loss(example_columns())
        return self._row_weights.scale if values.ndim == 1 else self._weights.scale

    def check(self, rows: Batch) -> None:
        """Check that advantages of all rows together are those of the portions, which were learned from.

        Args:
            rows: the portions by `concat_portions`, after `write_advantages`.

        Raises:
            RuntimeError: a function depends on other groups.
        """
        apart, mask = concat_portions(self.batches), rows["mask"]
        for name in (name for name in apart.names if name in written_by("correction", "advantage")):
            values, together = apart[name][mask], rows[name][mask]
            if not torch.allclose(values, together, rtol=1e-3, atol=1e-5, equal_nan=True):
                raise RuntimeError(
                    f"need functions of each group alone for a step in portions, but {name} of the rows "
                    "together are others than those of the portions, which were learned from; train on whole "
                    "steps with this algorithm"
                )


@dataclass
class _RunningDenominator:
    """Sum of the denominators of the portions so far, and a guess of the final sum.

    The loss is divided by the guess, from the first portion on; `scale` corrects it at the end.
    """

    guess: float = 0.0
    total: int = 0

    def add(self, denominator: int, share: float) -> float:
        """Add a portion, of a share of the step's groups; return the factor of its own loss weights."""
        self.guess = self.guess or max(1, denominator) / share
        self.total += denominator
        return denominator / self.guess

    @property
    def scale(self) -> float:
        """Guess over sum; 1 for portions without any token, as their loss is 0."""
        return self.guess / self.total if self.total else 1.0


class StreamedUpdate:
    """One update of a role, from portions of its rows.

    Portions of an abandoned step are discarded.

    Args:
        group: the role.
        plan: plan of the rows of a portion, as one minibatch.
        reads: columns that the role reads.
        kl_coef: coefficient of the KL in the loss.
        skips_zero_advantages: leave out rows whose advantages are all 0; if a step has no other rows the
            shortest stays.
    """

    def __init__(
        self,
        group: WorkerGroup,
        plan: Callable[[Batch], BatchPlan],
        *,
        reads: Collection[str],
        kl_coef: float = 0.0,
        skips_zero_advantages: bool = False,
    ) -> None:
        self._group, self._plan = group, plan
        self._reads, self._kl_coef = reads, kl_coef
        self._skips = skips_zero_advantages
        self._num_rows, self._num_with_signal = 0, 0
        self._shortest: tuple[Batch, int] | None = None
        self._started: list[Future[None]] = [group.call(Learner.discard)]

    def add(self, rows: Batch, first_row: int) -> None:
        """Start forward and backward on a portion that has its loss weights.

        Args:
            rows: whole groups.
            first_row: number of the first row in the step, from `StreamedBatch.add`.
        """
        plan = self._plan(rows)
        if self._skips:
            num_with_signal = int((rows["advantages"] != 0).any(1).sum())
            self._num_rows += rows.num_rows
            self._num_with_signal += num_with_signal
            if not num_with_signal:
                row = int(rows.num_tokens.argmin())
                shortest = rows.select([row])
                if self._shortest is None or int(shortest.num_tokens) < int(self._shortest[0].num_tokens):
                    self._shortest = shortest, first_row + row
                return
            plan, _ = skip_zero_advantages(rows, plan)
        self._accumulate(rows, plan, first_row)

    def finish(self, scale: float) -> Future[dict[str, float]]:
        """Make the update of all portions.

        Args:
            scale: `policy_scale` or `critic_scale` of the portions.

        Returns:
            The metrics of `Learner.update` with all rows at once, and `skipped_rows_share` if rows are left
            out.
        """
        more: dict[str, float] = {}
        if self._skips:
            if self._num_with_signal == 0 and self._shortest is not None:
                # The optimizer must see a gradient of 0, which moves its averages.
                row, number = self._shortest
                self._accumulate(row, self._plan(row), number)
            more = {"skipped_rows_share": 1 - max(1, self._num_with_signal) / max(1, self._num_rows)}
        return MergedMetrics(_AfterAll(self._started, self._group.call(Learner.finish, scale)), more)

    def _accumulate(self, rows: Batch, plan: BatchPlan, first_row: int) -> None:
        read = rows.keep(self._reads)
        self._started.append(self._group.call(Learner.accumulate, read, plan, self._kl_coef, first_row))


@dataclass(frozen=True)
class _AfterAll(Future[dict[str, float]]):
    """The result of the last of several calls, or the error of the first one that failed."""

    before: list[Future[None]]
    last: Future[dict[str, float]]

    @override
    def result(self) -> dict[str, float]:
        for future in self.before:
            future.result()
        return self.last.result()


def concat_portions(portions: Sequence[Batch]) -> Batch:
    """The rows of all portions, with the columns that each portion has or that have a `fill` value."""
    fills = {
        spec.name: float(spec.fill)
        for spec in COLUMNS.values()
        if spec.fill is not None and any(spec.name in batch for batch in portions)
    }
    portions = [batch.keep(batch.names) for batch in portions]
    for batch in portions:
        for name in fills.keys() - set(batch.names):
            batch.write(name, torch.full(batch["mask"].shape, fills[name]))
    common = set.intersection(*(set(batch.names) for batch in portions))
    return Batch.concat([batch.keep(common) for batch in portions])
