"""`verl score`: rewards of a file of answers, without a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from verl.config.checks.function_options import option_parameters
from verl.config.data import RewardsConfig, WeightedChoice
from verl.config.yaml_text import parse_override
from verl.data.trajectory import Trajectory
from verl.monitoring.progress import print_line
from verl.rewards.answer_files import AnswerColumns
from verl.rewards.library.reward_table import REWARDS, load_function, reward_lines
from verl.rewards.scoring import ScoreReport, check_output, score_answers
from verl.utils.jsonl import json_line

_WIDTH = 100


def score(args: argparse.Namespace) -> int:
    """`verl score`."""
    console = Console()
    if args.list:
        for line in reward_lines():
            print_line(console, line)
        return 0
    if not args.file:
        raise ValueError("need a file of answers: verl score FILE --with exact; --list shows the functions")
    output, figures_file = (Path(path) if path else None for path in (args.output, args.json))
    check_output(output)
    check_output(figures_file)
    report = score_answers(
        args.file,
        columns=AnswerColumns(args.prompt_key, args.response_key, args.reference_key),
        settings=score_settings(args.functions, timeout_s=args.timeout_s, column=args.reward_key),
    )
    figures = report.figures()
    if output:
        with output.open("wb") as file:
            file.writelines(map(json_line, report.rows()))
    if figures_file:
        figures_file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for note in report.notes:
        print_line(console, f"note: {note}")
    print_line(console, f"columns: {report.columns.in_words()}")
    print_report(console, report, figures, show=args.show)
    return int(figures["failed"] > RewardsConfig().max_failed_share * figures["answers"])


def score_settings(
    functions: Sequence[Sequence[str]], *, timeout_s: float | None = None, column: str | None = None
) -> RewardsConfig:
    """Reward settings of the arguments of the command.

    Args:
        functions: name of each, and its options as OPTION=VALUE; `weight` is one.
        timeout_s: limit of one call; None: that of `rewards.timeout_s`.
        column: with the function of a row.

    Raises:
        ValueError: an option without a value.
    """
    choices = []
    for name, *options in functions:
        choice: dict[str, Any] = {"name": name}
        for text in options:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise ValueError(
                    f"need options of {name} as OPTION=VALUE behind --with {name}, got {text!r}; the file of "
                    "answers comes before --with"
                )
            choice[key] = parse_override(value, key, is_text=_takes_text(name, key), is_list=False)
        choices.append(WeightedChoice.model_validate(choice))
    limit = {} if timeout_s is None else {"timeout_s": timeout_s}
    return RewardsConfig.model_validate({"functions": tuple(choices), "column": column, **limit})


def print_report(console: Console, report: ScoreReport, figures: dict[str, Any], *, show: int) -> None:
    """Print the figures, and some answers with the lowest rewards."""
    table = Table("", "answers", "reward", "accuracy", "without a reward")
    for name, row in (("all", figures), *_sources(figures)):
        failed = ", ".join(f"{outcome} {count}" for outcome, count in row["outcomes"].items()) or "0"
        table.add_row(name, str(row["answers"]), _number(row["reward"]), _number(row.get("accuracy")), failed)
    for name, row in figures["functions"].items():
        table.add_row(
            f"function {name}", str(row["answers"]), _number(row["mean"]), _number(row.get("accuracy"))
        )
    console.print(table)
    if "pass" in figures:
        print_line(console, f"rows with a right answer: {figures['pass']:.4g} of {figures['rows']}")
    worst = report.worst(show)
    if worst:
        print_line(console, f"the {len(worst)} lowest of {figures['answers']} answers:")
    for answer in worst:
        for line in answer_lines(answer):
            print_line(console, line)


def answer_lines(answer: Trajectory) -> list[str]:
    """Lines on one answer: its end, the reference, and its reward or the cause why it has none."""
    reward = answer.detail if answer.reward is None else f"{answer.reward:.4g}"
    extras = "".join(f"; {name}: {_short(value)}" for name, value in answer.extras.items() if value != "")
    text = answer.text.rstrip()
    shown = text if len(text) <= _WIDTH else f"...{text[-_WIDTH:]}"
    return [
        f"  row {answer.prompt.index}: {' '.join(shown.split())!r}",
        f"    reference {_short(answer.prompt.answer)!s}; reward {reward}{extras}",
    ]


def _sources(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    sources = figures["sources"]
    return list(sources.items()) if len(sources) > 1 else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."


def _takes_text(name: str, option: str) -> bool:
    """True if an option of a built-in function is a text, which is taken as it was typed."""
    if name not in REWARDS or not REWARDS[name].function:
        return False
    function = load_function(name)
    return option in option_parameters(function) and get_type_hints(function).get(option) in (str, str | None)
