"""The command `verl plan reshard`: what a change between the layouts of training and generation costs,
without a device.
"""

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

from verl.planner.architectures import Architecture, named_architecture
from verl.planner.model_layouts import generation_layout, training_layout
from verl.planner.traffic import ReshardCost, Traffic, gather_costs, plan_cost, received_share, traffic
from verl.weight_sync.layout import ShardLayout
from verl.weight_sync.meshes import Mesh, generation_groups
from verl.weight_sync.reshard_plan import Copy, make_plan

PICTURES = (".png", ".svg", ".pdf")
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
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
    """What is asked.

    Attributes:
        model: whose weights.
        mesh: sizes of training.
        homes: of training, a key of `verl.planner.model_layouts.WEIGHT_FORMATS`.
        tensor: of generation.
        pipeline: of generation.
        has_split_experts: in generation.
        grouping: a key of `verl.weight_sync.meshes.GROUPINGS`.
        itemsize: bytes per weight.
        ranks_per_node: of consecutive ranks.
        bucket_bytes: of a bucket.
    """

    model: Architecture
    mesh: Mesh
    homes: str
    tensor: int
    pipeline: int
    has_split_experts: bool
    grouping: str
    itemsize: int
    ranks_per_node: int
    bucket_bytes: int

    @property
    def model_bytes(self) -> int:
        """M."""
        return self.model.num_elements * self.itemsize

    def layouts(self, grouping: str | None = None) -> tuple[ShardLayout, ShardLayout]:
        """Of training and of generation."""
        target = generation_layout(
            self.model,
            self.mesh,
            tensor=self.tensor,
            pipeline=self.pipeline,
            grouping=grouping or self.grouping,
            has_split_experts=self.has_split_experts,
        )
        return training_layout(self.model, self.mesh, homes=self.homes), target

    def costs(self) -> tuple[Traffic, list[ReshardCost]]:
        """Traffic of the plan, and the costs of the plan and of other ways."""
        source, target = self.layouts()
        options = {
            "itemsize": self.itemsize,
            "bucket_bytes": self.bucket_bytes,
            "ranks_per_node": self.ranks_per_node,
        }
        moved = traffic(source, target, **options)
        share = (
            received_share(self.mesh, tensor=self.tensor, pipeline=self.pipeline)
            if self.grouping == "zero-redundancy"
            else None
        )
        costs = [plan_cost("this plan", moved, target, itemsize=self.itemsize, formula=share)]
        if self.grouping == "zero-redundancy" and self.tensor * self.pipeline > 1:
            _, other = self.layouts("consecutive")
            costs.append(
                plan_cost("consecutive", traffic(source, other, **options), other, itemsize=self.itemsize)
            )
        return moved, [*costs, *gather_costs(source, target, self.mesh, **options)]


def reshard(args: argparse.Namespace) -> None:
    """`verl plan reshard`."""
    question = question_of(args)
    if args.plot and Path(args.plot).suffix not in PICTURES:
        raise ValueError(
            f"need --plot with a picture that ends with {', '.join(PICTURES)}, got {args.plot!r}"
        )
    console = Console()
    if args.copies is not None:
        _show_copies(console, question, args.copies)
        if not (args.json or args.plot):
            return
    moved, costs = question.costs()
    if args.copies is None:
        _show(console, question, moved, costs)
    if args.json:
        Path(args.json).write_text(
            json.dumps(_facts(question, moved, costs), indent=2) + "\n", encoding="utf-8"
        )
        console.out(f"figures: {args.json}", highlight=False)
    if args.plot:
        # Drawing takes a second to load.
        import_module("verl.planner.plots").draw(Path(args.plot), moved.between, costs, question.model_bytes)
        console.out(f"drawing: {args.plot}", highlight=False)


def question_of(args: argparse.Namespace) -> ReshardQuery:
    """What the arguments of the command ask.

    Raises:
        ValueError: sizes that are none, or do not fit each other or the model.
    """
    training, generation = (
        _sizes("training", args.training, tuple(_TRAINING)),
        _sizes("generation", args.generation, _GENERATION),
    )
    if "fsdp" in training:
        # The ranks of a line have different shards, as in `placement`.
        training["fsdp"] *= training.pop("sequence", 1)
    mesh = Mesh(**{_TRAINING[key]: size for key, size in training.items()})
    tensor, experts = generation.get("tensor", 1), generation.get("experts", 1)
    if experts not in (1, tensor):
        raise ValueError(
            f"need experts=1 or as many as tensor ranks in generation, got experts={experts} for tensor={tensor}"
        )
    if args.bucket_mib < 1:
        raise ValueError(f"need --bucket-mib from 1, got {args.bucket_mib}")
    model = named_architecture(args.model)
    if model.num_experts == 0 and max(experts, mesh.experts) > 1:
        raise ValueError("need a model with experts for experts above 1, this one has none")
    homes = "transformers" if "fsdp" in training else "megatron"
    return ReshardQuery(
        model,
        mesh,
        homes,
        tensor,
        generation.get("pipeline", 1),
        experts == 1,
        args.grouping,
        ITEMSIZES[args.dtype],
        _ranks_per_node(args, mesh.num_ranks),
        args.bucket_mib * 2**20,
    )


def _sizes(stage: str, text: str, keys: tuple[str, ...]) -> dict[str, int]:
    """Sizes from "tensor=2,pipeline=1"."""
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


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(time_s: float) -> str:
    """Seconds for people, with three digits."""
    return f"{time_s:.3g} s" if time_s >= 1 else f"{time_s * 1e3:.3g} ms"


def _show(console: Console, question: ReshardQuery, moved: Traffic, costs: list[ReshardCost]) -> None:
    mesh, total = question.mesh, question.model_bytes
    title = (
        f"{question.model.num_elements / 1e9:.3g}B weights, {format_bytes(total)}, on {mesh.num_ranks} ranks"
    )
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
    for name, told in rows.items():
        table.add_row(name, *map(told, costs))
    console.print(table)
    for line in _remarks(question, moved):
        console.out(line, highlight=False)


def _remarks(question: ReshardQuery, moved: Traffic) -> list[str]:
    options: dict[str, Any] = {
        "tensor": question.tensor,
        "pipeline": question.pipeline,
        "grouping": question.grouping,
    }
    found = generation_groups(question.mesh, **options)
    fullest = int(moved.received.argmax())
    elsewhere = int(moved.from_other_nodes[fullest])
    within = format_bytes(int(moved.received[fullest]) - elsewhere)
    lines = [
        f"rank {fullest} receives {within} within its node and {format_bytes(elsewhere)} from others, in {len(moved.buckets)} buckets"
    ]
    shown = ", ".join(str(group) for group in found[:4]) + (", ..." if len(found) > 4 else "")
    lines.append(f"{len(found)} replicas of generation: {shown}")
    across = sum(len({rank // question.ranks_per_node for rank in group}) > 1 for group in found)
    if across and question.tensor > 1:
        lines.append(
            f"the ranks of {across} of them are on several nodes, which makes generation slow; take fewer shards (data=...) or "
            "--grouping consecutive"
        )
    return lines


def _show_copies(console: Console, question: ReshardQuery, rank: int) -> None:
    source, target = question.layouts()
    options = {
        "itemsize": question.itemsize,
        "bucket_bytes": question.bucket_bytes,
        "ranks_per_node": question.ranks_per_node,
    }
    plan = make_plan(source, target, **options, rank=rank)
    for copy in plan.local:
        console.out(f"keeps  {_told(copy)}", highlight=False)
    for index, bucket in enumerate(plan.buckets):
        for copy in bucket:
            way = f"from {copy.sender}" if copy.receiver == rank else f"to {copy.receiver}"
            console.out(f"bucket {index} {way}: {_told(copy)}", highlight=False)


def _told(copy: Copy) -> str:
    part = ", ".join(f"{start}:{stop}" for start, stop in copy.bounds)
    homes = f"{copy.sender_tensor}{list(copy.sender_offset)} -> {copy.receiver_tensor}{list(copy.receiver_offset)}"
    return f"{copy.name}[{part}] {homes}"


def _facts(question: ReshardQuery, moved: Traffic, costs: list[ReshardCost]) -> Mapping[str, Any]:
    return {
        "model_bytes": question.model_bytes,
        "num_ranks": question.mesh.num_ranks,
        "training": asdict(question.mesh),
        "generation": {
            "tensor": question.tensor,
            "pipeline": question.pipeline,
            "grouping": question.grouping,
        },
        "ranks_per_node": question.ranks_per_node,
        "num_buckets": len(moved.buckets),
        "ways": [asdict(cost) | {"seconds": cost.seconds} for cost in costs],
        "received_bytes": moved.received.tolist(),
        "from_other_nodes_bytes": moved.from_other_nodes.tolist(),
        "sent_bytes": moved.sent.tolist(),
        "local_bytes": moved.local.tolist(),
        "messages": moved.messages.tolist(),
    }
