"""`verl eval`: answers to held-out prompts, kept on disk, their metrics, and comparisons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from verl.config.algorithm import AlgorithmConfig
from verl.config.run import TrainerConfig
from verl.data.trajectory import Trajectory
from verl.monitoring.progress import print_line
from verl.monitoring.samples import sample_lines
from verl.trainer.checkpoint_store import only_run_in
from verl.trainer.evaluation import evaluation_size
from verl.trainer.evaluation.answering import (
    EvalQuestion,
    answer_in_portions,
    answered_set,
    portions_of,
    questions_of,
)
from verl.trainer.evaluation.answers_file import AnswersFile, write_json
from verl.trainer.evaluation.comparison import compare, comparison_table, read_results
from verl.trainer.evaluation.identity import digest, identity_of
from verl.trainer.evaluation.results import results_of, results_table, tables_by
from verl.trainer.rl_trainer import Trainer, rewards_with_task


def evaluate(config: TrainerConfig, *, output: str | None, fresh: bool) -> None:
    """`verl eval`: answer the held-out prompts that have no answers yet, and print and write the metrics.

    Args:
        config: of the policy, the data, the sampling and the rewards.
        output: folder; None: a name of the model and of a fingerprint of all that decides the answers, in the
            folder of `output_dir`.
        fresh: replace the answers that the folder has.
    """
    console = Console()
    # The default algorithm needs neither critic nor reference, so only the policy is loaded.
    # data.train is not read, but a task named there gives the reward.
    config = config.model_copy(
        update={
            "algorithm": AlgorithmConfig(),
            "epochs": None,
            "rewards": rewards_with_task(config),
            "data": config.data.model_copy(update={"train": None}),
        }
    )
    with closing(Trainer(config, console=console)) as trainer:
        sets = trainer.test_sets
        for note in trainer.notes:
            print_line(console, note)
        if trainer.rewards:
            trainer.rewards.check_data(trainer.test_prompts)
        questions = questions_of(sets, config, trainer.codec)
        identity = identity_of(config, sets, questions, trainer.codec)
        folder = Path(output) if output else default_folder(config, identity)
        portions = portions_of(questions, in_turn=trainer.collector.engine.in_turn)
        with only_run_in(folder):
            answers = AnswersFile(folder, identity, sets, portions, codec=trainer.codec, fresh=fresh)
            answer_missing(trainer, answers, num_questions=len(questions), console=console)
            answered = [answered_set(answers.scored, i, one) for i, one in enumerate(sets)]
            results = results_of(sets, answered, config, params=questions[0].params, identity=identity)
            answers.sort()
            write_json(folder / "results.json", results)
    print_line(console, "answers, with the special tokens that the model reads:")
    for line in sample_lines(answers.shown(config.tracking.num_samples)):
        print_line(console, line)
    show_results(console, results)
    print_line(console, f"results: {folder / 'results.json'}\nanswers: {answers.path}")


def answer_missing(trainer: Trainer, answers: AnswersFile, *, num_questions: int, console: Console) -> None:
    """Answer the questions that have no answers in the file, and say how far it is after each portion."""
    if kept := len(answers.scored):
        print_line(
            console,
            f"{answers.path} has the answers to {kept} of {num_questions} questions; --fresh answers anew",
        )

    def keep(portion: Sequence[tuple[EvalQuestion, list[Trajectory]]]) -> None:
        answers.append(portion)
        if (count := len(answers.scored)) < num_questions:
            trainer.progress.say(f"{count} of {num_questions} questions answered{_so_far(answers)}")

    if missing := answers.missing():
        with trainer.progress.phase(f"evaluating {evaluation_size(trainer.test_sets, trainer.config)}"):
            answer_in_portions(trainer.collector, missing, keep)


def default_folder(config: TrainerConfig, identity: dict[str, str]) -> Path:
    """Folder of an evaluation: another one for another model, data, sampling or reward."""
    named = Path(config.policy.path or config.policy.lora.path or "model")
    if named.name in ("model", "adapter") and named.parent.name:
        named = named.parent
    name = re.sub(r"[^\w.-]+", "-", named.name)
    return Path(config.output_dir).parent / f"eval-{name}-{digest(identity)[:8]}"


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Print the tables of an evaluation, and what they leave out."""
    console.print(results_table(results))
    for table in tables_by(results):
        console.print(table)
    for one in results["sets"]:
        failed = {name: count for name, count in one["outcomes"].items() if name != "ok"}
        if failed:
            listed = ", ".join(f"{name} {count}" for name, count in failed.items())
            print_line(console, f"{one['name']}: answers without a reward, counted as wrong: {listed}")
        if one["without_accuracy"]:
            print_line(
                console,
                f"{one['name']}: {one['without_accuracy']} prompts are in no accuracy, since their reward "
                "functions give none",
            )


def show_comparison(first: Path, second: Path) -> None:
    """`verl eval --compare A B`."""
    console = Console()
    results = read_results(first), read_results(second)
    compared = compare(*results)
    print_line(console, f"A: {first}\nB: {second}")
    console.print(comparison_table(compared))
    for letter, one in zip("AB", results, strict=True):
        alone = [s["name"] for s in one["sets"] if s["name"] not in compared]
        if alone and len(one["sets"]) > 1:
            print_line(
                console, f"left out, as no prompts of such a set are in both: {', '.join(alone)} of {letter}"
            )
    for name, one in compared.items():
        tests = {d.test for _, _, d in one["differences"].values()}
        print_line(console, f"{name}: p by {' and '.join(sorted(tests))}")
        if one["only_first"] or one["only_second"]:
            print_line(
                console,
                f"{name}: left out {one['only_first']} prompts that only A has, and {one['only_second']} "
                "that only B has",
            )


def _so_far(answers: AnswersFile) -> str:
    """The accuracy of the sampled answers so far, if there is one."""
    sampled = [a for key, group in answers.scored.items() if not key[1] for a in group]
    if not any(answer.accuracy is not None for answer in sampled):
        return ""
    return f", accuracy so far {sum(a.correctness for a in sampled) / len(sampled):.3f}"
