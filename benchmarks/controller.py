"""Cost of the controller: seconds and bytes per row of a step without models, against a plain Ray gather.

A step: every rank makes its share of the rows (32 to 96 tokens with logprobs) and returns the rewards; the
rows are balanced by length over the ranks; another role writes a column over their tokens; the controller
computes advantages of groups of eight; an update reads everything. With references, tokens stay with the
ranks that made them. The gather brings every row to the driver, which joins them and sends each rank its
slice.

    python benchmarks/controller.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.controller_worker import ModelFreeWorker
from verl.controller.ray_cluster import connect
from verl.controller.ray_pool import RayPool
from verl.controller.worker_group import Timeline, WorkerGroup
from verl.data.packing import balance

GROUP = 8


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """[B], rewards minus the mean of their group of eight consecutive rows."""
    whole = len(rewards) // GROUP * GROUP
    grouped = rewards[:whole].view(-1, GROUP)
    return torch.cat([(grouped - grouped.mean(1, keepdim=True)).flatten(), rewards[whole:]])


def by_reference(group: WorkerGroup, num_rows: int, num_ranks: int) -> None:
    counts = [len(part) for part in torch.arange(num_rows).tensor_split(num_ranks)]
    rewards, rows = group.call(ModelFreeWorker.generate, counts).result()
    plan = balance(rows.response_lengths, num_ranks=num_ranks, micro_batch_tokens=16_384)
    rows.update(group.call(ModelFreeWorker.write, rows.keep(["rollout_logprobs"]), plan).result())
    rows.write("advantages", group_advantages(rewards))
    group.call(
        ModelFreeWorker.update, rows.keep(["response_ids", "ref_logprobs", "advantages"]), plan
    ).result()


def by_gather(group: WorkerGroup, num_rows: int, num_ranks: int) -> None:
    counts = [len(part) for part in torch.arange(num_rows).tensor_split(num_ranks)]
    parts = group.call(ModelFreeWorker.generate_all, counts).result()
    rewards, ids, lengths, logprobs = (torch.cat(columns) for columns in zip(*parts, strict=True))
    ends = [int(part[-1]) for part in lengths.cumsum(0).tensor_split(num_ranks) if len(part)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # Clones: pickling a view would include the whole tensor.
    ids_of, logprobs_of = ([part.clone() for part in column.split(sizes)] for column in (ids, logprobs))
    written = torch.cat(group.call(ModelFreeWorker.write_all, logprobs_of).result())
    advantages = [part.clone() for part in group_advantages(rewards).tensor_split(num_ranks)]
    group.call(
        ModelFreeWorker.update_all, ids_of, [part.clone() for part in written.split(sizes)], advantages
    ).result()


def measured(step: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall seconds of the controller's process."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def bytes_moved(step: Callable[[], None]) -> int:
    """Serialized bytes that the controller puts into the object store and takes out of it."""
    moved = 0
    put, get = ray.put, ray.get

    def counting_put(value: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal moved
        moved += len(ray.cloudpickle.dumps(value))
        return put(value, *args, **kwargs)

    def counting_get(value: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal moved
        got = get(value, *args, **kwargs)
        moved += len(ray.cloudpickle.dumps(got))
        return got

    ray.put, ray.get = counting_put, counting_get
    try:
        step()
    finally:
        ray.put, ray.get = put, get
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two ranks and few rows")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 8, 64])
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    # The driver holds several copies of all rows: more do not fit into 24 GiB beside the object store.
    parser.add_argument(
        "--gather-rows", type=int, default=100_000, help="largest number of rows that the gather is run with"
    )
    args = parser.parse_args()
    ranks, sizes = ([2], [1_000, 10_000]) if args.quick else (args.ranks, args.rows)
    print(f"{'ranks':>5} {'rows':>9} {'way':>10} {'CPU us/row':>11} {'wall us/row':>12} {'bytes/row':>10}")
    for num_ranks in ranks:
        cluster = connect("local", num_devices=num_ranks)
        try:
            with tempfile.TemporaryDirectory() as logs:
                options = {"hang_limit_s": 600.0, "log_folder": Path(logs), "timeline": Timeline()}
                group = RayPool(cluster, "fake", num_ranks, **options).start("fake", ModelFreeWorker)
                for num_rows in sizes:
                    ways = (
                        {"reference": by_reference, "gather": by_gather}
                        if num_rows <= args.gather_rows
                        else {"reference": by_reference}
                    )
                    compare(group, ways, num_rows, num_ranks, rounds=args.rounds)
        finally:
            cluster.close()


def compare(
    group: WorkerGroup, ways: dict[str, Callable[..., None]], num_rows: int, num_ranks: int, *, rounds: int
) -> None:
    """Run all methods by turns, and print the medians."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    moved = {name: bytes_moved(lambda way=way: way(group, num_rows, num_ranks)) for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(measured(lambda way=way: way(group, num_rows, num_ranks)))
    for name in ways:
        cpu, wall = (
            statistics.median(column) * 1e6 / num_rows for column in zip(*seconds[name], strict=True)
        )
        print(
            f"{num_ranks:>5} {num_rows:>9} {name:>10} {cpu:>11.2f} {wall:>12.2f} "
            f"{moved[name] / num_rows:>10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
