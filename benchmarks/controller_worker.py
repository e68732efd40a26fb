"""Worker without a model for the benchmark of the controller: makes, increments and sums rows of tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist

from verl.controller.dispatch import ALL_TO_ALL, DP_PROTO, PLANNED, PLANNED_METRICS, layouts_3d, register
from verl.controller.worker_group import Worker
from verl.data.batch import Batch, Ragged
from verl.data.packing import BatchPlan

TOKENS = 64


class ModelFreeWorker(Worker):
    """Makes rows, writes a column over their tokens, and reads all columns."""

    def __init__(self) -> None:
        layouts = layouts_3d(pipeline=1, tensor=1, data=dist.get_world_size())
        self.rank = dist.get_rank()
        self.dispatch_ranks = {name: layout.ranks[self.rank] for name, layout in layouts.items()}
        self._rows: Batch | None = None

    def _make_rows(self, num_rows: int) -> tuple[torch.Tensor, Batch]:
        """Rewards and responses of 32 to 96 tokens."""
        generator = torch.Generator().manual_seed(self.rank)
        lengths = torch.randint(TOKENS // 2, 3 * TOKENS // 2, (num_rows,), generator=generator)
        num_tokens = int(lengths.sum())
        ids = torch.randint(0, 1000, (num_tokens,), generator=generator)
        columns = {
            "response_ids": Ragged(ids, lengths),
            "rollout_logprobs": Ragged(torch.rand(num_tokens, generator=generator), lengths),
        }
        return torch.rand(num_rows, generator=generator), Batch(columns)

    @register(DP_PROTO)
    def generate(self, counts: list[int]) -> tuple[torch.Tensor, Batch]:
        """Responses whose tokens stay on this rank."""
        return self._make_rows(sum(counts))

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """Column over the tokens."""
        logprobs = batch.ragged("rollout_logprobs")
        return Batch({"ref_logprobs": Ragged(logprobs.values + 1, logprobs.lengths)})

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan) -> dict[str, float]:
        """Sum of all columns."""
        total = (
            batch.ragged("response_ids").values.sum()
            + batch.ragged("ref_logprobs").values.sum()
            + batch["advantages"].sum()
        )
        return {"total": float(total)}

    @register(DP_PROTO)
    def generate_all(self, counts: list[int]) -> list[tuple[torch.Tensor, ...]]:
        """Responses as plain tensors, which all travel to the driver."""
        rewards, batch = self._make_rows(sum(counts))
        ids, logprobs = batch.ragged("response_ids"), batch.ragged("rollout_logprobs")
        return [(rewards, ids.values, ids.lengths, logprobs.values)]

    @register(ALL_TO_ALL)
    def write_all(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Column over the tokens, as a plain tensor."""
        return logprobs + 1

    @register(ALL_TO_ALL)
    def update_all(self, ids: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor) -> float:
        """Sum of all columns."""
        return float(ids.sum() + logprobs.sum() + advantages.sum())
