"""Cost of the change from training to generation: exact bytes and memory of the plan and of other methods.

    python benchmarks/reshard.py    # the settings of HybridFlow, 8 to 128 devices; needs no device

The layouts are those of real models, from Megatron's or FSDP2's local tensors into those of vLLM. So the
figures include what the formulas leave out, such as padding and weights that every rank has. Other methods:
HybridFlow-V and DS-Chat of https://arxiv.org/abs/2409.19256, table 2.

Seconds are modelled, not measured: all links are busy at the same time, 600 GB/s for a device within its node
of 8, and 200 Gbit/s for a node. Everything else is left out: the start of collectives, copies within a
device, contention, links below their rate. Traffic between nodes of the other methods is counted in two ways:
each byte enters a node once (one ring over all nodes), or each rank fetches it for itself. A real library
lies between the two. The plan has no such range, since it names sender and receiver of each byte.
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
# Model, sizes of a replica in training, tensor parallel size of generation: those of the paper, section 8.4,
# then FSDP2 into the same.
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
# Targets of the project: savings in memory and traffic over gathering whole models.
TARGETS = {"memory": 0.4, "traffic": 0.6}


@dataclass(frozen=True)
class Row:
    """Costs for one model on some devices.

    Attributes:
        model: its name.
        devices: of all replicas.
        training: sizes of a replica.
        generation: tensor parallel size.
        model_bytes: of all weights.
        ours: cost of the plan.
        vanilla: cost of HybridFlow-V.
        sharded: cost of DS-Chat.
        alone_s: seconds of HybridFlow-V and of DS-Chat if every rank fetches for itself from other nodes.
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

    def saved(self, quantity: str, other: ReshardCost) -> float:
        """Share of another method's traffic, memory or seconds that the plan saves."""
        values = {
            "traffic": lambda cost: cost.received_bytes,
            "memory": lambda cost: cost.peak_bytes,
            "seconds": lambda cost: cost.seconds,
        }[quantity]
        return 1 - values(self.ours) / values(other)


def rows(devices: tuple[int, ...]) -> Iterator[Row]:
    """Every setting on every number of devices that its replicas fill."""
    for name, sizes, tensor in SETTINGS:
        model = named_architecture(name)
        for count in devices:
            replica = Mesh(**sizes).num_ranks
            if count % replica:
                continue
            mesh = Mesh(**sizes, replicas=count // replica)
            weight_format = "transformers" if "shards" in sizes else "megatron"
            source, target = (
                training_layout(model, mesh, weight_format=weight_format),
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
    """Modelled seconds if each rank of a node fetches all that the node lacks."""
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
    """Print both tables, and the savings against the targets."""
    setting = ("model", "devices", "training", "t_g")
    print(
        "Received by the busiest rank as a share of the model (in brackets the formula of the paper), "
        "and memory beside training:\n"
    )
    shares = ("GB", "this plan", "HybridFlow-V", "DS-Chat", "less than V", "less than DS")
    print(head(*setting, *shares, "memory GB", "whole model GB", "less"))
    for row in counted:
        print(traffic_line(row))
    print(
        "\nSeconds by bandwidth; for the other methods from one ring over all nodes "
        "to each rank fetching for itself:\n"
    )
    print(head(*setting, "this plan", "HybridFlow-V", "DS-Chat", "less than V", "less than DS"))
    for row in counted:
        print(time_line(row))
    print()
    for quantity, target in TARGETS.items():
        saved = [row.saved(quantity, row.vanilla) for row in counted]
        short = {
            f"{row.model} {row.training}" for row, share in zip(counted, saved, strict=True) if share < target
        }
        line = f"{quantity}: {min(saved):.1%} to {max(saved):.1%} less than HybridFlow-V, target {target:.0%}"
        print(line + (f"; less than that: {', '.join(sorted(short))}" if short else ""))


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
