"""Workers that need no model, for tests of groups on other processes."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from verl.controller.dispatch import (
    ALL_TO_ALL,
    DP_PROTO,
    ONE_TO_ALL,
    PLANNED,
    PLANNED_METRICS,
    SAME_ON_ALL,
    THREE_D_ALL_MICRO_DP,
    THREE_D_PP_ONLY,
    THREE_D_PROTO,
    layouts_3d,
    register,
)
from verl.controller.worker_group import Worker
from verl.data.batch import Batch, Ragged
from verl.data.packing import BatchPlan


class Echo(Worker):
    """Says which rank it is and what it was given."""

    def __init__(self, sizes: dict[str, int] | None = None) -> None:
        layouts = layouts_3d(**(sizes or {"pipeline": 1, "tensor": 1, "data": dist.get_world_size()}))
        self.rank = dist.get_rank()
        self.dispatch_ranks = {name: layout.ranks[self.rank] for name, layout in layouts.items()}

    @register(ONE_TO_ALL)
    def one_to_all(self, value: Any) -> Any:
        return self.rank, value

    @register(ALL_TO_ALL)
    def all_to_all(self, value: Any) -> Any:
        return self.rank, value

    @register(DP_PROTO)
    def data(self, values: list[int]) -> list[Any]:
        return [(self.rank, value) for value in values]

    @register(THREE_D_PROTO)
    def three_d(self, values: list[int]) -> list[Any]:
        return [(self.rank, value) for value in values]

    @register(THREE_D_ALL_MICRO_DP)
    def micro(self, values: list[int]) -> list[Any]:
        return [(self.rank, value) for value in values]

    @register(THREE_D_PP_ONLY)
    def stages(self, value: Any) -> Any:
        return self.rank, value

    @register(SAME_ON_ALL)
    def process(self) -> int:
        return os.getpid()

    @register(ONE_TO_ALL)
    def where(self) -> tuple[int, int]:
        return os.getpid(), int(os.environ.get("OMP_NUM_THREADS", 0))

    @register(ONE_TO_ALL)
    def total(self, value: float) -> float:
        together = torch.tensor(value * (self.rank + 1))
        dist.all_reduce(together)
        return float(together)

    @register(ONE_TO_ALL)
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    @register(ONE_TO_ALL)
    def fail(self, rank: int) -> None:
        """One rank raises, the others wait for it."""
        print(f"about to fail on {rank}")
        if self.rank == rank:
            raise KeyError("a bug of rank")
        dist.barrier()

    @register(ONE_TO_ALL)
    def miss(self, rank: int) -> None:
        """One rank does not join a collective of the others."""
        if self.rank == rank:
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))

    @register(DP_PROTO)
    def answer(self, lengths: list[int]) -> tuple[list[int], Batch]:
        """Rows of tokens of these lengths, of which the controller hears only the lengths."""
        rows = [[100 * self.rank + length] * length for length in lengths]
        return lengths, Batch({"response_ids": Ragged.from_rows(rows, torch.int64)})

    @register(PLANNED)
    def write(self, batch: Batch, plan: BatchPlan) -> Batch:
        """Each row doubled, as a column."""
        ids = batch.ragged("response_ids")
        return Batch(
            {
                "doubled": Ragged(2.0 * ids.values, ids.lengths),
                "rank": torch.full((batch.num_rows,), self.rank),
            }
        )

    @register(PLANNED_METRICS)
    def update(self, batch: Batch, plan: BatchPlan) -> dict[str, float]:
        total = torch.tensor(float(batch.ragged("doubled").values.sum()))
        dist.all_reduce(total)
        return {"total": float(total)}


def refuses(reason: str) -> Worker:
    """A factory that cannot use what it is given."""
    raise ValueError(reason)
