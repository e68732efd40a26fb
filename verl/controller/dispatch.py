"""Dispatch of a worker's method: arguments split over ranks, results joined; no processes, no Ray.

A layout assigns to each rank a part of the work, and marks the ranks whose results count. The six transfer
protocols of HybridFlow (https://arxiv.org/abs/2409.19256, table 3) are layouts with a split and a join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.data.packing import BatchPlan

Arguments = tuple[Any, ...]
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class DispatchRank:
    """Role of one rank in a layout.

    Attributes:
        data_rank: index of the part of the work that it takes.
        collects: its result is the result of the part.
    """

    data_rank: int
    collects: bool


@dataclass(frozen=True)
class DispatchLayout:
    """Parts of the work of a group's ranks.

    Ranks with the same part compute it together (tensor, pipeline or sequence parallel).

    Attributes:
        ranks: in the order of the group.
    """

    ranks: tuple[DispatchRank, ...]

    def __post_init__(self) -> None:
        parts = {rank.data_rank for rank in self.ranks}
        counted = sorted(rank.data_rank for rank in self.ranks if rank.collects)
        if parts != set(range(len(parts))) or counted != sorted(set(counted)) or not counted:
            raise ValueError(
                f"need parts numbered from 0 and the results of at most one rank of each, got {self.ranks}"
            )

    @property
    def num_parts(self) -> int:
        """Number of parts that arguments are split into."""
        return 1 + max(rank.data_rank for rank in self.ranks)

    @property
    def collectors(self) -> list[int]:
        """Ranks whose results count, ordered by part."""
        collectors = [rank for rank, own in enumerate(self.ranks) if own.collects]
        return sorted(collectors, key=lambda rank: self.ranks[rank].data_rank)


def layout_of_ranks(ranks: Iterable[tuple[int, bool]]) -> DispatchLayout:
    """Layout from (data_rank, collects) of each rank."""
    return DispatchLayout(tuple(DispatchRank(*rank) for rank in ranks))


def layouts_3d(*, pipeline: int, tensor: int, data: int, micro_data: int = 1) -> dict[str, DispatchLayout]:
    """Layouts of a group of pipeline x tensor x data ranks, rank = (d * pipeline + p) * tensor + t.

    `ranks`: every rank has a part and collects. `train`: the ranks of a model replica share a part, the last
    stage's first tensor rank collects. `generate`: each model replica is divided into `micro_data` groups of
    consecutive ranks, and the first rank of each group collects. `stages`: the ranks of a pipeline stage
    share a part, and the first one collects.

    Raises:
        ValueError: a size below 1, or `micro_data` does not divide a replica.
    """
    replica = pipeline * tensor
    if min(pipeline, tensor, data, micro_data) < 1 or replica % micro_data:
        given = f"pipeline={pipeline}, tensor={tensor}, data={data}, micro_data={micro_data}"
        raise ValueError(f"need sizes from 1, and pipeline * tensor divisible by micro_data, got {given}")
    grid = [(d, p, t) for d in range(data) for p in range(pipeline) for t in range(tensor)]
    share = replica // micro_data
    return {
        "ranks": layout_of_ranks((rank, True) for rank in range(len(grid))),
        "train": layout_of_ranks((d, p == pipeline - 1 and t == 0) for d, p, t in grid),
        "generate": layout_of_ranks((rank // share, rank % share == 0) for rank in range(len(grid))),
        "stages": layout_of_ranks((p, d == 0 and t == 0) for d, p, t in grid),
    }


@dataclass(frozen=True)
class DispatchMode:
    """Split and join of a call on a group.

    Attributes:
        layout: name of one of the layouts of the group's workers.
        split: (arguments, number of parts) -> arguments of each part.
        join: (results of the parts in order, arguments of the call) -> result of the call.
    """

    layout: str
    split: Callable[[Arguments, int], list[Arguments]]
    join: Callable[[Sequence[Any], Arguments], Any]


def register(mode: DispatchMode) -> Callable[[Method], Method]:
    """Decorator that declares the dispatch mode of a worker's method."""

    def mark(method: Method) -> Method:
        method.dispatch_mode = mode  # type: ignore[attr-defined]
        return method

    return mark


def dispatch_mode(method: Callable[..., Any]) -> DispatchMode:
    """Dispatch mode that `register` declared for a method.

    Raises:
        ValueError: the method is not registered.
    """
    mode = vars(method).get("dispatch_mode")
    if not isinstance(mode, DispatchMode):
        raise ValueError(
            f"{method.__qualname__} does not say how its arguments are split; decorate it with @register(...)"
        )
    return mode


def broadcast(arguments: Arguments, num_parts: int) -> list[Arguments]:
    """The same arguments for every part."""
    return [arguments] * num_parts


def split_lists(arguments: Arguments, num_parts: int) -> list[Arguments]:
    """Entry `i` of each argument for part `i`; every argument is a list with one entry for each part.

    Raises:
        ValueError: an argument has more or fewer entries.
    """
    if any(len(argument) != num_parts for argument in arguments):
        raise ValueError(
            f"need {num_parts} entries in each argument, one for each rank, got {[len(a) for a in arguments]}"
        )
    return [tuple(argument[part] for argument in arguments) for part in range(num_parts)]


def split_evenly(arguments: Arguments, num_parts: int) -> list[Arguments]:
    """Batches, tensors and lists in consecutive parts, equal in size within 1; other values unsplit."""
    if num_parts == 1:
        return [arguments]
    split = [_even_parts(argument, num_parts) for argument in arguments]
    return [tuple(parts[i] for parts in split) for i in range(num_parts)]


def _even_parts(argument: Any, num_parts: int) -> list[Any]:
    if isinstance(argument, Tensor):
        # Clones: pickling a view for another process would include the whole tensor.
        return [part.clone() for part in argument.tensor_split(num_parts)]
    if isinstance(argument, Batch | list):
        length = argument.num_rows if isinstance(argument, Batch) else len(argument)
        ranges = [index.tolist() for index in torch.arange(length).tensor_split(num_parts)]
        return [
            argument.select(rows) if isinstance(argument, Batch) else [argument[row] for row in rows]
            for rows in ranges
        ]
    return [argument] * num_parts


def split_by_plan(arguments: Arguments, num_parts: int) -> list[Arguments]:
    """Rows of batches for each rank of the one plan among the arguments, and that rank's own plan.

    A part's batch has a further column `row_ids`, the numbers of its rows in the batch of the call.

    Raises:
        ValueError: no plan or several, or a plan for another number of ranks.
    """
    if num_parts == 1:
        return [arguments]
    plan = find_plan(arguments)
    if any(len(minibatch) != num_parts for minibatch in plan.minibatches):
        raise ValueError(
            f"need a plan for {num_parts} ranks, got one for "
            f"{[len(minibatch) for minibatch in plan.minibatches]}"
        )

    def part_of(argument: Any, rank: int) -> Any:
        if argument is plan:
            return plan.of_rank(rank)
        if not isinstance(argument, Batch):
            return argument
        rows = torch.tensor(plan.rows_of(rank), dtype=torch.int64)
        selected = argument.select(rows)
        selected.write("row_ids", rows)
        return selected

    return [tuple(part_of(argument, rank) for argument in arguments) for rank in range(num_parts)]


def find_plan(arguments: Arguments) -> BatchPlan:
    """The one plan among the arguments."""
    plans = [argument for argument in arguments if isinstance(argument, BatchPlan)]
    if len(plans) != 1:
        raise ValueError(f"need one plan among the arguments, got {len(plans)}")
    return plans[0]


def as_list(results: Sequence[Any], arguments: Arguments) -> list[Any]:
    """All results."""
    return list(results)


def first(results: Sequence[Any], arguments: Arguments) -> Any:
    """First result, for calls whose results are equal on all ranks."""
    return results[0]


def concat(results: Sequence[Any], arguments: Arguments) -> Any:
    """Results concatenated: batches, tensors, lists, or tuples of them.

    Raises:
        TypeError: results of another type.
    """
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], tuple):
        return tuple(concat(parts, arguments) for parts in zip(*results, strict=True))
    if isinstance(results[0], Batch):
        # Batches without rows add nothing, and may lack columns.
        return Batch.concat([result for result in results if result.num_rows] or [results[0]])
    if isinstance(results[0], Tensor):
        return torch.cat(list(results))
    if isinstance(results[0], list):
        return [entry for result in results for entry in result]
    raise TypeError(f"need batches, tensors or lists as results, got {type(results[0]).__name__}")


def in_plan_order(results: Sequence[Any], arguments: Arguments) -> Any:
    """Batches concatenated, with rows in the order that they had before the plan split them."""
    if len(results) == 1:
        return results[0]
    plan = find_plan(arguments)
    taken = torch.tensor(
        [row for part in range(len(results)) for row in plan.rows_of(part)], dtype=torch.int64
    )
    return concat(results, arguments).select(taken.argsort())


# The six protocols of the paper, table 3.
ONE_TO_ALL = DispatchMode("ranks", broadcast, as_list)
THREE_D_PROTO = DispatchMode("train", split_evenly, concat)
THREE_D_ALL_MICRO_DP = DispatchMode("generate", split_evenly, concat)
THREE_D_PP_ONLY = DispatchMode("stages", broadcast, as_list)
DP_PROTO = DispatchMode("ranks", split_evenly, concat)
ALL_TO_ALL = DispatchMode("ranks", split_lists, as_list)
# Beyond the paper: rows split by a plan, and calls whose results are equal on all ranks.
PLANNED = DispatchMode("train", split_by_plan, in_plan_order)
PLANNED_METRICS = DispatchMode("train", split_by_plan, first)
SAME_ON_ALL = DispatchMode("ranks", broadcast, first)

Layouts = Mapping[str, DispatchLayout]
