"""Commands that load PyTorch or Rich; `verl.cli.main` imports this module only when one of them runs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from verl.cli.chat_quickstart import run_chat_quickstart
from verl.cli.quickstart import run_quickstart
from verl.config.loader import to_yaml
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.data.tasks.episode_tasks import EPISODE_TASKS
from verl.data.tasks.table import TASKS, write_jsonl
from verl.engines.hf.pretrained import make_tiny_model
from verl.monitoring.formatting import format_bytes
from verl.monitoring.sinks import check_sinks
from verl.rollout.pool.admin_api import call_admin_api
from verl.trainer.base import BaseTrainer
from verl.trainer.export import export_checkpoint
from verl.trainer.export.hub_upload import HubUpload
from verl.trainer.preference import PreferenceTrainer
from verl.trainer.reward_model import RewardModelTrainer
from verl.trainer.rl_trainer import Trainer
from verl.trainer.run.run_sizes import bytes_on_disk
from verl.trainer.sft import SFTTrainer
from verl.utils.device import PRECISIONS
from verl.utils.tokens import CHARACTERS

# Settings of a run -> its trainer.
TRAINERS: dict[type[RunConfig], Callable[..., BaseTrainer]] = {
    TrainerConfig: Trainer,
    SFTConfig: SFTTrainer,
    PreferenceConfig: PreferenceTrainer,
    RewardModelConfig: RewardModelTrainer,
}


def fit(config: RunConfig, *, dry_run: bool) -> None:
    """`verl train`, `sft`, `preference` and `reward-model`.

    A dry run builds the trainer, reads the data, calls each reward function once, prints the settings, and
    stops.
    """
    check_sinks(config.tracking.sinks)
    console = Console()
    progress_console = Console(stderr=True) if dry_run else console  # the settings stay a file of their own
    with closing(TRAINERS[type(config)](config, console=progress_console)) as trainer:
        if dry_run:
            report = trainer.load_train_data()
            tried = try_rewards(trainer)
            console.out(to_yaml(trainer.config), end="", highlight=False)
            for note in report.notes:
                progress_console.out(f"data: {note}", highlight=False)
            is_stream = trainer.loader is not None and trainer.loader.num_prompts is None
            rows = "rows of a stream" if is_stream else f"{report.num_rows} rows"
            console.out(
                f"everything fits: {rows} from {report.source}, "
                f"{trainer.config.steps} steps; nothing was trained",
                highlight=False,
            )
            for line in tried:
                console.out(line, highlight=False)
            return
        if not trainer.fit():
            console.out(
                f"{config.output_dir} is already at step {trainer.version}; "
                "raise steps, or take another output_dir",
                highlight=False,
            )
        model = Path(config.output_dir) / "model"
        console.out(f"trained model: {model} ({format_bytes(bytes_on_disk(model))})", highlight=False)
        if (adapter := model.with_name("adapter")).is_dir():
            size = format_bytes(bytes_on_disk(adapter))
            console.out(f"its LoRA adapter, in PEFT's format: {adapter} ({size})", highlight=False)


def try_rewards(trainer: BaseTrainer) -> list[str]:
    """Sentences about one call of each reward function, on its first prompt; none without rewards."""
    if not (isinstance(trainer, Trainer) and trainer.rewards and trainer.loader):
        return []
    return trainer.rewards.try_out(trainer.loader.prompts, trainer.codec)


def export(args: argparse.Namespace) -> None:
    """`verl export`."""
    console, folder = Console(), Path(args.folder)
    upload = HubUpload(args.push_to_hub, folder, args.private) if args.push_to_hub else None
    if upload is None and (args.private or args.dry_run):
        raise ValueError("need --push-to-hub USER/NAME beside --private or --dry-run, which change an upload")
    if upload:
        upload.check_name() if args.dry_run else upload.check()
    taken = export_checkpoint(
        Path(args.checkpoint),
        folder,
        role=args.role,
        dtype=PRECISIONS[args.dtype],
        max_file_bytes=args.max_shard_size,
        adapter_only=args.adapter_only,
    )
    console.out(f"model: {folder} ({args.role} of {taken})", highlight=False)
    if upload and args.dry_run:
        console.out(describe_upload(upload), highlight=False)
    elif upload:
        console.out(f"uploaded: {upload.send()}", highlight=False)


def describe_upload(upload: HubUpload) -> str:
    """Lines on the repository and the files that an upload would send."""
    files = upload.files()
    visibility = "private" if upload.is_private else "public"
    lines = [f"{size:>15,} bytes  {name}" for name, size in files.items()]
    return "\n".join(
        (
            f"would send {len(files)} files of {sum(files.values()):,} bytes to the model repository "
            f"{upload.repo} ({visibility} if it is new); nothing was sent",
            *lines,
        )
    )


def engines(args: argparse.Namespace) -> None:
    """`verl engines list|add|remove`."""
    console, folder = Console(), Path(args.run_folder)
    if args.action == "remove" and not args.name:
        raise ValueError("need the name of the engine to remove; `verl engines list` shows them")
    if args.action == "add":
        added = call_admin_api(folder, "POST", "/engines", {"name": args.name, "address": args.address})
        console.out(f"added {added['name']}", highlight=False)
    elif args.action == "remove":
        removed = call_admin_api(folder, "DELETE", f"/engines/{quote(args.name)}")
        console.out(f"leaving: {removed['name']}", highlight=False)
    else:
        console.print(engines_table(call_admin_api(folder, "GET", "/engines")))


def engines_table(pool: Mapping[str, Any]) -> Table:
    """The engines of a pool, from the answer of its admin API."""
    columns = ("engine", "state", "since", "version", "running", "served", "last failure")
    table = Table(*columns, title=f"policy version {pool['version']}")
    for row in pool["engines"]:
        since, failure = f"{row['for_s']:g} s", row["cause"].partition("\n")[0]
        cells = (row["name"], row["state"], since, row["version"], row["running"], row["served"], failure)
        table.add_row(*map(str, cells))
    return table


def quickstart(args: argparse.Namespace) -> None:
    """`verl quickstart`."""
    if args.model == "tiny":
        if args.task:
            raise ValueError(
                f"need --model smollm2 beside --task {args.task}: the tiny model knows no words, it learns "
                "addition"
            )
        folder = Path(args.output or "outputs/quickstart")
        run_quickstart(folder, seed=args.seed, algo=args.algo or "grpo")
        return
    if args.algo == "ppo":
        raise ValueError("need --algo grpo beside --model: PPO is shown with the tiny model")
    folder = Path(args.output or f"outputs/quickstart-{Path(args.model).name}")
    run_chat_quickstart(folder, model=args.model, task=args.task or "chain_sum", seed=args.seed)


def make_model(args: argparse.Namespace) -> None:
    """`verl make-model`."""
    if args.words and args.words not in EPISODE_TASKS:
        raise ValueError(f"need a task of {', '.join(EPISODE_TASKS)} for --words, got {args.words!r}")
    make_tiny_model(
        Path(args.folder),
        hidden=args.hidden,
        layers=args.layers,
        seed=args.seed,
        characters=args.characters or CHARACTERS,
        words=EPISODE_TASKS[args.words].words if args.words else (),
    )
    Console().out(f"model: {args.folder}", highlight=False)


def make_data(args: argparse.Namespace) -> None:
    """`verl make-data`."""
    if args.task not in TASKS:
        near = difflib.get_close_matches(args.task, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"need a task of {', '.join(TASKS)}, got {args.task!r}; did you mean {near!r}?")
    rows = write_jsonl(TASKS[args.task], args.split, args.path, seed=args.seed, form=args.form)
    Console().out(f"{rows} rows: {args.path}", highlight=False)
