"""The table of columns: shape, values, writer and readers of every column that a batch may have.

Everything that handles columns by name derives from this table. A new column is a row here and the function
that computes it, where its writer does: `TRAJECTORY_COLUMNS` of `verl.data.batch` for the sampler and the
rewards, `POLICY_COLUMNS` of `verl.engines.roles.policy`, `STEP_COLUMNS` of `verl.algorithms.objective`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Writer = Literal[
    "sampler", "rewards", "dispatch", "policy", "reference", "critic", "process_reward_model", "teacher",
    "step", "correction", "advantage", "loss_weights", "update",
]  # fmt: skip
Reader = Literal[
    "advantage", "policy_loss", "value_loss", "correction", "kl", "aggregation", "length_penalty",
    "preference_loss", "reward_loss", "model", "step", "policy_update", "critic_update",
]  # fmt: skip


@dataclass(frozen=True)
class Values:
    """Type and bounds of the values of a column."""

    dtype: torch.dtype
    low: float = float("-inf")
    high: float = float("inf")


REAL = Values(torch.float32)
LOGPROB = Values(torch.float32, high=0)
SHARE = Values(torch.float32, low=0, high=1)
COUNT = Values(torch.int64, low=0)
FLAG = Values(torch.bool, low=0, high=1)

# The functions that an algorithm chooses: most columns are there for each of them.
CHOSEN: frozenset[Reader] = frozenset({"advantage", "policy_loss", "value_loss", "correction", "kl"})
# Of those, the ones that run when the advantages are known.
_LATE: frozenset[Reader] = frozenset({"policy_loss", "value_loss", "kl"})


@dataclass(frozen=True)
class ColumnSpec:
    """One row of the table.

    Attributes:
        name: of the column, and of the parameter of each function that reads it.
        shape: axes, separated by spaces: B rows, S prompt tokens, T response tokens, K reward functions,
            k most likely tokens, P pairs of answers.
        values: their type and bounds.
        writer: part of a step that computes it.
        description: its content.
        read_by: functions and parts of a step that may read it.
        requires: columns without which it cannot be computed.
        fill: value for rows without one; None: the column exists only if every row has one.
    """

    name: str
    shape: str
    values: Values
    writer: Writer
    description: str
    read_by: frozenset[Reader] = CHOSEN
    requires: tuple[str, ...] = ()
    fill: float | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its shape."""
        return tuple(self.shape.split())

    @property
    def is_ragged(self) -> bool:
        """True if it has a value for each token of the prompt or the response."""
        return bool({"S", "T"} & set(self.axes))


def _only(*readers: Reader) -> frozenset[Reader]:
    return frozenset(readers)


# fmt: off
_ROWS = (
    # Written with the answers, and with their rewards.
    ColumnSpec("prompt_ids", "B S", COUNT, "sampler", "tokens of the prompt", read_by=_only("model")),
    ColumnSpec("response_ids", "B T", COUNT, "sampler", "every token after the prompt",
               read_by=_only("model")),
    ColumnSpec("mask", "B T", FLAG, "sampler", "True where the policy sampled the token",
               read_by=CHOSEN | {"model", "aggregation"}),
    ColumnSpec("versions", "B T", COUNT, "sampler", "version of the policy that sampled the token"),
    ColumnSpec("rollout_logprobs", "B T", LOGPROB, "sampler", "logprobs of the sampler",
               read_by=CHOSEN | {"policy_update"}),
    ColumnSpec("group_ids", "B", COUNT, "sampler", "equal for the trajectories of one prompt",
               read_by=CHOSEN | {"aggregation"}),
    ColumnSpec("episode_ends", "B", FLAG, "sampler",
               "True for the last row of an episode; rows before it are its earlier segments",
               read_by=_only("step")),
    ColumnSpec("truncated", "B", FLAG, "sampler", "True if cut off at the length limit"),
    ColumnSpec("num_tokens", "B", COUNT, "sampler", "length of the answer", read_by=_only("length_penalty")),
    ColumnSpec("rewards", "B", REAL, "rewards", "of the row, minus the KL penalty if it is in the reward",
               read_by=CHOSEN | {"length_penalty"}),
    ColumnSpec("turn_rewards", "B T", REAL, "rewards", "reward of each turn, at the last token of the turn",
               read_by=_only("step"), fill=0),
    ColumnSpec("states", "B T", COUNT, "sampler",
               "number of the environment's state before the turn of the token, equal for equal states",
               read_by=_only("advantage"), fill=0),
    ColumnSpec("reward_parts", "B K", REAL, "rewards", "value of each reward function before its weight"),
    ColumnSpec("reward_weights", "B K", REAL, "rewards", "weight of each reward function"),
    ColumnSpec("greedy_rewards", "B", REAL, "rewards", "reward of the greedy answer to the same prompt"),

    # Written before the first update by models that read the rows, if a chosen function reads the column.
    ColumnSpec("row_ids", "B", COUNT, "dispatch", "number of the row in the step", read_by=_only("model")),
    ColumnSpec("trainer_logprobs", "B T", LOGPROB, "policy",
               "logprobs of the policy before the first update"),
    ColumnSpec("sum_squared_probs", "B T", SHARE, "policy",
               "sum of the squared probabilities of the whole vocabulary, before the first update"),
    ColumnSpec("ref_logprobs", "B T", LOGPROB, "reference", "logprobs of the reference policy"),
    ColumnSpec("values", "B T", REAL, "critic", "values of the critic before its update"),
    ColumnSpec("prm_logprobs", "B T", LOGPROB, "process_reward_model",
               "logprobs of the implicit process reward model before its update; with gradient in its loss"),
    ColumnSpec("teacher_logprobs", "B T", LOGPROB, "teacher", "logprobs of the teacher"),
    ColumnSpec("teacher_top_logprobs", "B T k", LOGPROB, "teacher",
               "logprobs of the teacher's k most likely tokens"),
    ColumnSpec("teacher_top_ids", "B T k", COUNT, "teacher", "the teacher's k most likely tokens",
               read_by=_only("policy_update")),

    # Written by the step itself.
    ColumnSpec("staleness", "B T", COUNT, "step",
               "steps between the version that sampled the token and the version that is trained",
               read_by=CHOSEN | {"policy_update"}),
    ColumnSpec("noise", "B T", SHARE, "step",
               "uniform in [0, 1), new in each step, from the seed of the run"),
    ColumnSpec("token_rewards", "B T", REAL, "step",
               "rewards of turns at their last tokens, the rest of the reward at the last token of the row, "
               "minus the KL penalty of each token if it is in the reward",
               read_by=_only("advantage")),
    ColumnSpec("old_logprobs", "B T", LOGPROB, "correction", "denominator of the ratio"),
    ColumnSpec("correction_weights", "B T", REAL, "correction", "factor of the policy loss of each token",
               read_by=_only("policy_update")),
    ColumnSpec("advantages", "B T", REAL, "advantage", "advantage of each token",
               read_by=_LATE | {"correction"}),
    ColumnSpec("returns", "B T", REAL, "advantage", "target of the critic", read_by=_LATE),
    ColumnSpec("weights", "B T", REAL, "loss_weights", "share of the token in the loss of its minibatch",
               read_by=_only("policy_update", "critic_update")),
    ColumnSpec("row_weights", "B", REAL, "loss_weights", "share of the row in a mean over its minibatch",
               read_by=_only("critic_update")),
    ColumnSpec("likelihood_weights", "B T", REAL, "loss_weights",
               "share of the token in the likelihood of the answers with a reward above 0",
               read_by=_only("policy_update")),

    # Written in the update, from the model that is trained.
    ColumnSpec("minibatch_mask", "B T", FLAG, "update",
               "the mask; a policy loss that reads it gets all rows of an optimizer update in one call",
               read_by=_only("policy_loss")),
    ColumnSpec("logprobs", "B T", LOGPROB, "update",
               "logprobs of the policy in the update, with gradient; a correction gets them without",
               read_by=_only("policy_loss", "correction", "kl")),
    ColumnSpec("top_logprobs", "B T k", LOGPROB, "update",
               "logprobs of the policy in the update for the teacher's k most likely tokens, with gradient",
               read_by=_only("policy_loss"), requires=("teacher_top_ids",)),
    ColumnSpec("new_values", "B T", REAL, "update", "values of the critic in the update, with gradient",
               read_by=_only("value_loss")),
    ColumnSpec("loss_gradients", "B T", REAL, "update",
               "gradient of the loss of a whole minibatch with respect to the logprobs",
               read_by=_only("policy_update")),
    ColumnSpec("weighted_losses", "B T", REAL, "update",
               "loss of each token of a whole minibatch, times its weight", read_by=_only("policy_update")),

    # Pairs of a chosen and a rejected answer; logprobs are sums over the tokens of the answer.
    ColumnSpec("chosen_logprobs", "P", LOGPROB, "update", "logprob of the chosen answer, with gradient",
               read_by=_only("preference_loss")),
    ColumnSpec("rejected_logprobs", "P", LOGPROB, "update", "logprob of the rejected answer, with gradient",
               read_by=_only("preference_loss")),
    ColumnSpec("chosen_ref_logprobs", "P", LOGPROB, "reference", "the same under the reference policy",
               read_by=_only("preference_loss")),
    ColumnSpec("rejected_ref_logprobs", "P", LOGPROB, "reference", "the same under the reference policy",
               read_by=_only("preference_loss")),
    ColumnSpec("chosen_tokens", "P", COUNT, "sampler", "number of tokens of the chosen answer",
               read_by=_only("preference_loss", "reward_loss")),
    ColumnSpec("rejected_tokens", "P", COUNT, "sampler", "number of tokens of the rejected answer",
               read_by=_only("preference_loss", "reward_loss")),
    ColumnSpec("chosen_rewards", "P", REAL, "update", "reward of the chosen answer, with gradient",
               read_by=_only("reward_loss")),
    ColumnSpec("rejected_rewards", "P", REAL, "update", "reward of the rejected answer, with gradient",
               read_by=_only("reward_loss")),
)
# fmt: on

COLUMNS: dict[str, ColumnSpec] = {spec.name: spec for spec in _ROWS}


def written_by(*writers: Writer) -> set[str]:
    """Names of the columns that these writers compute."""
    return {name for name, spec in COLUMNS.items() if spec.writer in writers}


def readable_by(*readers: Reader) -> tuple[str, ...]:
    """Names of the columns that one of these readers may read, in the order of the table."""
    return tuple(name for name, spec in COLUMNS.items() if spec.read_by & set(readers))


def with_required(names: Iterable[str]) -> frozenset[str]:
    """These columns and those that they require."""
    known = frozenset(names)
    return known.union(*(COLUMNS[name].requires for name in known if name in COLUMNS))
