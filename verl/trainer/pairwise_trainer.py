"""Base of training on pairs of answers: a step, held-out pairs, and micro-batches that never split a pair."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property, partial
from typing import Literal

from torch import Tensor
from typing_extensions import override

from verl.algorithms.dry_run import try_out
from verl.algorithms.registry import BoundFunction
from verl.config.roles import RoleConfig
from verl.config.run import PairsConfig
from verl.data.batch import Batch, ModelInput, Ragged
from verl.data.dataset import LoadReport
from verl.data.examples import Answer, RowLimits, answer_row, fit_rows
from verl.data.packing import balance
from verl.data.preference_pairs import Pair, load_pairs
from verl.data.reading.sources import SourceSetting
from verl.engines.memory_limits import MOST_TOKENS, micro_batch_tokens
from verl.trainer.base import Metrics
from verl.trainer.evaluation.eval_sets import EvalSet
from verl.trainer.evaluation.measures import over_sets
from verl.trainer.single_model_trainer import SingleModelTrainer
from verl.utils.sampling_types import Prompt

SIDES = ("chosen", "rejected")


class PairwiseTrainer(SingleModelTrainer):
    """Trains on pairs: row 2i of a step is the chosen answer of pair i, row 2i + 1 the rejected one.

    The loss is the mean over the pairs of the step, whatever the micro-batches are.

    Attributes:
        loss: loss of a pair; subclasses bind it before anything is loaded.
    """

    config: PairsConfig
    loss: BoundFunction

    @cached_property
    def _role(self) -> RoleConfig:
        """The role of the policy, with the micro-batches that fit the device."""
        role, on_cpu = self.config.policy, self.device.type == "cpu"
        fitting = micro_batch_tokens(role, self.policy_engine.config, on_cpu=on_cpu)
        return role.model_copy(update={"micro_batch_tokens": fitting})

    @override
    def step(self) -> Metrics:
        assert self.loader is not None
        return self.learn(self.loader.take(self.rows_per_step))

    def learn(self, pairs: list[Prompt]) -> Metrics:
        """One update on prompts whose answers are pairs."""
        rows = self.encode(pairs)
        plan = plan_pairs(rows, self._role)
        self.write_columns(rows, plan)
        with self.clock.phase("update_policy"):
            metrics = self.policy_engine.update(rows, plan, partial(self._objective, rows))
        self.version += 1
        answer_tokens = float(self.answer_tokens(rows).sum())
        tokens = float(rows.ragged("prompt_ids").lengths.sum()) + answer_tokens
        return metrics | {"response_tokens": answer_tokens / rows.num_rows, "tokens": tokens}

    @abstractmethod
    def encode(self, pairs: list[Prompt]) -> Batch:
        """Both answers of each pair as rows."""

    @abstractmethod
    def token_values(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """[M] value of every response token with gradient, and their [M] entropies if the model has any."""

    @abstractmethod
    def row_columns(self, rows: Batch, values: Tensor) -> dict[str, Tensor]:
        """Columns [B] of the loss, without the prefixes `chosen_` and `rejected_`.

        Args:
            rows: answers of whole pairs.
            values: [B, T], `token_values` of them.
        """

    def answer_tokens(self, rows: Batch) -> Tensor:
        """[B] int64, number of tokens of the answers, end token included."""
        return rows["mask"].sum(1)

    def write_columns(self, rows: Batch, plan: list[list[int]]) -> None:
        """Add columns that the loss reads and the update does not change; none here."""
        return

    def monitors(
        self, columns: Mapping[str, Tensor], entropy: Tensor | None, step: Batch
    ) -> dict[str, Tensor]:
        """Further metrics of a micro-batch; their sum over all micro-batches is the metric of the step.

        Args:
            columns: columns [P] of the pairs in the micro-batch.
            entropy: [m] of its learned tokens.
            step: all rows of the step, for the denominators.
        """
        return {}

    @override
    def read_data(self) -> None:
        pairs, report = self.read_pairs(self.source("train"), "train")
        if self.config.data.test is not None:
            _ = self.test_sets  # read now: a mistake in them is found before a model is loaded
        self.use_train_rows(pairs, report, per_step=self.config.pairs_per_step, setting="pairs_per_step")

    @override
    def load_train_data(self) -> LoadReport:
        report = super().load_train_data()
        if self.eval_every:
            _ = self.test_rows  # encoded now, so that a mistake in them is found before the first step
            self.clock.take()  # the reference's time for them belongs to no step
        return report

    def read_pairs(
        self, source: SourceSetting | None, split: Literal["train", "test"]
    ) -> tuple[list[Prompt], LoadReport]:
        """Pairs of a data set within the limits of `data`.

        Raises:
            ValueError: there is no source, or nothing usable in it.
        """
        if source is None:
            raise ValueError(
                f"need data.{split}: rows {{prompt, chosen, rejected}}, as a file, a saved data set's "
                "folder, a data set of the hub (OWNER/NAME), or task:NAME such as task:add-2; or "
                f"{split}_dataset in a program"
            )
        return fit_rows(
            *load_pairs(source, self.config.data, split=split),
            RowLimits.of(self.config.data, self.context),
            lambda pair: [answer_row(self.codec, pair, answer) for answer in pair.answer],
            skips=self.config.data.on_malformed == "skip",
        )

    @cached_property
    def test_sets(self) -> list[EvalSet]:
        """The held-out pairs, by source."""
        return self.held_out_sets(partial(self.read_pairs, split="test"), "pairs")

    @cached_property
    def test_rows(self) -> dict[str, Batch]:
        """The held-out pairs by set, with all columns that training does not change."""
        rows = {one.name: self.encode([*one.prompts]) for one in self.test_sets}
        for each in rows.values():
            self.write_columns(each, plan_pairs(each, self._role))
        return rows

    @override
    def evaluate(self) -> Metrics:
        """`eval/loss` and `eval/accuracy`, means over the pairs of each set, and `calibration_metrics`."""
        return over_sets({name: self._measured(rows) for name, rows in self.test_rows.items()})

    def _measured(self, rows: Batch) -> Metrics:
        with self.clock.phase("evaluate"):
            values = self.policy_engine.infer(
                rows, plan_pairs(rows, self._role), lambda inputs: self.token_values(inputs)[0]
            )
        columns = split_sides(self.row_columns(rows, values))
        losses, monitors = self.loss(columns)
        return self.calibration_metrics(columns) | {
            "eval/loss": float(losses.mean()),
            "eval/accuracy": float(monitors["accuracy"].mean()),
        }

    def calibration_metrics(self, columns: Mapping[str, Tensor]) -> Metrics:
        """Calibration of the scores of held-out pairs; none without scores."""
        return {}

    def _objective(self, step: Batch, rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of a micro-batch in the loss of the step, and in its metrics."""
        values, entropy = self.token_values(inputs)
        if rows.num_rows % 2:
            # After a loss that is not finite, the engine passes rows one by one to find the cause. One row is
            # no pair, but its values show whether it is the cause.
            return values.sum(), {}
        padded = Ragged(values, inputs.response_lengths.to(values.device)).padded()
        if entropy is not None:
            entropy = entropy[rows.ragged("mask").values.to(entropy.device)]
        columns = split_sides(self.row_columns(rows, padded))
        losses, monitors = self.loss(columns)
        num_pairs = step.num_rows // 2
        means = {name: monitor.sum() / num_pairs for name, monitor in monitors.items()}
        return losses.sum() / num_pairs, means | self.monitors(columns, entropy, step)


def prompts_and_answers(pairs: list[Prompt]) -> tuple[list[Prompt], list[Answer]]:
    """The prompt and the answer of each row, two rows per pair."""
    prompts: list[Prompt] = []
    answers: list[Answer] = []
    for prompt in pairs:
        assert isinstance(prompt.answer, Pair)
        prompts += [prompt, prompt]
        answers += prompt.answer
    return prompts, answers


def split_sides(row_columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns [P] of the chosen and of the rejected answers, from columns [2 P] of rows."""
    return {
        f"{side}_{name}": column[i::2] for name, column in row_columns.items() for i, side in enumerate(SIDES)
    }


def plan_pairs(rows: Batch, role: RoleConfig) -> list[list[int]]:
    """Row numbers of micro-batches of whole pairs, within `micro_batch_tokens` and `micro_batch_rows`.

    A pair that is larger than these bounds is a micro-batch of its own.
    """
    num_tokens = rows.num_tokens.view(-1, 2).sum(1)
    max_pairs = role.micro_batch_rows and max(1, role.micro_batch_rows // 2)
    plan = balance(
        num_tokens,
        num_ranks=1,
        micro_batch_tokens=role.micro_batch_tokens or MOST_TOKENS,
        micro_batch_rows=max_pairs,
    )
    return [[row for pair in pairs for row in (2 * pair, 2 * pair + 1)] for pairs in plan.minibatches[0][0]]


def check_pair_loss(loss: BoundFunction, columns: Collection[str]) -> BoundFunction:
    """The loss itself, after one call on small columns, so that a wrong option is found before loading.

    Raises:
        ValueError: the loss refuses its options, or does not return losses and the monitor `accuracy`.
    """
    _, monitors = try_out(loss, columns, learns=True)
    if "accuracy" not in monitors:
        raise ValueError(
            f"{loss.name}: need a monitor 'accuracy', 1 for each pair whose chosen answer is ranked higher, "
            f"got {', '.join(monitors) or 'none'}"
        )
    return loss
