"""What the change from training to generation costs: exact bytes and memory of the plan, beside other ways on
the same layouts.

.venv/bin/python benchmarks/reshard.py                   # the settings of HybridFlow, 8 to 128 devices; no
device is needed

The layouts are those of the real models (Megatron's or FSDP2's homes into vLLM's), so biases of the formulas
such as weights that every rank has or padding are in the figures. Other ways: HybridFlow-V and DS-Chat of
https://arxiv.org/abs/2409.19256, table 2.

Seconds are those of a model, not measured: all links are busy at a time, 600 GB/s of a device within its node
of 8, 200 Gbit/s of a node to the others. Left out is all else: start of collectives, copies within a device,
contention, what a link falls short of its rate. What the others take from other nodes is counted in two ways:
each byte enters a node once (one ring over all nodes), and each rank fetches for itself. A library comes to
lie between; the plan has no such range, since it says who sends what to whom.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.planner.architectures import named_architecture
from verl.planner.model_layouts import generation_layout, training_layout
from verl.planner.traffic import (
    NETWORK_BYTES_PER_S,
    NVLINK_BYTES_PER_S,
    ReshardCost,
    gather_costs,
    plan_cost,
    received_share,
    traffic,
)
from verl.weight_sync.meshes import Mesh

ITEMSIZE, DEVICES_PER_NODE = 2, 8
# Model, sizes of a replica in training, tensor ranks of generation: those of the paper, section 8.4, then
# FSDP2 into the same.
SETTINGS: list[tuple[str, dict[str, int], int]] = [
    ("llama-7b", {"tensor": 8}, 2),
    ("llama-13b", {"tensor": 8}, 4),
    ("llama-34b", {"tensor": 8, "pipeline": 4}, 8),
    ("llama-70b", {"tensor": 8, "pipeline": 8}, 8),
    ("llama-7b", {"shards": 8}, 2),
    ("llama-13b", {"shards": 16}, 4),
    ("llama-34b", {"shards": 32}, 8),
    ("llama-70b", {"shards": 64}, 8),
]
DEVICES = (8, 16, 32, 64, 128)
# What was promised when the project began: less memory and less traffic than gathering whole models.
PROMISED = {"memory": 0.4, "traffic": 0.6}


@dataclass(frozen=True)
class Row:
    """One model on some devices.

    Attributes:
        model: its name.
        devices: in all.
        training: sizes of a replica.
        generation: tensor ranks.
        model_bytes: M.
        ours: cost of the plan.
        vanilla: cost of HybridFlow-V.
        sharded: cost of DS-Chat.
        alone_s: seconds of HybridFlow-V and of DS-Chat if every rank fetches for itself.
    """

    model: str
    devices: int
    training: str
    generation: int
    model_bytes: int
    ours: ReshardCost
    vanilla: ReshardCost
    sharded: ReshardCost
    alone_s: tuple[float, float]

    def saved(self, what: str, other: ReshardCost) -> float:
        """Share of another way's traffic, memory or seconds that the plan does without."""
        values = {
            "traffic": lambda cost: cost.received_bytes,
            "memory": lambda cost: cost.peak_bytes,
            "seconds": lambda cost: cost.seconds,
        }[what]
        return 1 - values(self.ours) / values(other)


def rows(devices: tuple[int, ...]) -> Iterator[Row]:
    """Every setting on every number of devices that it divides."""
    for name, sizes, tensor in SETTINGS:
        model = named_architecture(name)
        for count in devices:
            replica = Mesh(**sizes).num_ranks
            if count % replica:
                continue
            mesh = Mesh(**sizes, replicas=count // replica)
            homes = "transformers" if "shards" in sizes else "megatron"
            source, target = (
                training_layout(model, mesh, homes=homes),
                generation_layout(model, mesh, tensor=tensor),
            )
            options = {"itemsize": ITEMSIZE, "ranks_per_node": DEVICES_PER_NODE}
            share = received_share(mesh, tensor=tensor, pipeline=1)
            ours = plan_cost(
                "this plan", traffic(source, target, **options), target, itemsize=ITEMSIZE, formula=share
            )
            _, vanilla, sharded = gather_costs(source, target, mesh, **options)
            alone = tuple(fetched_alone_s(cost, min(count, DEVICES_PER_NODE)) for cost in (vanilla, sharded))
            training = " ".join(f"{key}={size}" for key, size in sizes.items()).replace("shards", "fsdp")
            yield Row(
                name, count, training, tensor, model.num_elements * ITEMSIZE, ours, vanilla, sharded, alone
            )


def fetched_alone_s(cost: ReshardCost, ranks: int) -> float:
    """Seconds of the model if each rank of a node fetches what the node lacks."""
    return max(cost.received_bytes / NVLINK_BYTES_PER_S, ranks * cost.node_bytes / NETWORK_BYTES_PER_S)


def traffic_line(row: Row) -> str:
    shares = [
        f"{cost.received_bytes / row.model_bytes:.4f} ({cost.formula:.4f})"
        for cost in (row.ours, row.vanilla, row.sharded)
    ]
    saved = [f"{row.saved('traffic', cost):.1%}" for cost in (row.vanilla, row.sharded)]
    cells = (
        row.model,
        row.devices,
        row.training,
        row.generation,
        f"{row.ours.received_bytes / 1e9:.2f}",
        *shares,
        *saved,
    )
    memory = (
        f"{row.ours.peak_bytes / 1e9:.2f}",
        f"{row.model_bytes / 1e9:.2f}",
        f"{row.saved('memory', row.vanilla):.1%}",
    )
    return "| " + " | ".join(map(str, (*cells, *memory))) + " |"


def time_line(row: Row) -> str:
    ours, cells = (
        row.ours.seconds,
        [row.model, row.devices, row.training, row.generation, f"{row.ours.seconds:.3f}"],
    )
    ways = [
        (cost.seconds, alone) for cost, alone in zip((row.vanilla, row.sharded), row.alone_s, strict=True)
    ]
    cells += [" to ".join(dict.fromkeys(f"{s:.3f}" for s in way)) for way in ways]
    cells += [" to ".join(dict.fromkeys(f"{1 - ours / s:.1%}" for s in way)) for way in ways]
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names: str) -> str:
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def show(counted: list[Row]) -> None:
    """Both tables, and what of the promises is kept."""
    setting = ("model", "devices", "training", "t_g")
    print(
        "Received by the fullest rank as a share of the model (in brackets the formula of the paper), and memory beside training:\n"
    )
    shares = ("GB", "this plan", "HybridFlow-V", "DS-Chat", "less than V", "less than DS")
    print(head(*setting, *shares, "memory GB", "whole model GB", "less"))
    for row in counted:
        print(traffic_line(row))
    print(
        "\nSeconds by bandwidth, of the others if each byte enters a node once, to if each rank fetches for itself:\n"
    )
    print(head(*setting, "this plan", "HybridFlow-V", "DS-Chat", "less than V", "less than DS"))
    for row in counted:
        print(time_line(row))
    print()
    for what, promised in PROMISED.items():
        saved = [row.saved(what, row.vanilla) for row in counted]
        short = {
            f"{row.model} {row.training}"
            for row, share in zip(counted, saved, strict=True)
            if share < promised
        }
        told = f"{what}: {min(saved):.1%} to {max(saved):.1%} less than HybridFlow-V, promised {promised:.0%}"
        print(told + (f"; less than that: {', '.join(sorted(short))}" if short else ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--json", default=None, metavar="FILE", help="all figures")
    args = parser.parse_args()
    counted = list(rows(tuple(args.devices)))
    show(counted)
    if args.json:
        Path(args.json).write_text(
            json.dumps([asdict(row) for row in counted], indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
