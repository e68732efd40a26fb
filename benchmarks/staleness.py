"""The cost of staleness in learning, with and without decoupled PPO: two-digit addition, several seeds.

Generation and training alternate in one process. Every step has the largest staleness that the bound allows:
the worst case, and the same in each run. The table is like that of AReaL, https://arxiv.org/abs/2505.24298.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from verl.cli.quickstart import quickstart_config, warm_up
from verl.config import load_config
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer

# The denominator of the ratio in the loss: the sampler's probabilities; or those of the policy before the
# step, weighted by the ratio of the two.
OBJECTIVES = {
    "naive": ("algorithm.correction=bypass",),
    "decoupled": ("algorithm.correction={name: token_tis, cap: 5.0}",),
    "loglinear": ("algorithm.correction={name: loglinear, cap: 5.0}",),
}
# Four updates per step, each answer in one of them, as in AReaL.
SETTINGS = (
    "algorithm.epochs=1",
    "algorithm.minibatches=4",
    "algorithm.kl.where=off",
    "policy.optimizer.schedule=constant",
    "tracking.sinks=[]",
    "tracking.samples_every_steps=0",
)


@dataclass(frozen=True)
class Run:
    """Measurements of one run.

    Attributes:
        after: share of right answers to the held-out prompts at the end.
        best: highest share of right answers of ten successive steps.
        staleness: mean over tokens, in the second half of the run.
        cpu_s: of the run.
        curve: share of right answers in ten equal parts of the run.
    """

    objective: str
    max_staleness: int
    seed: int
    before: float
    after: float
    best: float
    staleness: float
    cpu_s: float
    curve: list[float]


def run(objective: str, max_staleness: int, seed: int, steps: int, rate: float, folder: Path) -> Run:
    """Train the warm start; meant for a process of its own."""
    torch.set_num_threads(1)
    start_s = time.process_time()
    own = [
        f"policy.path={folder / 'warm'}",
        f"output_dir={folder / f'{objective}-{max_staleness}'}",
        f"seed={seed}",
        f"steps={steps}",
    ]
    more = [f"pipeline.max_staleness={max_staleness}", f"policy.optimizer.lr={rate}", *OBJECTIVES[objective]]
    trainer = Trainer(load_config("quickstart", [*SETTINGS, *own, *more]), console=Console(quiet=True))
    before = trainer.evaluate()["eval/accuracy"]
    trainer.load_train_data()
    history = [trainer.step() for _ in range(steps)]
    after = trainer.evaluate()["eval/accuracy"]
    accuracies = [step["accuracy"] for step in history]
    smooth = [statistics.fmean(accuracies[i : i + 10]) for i in range(len(accuracies) - 9)]
    tenth = max(1, steps // 10)
    return Run(
        objective,
        max_staleness,
        seed,
        before,
        after,
        max(smooth),
        statistics.fmean(step["staleness/mean"] for step in history[steps // 2 :]),
        time.process_time() - start_s,
        [statistics.fmean(accuracies[i : i + tenth]) for i in range(0, tenth * 10, tenth)],
    )


def warm_start(seed: int, folder: Path) -> None:
    """Make a model and fine-tune it until it is sometimes right; meant for a process of its own."""
    torch.set_num_threads(1)
    make_tiny_model(folder / "start", hidden=64, layers=3, seed=seed, characters="0123456789+=")
    data = ["data.train=task:add-2", "data.test=task:add-2", "tracking.sinks=[]"]
    data.append("evaluation.every_steps=null")
    warm_up(
        folder,
        quickstart_config(folder, seed=seed, algo="grpo", overrides=data),
        Console(quiet=True),
        enough=0.22,
    )


def table(runs: list[Run]) -> str:
    """Mean, minimum and maximum over the seeds, a row for each bound."""
    objectives = [name for name in OBJECTIVES if any(r.objective == name for r in runs)]
    lines = [
        "| max_staleness | " + " | ".join(f"{name}, after (min to max)" for name in objectives) + " |",
        "| --- |" + " --- |" * len(objectives),
    ]
    for bound in sorted({r.max_staleness for r in runs}):
        cells = []
        for name in objectives:
            after = [r.after for r in runs if (r.objective, r.max_staleness) == (name, bound)]
            cells.append(
                f"{statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f})" if after else ""
            )
        lines.append(f"| {bound} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", nargs="+", default=["naive", "decoupled"], choices=list(OBJECTIVES))
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (3e-4)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", default=None, help="write all figures")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tempfile.TemporaryDirectory() as parent,
        ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as processes,
    ):
        folders = {seed: Path(parent) / str(seed) for seed in args.seeds}
        list(processes.map(warm_start, folders, folders.values()))
        jobs = [
            processes.submit(run, objective, bound, seed, args.steps, args.rate, folders[seed])
            for seed in args.seeds
            for bound in args.staleness
            for objective in args.objectives
        ]
        runs = []
        for job in jobs:
            runs.append(job.result())
            done = runs[-1]
            shown = " ".join(f"{value:.2f}" for value in done.curve)
            name = f"{done.objective} {done.max_staleness} seed {done.seed}"
            print(f"{name}: {done.before:.3f} -> {done.after:.3f}, {done.cpu_s:.0f} s, {shown}", flush=True)
    print(table(runs))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in runs], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
