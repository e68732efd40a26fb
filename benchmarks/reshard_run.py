"""The change from training to generation on real processes, from FSDP2 shards into tensor parallel parts.

    python benchmarks/reshard_run.py --ranks 4 --tensor 2

Compares the plan with gathering whole tensors. Both fill the same weights of generation, by turns. Prints
medians of the seconds, and the memory of a process at its peak over that before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.engines.fsdp import FSDPForwardEngine, sharded_engine
from verl.engines.hf.pretrained import make_tiny_model
from verl.engines.hf.weights import shard_slices
from verl.rollout.embedded.hybrid_engine import HybridEngine

_PORT = 29517


def by_plan(hybrid: HybridEngine) -> int:
    """Fill the weights by the plan, as the engine does; return the bytes received."""
    with hybrid.loaded(0):
        pass
    return hybrid.switches[-1].received_bytes


def by_whole_tensors(engine: FSDPForwardEngine, hybrid: HybridEngine) -> int:
    """Gather every tensor whole on every rank and slice it; return the bytes received."""
    received = 0
    parameters = dict(hybrid.model.transformer.named_parameters())
    for name, storage in hybrid._own_storages.items():
        storage.resize_(hybrid._num_bytes[name])
    sources = engine.local_tensors()
    for name, tensor in engine.full_tensors():
        received += tensor.nbytes - sources[name].nbytes
        hybrid._local_tensors[name].copy_(tensor[shard_slices(parameters[name])])
    return received


def measured(work: Callable[[], int]) -> tuple[float, int, int]:
    """Seconds, bytes received, and memory of the process at its peak over that before."""
    # Resets the peak that Linux has recorded for this process.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    dist.barrier()
    start_s = time.perf_counter()
    received = work()
    dist.barrier()
    return time.perf_counter() - start_s, received, _memory("VmHWM") - before


def _memory(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def rank_main(rank: int, args: argparse.Namespace, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    device = torch.device("cpu")
    engine = sharded_engine(
        folder, "policy", RoleConfig(), ParallelConfig(), device=device, total_updates=None
    )
    hybrid = HybridEngine(engine, tensor=args.tensor, precision="fp32", bucket_bytes=args.bucket_mib * 2**20)
    ways = {"plan": lambda: by_plan(hybrid), "whole tensors": lambda: by_whole_tensors(engine, hybrid)}
    found: dict[str, list[tuple[float, int, int]]] = {way: [] for way in ways}
    for _ in range(args.repeats + 1):
        for way, work in ways.items():
            found[way].append(measured(work))
            hybrid.sleep()
    model_bytes = sum(torch.Size(shape).numel() * 4 for shape in engine.shapes().values())
    results.put((rank, {way: runs[1:] for way, runs in found.items()}, model_bytes))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--bucket-mib", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    # Freed memory returns to the system at once, so that a peak belongs to the current switch alone.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder), hidden=args.hidden, layers=args.layers)
        results = mp.get_context("spawn").SimpleQueue()
        running = mp.spawn(rank_main, (args, folder, results), nprocs=args.ranks, join=False)
        ranks = [results.get() for _ in range(args.ranks)]
        running.join()
    model_bytes = ranks[0][2]
    print(
        f"{model_bytes / 1e6:.1f} MB in fp32, {args.ranks} ranks, generation tensor={args.tensor}, "
        f"buckets of {args.bucket_mib} MiB\n"
    )
    print(
        "| way | received MB (busiest rank) | share of the model | seconds (median) "
        "| peak MB beside training (busiest rank) |"
    )
    print("|---|---|---|---|---|")
    for way in ranks[0][1]:
        received = max(run[1] for _, runs, _ in ranks for run in runs[way])
        seconds = statistics.median(max(runs[way][i][0] for _, runs, _ in ranks) for i in range(args.repeats))
        peak = max(statistics.median(run[2] for run in runs[way]) for _, runs, _ in ranks)
        print(
            f"| {way} | {received / 1e6:.1f} | {received / model_bytes:.3f} | {seconds:.3f} "
            f"| {peak / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
