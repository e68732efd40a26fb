"""Columns that the roles read, and columns over the response tokens that they write."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from verl.algorithms.objective import Algorithm
from verl.data.batch import Batch, ModelInput, Ragged, present_mask
from verl.data.columns import readable_by
from verl.data.packing import BatchPlan
from verl.engines.base import ForwardEngine
from verl.engines.hf.models import PolicyModel
from verl.engines.roles.loss_weights import plan_rows

# Columns that every model needs to run on rows.
MODEL_COLUMNS = readable_by("model")


def policy_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of the policy reads from the batch, besides `MODEL_COLUMNS`, if they are there."""
    functions = [algorithm.policy_loss]
    if algorithm.kl and not algorithm.kl_in_reward:
        functions.append(algorithm.kl)
    if algorithm.corrects_in_update:
        functions.append(algorithm.correction)
    read = {column for function in functions for column in function.columns}
    return {*read, *readable_by("policy_update")} - {"logprobs"}


def critic_reads(algorithm: Algorithm) -> set[str]:
    """Columns that the update of a critic or process reward model reads from the batch, besides `MODEL_COLUMNS`."""
    return {*algorithm.value_loss.columns, *readable_by("critic_update")} - {"new_values", "prm_logprobs"}


def read_columns(batch: Batch, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The named columns that the batch has, with the mask, padded, on the device."""
    return {name: batch[name].to(device) for name in (*names, "mask") if name in batch}


def pad_response(values: Tensor, inputs: ModelInput) -> Tensor:
    """[b, T, ...] from [M, ...] response tokens; keeps the gradient."""
    return Ragged(values, inputs.response_lengths.to(values.device)).padded()


def stacked_columns(written: Tensor, batch: Batch, count: int) -> Tensor:
    """[B, T, count] values of tokens that an engine wrote; of a rank without rows it cannot know how many of
    each.
    """
    return written if batch.num_rows else written.new_zeros(0, 0, count)


def response_columns(batch: Batch, columns: dict[str, Tensor]) -> Batch:
    """A batch of the same rows with the columns [B, T, ...] over their response tokens."""
    present = present_mask(batch.response_lengths)
    return Batch({name: Ragged(column[present], batch.response_lengths) for name, column in columns.items()})


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
