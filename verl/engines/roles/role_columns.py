"""Columns that the roles read from a batch, and columns over the response tokens that they write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from verl.algorithms.objective import Algorithm
from verl.data.batch import Batch, ModelInput, Ragged, present_mask
from verl.data.columns import readable_by
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine
from verl.engines.hf.models import PolicyModel
from verl.engines.minibatches import plan_rows

# Columns that every model needs to run on rows.
MODEL_COLUMNS = readable_by("model")


def policy_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of the policy reads besides `MODEL_COLUMNS`, if the batch has them."""
    functions = [algorithm.policy_loss]
    if algorithm.kl and not algorithm.kl_in_reward:
        functions.append(algorithm.kl)
    if algorithm.corrects_in_update:
        functions.append(algorithm.correction)
    read = {column for function in functions for column in function.columns}
    return {*read, *readable_by("policy_update")} - {"logprobs"}


def critic_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of a critic or process reward model reads besides `MODEL_COLUMNS`."""
    return {*algorithm.value_loss.columns, *readable_by("critic_update")} - {"new_values", "prm_logprobs"}


def read_columns(batch: Batch, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The mask and the named columns that the batch has, padded, on the device."""
    return {name: batch[name].to(device) for name in (*names, "mask") if name in batch}


def concat_by_row_id(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns [b, T, ...] of several ranks as one, padded to the longest row, ordered by `row_ids` [b]."""
    parts = [part for part in parts if len(part["row_ids"])]
    order = torch.cat([part["row_ids"] for part in parts]).argsort()

    def concat(columns: Sequence[Tensor]) -> Tensor:
        if columns[0].ndim == 1:
            return torch.cat(list(columns))[order]
        width = max(column.shape[1] for column in columns)
        padded = [column.new_zeros(len(column), width, *column.shape[2:]) for column in columns]
        for target, column in zip(padded, columns, strict=True):
            target[:, : column.shape[1]] = column
        return torch.cat(padded)[order]

    return {name: concat([part[name] for part in parts]) for name in parts[0]}


def pad_response(values: Tensor, inputs: ModelInput) -> Tensor:
    """[b, T, ...] from [M, ...] response tokens; keeps the gradient."""
    return Ragged(values, inputs.response_lengths.to(values.device)).padded()


def response_columns(batch: Batch, columns: dict[str, Tensor]) -> Batch:
    """A batch of the same rows with the columns [B, T, ...] over their response tokens."""
    present = present_mask(batch.response_lengths)
    return Batch({name: Ragged(column[present], batch.response_lengths) for name, column in columns.items()})


def stacked_columns(written: Tensor, batch: Batch, count: int) -> Tensor:
    """[B, T, count] values that an engine inferred; it cannot know the count on a rank without rows."""
    return written if batch.num_rows else written.new_zeros(0, 0, count)


def policy_logprobs(
    engine: ForwardEngine, batch: Batch, plan: BatchPlan, *, temperature: float, chunk: int | None
) -> Tensor:
    """[B, T] fp32 logprobs of the response tokens under the engine's language model."""
    model = engine.model
    assert isinstance(model, PolicyModel)
    return engine.infer(
        batch,
        plan_rows(plan),
        lambda inputs: model.token_logprobs(inputs, temperature=temperature, chunk=chunk)[0],
    )
