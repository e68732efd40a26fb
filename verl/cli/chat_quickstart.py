"""The quickstart of a pretrained chat model: it learns a task of reasoning-gym from rewards."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl.cli.packaged_model import SMOLLM2, fetch_model
from verl.cli.quickstart import accuracy_of, command_name, say, show_curve
from verl.config.loader import load_config, load_sft_config
from verl.config.run import TrainerConfig
from verl.data.tasks.gym_tasks import PREFIX, check_name
from verl.data.trajectory import Trajectory
from verl.monitoring.formatting import printable
from verl.trainer.base import Metrics
from verl.trainer.evaluation import answer_all
from verl.trainer.rl_trainer import Trainer
from verl.trainer.sft import SFTTrainer

_SHOWN = 6


@dataclass(frozen=True)
class Demo:
    """A task of reasoning-gym at a size at which a small chat model learns it on a CPU.

    Attributes:
        task: name of the generator.
        meaning: the question in a few words.
        minutes: of the whole run on two CPU cores, in words; "": not measured.
        options: of the generator.
        changes: settings besides those of all demos.
        taught_steps: steps of fine-tuning on solved questions before, for a task at which the model is never
            right, so that no reward says what to do; 0: none.
    """

    task: str
    meaning: str
    minutes: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    taught_steps: int = 0


# Settings of all demos, over the recipe grpo. Values found by trying with 135M parameters.
_SETTINGS = (
    "steps=20",
    "prompts_per_step=16",
    "samples_per_prompt=8",
    # As in DAPO, https://arxiv.org/abs/2503.14476, section 3.1: keeps rare answers alive.
    "algorithm.policy_loss.clip_high=0.28",
    "algorithm.aggregation=token_mean",
    "algorithm.kl.where=off",
    "policy.lora={rank: 16, alpha: 32}",
    "policy.optimizer={lr: 3.0e-4, betas: [0.9, 0.95]}",
    "data.system_prompt=Answer with the result only.",
    "sampling.max_tokens=16",
    "tracking.sinks=[console, jsonl]",
    "evaluation.every_steps=null",
)
# The last number of an answer counts, as on GSM8K: a model of this size seldom writes it alone.
_LAST_NUMBER = "rewards.functions=[{name: reasoning_gym, number: true}]"
DEMOS = {
    demo.task: demo
    for demo in (
        Demo(
            "chain_sum",
            "sums and differences of two numbers of one or two digits",
            "6 to 10",
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            (_LAST_NUMBER,),
        ),
        Demo(
            "countdown",
            "calculations that use given numbers to reach another one",
            options={"min_numbers": 3, "max_numbers": 3, "max_value": 20, "min_target": 5, "max_target": 50},
            changes=("sampling.max_tokens=24", "data.system_prompt=Write one expression only."),
            minutes="about 20",
            taught_steps=40,
        ),
    )
}


def run_chat_quickstart(folder: Path, *, model: str, task: str, seed: int) -> Metrics:
    """Fetch the model if need be, and run the demo of a task.

    Args:
        folder: output folder.
        model: smollm2, or the folder or hub name of another chat model.
        task: of `DEMOS`, or another generator of reasoning-gym, with its own sizes.
        seed: of data order, new weights and sampling.

    Raises:
        ValueError: there is no such task or model, or a package is missing.
        RuntimeError: the model cannot be fetched.
    """
    console = Console()
    check_name(task)  # before the long parts
    path = str(fetch_model(SMOLLM2, lambda line: say(console, line))) if model == SMOLLM2.name else model
    demo = DEMOS.get(task) or Demo(
        task, f"the task {task} of reasoning-gym", changes=("sampling.max_tokens=64",)
    )
    # Here the arithmetic is large enough to be shared by the cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cores())
    return learn(folder, path, demo=demo, seed=seed, console=console)


def learn(
    folder: Path,
    model: str,
    *,
    demo: Demo,
    seed: int = 0,
    console: Console,
    overrides: Sequence[str] = (),
) -> Metrics:
    """Evaluate the model, train it, evaluate it again, and print the progress.

    Args:
        folder: output folder; the run of an earlier quickstart in it is replaced.
        model: folder or hub name of a chat model.
        demo: the task.
        seed: of data order, new weights and sampling.
        console: for output.
        overrides: further settings.

    Returns:
        accuracy_before and accuracy_after on the held-out prompts at temperature 1, and seconds.
    """
    start = time.perf_counter()
    for part in ("run", "taught"):
        shutil.rmtree(folder / part, ignore_errors=True)
    config = demo_config(folder / "run", model, demo=demo, seed=seed, overrides=overrides)
    say(console, opening(Path(model).name, demo))
    if demo.taught_steps:
        config = taught(folder / "taught", config, demo.taught_steps, console)
    with closing(Trainer(config, console=console)) as trainer:
        trainer.load_train_data()
        before = answer_all(trainer.collector, trainer.test_prompts, config)
        trainer.clock.take()
        say(console, f"   {described(before)}")
        say(console, f"\n2. {config.steps} steps of GRPO, {config.samples_per_prompt} answers to each prompt")
        history = trainer.fit()
        after = answer_all(trainer.collector, trainer.test_prompts, config)
    say(console, "\n3. What it learned\n")
    console.print(comparison(before, after))
    picture, curve = folder / "accuracy.png", [metrics["accuracy"] for metrics in history]
    show_curve(console, curve, picture, title=f"{demo.task} by GRPO, seed {seed}")
    seconds = time.perf_counter() - start
    result = {
        "accuracy_before": accuracy_of(before),
        "accuracy_after": accuracy_of(after),
        "seconds": seconds,
    }
    say(
        console,
        f"\nheld-out questions, at temperature 1:\n   before: {described(before)}\n"
        f"   after:  {described(after)} ({seconds / 60:.1f} minutes in all)",
    )
    run = folder / "run"
    say(console, f"trained model, Hugging Face format: {run / 'model'}\nLoRA adapter: {run / 'adapter'}")
    say(console, f"curve: {picture}\nmetrics: {run / 'metrics.jsonl'}")
    say(console, next_commands(run))
    return result


def demo_config(
    output: Path, model: str, *, demo: Demo, seed: int, overrides: Sequence[str] = ()
) -> TrainerConfig:
    """Settings of a demo's run."""
    source = json.dumps({"path": f"task:{PREFIX}{demo.task}", "options": dict(demo.options)})
    data = [f"{key}={source}" for key in ("data.train", "data.test")]
    run = [f"policy.path={model}", f"output_dir={output}", f"seed={seed}"]
    return load_config("grpo", [*_SETTINGS, *data, *run, *demo.changes, *overrides])


def opening(model: str, demo: Demo) -> str:
    """First lines of a demo."""
    minutes = f"On two CPU cores: {demo.minutes} minutes. " if demo.minutes else ""
    return (
        f"verl quickstart: {model} learns {demo.meaning} by GRPO,\nfrom rewards alone. {minutes}"
        f"Threads of this run: {torch.get_num_threads()}.\n\n1. The model as it comes"
    )


def taught(folder: Path, config: TrainerConfig, steps: int, console: Console) -> TrainerConfig:
    """Fine-tune the model on solved questions; returns the settings with the model that came out."""
    say(console, f"   {steps} steps of fine-tuning on solved questions, as it is never right by itself")
    run = [f"steps={steps}", "rows_per_step=16", f"output_dir={folder}", f"seed={config.seed}"]
    settings = load_sft_config(None, [*run, "tracking.sinks=[console, jsonl]"])
    shared = {"train": config.data.train, "system_prompt": config.data.system_prompt}
    data = settings.data.model_copy(update=shared)
    settings = settings.model_copy(update={"policy": config.policy, "data": data})
    with closing(SFTTrainer(settings, console=console)) as tuner:
        tuner.fit()
    policy = config.policy.model_copy(update={"path": str(folder / "model")})
    return config.model_copy(update={"policy": policy})


def described(groups: Sequence[Sequence[Trajectory]]) -> str:
    """Accuracy, reward and length of answers, in words."""
    answers = [answer for group in groups for answer in group]
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    tokens = sum(len(answer.response_ids) for answer in answers) / len(answers)
    return (
        f"accuracy {accuracy_of(groups):.3f} on {len(groups)} prompts, mean reward "
        f"{sum(rewards) / max(len(rewards), 1):.3f}, {tokens:.1f} tokens an answer"
    )


def comparison(before: Sequence[Sequence[Trajectory]], after: Sequence[Sequence[Trajectory]]) -> Table:
    """Answers to the same prompts before and after the training."""
    table = Table(show_lines=True)
    for title in ("prompt", "before", "after", "reference"):
        table.add_column(title, overflow="fold")
    for (old, *_), (new, *_) in list(zip(before, after, strict=True))[:_SHOWN]:
        content = old.prompt.content
        prompt = content if isinstance(content, str) else content[-1]["content"]
        texts = (prompt, old.text, new.text, str(old.prompt.answer or ""))
        table.add_row(*(Text(printable(text.strip()[:400], keep_newlines=True)) for text in texts))
    return table


def next_commands(run: Path) -> str:
    """Commands to try next: talk to the model, evaluate it at more tokens, train on own prompts."""
    verl, config = command_name(), shlex.quote(str(run / "config.yaml"))
    model = shlex.quote(str(run / "model"))
    policy, output = (
        shlex.quote(f"{key}={run / name}") for key, name in (("policy.path", "model"), ("output_dir", "own"))
    )
    return (
        "\nNext, try:\n"
        f"  {verl} serve {model}\n"
        f"  {verl} eval {config} {policy} policy.lora.rank=0 evaluation.samples=4\n"
        f"  {verl} train {config} data.train=YOURS.jsonl data.test=null 'rewards.functions=[exact]' {output}"
    )


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
