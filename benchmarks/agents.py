"""Learning curves of tasks of several turns, as tools, as an environment and as a program."""

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
from curves import NUM_POINTS, smoothed
from matplotlib.figure import Figure
from rich.console import Console

from verl.config import load_config, load_sft_config
from verl.data.tasks.table import TASKS, write_jsonl
from verl.engines.hf.pretrained import make_tiny_model
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer

EXAMPLES = Path(__file__).parent.parent / "examples" / "agents"


@dataclass(frozen=True)
class AgentTask:
    """A task of `verl.data.tasks.episode_tasks`, and the settings of its training.

    Attributes:
        warm_steps: of fine-tuning on the teacher's traces, at most.
        enough: mean reward of sampled episodes at which it stops.
        steps: of learning from rewards.
        at_least: mean reward on held-out prompts that every run must reach.
        settings: of all its runs.
        rungs: form of the episodes -> further settings.
    """

    warm_steps: int
    enough: float
    steps: int
    at_least: float
    settings: tuple[str, ...]
    rungs: dict[str, tuple[str, ...]]


AGENT_TASKS = {
    "guess": AgentTask(
        400,
        0.4,
        80,
        0.9,
        ("sampling.max_tokens=8", "agent.max_calls=6", "agent.max_turns=7", "evaluation.samples=8"),
        {
            "environment": (f"agent.environment={EXAMPLES}/guess.py:Guess",),
            "tools": (
                f"agent.tools=[{EXAMPLES}/guess.py:guess]",
                f"rewards.functions=[{EXAMPLES}/guess.py:found]",
            ),
            "program": (f"agent.program={EXAMPLES}/guess.py:play",),
        },
    ),
    "calculator": AgentTask(
        300,
        0.3,
        100,
        0.9,
        ("sampling.max_tokens=16", "agent.max_turns=3"),
        {
            "environment": (
                f"agent.environment={EXAMPLES}/lookup.py:Calculator",
                "rewards.functions=[exact]",
            ),
            "tools": ("agent.tools=[calculator]",),
            "program": (f"agent.program={EXAMPLES}/lookup.py:compute",),
        },
    ),
    "search": AgentTask(
        300,
        0.3,
        50,
        0.9,
        ("sampling.max_tokens=16", "agent.max_turns=3"),
        {"tools": ("agent.tools=[{{name: search, corpus: {folder}/documents.jsonl, top_k: 1}}]",)},
    ),
}


@dataclass(frozen=True)
class AgentCurve:
    """Measurements of a run; rewards are in [0, 1].

    Attributes:
        before, after: mean reward of held-out prompts at temperature 1.
        cpu_s: CPU seconds of learning from rewards, on one thread, with both evaluations.
        wall_s: seconds of the same.
        turns: mean turns of an episode in the last step.
        rewards: mean reward of the episodes of each step.
    """

    task: str
    rung: str
    seed: int
    before: float
    after: float
    cpu_s: float
    wall_s: float
    turns: float
    rewards: list[float]


def settings_of(name: str, rung: str, seed: int, folder: str, overrides: Sequence[str] = ()) -> list[str]:
    """Settings of a run from the taught model in the folder."""
    task = AGENT_TASKS[name]
    return [
        f"seed={seed}",
        f"steps={task.steps}",
        f"policy.path={folder}/taught/model",
        f"data.train=task:{name}",
        f"data.test=task:{name}",
        f"output_dir={folder}/{rung}",
        "prompts_per_step=32",
        "samples_per_prompt=8",
        "algorithm.epochs=1",
        "algorithm.minibatches=2",
        "algorithm.kl.where=off",
        "policy.optimizer.lr=2e-3",
        # Without, the first updates of Adam are so large that what fine-tuning taught is lost.
        "policy.optimizer.warmup_steps=5",
        "policy.optimizer.schedule=constant",
        "agent.max_processes=256",
        "evaluation.every_steps=null",
        "tracking.sinks=[]",
        *task.settings,
        *(setting.format(folder=folder) for setting in task.rungs[rung]),
        *overrides,
    ]


def taught(name: str, seed: int, folder: Path) -> int:
    """Fine-tune a small model on the traces of the teacher, and write `folder/taught/model`.

    A policy learns from rewards only if some of its sampled episodes earn one, so their mean reward decides
    when to stop.

    Returns:
        The number of steps.
    """
    torch.set_num_threads(1)
    task, start, quiet = AGENT_TASKS[name], folder / "start", Console(quiet=True)
    make_tiny_model(start, hidden=64, layers=2, seed=seed, words=TASKS[name].words)
    write_jsonl(TASKS[name], "train", folder / "traces.jsonl", seed=seed, form="traces")
    if TASKS[name].documents:
        write_jsonl(TASKS[name], "train", folder / "documents.jsonl", form="documents")
    settings = [
        f"policy.path={start}",
        f"data.train={folder / 'traces.jsonl'}",
        f"seed={seed}",
        f"steps={task.warm_steps}",
        "rows_per_step=64",
        "policy.optimizer.lr=4e-3",
        "policy.optimizer.warmup_steps=10",
        "policy.optimizer.betas=[0.9, 0.95]",
        "tracking.sinks=[]",
    ]
    tuner = SFTTrainer(load_sft_config(None, settings), console=quiet)
    tuner.load_train_data()
    # Both trainers hold the same model, so this one plays with the weights that are being fine-tuned.
    few = ("evaluation.prompts=128", f"evaluation.samples={256 // min(len(TASKS[name].rows('test')), 128)}")
    config = load_config("quickstart", settings_of(name, next(iter(task.rungs)), seed, str(folder), few))
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"path": str(start)})})
    model = tuner.policy_engine.model.transformer
    player = Trainer(config, actor_model=model, codec=tuner.codec, console=quiet)
    while tuner.version < task.warm_steps:
        tuner.step()
        if tuner.version % 20:
            continue
        player.release_devices()  # what its engine keeps of earlier turns is from earlier weights
        if player.evaluate()["eval/reward"] >= task.enough:
            break
    tuner.save_model(folder / "taught" / "model")
    player.close()
    return tuner.version


def run(name: str, rung: str, seed: int, folder: str, overrides: Sequence[str] = ()) -> AgentCurve:
    """Train from the taught model in the folder; meant for a process of its own."""
    torch.set_num_threads(1)
    settings = settings_of(name, rung, seed, folder, overrides)
    shutil.rmtree(f"{folder}/{rung}", ignore_errors=True)
    begun = time.process_time(), time.perf_counter()
    trainer = Trainer(load_config("quickstart", settings), console=Console(quiet=True))
    before = trainer.evaluate()["eval/reward"]
    history = trainer.fit()
    after = trainer.evaluate()["eval/reward"]
    trainer.close()
    spent = time.process_time() - begun[0], time.perf_counter() - begun[1]
    return AgentCurve(
        name,
        rung,
        seed,
        before,
        after,
        *spent,
        history[-1]["episode/turns"],
        [step["reward"] for step in history],
    )


def points(rewards: Sequence[float]) -> str:
    """Means over equal parts of the run, as text."""
    size = len(rewards) / NUM_POINTS
    parts = (rewards[round(i * size) : round((i + 1) * size)] for i in range(NUM_POINTS))
    return " ".join(f"{statistics.fmean(part):.2f}" for part in parts if part)


def table(curves: Sequence[AgentCurve]) -> str:
    """Mean, minimum and maximum over the seeds, as Markdown."""
    lines = [
        "| Task | Form | Seeds | Steps | CPU s of a run | Turns | Before, mean | After, mean (min to max) "
        "| Wanted of each | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, rung), runs in by_pair(curves).items():
        after, wanted = [r.after for r in runs], AGENT_TASKS[name].at_least
        lines.append(
            f"| `{name}` | {rung} | {', '.join(str(r.seed) for r in runs)} | {len(runs[0].rewards)} "
            f"| {statistics.fmean(r.cpu_s for r in runs):.0f} "
            f"| {statistics.fmean(r.turns for r in runs):.1f} "
            f"| {statistics.fmean(r.before for r in runs):.3f} "
            f"| {statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f}) | {wanted} "
            f"| {'reached' if min(after) >= wanted else '**not reached**'} |"
        )
    return "\n".join(lines)


def by_pair(curves: Sequence[AgentCurve]) -> dict[tuple[str, str], list[AgentCurve]]:
    """(task, form) -> its runs."""
    pairs: dict[tuple[str, str], list[AgentCurve]] = {}
    for curve in curves:
        pairs.setdefault((curve.task, curve.rung), []).append(curve)
    return pairs


def draw(curves: Sequence[AgentCurve], path: Path) -> None:
    """Write a PNG with a panel per task: mean and range over the seeds for each form."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure = Figure(figsize=(4 * len(tasks), 3.2), dpi=100, layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], strict=True))
    for (name, rung), runs in by_pair(curves).items():
        smooth = [smoothed(run.rewards) for run in runs]
        steps = range(1, len(smooth[0]) + 1)
        means = [statistics.fmean(values) for values in zip(*smooth, strict=True)]
        (line,) = panels[name].plot(steps, means, label=rung)
        low, high = ([pick(values) for values in zip(*smooth, strict=True)] for pick in (min, max))
        panels[name].fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for name, axes in panels.items():
        axes.set(title=name, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    panels[tasks[0]].set_ylabel("mean reward of the episodes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main() -> int:
    """Run the chosen tasks one after the other; return 1 if a run stays below the goal of its task."""
    rungs = list(dict.fromkeys(rung for task in AGENT_TASKS.values() for rung in task.rungs))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=AGENT_TASKS, default=list(AGENT_TASKS))
    parser.add_argument("--rungs", nargs="+", choices=rungs, default=rungs, help="forms of the episodes")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument(
        "--json", type=Path, help="file for all figures; runs that are in it are not repeated"
    )
    parser.add_argument("--png", type=Path, help="file for a picture of the curves")
    parser.add_argument("--folder", type=Path, help="keep the taught models here, and use those that are")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    curves: list[AgentCurve] = []
    if options.json and options.json.exists():
        curves = [AgentCurve(**row) for row in json.loads(options.json.read_text())["runs"]]
    done = {(curve.task, curve.rung, curve.seed) for curve in curves}
    with tempfile.TemporaryDirectory() as place:
        for name in options.tasks:
            for seed in map(int, options.seeds.split(",")):
                folder = (options.folder or Path(place)) / f"{name}-{seed}"
                wanted = [r for r in AGENT_TASKS[name].rungs if r in options.rungs]
                wanted = [rung for rung in wanted if (name, rung, seed) not in done]
                if wanted and not (folder / "taught" / "model").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    in_own_process(taught, name, seed, folder)
                for rung in wanted:
                    curve = in_own_process(run, name, rung, seed, str(folder), options.set)
                    curves.append(curve)
                    print(
                        f"{name:<11}{rung:<12} seed {seed}  {curve.before:.3f} -> {curve.after:.3f}  "
                        f"{curve.cpu_s:4.0f} CPU s {curve.wall_s:4.0f} s  {points(curve.rewards)}",
                        flush=True,
                    )
                    write(options.json, curves)
    print(f"\n{table(curves)}")
    if options.png:
        draw(curves, options.png)
    return int(any(curve.after < AGENT_TASKS[curve.task].at_least for curve in curves))


def in_own_process(function, *args):
    """Result of a call in a fresh process, so that no run depends on the memory of another."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write(path: Path | None, curves: Sequence[AgentCurve]) -> None:
    """Write all figures, one run in each line."""
    if path:
        rows = [asdict(c) | {"rewards": [round(r, 3) for r in c.rewards]} for c in curves]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"date": "{date.today().isoformat()}", "runs": [\n{text}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
