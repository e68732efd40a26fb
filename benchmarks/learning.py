"""Every recipe on the same tasks and warm start, with equal numbers of answers and updates."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
from curves import smoothed
from matplotlib.figure import Figure
from rich.console import Console

from verl.cli.quickstart import quickstart_config, warm_up
from verl.config import RECIPES, load_config
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer

# Answers and updates of a run, equal for every recipe. A recipe that must not reuse answers makes more and
# smaller steps.
ANSWERS_PER_STEP, UPDATES_PER_STEP = 512, 4
# Least rise of the mean held-out accuracy over the seeds; the standard error of 512 answers is 0.022.
CLEARLY = 0.1


@dataclass(frozen=True)
class Task:
    """A task of `verl.data.tasks.table`.

    Attributes:
        characters: vocabulary of the model.
        warm: sampled accuracy up to which the model is fine-tuned on examples.
        max_tokens: longest answer.
        steps: of `ANSWERS_PER_STEP` answers.
    """

    characters: str
    warm: float
    max_tokens: int
    steps: int


TASKS = {"add-2": Task("0123456789+=", 0.22, 4, 80), "sort-6": Task("0123456789=", 0.1, 7, 140)}

# Settings of every recipe for a model of 0.16M parameters instead of billions.
SMALL = (
    "policy.optimizer.lr=1.5e-3",
    "policy.optimizer.betas=[0.9, 0.95]",
    "policy.optimizer.schedule=linear",
    "policy.optimizer.min_lr_ratio=0.1",
    "policy.optimizer.warmup_steps=0",
    "algorithm.epochs=1",
    "tracking.sinks=[]",
    "tracking.samples_every_steps=0",
)
# One answer per prompt: the critic, the greedy answer or the batch replaces siblings.
ALONE = ("samples_per_prompt=1", f"prompts_per_step={ANSWERS_PER_STEP}")
CRITIC = ("critic.optimizer.lr=1.5e-3",)
# Recipes without a ratio: each answer is used for one update, by the policy that gave it.
ON_POLICY = ("gpg", "maxrl", "opo", "optimal_token_baseline", "remax", "rloo")
# Settings of single recipes at this size.
OWN: dict[str, tuple[str, ...]] = {
    "ppo": (*ALONE, *CRITIC, "algorithm.advantage.lam=1.0"),
    # lambda of 1 - 1 / (alpha l) is 0.95 for l = 4 tokens; with the paper's alpha, made for thousands, it
    # would be 0.
    "vapo": (
        *CRITIC,
        "critic.warmup_steps=2",
        "algorithm.advantage.alpha=5.0",
        "samples_per_prompt=16",
        "prompts_per_step=32",
    ),
    # A process reward model that learns as fast as the policy forgets what the start of training taught it.
    "prime": ("critic.optimizer.lr=1e-4",),
    "remax": ALONE,
    "reinforce_pp": ALONE,
    # At the learning rate of the others, a seed of these forgets the task before it learns it.
    "gpg": ("policy.optimizer.lr=5e-4",),
    "sapo": ("policy.optimizer.lr=5e-4",),
    "scalerl": ("policy.optimizer.lr=5e-4",),
    "online_dpo": (
        "samples_per_prompt=2",
        f"prompts_per_step={ANSWERS_PER_STEP // 2}",
        "policy.optimizer.lr=5e-4",
    ),
    # Two rewards: the share of right positions is worth less than the whole.
    "gdpo": ("rewards.functions=[exact, {name: position_share, weight: 0.5}]",),
}
# Not a recipe of a method.
LEFT_OUT = ("quickstart",)


@dataclass(frozen=True)
class Curve:
    """Measurements of a run; accuracies are in [0, 1].

    Attributes:
        before, after: share of right answers, one sampled at temperature 1 for each held-out prompt.
        cpu_s: CPU seconds of the run without the warm start, on one thread.
        accuracies: of the answers of each step.
    """

    task: str
    recipe: str
    seed: int
    before: float
    after: float
    cpu_s: float
    accuracies: list[float]


def overrides(name: str, recipe: str, seed: int, folder: Path) -> list[str]:
    """Settings that make a recipe small and choose the task."""
    task, steps, answers, updates = TASKS[name], TASKS[name].steps, ANSWERS_PER_STEP, UPDATES_PER_STEP
    if recipe in ON_POLICY:
        steps, answers, updates = steps * updates, answers // updates, 1
    samples = load_config(recipe).samples_per_prompt
    own = [setting.replace(f"={ANSWERS_PER_STEP}", f"={answers}") for setting in OWN.get(recipe, ())]
    sizes = (
        []
        if any("prompts_per_step" in s for s in own)
        else ["samples_per_prompt=8", f"prompts_per_step={answers // 8}"]
    )
    if samples == 1 and recipe not in OWN:
        raise ValueError(f"need sizes for the recipe {recipe}, whose groups have one answer; add it to OWN")
    paths = [
        f"policy.path={folder / 'warm'}",
        f"output_dir={folder / recipe}",
        f"data.train=task:{name}",
        f"data.test=task:{name}",
        "evaluation.every_steps=null",  # it is done here, before and after
    ]
    teacher = [f"teacher.path={folder / 'grpo' / 'model'}"] if recipe == "distillation" else []
    minibatches = [
        f"algorithm.minibatches={updates}",
        f"sampling.max_tokens={task.max_tokens}",
        f"seed={seed}",
        f"steps={steps}",
    ]
    return [*SMALL, *minibatches, *sizes, *own, *paths, *teacher, *_short_answer_settings(recipe)]


def _short_answer_settings(recipe: str) -> list[str]:
    """Settings that turn off penalties for long answers and draws that would multiply the answers."""
    config = load_config(recipe)
    off = ["algorithm.overlong_buffer_tokens=0"] if config.algorithm.overlong_buffer_tokens else []
    if config.algorithm.aggregation.name == "seq_mean_token_sum_norm":
        off.append("algorithm.aggregation.length=8")
    if config.algorithm.dynamic_sampling:
        off.append("algorithm.max_resamples=1")
    return off


def warm_start(name: str, seed: int, folder: Path) -> None:
    """Make a model and fine-tune it until it is sometimes right; meant for a process of its own."""
    torch.set_num_threads(1)
    task, console = TASKS[name], Console(quiet=True)
    make_tiny_model(folder / "start", hidden=64, layers=3, seed=seed, characters=task.characters)
    data = [
        f"data.train=task:{name}",
        f"data.test=task:{name}",
        "tracking.sinks=[]",
        f"sampling.max_tokens={task.max_tokens}",
    ]
    warm_up(
        folder, quickstart_config(folder, seed=seed, algo="grpo", overrides=data), console, enough=task.warm
    )


def run(name: str, recipe: str, seed: int, folder: Path) -> Curve:
    """Train the warm start by a recipe; meant for a process of its own."""
    torch.set_num_threads(1)
    start = time.process_time()
    trainer = Trainer(load_config(recipe, overrides(name, recipe, seed, folder)), console=Console(quiet=True))
    before = trainer.evaluate()["eval/accuracy"]
    history = trainer.fit()
    after = trainer.evaluate()["eval/accuracy"]
    accuracies = [step["accuracy"] for step in history]
    if recipe in ON_POLICY:
        accuracies = [
            statistics.fmean(accuracies[i : i + UPDATES_PER_STEP])
            for i in range(0, len(accuracies), UPDATES_PER_STEP)
        ]
    shutil.rmtree(folder / recipe / "checkpoints", ignore_errors=True)
    return Curve(name, recipe, seed, before, after, time.process_time() - start, accuracies)


def by_pair(curves: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """(task, recipe) -> its runs."""
    pairs: dict[tuple[str, str], list[Curve]] = {}
    for curve in sorted(curves, key=lambda c: (c.task, c.recipe, c.seed)):
        pairs.setdefault((curve.task, curve.recipe), []).append(curve)
    return pairs


def table(curves: Sequence[Curve]) -> str:
    """Mean, minimum and maximum over the seeds, the best recipe of each task first, as Markdown."""
    lines = [
        "| Task | Recipe | Before, mean | After, mean (min to max) | CPU s of a run | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = sorted(
        by_pair(curves).items(), key=lambda item: (item[0][0], -statistics.fmean(c.after for c in item[1]))
    )
    for (name, recipe), runs in rows:
        after = [run.after for run in runs]
        lines.append(
            f"| `{name}` | `{recipe}` | {statistics.fmean(r.before for r in runs):.3f} "
            f"| {statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f}) "
            f"| {statistics.fmean(r.cpu_s for r in runs):.0f} "
            f"| {'' if improves(runs) else '**does not improve clearly**'} |"
        )
    return "\n".join(lines)


def improves(runs: Sequence[Curve]) -> bool:
    """True if the mean of the seeds rises clearly."""
    return statistics.fmean(run.after - run.before for run in runs) >= CLEARLY


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write a PNG with a panel per recipe: the mean over the seeds in each task; GRPO in grey."""
    pairs = by_pair(curves)
    recipes, tasks = sorted({recipe for _, recipe in pairs}), sorted({task for task, _ in pairs})
    columns = 5
    rows = -(-len(recipes) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.7 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    colors = {task: f"C{i}" for i, task in enumerate(tasks)}
    for axes, recipe in zip(panels, recipes, strict=False):
        for task in tasks:
            for shown, color in (("grpo", "lightgray"), (recipe, colors[task])):
                if (task, shown) not in pairs:
                    continue
                smooth = [smoothed(run.accuracies) for run in pairs[task, shown]]
                mean = [statistics.fmean(values) for values in zip(*smooth, strict=True)]
                axes.plot(
                    [(i + 1) / len(mean) for i in range(len(mean))],
                    mean,
                    color=color,
                    linewidth=1.2,
                    label=task,
                )
        axes.set_title(recipe, fontsize=8)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
    for axes in panels[len(recipes) :]:
        axes.set_axis_off()
    figure.supxlabel("share of the run", fontsize=8)
    figure.supylabel("accuracy of the sampled answers", fontsize=8)
    figure.legend(
        handles=[panels[0].plot([], [], color=colors[t], label=t)[0] for t in tasks],
        loc="outside lower right",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main() -> int:
    """Run the chosen recipes; return 1 if one does not improve clearly."""
    known = [name for name in RECIPES if name not in LEFT_OUT]
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
        "--recipes", nargs="+", choices=known, default=known, metavar="RECIPE", help=f"of {', '.join(known)}"
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument(
        "--json", type=Path, help="file for all figures; runs that are in it already are not repeated"
    )
    parser.add_argument("--png", type=Path, help="file for a picture of the curves")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    curves = _read(options.json)
    done = {(c.task, c.recipe, c.seed) for c in curves}
    seeds = [int(seed) for seed in options.seeds.split(",")]
    wanted = [(task, recipe, seed) for recipe in options.recipes for task in options.tasks for seed in seeds]
    # GRPO first: its policy is the teacher of the distillation.
    wanted = sorted(
        (w for w in wanted if w not in done), key=lambda w: (w[1] != "grpo", w[1] == "distillation")
    )
    with tempfile.TemporaryDirectory() as place:
        for batch in _stages(wanted, Path(place), options.processes):
            for curve in batch:
                curves.append(curve)
                points = " ".join(
                    f"{p:.2f}" for p in smoothed(curve.accuracies)[:: max(1, len(curve.accuracies) // 8)]
                )
                name = f"{curve.task:<7}{curve.recipe:<24} seed {curve.seed}"
                change = f"{curve.before:.3f} -> {curve.after:.3f}"
                print(f"{name}  {change}  {curve.cpu_s:4.0f} CPU s  {points}", flush=True)
                _write(options.json, curves)
    print(f"\n{table(curves)}")
    if options.png:
        draw(curves, options.png)
    return int(not all(improves(runs) for runs in by_pair(curves).values()))


def _stages(wanted, place: Path, processes: int):
    """Results of the runs as they come: GRPO, then the others, then those that need the policy of GRPO."""
    starts = sorted({(task, seed) for task, _, seed in wanted})
    folders = {start: place / f"{start[0]}-{start[1]}" for start in starts}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(warm_start, *zip(*starts, strict=True), folders.values()) if starts else ())
        needs_teacher = [w for w in wanted if w[1] == "distillation"]
        teachers = {(task, "grpo", seed) for task, _, seed in needs_teacher}
        first = [w for w in wanted if w not in needs_teacher]
        # A teacher that was measured in an earlier call is trained again, and not counted twice.
        again = sorted(teachers - set(first))
        for stage, counts in ((again, False), (first, True), (needs_teacher, True)):
            futures = [pool.submit(run, *w, folders[w[0], w[2]]) for w in stage]
            results = (future.result() for future in as_completed(futures))
            yield [r for r in results if counts] if not counts else results


def _read(path: Path | None) -> list[Curve]:
    if path is None or not path.exists():
        return []
    return [Curve(**row) for row in json.loads(path.read_text())["runs"]]


def _write(path: Path | None, curves: Sequence[Curve]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            asdict(c) | {"cpu_s": round(c.cpu_s, 1), "accuracies": [round(a, 3) for a in c.accuracies]}
            for c in curves
        ]
        rows.sort(key=lambda row: (row["recipe"], row["task"], row["seed"]))
        text = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"date": "{date.today().isoformat()}", "runs": [\n{text}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
