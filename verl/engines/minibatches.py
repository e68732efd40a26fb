"""Minibatches of a step: their rows, the loss weights of tokens, the updates, and means of monitors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from verl.algorithms.mismatch import FRESH_TOKENS, OVER_FRESH_TOKENS
from verl.algorithms.objective import Algorithm
from verl.data.batch import Batch, ModelInput
from verl.data.episode_rows import EpisodeRows
from verl.data.packing import BatchPlan
from verl.engines.base import MAX_SUFFIX, Objective, TrainEngine

MicroBatches = Sequence[Sequence[int]]
# Monitor that counts the sampled tokens of a minibatch on all ranks.
_TOKENS = "sampled_tokens"
# Metrics of a whole update, which no row has by itself.
_OF_UPDATE = ("loss", "grad_norm", "lr", "skipped_updates")


def plan_rows(plan: BatchPlan) -> list[list[int]]:
    """All micro-batches of a one-rank plan, minibatch after minibatch."""
    return [rows for minibatch in plan.minibatches for rows in minibatch[0]]


def write_loss_weights(batch: Batch, plan: BatchPlan, algorithm: Algorithm) -> None:
    """Write the weight of each token and row in the loss of its minibatch.

    The columns are `weights` [B, T] of the aggregation, `row_weights` [B] of the mean over rows and, if the
    algorithm has a likelihood term, `likelihood_weights` [B, T] of the aggregation over the answers with a
    reward above 0. They are made before the minibatch is split, so the loss does not depend on ranks and
    micro-batches. They count episodes: the segments of one share its weight.
    """
    rows = EpisodeRows(batch, ("mask", "group_ids", "rewards"))
    episodes = rows.episodes
    mask, group_ids = episodes["mask"], episodes["group_ids"]
    weights, likelihood_weights = torch.zeros(mask.shape), torch.zeros(mask.shape)
    row_weights = torch.zeros(episodes.num_rows)
    for minibatch in range(len(plan.minibatches)):
        own = rows.episode_of[plan.rows_of_minibatch(minibatch)].unique()
        has_tokens = mask[own].any(1)
        weights[own] = algorithm.aggregation({"mask": mask[own], "group_ids": group_ids[own]})
        row_weights[own] = has_tokens / has_tokens.sum().clamp(min=1)
        if algorithm.likelihood_coef:
            good = mask[own] & (episodes["rewards"][own] > 0)[:, None]
            likelihood_weights[own] = algorithm.aggregation({"mask": good, "group_ids": group_ids[own]})
    num_segments = rows.joined(torch.ones(batch.num_rows))
    episodes.write("weights", weights)
    episodes.write("row_weights", row_weights / num_segments)
    if algorithm.likelihood_coef:
        episodes.write("likelihood_weights", likelihood_weights)
    rows.write_back()


def skip_zero_advantages(batch: Batch, plan: BatchPlan) -> tuple[BatchPlan, dict[str, float]]:
    """The plan without the rows whose advantages are all 0, since their gradient is 0; and their share.

    If all rows of a minibatch have advantages of 0 the shortest row stays: the optimizer must see a gradient
    of 0, which moves its averages.
    """
    has_signal = (batch["advantages"] != 0).any(1).tolist()
    lengths = batch.num_tokens.tolist()

    def kept(minibatch: int) -> list[list[list[int]]]:
        rows = plan.rows_of_minibatch(minibatch)
        shortest = min(rows, key=lambda row: lengths[row])
        stays = {row for row in rows if has_signal[row]} or {shortest}
        return [
            [[row for row in micro if row in stays] for micro in micro_batches]
            for micro_batches in plan.minibatches[minibatch]
        ]

    short = BatchPlan([kept(minibatch) for minibatch in range(len(plan.minibatches))])
    num_kept = sum(len(short.rows_of_minibatch(minibatch)) for minibatch in range(len(short.minibatches)))
    return short, {"skipped_rows_share": 1 - num_kept / batch.num_rows}


def run_updates(
    engine: TrainEngine,
    batch: Batch,
    plan: BatchPlan,
    objective: Objective,
    *,
    epochs: int,
    prepare: Callable[[Batch, MicroBatches], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Make every update of a step; return the metrics of each, with monitors as means over sampled tokens.

    Args:
        engine: trains the model.
        batch: rows of this rank.
        plan: a one-rank plan.
        objective: the loss of some rows.
        epochs: passes over the rows.
        prepare: called before each update; may add columns to the batch, and returns sums of monitors.
    """
    objective, results = count_tokens(objective), []
    for _ in range(epochs):
        for minibatch in plan.minibatches:
            sums = prepare(batch, minibatch[0]) if prepare else {}
            update = engine.update(batch, minibatch[0], objective)
            if "loss" in update:
                # Else the loss was not finite, and neither are these monitors.
                update = sums | update
            results.append(per_token_means(update))
    return results


def count_tokens(objective: Objective) -> Objective:
    """The objective with one more monitor, which counts sampled tokens for `per_token_means`."""

    def with_count(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss, monitors = objective(rows, inputs)
        return loss, monitors | {_TOKENS: rows["mask"].sum().to(loss.device)}

    return with_count


def per_token_means(update: dict[str, float]) -> dict[str, float]:
    """Metrics of an update of a `count_tokens` objective, with sums of monitors as means over tokens."""
    count = max(1, update.pop(_TOKENS, 0))
    means = {
        name: value if name in _OF_UPDATE or name.endswith(MAX_SUFFIX) else value / count
        for name, value in update.items()
    }
    share = means.pop(FRESH_TOKENS, None)
    if share is None:
        return means
    for name in OVER_FRESH_TOKENS:
        if share:
            means[name] /= share
        else:
            means = {key: value for key, value in means.items() if not key.startswith(name)}
    if share == 1:
        del means["kl_off_policy"]  # all tokens are fresh: it is `kl_sampler`
    return means


def named_as_learned(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an update without its skipped rows: `learned/NAME` for all that are means over rows."""
    return {name if name in _OF_UPDATE else f"learned/{name}": value for name, value in metrics.items()}


def mean_over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the updates that have it; skipped updates are summed."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            values.setdefault(name, []).append(value)
    metrics = {name: sum(found) / len(found) for name, found in values.items()}
    metrics["skipped_updates"] = sum(update["skipped_updates"] for update in updates)
    return metrics
