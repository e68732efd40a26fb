"""Rewards and times of the same run with other engines and layouts.

.venv/bin/python benchmarks/engines.py --algo ppo --engines embedded fsdp-4 megatron-2x2
.venv-engines/bin/python benchmarks/engines.py --engines embedded vllm vllm-2 served-2    # make engines
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from verl.cli.quickstart import quickstart_config, warm_up
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer

_PAIRS = "hybrid_engine.actor_repartition={enabled: true, tensor: 2}"
# Name -> settings.
ENGINES = {
    "embedded": (),
    "vllm": ("rollout={engine: vllm, engine_options: {max_model_len: 64}}",),
    "vllm-2": ("rollout={engine: vllm, servers: 2, engine_options: {max_model_len: 64}}",),
    "sglang-2": ("rollout={engine: sglang, servers: 2}",),
    "served-2": ("rollout={engine: served, servers: 2}",),
    # Training in four shards, or in two stages of two tensor ranks; generation in pairs of tensor ranks.
    "fsdp-4": ("placement={name: colocated, devices: [4], address: local}", _PAIRS),
    "megatron-2x2": (
        "placement={name: colocated, devices: [4], address: local, "
        "policy: {tensor: 2, pipeline: 2, engine: megatron}}",
        _PAIRS,
    ),
}
# Heads of 32 values, which vLLM's kernels for CPUs need.
HIDDEN, LAYERS = 128, 2
POINTS = 6


@dataclass(frozen=True)
class Run:
    """Figures of a run.

    Attributes:
        engine: a key of `ENGINES`.
        seed: of the run.
        before, after: accuracy of one sampled answer to each of 512 held-out prompts.
        rewards: of each step.
        generate_s, update_s, sync_s, sync_bytes: medians over the steps.
        gap, gap_max: largest `sampler_gap` and `sampler_gap_max` of a step.
    """

    engine: str
    seed: int
    before: float
    after: float
    rewards: list[float]
    generate_s: float
    update_s: float
    sync_s: float
    sync_bytes: float
    gap: float
    gap_max: float


def warm_model(folder: Path, seed: int, steps: int) -> None:
    """Fine-tune the model from which every engine starts: its answers are right now and then."""
    torch.set_num_threads(1)
    make_tiny_model(folder / "start", hidden=HIDDEN, layers=LAYERS, seed=seed, characters="0123456789+=")
    warm_up(
        folder,
        quickstart_config(folder, seed=seed, algo="grpo", overrides=[f"steps={steps}"]),
        Console(quiet=True),
    )


def run(engine: str, algo: str, *, seed: int, steps: int, start: str) -> Run:
    """Run once; call it in a process of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "warm").symlink_to(start)
        overrides = ["tracking.sinks=[]", f"steps={steps}", *ENGINES[engine]]
        config = quickstart_config(Path(place), seed=seed, algo=algo, overrides=overrides)
        with closing(Trainer(config, console=Console(quiet=True))) as trainer:
            before = trainer.evaluate()["eval/reward"]
            history = trainer.fit()
            after = trainer.evaluate()["eval/reward"]

    def median(name: str) -> float:
        return statistics.median(step.get(name, 0.0) for step in history)

    return Run(
        engine,
        seed,
        before,
        after,
        [step["reward"] for step in history],
        median("time/generate_s"),
        median("time/update_policy_s"),
        median("time/sync_write_s") + median("time/sync_load_s") + median("time/reshard_s"),
        median("engines/sync_bytes") + median("hybrid/received_bytes"),
        max(step.get("sampler_gap", 0.0) for step in history),
        max(step.get("sampler_gap_max", 0.0) for step in history),
    )


def line(run: Run) -> str:
    size = len(run.rewards) / POINTS
    points = [statistics.fmean(run.rewards[round(i * size) : round((i + 1) * size)]) for i in range(POINTS)]
    return (
        f"{run.engine:<12} seed {run.seed}  {run.before:.3f} -> {run.after:.3f}  "
        f"{' '.join(f'{p:.2f}' for p in points)}  generate {run.generate_s:.2f} s, "
        f"update {run.update_s:.2f} s, sync {run.sync_s:.3f} s {run.sync_bytes:.0f} B, "
        f"gap {run.gap:.1e} max {run.gap_max:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["embedded", "vllm", "vllm-2"])
    parser.add_argument("--algo", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    runs: list[Run] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as place:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                pool.submit(warm_model, Path(place), seed, args.steps).result()
            for engine in args.engines:
                start = time.time()
                options = {"seed": seed, "steps": args.steps, "start": str(Path(place) / "warm")}
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    runs.append(pool.submit(run, engine, args.algo, **options).result())
                print(f"{line(runs[-1])}, {time.time() - start:.0f} s in all", flush=True)
                if args.json:
                    args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    sys.exit(main())
