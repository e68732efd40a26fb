"""The minibatches of a plan: their rows, and the weight of each token and row in the loss."""

from __future__ import annotations

import torch

from verl.algorithms.objective import Algorithm
from verl.data.batch import Batch
from verl.data.packing import BatchPlan


def plan_rows(plan: BatchPlan) -> list[list[int]]:
    """All micro-batches of a one-rank plan, minibatch after minibatch."""
    return [rows for minibatch in plan.minibatches for rows in minibatch[0]]


def write_loss_weights(batch: Batch, plan: BatchPlan, algorithm: Algorithm) -> None:
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


def skip_zero_advantages(batch: Batch, plan: BatchPlan) -> tuple[BatchPlan, dict[str, float]]:
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
