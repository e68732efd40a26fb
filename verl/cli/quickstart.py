"""The quickstart: a small random model is warmed up on examples, and then learns addition from rewards."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from verl.config.loader import load_config, load_sft_config
from verl.config.run import TrainerConfig
from verl.data.trajectory import Trajectory
from verl.engines.hf.pretrained import make_tiny_model
from verl.monitoring.display import samples_table, save_curve, terminal_curve
from verl.trainer.base import Metrics
from verl.trainer.evaluation import answer_all, sample_row, summarize
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer
from verl.utils.tokens import TextCodec

# A policy learns from rewards only if some of its sampled answers are correct: the sampled accuracy counts,
# not that of the most likely answer.
_WARM_ACCURACY = 0.22
_WARM_CHECK_STEPS = 10
_WARM_MAX_STEPS = 600

# Changes to the recipe `quickstart` for a critic instead of groups: more prompts, one answer each.
_PPO = (
    "prompts_per_step=512",
    "samples_per_prompt=1",
    "algorithm.advantage={name: gae, gamma: 1.0, lam: 1.0}",
    "critic.optimizer.lr=1.5e-3",
)


def run_quickstart(
    folder: Path, *, seed: int = 0, algo: str = "grpo", console: Console | None = None
) -> Metrics:
    """Create, warm up, train and evaluate a model, and print the progress.

    Args:
        folder: output folder; the files of an earlier quickstart are replaced.
        seed: seed of weights, data and sampling.
        algo: grpo or ppo.
        console: destination of human-readable output; none: standard output.

    Returns:
        accuracy_before and accuracy_after on the held-out prompts at temperature 1, and seconds.
    """
    console, start = console or Console(), time.perf_counter()
    # One thread is faster for a model this small, and gives the same numbers on any number of cores.
    torch.set_num_threads(1)
    for part in ("start", "warm", "run"):
        shutil.rmtree(folder / part, ignore_errors=True)
    config = quickstart_config(folder, seed=seed, algo=algo)
    say(
        console,
        f"verl quickstart: a model of 0.16M parameters learns two-digit addition by {algo.upper()}. "
        "On two CPU cores: 1 to 3 minutes.\n\n"
        "1. A random model, taught by examples until about one sampled answer in four is right.",
    )
    make_tiny_model(folder / "start", hidden=64, layers=3, seed=seed, characters="0123456789+=")
    warm_up(folder, config, console)

    say(
        console,
        f"\n2. {config.steps} steps of {algo.upper()}: no more answers are shown, "
        "only whether its own were right.",
    )
    trainer = Trainer(config, console=console)
    before = answer_all(trainer.collector, trainer.test_prompts, config)
    trainer.clock.take()
    history = trainer.fit()
    after = answer_all(trainer.collector, trainer.test_prompts, config)

    accuracy = {"accuracy_before": accuracy_of(before), "accuracy_after": accuracy_of(after)}
    picture, curve = folder / "accuracy.png", [metrics["accuracy"] for metrics in history]
    title = f"add-2 by {algo.upper()}, seed {seed}"
    show_learned(console, after, curve, picture, codec=trainer.codec, title=title)
    seconds = time.perf_counter() - start
    say(
        console,
        f"\naccuracy on {len(after)} held-out prompts at temperature 1: "
        f"{accuracy['accuracy_before']:.3f} before, "
        f"{accuracy['accuracy_after']:.3f} after ({seconds:.0f} s in all)",
    )
    model = Path(config.output_dir) / "model"
    metrics_file = Path(config.output_dir) / "metrics.jsonl"
    say(console, f"trained model, Hugging Face format: {model}\ncurve: {picture}\nmetrics: {metrics_file}")
    say(console, next_steps(folder, model))
    return {**accuracy, "seconds": seconds}


def show_learned(
    console: Console,
    groups: Sequence[Sequence[Trajectory]],
    curve: Sequence[float],
    picture: Path,
    *,
    codec: TextCodec,
    title: str,
) -> None:
    """Print some answers and the accuracy of each step, and write the curve as a picture."""
    say(console, "\n3. What it learned\n")
    console.print(samples_table([sample_row(group[0], codec) for group in groups[:8]]))
    show_curve(console, curve, picture, title=title)


def show_curve(console: Console, curve: Sequence[float], picture: Path, *, title: str) -> None:
    """Print the accuracy of each step as a curve, and write it as a picture."""
    say(console, terminal_curve(curve, title="accuracy of the sampled answers, by step"))
    steps = [i + 1.0 for i in range(len(curve))]
    save_curve(picture, steps, curve, title=title, ylabel="accuracy")


def quickstart_config(folder: Path, *, seed: int, algo: str, overrides: Sequence[str] = ()) -> TrainerConfig:
    """The recipe `quickstart`, or its form with a critic, with overrides on top."""
    config = load_config("quickstart", [f"seed={seed}", *(_PPO if algo == "ppo" else ()), *overrides])
    policy = config.policy.model_copy(update={"path": str(folder / "warm")})
    changes = {"policy": policy, "output_dir": str(folder / "run")}
    # Its own evaluations, before and after, also show answers.
    changes["evaluation"] = config.evaluation.model_copy(update={"every_steps": None})
    return config.model_copy(update=changes)


def warm_up(folder: Path, config: TrainerConfig, console: Console, *, enough: float = _WARM_ACCURACY) -> int:
    """Fine-tune `folder/start` on reference answers up to a low accuracy, and write `folder/warm`.

    Args:
        folder: folder of both models.
        config: settings of the RL run that follows; its prompts are learned, and its sampling is evaluated.
        console: destination of human-readable output.
        enough: sampled accuracy on 256 held-out prompts at which to stop.

    Returns:
        The number of steps.

    Raises:
        RuntimeError: the accuracy is not reached in time.
    """
    overrides = [f"data.train={config.data.train}", f"seed={config.seed}", "rows_per_step=128"]
    optimizer = [
        "policy.optimizer.lr=6e-3",
        "policy.optimizer.warmup_steps=10",
        "policy.optimizer.betas=[0.9, 0.95]",
    ]
    settings = load_sft_config(None, [*overrides, *optimizer])
    policy = settings.policy.model_copy(update={"path": str(folder / "start")})
    quiet = Console(quiet=True)  # what they do is said here
    tuner = SFTTrainer(settings.model_copy(update={"policy": policy}), console=quiet)
    tuner.load_train_data()
    # Both trainers hold the same model, so this one generates with the weights that are being fine-tuned.
    evaluator = Trainer(
        config, actor_model=tuner.policy_engine.model.transformer, codec=tuner.codec, console=quiet
    )
    while tuner.version < _WARM_MAX_STEPS:
        loss = tuner.step().get("loss", float("nan"))  # absent if the engine skipped the update
        if tuner.version % _WARM_CHECK_STEPS:
            continue
        accuracy = accuracy_of(answer_all(evaluator.collector, evaluator.test_prompts[:256], config))
        if tuner.version % (4 * _WARM_CHECK_STEPS) == 0 or accuracy >= enough:
            say(console, f"   step {tuner.version:3}   loss {loss:.3f}   sampled accuracy {accuracy:.3f}")
        if accuracy >= enough:
            tuner.save_model(folder / "warm")
            return tuner.version
    raise RuntimeError(
        f"the warm-up did not reach an accuracy of {enough} in {_WARM_MAX_STEPS} steps; try another --seed"
    )


def accuracy_of(groups: Sequence[Sequence[Trajectory]]) -> float:
    """mean@k over answered prompts."""
    return summarize(groups)["eval/accuracy"]


def next_steps(folder: Path, model: Path) -> str:
    """Three commands to try next."""
    verl = command_name()
    policy, warm = (shlex.quote(f"policy.path={path}") for path in (model, folder / "warm"))
    output = shlex.quote(f"output_dir={folder / 'dapo'}")
    return (
        "\nNext, try:\n"
        f"  {verl} eval quickstart {policy} evaluation.samples=4 sampling.max_tokens=4\n"
        f"  {verl} train quickstart {warm} {output} algorithm.dynamic_sampling=true\n"
        f"  {verl} config algorithm"
    )


def command_name() -> str:
    """The program to type: `verl`, or its path where a shell finds none or another one."""
    started = Path(sys.argv[0])
    own = started if started.name == "verl" and started.exists() else Path(sys.prefix) / "bin" / "verl"
    found = shutil.which("verl")
    if found and own.exists() and Path(found).resolve() == own.resolve():
        return "verl"
    return shlex.quote(str(own)) if own.exists() else f"{shlex.quote(sys.executable)} -m verl.cli.main"


def say(console: Console, text: str) -> None:
    """Print a line of text without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
