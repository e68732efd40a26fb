"""How the arguments of a worker's method are split over ranks and its results joined; pure, it knows neither
processes nor Ray.

The n-dimensional form: a layout says which part of the work each rank takes, and whose results count. The six
transfer protocols of HybridFlow (https://arxiv.org/abs/2409.19256, table 3) are presets of it.
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
    """Where one rank stands in a layout: the part of the work that it takes, and whether its result counts."""

    data_rank: int
    collects: bool


@dataclass(frozen=True)
class DispatchLayout:
    """Which part of the work each rank of a group takes, and whose results count.

    Ranks with the same part compute it together (tensor, pipeline or sequence parallel).

    Attributes:
        ranks: one per rank.
    """

    ranks: tuple[DispatchRank, ...]

    def __post_init__(self) -> None:
        parts = {place.data_rank for place in self.ranks}
        counted = sorted(place.data_rank for place in self.ranks if place.collects)
        if parts != set(range(len(parts))) or counted != sorted(set(counted)) or not counted:
            raise ValueError(
                f"need parts numbered from 0 and the results of at most one rank of each, got {self.ranks}"
            )

    @property
    def num_parts(self) -> int:
        """Parts that arguments are split into."""
        return 1 + max(place.data_rank for place in self.ranks)

    @property
    def collectors(self) -> list[int]:
        """Ranks whose results count, in the order of their parts."""
        ranks = [rank for rank, place in enumerate(self.ranks) if place.collects]
        return sorted(ranks, key=lambda rank: self.ranks[rank].data_rank)


def layout_of_ranks(places: Iterable[tuple[int, bool]]) -> DispatchLayout:
    """A layout from (part, collects) of each rank."""
    return DispatchLayout(tuple(DispatchRank(*place) for place in places))


def layouts_3d(*, pipeline: int, tensor: int, data: int, micro_data: int = 1) -> dict[str, DispatchLayout]:
    """The layouts of a group of pipeline x tensor x data ranks, rank = (d * pipeline + p) * tensor + t.

    `ranks`: every rank for itself. `train`: the ranks of a model replica take one part, the last stage's
    first tensor rank answers. `generate`: every model replica is divided into `micro_data` groups of
    consecutive ranks for generation, and the first rank of each answers. `stages`: the first rank of each
    pipeline stage answers.

    Raises:
        ValueError: a size below 1, or a replica that cannot be divided so.
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
    """How a method is called on a group.

    Attributes:
        layout: name of the layout, one of those that the workers of the group have.
        split: arguments and number of parts to the arguments of each part.
        join: results of the parts, in order, and the arguments of the call, to its result.
    """

    layout: str
    split: Callable[[Arguments, int], list[Arguments]]
    join: Callable[[Sequence[Any], Arguments], Any]


def register(mode: DispatchMode) -> Callable[[Method], Method]:
    """Declares how a method of a worker is called on a group."""

    def mark(method: Method) -> Method:
        method.dispatch_mode = mode  # type: ignore[attr-defined]
        return method

    return mark


def dispatch_mode(method: Callable[..., Any]) -> DispatchMode:
    """What `register` declared.

    Raises:
        ValueError: nothing was.
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
    """Every argument is a list with an entry for each part.

    Raises:
        ValueError: it has more or fewer.
    """
    if any(len(argument) != num_parts for argument in arguments):
        raise ValueError(
            f"need {num_parts} entries in each argument, one for each rank, got {[len(a) for a in arguments]}"
        )
    return [tuple(argument[part] for argument in arguments) for part in range(num_parts)]


def split_evenly(arguments: Arguments, num_parts: int) -> list[Arguments]:
    """Batches, tensors and lists in consecutive parts whose sizes differ by at most one; everything else
    whole.
    """
    if num_parts == 1:
        return [arguments]
    split = [_even_parts(argument, num_parts) for argument in arguments]
    return [tuple(parts[i] for parts in split) for i in range(num_parts)]


def _even_parts(argument: Any, num_parts: int) -> list[Any]:
    if isinstance(argument, Tensor):
        # Not views: one that is sent to another process takes the whole tensor along.
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
    """Batches are split as the one plan among the arguments says; each part gets its rows, with `row_ids`,
    and its own plan.

    Raises:
        ValueError: not one plan, or one for another number of ranks.
    """
    if num_parts == 1:
        return [arguments]
    plan = find_plan(arguments)
    if any(len(minibatch) != num_parts for minibatch in plan.minibatches):
        raise ValueError(
            f"need a plan for {num_parts} ranks, got one for {[len(minibatch) for minibatch in plan.minibatches]}"
        )
    return [tuple(_planned_part(argument, plan, part) for argument in arguments) for part in range(num_parts)]


def _planned_part(argument: Any, plan: BatchPlan, part: int) -> Any:
    if argument is plan:
        return plan.of_rank(part)
    if not isinstance(argument, Batch):
        return argument
    rows = torch.tensor(plan.rows_of(part), dtype=torch.int64)
    selected = argument.select(rows)
    selected.write("row_ids", rows)
    return selected


def find_plan(arguments: Arguments) -> BatchPlan:
    """The one plan among the arguments."""
    plans = [argument for argument in arguments if isinstance(argument, BatchPlan)]
    if len(plans) != 1:
        raise ValueError(f"need one plan among the arguments, got {len(plans)}")
    return plans[0]


def as_list(results: Sequence[Any], arguments: Arguments) -> list[Any]:
    """Every result."""
    return list(results)


def first(results: Sequence[Any], arguments: Arguments) -> Any:
    """The first result, where all are the same."""
    return results[0]


def concat(results: Sequence[Any], arguments: Arguments) -> Any:
    """Results end to end: batches, tensors, lists, or tuples of them.

    Raises:
        TypeError: they are something else.
    """
    if len(results) == 1:
        return results[0]
    if isinstance(results[0], tuple):
        return tuple(concat(parts, arguments) for parts in zip(*results, strict=True))
    if isinstance(results[0], Batch):
        return Batch.concat([result for result in results if result.num_rows] or [results[0]])
    if isinstance(results[0], Tensor):
        return torch.cat(list(results))
    if isinstance(results[0], list):
        return [entry for result in results for entry in result]
    raise TypeError(f"need batches, tensors or lists as results, got {type(results[0]).__name__}")


def in_plan_order(results: Sequence[Any], arguments: Arguments) -> Any:
    """Batches end to end, their rows where the plan took them from."""
    if len(results) == 1:
        return results[0]
    plan = find_plan(arguments)
    taken = torch.tensor(
        [row for part in range(len(results)) for row in plan.rows_of(part)], dtype=torch.int64
    )
    return concat(results, arguments).select(taken.argsort())


# The six protocols of the paper.
ONE_TO_ALL = DispatchMode("ranks", broadcast, as_list)
THREE_D_PROTO = DispatchMode("train", split_evenly, concat)
THREE_D_ALL_MICRO_DP = DispatchMode("generate", split_evenly, concat)
THREE_D_PP_ONLY = DispatchMode("stages", broadcast, as_list)
DP_PROTO = DispatchMode("ranks", split_evenly, concat)
ALL_TO_ALL = DispatchMode("ranks", split_lists, as_list)
# Ours: rows where a plan says, and calls whose results are the same on all ranks.
PLANNED = DispatchMode("train", split_by_plan, in_plan_order)
PLANNED_METRICS = DispatchMode("train", split_by_plan, first)
SAME_ON_ALL = DispatchMode("ranks", broadcast, first)

Layouts = Mapping[str, DispatchLayout]
