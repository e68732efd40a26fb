"""What the commands do that need models; the command line itself loads none."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from verl.cli.quickstart import run_quickstart
from verl.config.algorithm import AlgorithmConfig
from verl.config.loader import to_yaml
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.data.tasks import TASKS, write_jsonl
from verl.engines.hf.pretrained import make_tiny_model
from verl.monitoring.display import samples_table
from verl.monitoring.sinks import check_sinks
from verl.rollout.pool.admin_api import ask
from verl.trainer.base import BaseTrainer
from verl.trainer.evaluation import answer_all, summarize
from verl.trainer.export import export_checkpoint
from verl.trainer.preference import PreferenceTrainer
from verl.trainer.reward_model import RewardModelTrainer
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sample_table import sample_row
from verl.trainer.sft import SFTTrainer
from verl.utils.tokens import CHARACTERS

# What a configuration trains with.
TRAINERS: dict[type[RunConfig], Callable[..., BaseTrainer]] = {
    TrainerConfig: Trainer,
    SFTConfig: SFTTrainer,
    PreferenceConfig: PreferenceTrainer,
    RewardModelConfig: RewardModelTrainer,
}


def fit(config: RunConfig, *, dry_run: bool) -> None:
    """`verl train`, `sft`, `preference`, `reward-model`; a dry run reads the data as well, shows the
    settings, and stops.
    """
    check_sinks(config.tracking.sinks)
    console = Console()
    with closing(TRAINERS[type(config)](config, console=console)) as trainer:
        if dry_run:
            report = trainer.load_train_data()
            console.out(to_yaml(config), end="", highlight=False)
            console.out(
                f"everything fits: {report.num_rows} rows from {report.source}, {config.steps} steps; nothing was trained",
                highlight=False,
            )
            return
        if not trainer.fit():
            told = f"{config.output_dir} is already at step {trainer.version}; raise steps, or take another output_dir"
            console.out(told, highlight=False)
        console.out(f"trained model: {Path(config.output_dir) / 'model'}", highlight=False)


def evaluate(config: TrainerConfig) -> None:
    """`verl eval`: prints metrics and sample answers."""
    console = Console()
    # The default algorithm has neither a critic nor a reference: answers need no second and third model.
    config = config.model_copy(update={"algorithm": AlgorithmConfig()})
    with closing(Trainer(config, console=console)) as trainer:
        groups = answer_all(trainer.collector, trainer.test_prompts, config)
    console.print(samples_table([sample_row(group[0]) for group in groups[: config.tracking.num_samples]]))
    print_metrics(console, {"eval/prompts": float(len(groups)), **summarize(groups)})


def print_metrics(console: Console, metrics: Mapping[str, float]) -> None:
    """One metric per line."""
    for name, value in metrics.items():
        console.out(f"{name:24} {value:.4g}", highlight=False)


def export(args: argparse.Namespace) -> None:
    """`verl export`."""
    export_checkpoint(Path(args.checkpoint), Path(args.folder))
    Console().out(f"model: {args.folder}", highlight=False)


def engines(args: argparse.Namespace) -> None:
    """`verl engines list|add|remove`."""
    console, folder = Console(), Path(args.run_folder)
    if args.action == "remove" and not args.name:
        raise ValueError("need the name of the engine to remove; `verl engines list` shows them")
    if args.action == "add":
        console.out(
            f"added {ask(folder, 'POST', '/engines', {'name': args.name, 'address': args.address})['name']}",
            highlight=False,
        )
    elif args.action == "remove":
        console.out(
            f"leaving: {ask(folder, 'DELETE', f'/engines/{quote(args.name)}')['name']}", highlight=False
        )
    else:
        found = ask(folder, "GET", "/engines")
        table = Table(
            "engine",
            "state",
            "since",
            "version",
            "running",
            "served",
            "last failure",
            title=f"policy version {found['version']}",
        )
        for row in found["engines"]:
            cells = (
                row["name"],
                row["state"],
                f"{row['for_s']:g} s",
                row["version"],
                row["running"],
                row["served"],
            )
            table.add_row(*map(str, cells), row["cause"].partition("\n")[0])
        console.print(table)


def quickstart(args: argparse.Namespace) -> None:
    """`verl quickstart`."""
    run_quickstart(Path(args.output), seed=args.seed, algo=args.algo)


def make_model(args: argparse.Namespace) -> None:
    """`verl make-model`."""
    characters = args.characters or CHARACTERS
    make_tiny_model(
        Path(args.folder), hidden=args.hidden, layers=args.layers, seed=args.seed, characters=characters
    )
    Console().out(f"model: {args.folder}", highlight=False)


def make_data(args: argparse.Namespace) -> None:
    """`verl make-data`."""
    if args.task not in TASKS:
        near = difflib.get_close_matches(args.task, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"need a task of {', '.join(TASKS)}, got {args.task!r}; did you mean {near!r}?")
    rows = write_jsonl(TASKS[args.task], args.split, args.path, seed=args.seed, pairs=args.pairs)
    Console().out(f"{rows} rows: {args.path}", highlight=False)
