"""The updates of a step over an engine, and its sums of monitors as means over tokens; whose loss it is is
left to the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from verl.data.batch import Batch, ModelInput
from verl.data.packing import BatchPlan
from verl.engines.base import MAX_SUFFIX, Objective, TrainEngine

MicroBatches = Sequence[Sequence[int]]
# Monitor that counts the sampled tokens of a minibatch on all ranks.
_TOKENS = "sampled_tokens"


def run_updates(
    engine: TrainEngine,
    batch: Batch,
    plan: BatchPlan,
    objective: Objective,
    epochs: int,
    before: Callable[[Batch, MicroBatches], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Every update of a step; sums of monitors become means over the sampled tokens of their minibatch.

    `before` each update may add columns to the batch, and returns sums of monitors.
    """
    with_count, results = counted(objective), []
    for _ in range(epochs):
        for minibatch in plan.minibatches:
            sums = before(batch, minibatch[0]) if before else {}
            update = engine.update(batch, minibatch[0], with_count)
            if "loss" in update:  # else it was not finite, and neither are the monitors of it
                update = sums | update
            results.append(per_token(update))
    return results


def counted(objective: Objective) -> Objective:
    """The objective with a monitor that counts sampled tokens."""

    def with_count(rows: Batch, inputs: ModelInput) -> tuple[Tensor, dict[str, Tensor]]:
        loss, monitors = objective(rows, inputs)
        return loss, monitors | {_TOKENS: rows["mask"].sum().to(loss.device)}

    return with_count


def per_token(update: dict[str, float]) -> dict[str, float]:
    """What an engine returns of a counted objective, with means over tokens in place of the sums of monitors."""
    count, own = max(1, update.pop(_TOKENS, 0)), ("loss", "grad_norm", "lr", "skipped_updates")
    is_mean = {name: name not in own and not name.endswith(MAX_SUFFIX) for name in update}
    return {name: value / count if is_mean[name] else value for name, value in update.items()}


def mean_over(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the updates that have it; skipped updates are summed."""
    names = {name: None for update in updates for name in update}
    metrics = {name: _mean_of([u[name] for u in updates if name in u]) for name in names}
    metrics["skipped_updates"] = sum(u["skipped_updates"] for u in updates)
    return metrics


def _mean_of(values: list[float]) -> float:
    return sum(values) / len(values)
