"""The command `verl plan reshard`: cost of the change from training to generation, without a device."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from verl.monitoring.formatting import format_bytes
from verl.planner.architectures import Architecture, named_architecture
from verl.planner.model_layouts import generation_layout, training_layout
from verl.planner.traffic import ReshardCost, Traffic, gather_costs, plan_cost, received_share, traffic
from verl.weight_sync.layout import ShardLayout
from verl.weight_sync.meshes import Mesh, generation_groups
from verl.weight_sync.reshard_plan import Copy, make_plan

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Names of sizes on the command line, and of the same sizes in `Mesh`.
_TRAINING = {
    "tensor": "tensor",
    "pipeline": "pipeline",
    "data": "replicas",
    "fsdp": "shards",
    "sequence": "sequence",
    "experts": "experts",
}
_GENERATION = ("tensor", "pipeline", "experts")


@dataclass(frozen=True)
class ReshardQuery:
    """A change of layout to be planned.

    Attributes:
        model: whose weights.
        mesh: sizes of training.
        weight_format: of training, a key of `verl.planner.model_layouts.WEIGHT_FORMATS`.
        tensor: tensor parallel size of generation.
        pipeline: stages of generation.
        has_split_experts: in generation, experts are split as other matrices.
        grouping: a key of `verl.weight_sync.meshes.GROUPINGS`.
        itemsize: bytes per weight.
        ranks_per_node: of consecutive ranks.
        bucket_bytes: largest size of a bucket for one receiver.
    """

    model: Architecture
    mesh: Mesh
    weight_format: str
    tensor: int
    pipeline: int
    has_split_experts: bool
    grouping: str
    itemsize: int
    ranks_per_node: int
    bucket_bytes: int

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights."""
        return self.model.num_elements * self.itemsize

    @property
    def plan_options(self) -> dict[str, int]:
        """Keyword arguments of `make_plan`, `traffic` and `gather_costs`."""
        return {
            "itemsize": self.itemsize,
            "bucket_bytes": self.bucket_bytes,
            "ranks_per_node": self.ranks_per_node,
        }

    def layouts(self, grouping: str | None = None) -> tuple[ShardLayout, ShardLayout]:
        """Layouts of training and of generation."""
        target = generation_layout(
            self.model,
            self.mesh,
            tensor=self.tensor,
            pipeline=self.pipeline,
            grouping=grouping or self.grouping,
            has_split_experts=self.has_split_experts,
        )
        return training_layout(self.model, self.mesh, weight_format=self.weight_format), target

    def costs(self) -> tuple[Traffic, list[ReshardCost]]:
        """Traffic of the plan, and the costs of the plan and of other methods."""
        source, target = self.layouts()
        moved = traffic(source, target, **self.plan_options)
        is_zero_redundancy = self.grouping == "zero-redundancy"
        share = (
            received_share(self.mesh, tensor=self.tensor, pipeline=self.pipeline)
            if is_zero_redundancy
            else None
        )
        costs = [plan_cost("this plan", moved, target, itemsize=self.itemsize, formula=share)]
        if is_zero_redundancy and self.tensor * self.pipeline > 1:
            _, other = self.layouts("consecutive")
            other_moved = traffic(source, other, **self.plan_options)
            costs.append(plan_cost("consecutive", other_moved, other, itemsize=self.itemsize))
        return moved, [*costs, *gather_costs(source, target, self.mesh, **self.plan_options)]


def reshard(args: argparse.Namespace) -> None:
    """Run `verl plan reshard`."""
    query = parse_query(args)
    if args.plot and Path(args.plot).suffix not in PLOT_SUFFIXES:
        raise ValueError(
            f"need --plot with a picture that ends with {', '.join(PLOT_SUFFIXES)}, got {args.plot!r}"
        )
    console = Console()
    if args.copies is not None:
        _print_copies(console, query, args.copies)
        if not (args.json or args.plot):
            return
    moved, costs = query.costs()
    if args.copies is None:
        _print_costs(console, query, moved, costs)
    if args.json:
        figures = json.dumps(_figures(query, moved, costs), indent=2)
        Path(args.json).write_text(figures + "\n", encoding="utf-8")
        console.out(f"figures: {args.json}", highlight=False)
    if args.plot:
        # Matplotlib takes a second to load.
        import_module("verl.planner.plots").draw(Path(args.plot), moved.between, costs, query.model_bytes)
        console.out(f"drawing: {args.plot}", highlight=False)


def parse_query(args: argparse.Namespace) -> ReshardQuery:
    """Query of the command's arguments.

    Raises:
        ValueError: sizes that are no numbers, or do not fit each other or the model.
    """
    training = _parse_sizes("training", args.training, tuple(_TRAINING))
    generation = _parse_sizes("generation", args.generation, _GENERATION)
    if "fsdp" in training:
        # The ranks that share a sequence hold different shards, as in `placement`.
        training["fsdp"] *= training.pop("sequence", 1)
    mesh = Mesh(**{_TRAINING[key]: size for key, size in training.items()})
    tensor, experts = generation.get("tensor", 1), generation.get("experts", 1)
    if experts not in (1, tensor):
        raise ValueError(
            f"need experts=1 or as many as tensor ranks in generation, got experts={experts} "
            f"for tensor={tensor}"
        )
    if args.bucket_mib < 1:
        raise ValueError(f"need --bucket-mib from 1, got {args.bucket_mib}")
    model = named_architecture(args.model)
    if model.num_experts == 0 and max(experts, mesh.experts) > 1:
        raise ValueError("need a model with experts for experts above 1, this one has none")
    return ReshardQuery(
        model=model,
        mesh=mesh,
        weight_format="transformers" if "fsdp" in training else "megatron",
        tensor=tensor,
        pipeline=generation.get("pipeline", 1),
        has_split_experts=experts == 1,
        grouping=args.grouping,
        itemsize=ITEMSIZES[args.dtype],
        ranks_per_node=_ranks_per_node(args, mesh.num_ranks),
        bucket_bytes=args.bucket_mib * 2**20,
    )


def _parse_sizes(stage: str, text: str, keys: tuple[str, ...]) -> dict[str, int]:
    """Sizes of a text such as "tensor=2,pipeline=1"."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        key, equals, value = item.strip().partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"need sizes of {stage} as name=number of {', '.join(keys)}, got {item.strip()!r}{hint}"
            )
        if not equals or not value.isascii() or not value.isdigit() or int(value) < 1:
            raise ValueError(f"need a number from 1 for {key} of {stage}, got {item.strip()!r}")
        if key in sizes:
            raise ValueError(f"need {key} of {stage} once, got {text!r}")
        sizes[key] = int(value)
    return sizes


def _ranks_per_node(args: argparse.Namespace, num_ranks: int) -> int:
    if args.nodes is None:
        if args.devices_per_node < 1:
            raise ValueError(f"need --devices-per-node from 1, got {args.devices_per_node}")
        return int(args.devices_per_node)
    if args.nodes < 1 or num_ranks % args.nodes:
        raise ValueError(f"need --nodes that divide the {num_ranks} ranks of training, got {args.nodes}")
    return num_ranks // int(args.nodes)


def format_seconds(time_s: float) -> str:
    """Human-readable time, with three digits."""
    return f"{time_s:.3g} s" if time_s >= 1 else f"{time_s * 1e3:.3g} ms"


def _print_costs(console: Console, query: ReshardQuery, moved: Traffic, costs: list[ReshardCost]) -> None:
    mesh, total = query.mesh, query.model_bytes
    title = f"{query.model.num_elements / 1e9:.3g}B weights, {format_bytes(total)}, on {mesh.num_ranks} ranks"
    table = Table("", title=title)
    for cost in costs:
        table.add_column(cost.way, justify="right")
    rows: dict[str, Callable[[ReshardCost], str]] = {
        "received": lambda cost: format_bytes(cost.received_bytes),
        "share": lambda cost: f"{cost.received_bytes / total:.3f}",
        "in paper": lambda cost: "" if cost.formula is None else f"{cost.formula:.3f}",
        "sent": lambda cost: format_bytes(cost.sent_bytes),
        "to a node": lambda cost: format_bytes(cost.node_bytes),
        "memory": lambda cost: format_bytes(cost.peak_bytes),
        "messages": lambda cost: str(cost.num_messages),
        "at least": lambda cost: format_seconds(cost.seconds),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, costs))
    console.print(table)
    for line in _remarks(query, moved):
        console.out(line, highlight=False)


def _remarks(query: ReshardQuery, moved: Traffic) -> list[str]:
    """Sentences below the table: the busiest rank, the replicas of generation, and a warning."""
    busiest = int(moved.received.argmax())
    outside = int(moved.from_other_nodes[busiest])
    inside = int(moved.received[busiest]) - outside
    groups = generation_groups(
        query.mesh, tensor=query.tensor, pipeline=query.pipeline, grouping=query.grouping
    )
    shown = ", ".join(str(group) for group in groups[:4]) + (", ..." if len(groups) > 4 else "")
    lines = [
        f"rank {busiest} receives {format_bytes(inside)} within its node and {format_bytes(outside)} from "
        f"others, in {len(moved.buckets)} buckets",
        f"{len(groups)} replicas of generation: {shown}",
    ]
    across = sum(len({rank // query.ranks_per_node for rank in group}) > 1 for group in groups)
    if across and query.tensor > 1:
        lines.append(
            f"the ranks of {across} of them are on several nodes, which makes generation slow; "
            "take fewer shards (data=...) or --grouping consecutive"
        )
    return lines


def _print_copies(console: Console, query: ReshardQuery, rank: int) -> None:
    """Print all copies that a rank keeps, receives or sends."""
    source, target = query.layouts()
    plan = make_plan(source, target, **query.plan_options, rank=rank)
    for copy in plan.local:
        console.out(f"keeps  {_copy_text(copy)}", highlight=False)
    for index, bucket in enumerate(plan.buckets):
        for copy in bucket:
            direction = f"from {copy.sender}" if copy.receiver == rank else f"to {copy.receiver}"
            console.out(f"bucket {index} {direction}: {_copy_text(copy)}", highlight=False)


def _copy_text(copy: Copy) -> str:
    part = ", ".join(f"{start}:{stop}" for start, stop in copy.bounds)
    source = f"{copy.sender_tensor}{list(copy.sender_offset)}"
    return f"{copy.name}[{part}] {source} -> {copy.receiver_tensor}{list(copy.receiver_offset)}"


def _figures(query: ReshardQuery, moved: Traffic, costs: list[ReshardCost]) -> Mapping[str, Any]:
    """Content of the file that `--json` writes."""
    return {
        "model_bytes": query.model_bytes,
        "num_ranks": query.mesh.num_ranks,
        "training": asdict(query.mesh),
        "generation": {
            "tensor": query.tensor,
            "pipeline": query.pipeline,
            "grouping": query.grouping,
        },
        "ranks_per_node": query.ranks_per_node,
        "num_buckets": len(moved.buckets),
        "ways": [asdict(cost) | {"seconds": cost.seconds} for cost in costs],
        "received_bytes": moved.received.tolist(),
        "from_other_nodes_bytes": moved.from_other_nodes.tolist(),
        "sent_bytes": moved.sent.tolist(),
        "local_bytes": moved.local.tolist(),
        "messages": moved.messages.tolist(),
    }
