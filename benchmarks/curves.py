"""Learning curves of small tasks on held-out prompts, over several seeds, for each algorithm."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from verl.cli.quickstart import quickstart_config, warm_up
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer

# Points of a printed curve, each the mean over a tenth of the steps.
NUM_POINTS = 10


@dataclass(frozen=True)
class Task:
    """A task of `verl.data.tasks.table`, its model, and the settings of its training.

    Attributes:
        characters: vocabulary of the model.
        hidden, layers: its size.
        warm: sampled accuracy up to which it is fine-tuned on examples; none: it starts from random weights.
        at_least: mean reward on held-out prompts that every run must reach.
        overrides: settings that differ from the recipe `quickstart`.
        algos: algorithm -> further settings.
    """

    characters: str
    hidden: int
    layers: int
    warm: float | None
    at_least: float
    overrides: tuple[str, ...]
    algos: dict[str, tuple[str, ...]]


# The choices of the recipe `dapo`, with as many answers and updates per step as the recipe `quickstart`.
DAPO = (
    "prompts_per_step=32",
    "samples_per_prompt=16",
    "algorithm.dynamic_sampling=true",
    "algorithm.policy_loss={name: ppo_clip, clip_low: 0.2, clip_high: 0.28, dual_clip: 10.0}",
    "algorithm.kl.where=off",
)

TASKS: dict[str, Task] = {
    "add-2": Task("0123456789+=", 64, 3, 0.22, 0.7, (), {"grpo": (), "ppo": (), "dapo": DAPO}),
    # PPO's curve is flat after 120 steps; with 240, one seed of GRPO ended at 0.58.
    "sort-6": Task(
        "0123456789=",
        64,
        3,
        0.1,
        0.6,
        ("sampling.max_tokens=7",),
        {"grpo": ("steps=360",), "ppo": ("steps=120",)},
    ),
    "copy-8": Task(
        "abcdefgh=",
        64,
        2,
        None,
        0.9,
        ("sampling.max_tokens=9", "prompts_per_step=32", "samples_per_prompt=16", "steps=120"),
        {"grpo": ()},
    ),
}


@dataclass(frozen=True)
class Curve:
    """Measurements of a run; rewards are in [0, 1], accuracies where the reward is 1 for a right answer.

    Attributes:
        before, after: mean reward of one sampled answer (temperature 1) to each held-out prompt.
        warm_steps: steps of fine-tuning before.
        cpu_s: CPU seconds of the whole run, on one thread.
        rewards: mean reward of the answers of each step.
    """

    task: str
    algo: str
    seed: int
    before: float
    after: float
    warm_steps: int
    cpu_s: float
    rewards: list[float]

    @property
    def points(self) -> list[float]:
        """Means over equal parts of the run."""
        size = len(self.rewards) / NUM_POINTS
        return [
            statistics.fmean(self.rewards[round(i * size) : round((i + 1) * size)]) for i in range(NUM_POINTS)
        ]


def run(name: str, algo: str, seed: int) -> Curve:
    """Make, warm up, train and measure a model; meant for a process of its own."""
    torch.set_num_threads(1)
    task, start, console = TASKS[name], time.process_time(), Console(quiet=True)
    overrides = (
        f"data.train=task:{name}",
        f"data.test=task:{name}",
        "evaluation.every_steps=null",
        "tracking.sinks=[]",
        *task.overrides,
        *task.algos[algo],
    )
    with tempfile.TemporaryDirectory() as place:
        folder, warm_steps = Path(place), 0
        make_tiny_model(
            folder / "start", hidden=task.hidden, layers=task.layers, seed=seed, characters=task.characters
        )
        config = quickstart_config(folder, seed=seed, algo=algo, overrides=overrides)
        if task.warm is None:
            (folder / "start").rename(folder / "warm")
        else:
            warm_steps = warm_up(folder, config, console, enough=task.warm)
        trainer = Trainer(config, console=console)
        before = trainer.evaluate()["eval/reward"]
        history = trainer.fit()
        after = trainer.evaluate()["eval/reward"]
    return Curve(
        name,
        algo,
        seed,
        before,
        after,
        warm_steps,
        time.process_time() - start,
        [step["reward"] for step in history],
    )


def in_own_process(name: str, algo: str, seed: int) -> Curve:
    """`run` in a fresh process, so that no run depends on the memory of another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, name, algo, seed).result()


def run_line(curve: Curve) -> str:
    """A run as a human-readable line."""
    points = " ".join(f"{point:.2f}" for point in curve.points)
    return (
        f"{curve.task:<7}{curve.algo:<5} seed {curve.seed}  {curve.before:.3f} -> {curve.after:.3f}  "
        f"{curve.warm_steps:3} + {len(curve.rewards)} steps  {curve.cpu_s:4.0f} CPU s  {points}"
    )


def by_pair(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """(task, algorithm) -> its runs."""
    pairs: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        pairs.setdefault((curve.task, curve.algo), []).append(curve)
    return pairs


def table(curves: Sequence[Curve]) -> str:
    """Mean, minimum and maximum over the seeds, as Markdown."""
    lines = [
        "| Task | Algorithm | Seeds | Steps | CPU s of a run | Before, mean | After, mean (min to max) "
        "| Wanted of each | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, algo), runs in by_pair(curves).items():
        after, wanted = [r.after for r in runs], TASKS[name].at_least
        lines.append(
            f"| `{name}` | {algo.upper()} | {', '.join(str(r.seed) for r in runs)} | {len(runs[0].rewards)} "
            f"| {statistics.fmean(r.cpu_s for r in runs):.0f} "
            f"| {statistics.fmean(r.before for r in runs):.3f} "
            f"| {statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f}) | {wanted} "
            f"| {'reached' if min(after) >= wanted else '**not reached**'} |"
        )
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG with a panel per task: mean and range over the seeds for each algorithm."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure = Figure(figsize=(4 * len(tasks), 3.2), dpi=100, layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], strict=True))
    for (name, algo), runs in by_pair(curves).items():
        smooth = [smoothed(run.rewards) for run in runs]
        steps = range(1, len(smooth[0]) + 1)
        (line,) = panels[name].plot(
            steps, [statistics.fmean(values) for values in zip(*smooth, strict=True)], label=algo.upper()
        )
        low, high = ([pick(values) for values in zip(*smooth, strict=True)] for pick in (min, max))
        panels[name].fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for name, axes in panels.items():
        axes.axhline(TASKS[name].at_least, color="gray", linestyle=":", linewidth=1)
        axes.set(title=name, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    panels[tasks[0]].set_ylabel("mean reward of the sampled answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def smoothed(values: Sequence[float], *, keep: float = 0.8) -> list[float]:
    """Exponential moving average without the bias to the start."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def main() -> int:
    """Run the chosen tasks one after the other; return 1 if a run stays below the goal of its task."""
    algos = list(dict.fromkeys(algo for task in TASKS.values() for algo in task.algos))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--algos", nargs="+", choices=algos, default=algos, metavar="ALGO", help=f"of {', '.join(algos)}"
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    parser.add_argument("--json", type=Path, help="file for all figures, each step's too")
    parser.add_argument("--png", type=Path, help="file for a picture of the curves")
    options = parser.parse_args()
    # One thread is faster than several for models this small; read by the processes of the runs.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    curves: list[Curve] = []
    for name in options.tasks:
        for algo in (algo for algo in TASKS[name].algos if algo in options.algos):
            for seed in map(int, options.seeds.split(",")):
                curves.append(in_own_process(name, algo, seed))
                print(run_line(curves[-1]), flush=True)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(
                        json.dumps(
                            {"date": date.today().isoformat(), "runs": [asdict(c) for c in curves]}, indent=1
                        )
                    )
    if not curves:
        parser.error("none of these tasks is learned by one of these algorithms")
    print(f"\n{table(curves)}")
    if options.png:
        draw(curves, options.png)
    return int(any(curve.after < TASKS[curve.task].at_least for curve in curves))


if __name__ == "__main__":
    sys.exit(main())
