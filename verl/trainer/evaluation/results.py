"""Results of an evaluation: all metrics with their intervals as JSON, and as tables for the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from verl.config.run import TrainerConfig
from verl.trainer.evaluation.answering import measures_by
from verl.trainer.evaluation.answers_file import FORMAT
from verl.trainer.evaluation.eval_sets import EvalSet
from verl.trainer.evaluation.intervals import Estimate
from verl.trainer.evaluation.measures import (
    AnsweredPrompt,
    Measures,
    ks_of,
    mean_over_sets,
    measure,
    outcomes,
)
from verl.utils.sampling_types import Prompt, SamplingParams

_NO_SHARES = ("reward", "greedy/reward", "response_tokens")


def results_of(
    sets: Sequence[EvalSet],
    answered: Sequence[Sequence[AnsweredPrompt]],
    config: TrainerConfig,
    *,
    params: SamplingParams,
    identity: Mapping[str, str],
) -> dict[str, Any]:
    """The content of `results.json`.

    Returns:
        policy, sampling, samples, identity: of the evaluation.
        sets: for each set `name`, `source`, `prompts` (their number), `metrics` (each with `value`, `low` and
            `high`), `outcomes` (number of answers), `without_accuracy` (prompts whose rewards give none),
            `by` (parts by column and value) and `per_prompt` (means over the answers to each prompt).
        mean: metrics, means over the sets.
    """
    ks = ks_of(config.evaluation)
    measures = [measure(prompts, ks) for prompts in answered]
    rows = [
        {
            "name": one.name,
            "source": one.source,
            "prompts": len(one.prompts),
            "metrics": as_json(measured),
            "outcomes": outcomes(prompts),
            "without_accuracy": _without_accuracy(prompts, measured),
            "by": {
                column: [
                    {"value": value, "prompts": count, "metrics": as_json(part)}
                    for value, (count, part) in parts.items()
                ]
                for column, parts in measures_by(sets, one, prompts, config).items()
            },
            "per_prompt": [_per_prompt(p, a) for p, a in zip(one.prompts, prompts, strict=True)],
        }
        for one, prompts, measured in zip(sets, answered, measures, strict=True)
    ]
    settings = {name: value for name, value in vars(params).items() if name not in ("seed", "sample_index")}
    return {
        "format": FORMAT,
        "policy": config.policy.path,
        "samples": config.evaluation.samples,
        "sampling": settings,
        "identity": dict(identity),
        "mean": as_json(mean_over_sets(measures)),
        "sets": rows,
    }


def as_json(measures: Measures) -> dict[str, dict[str, float | None]]:
    """Metrics with value and bounds; those without an interval have the value alone."""
    return {
        name: {"value": e.value} if e.low is None else {"value": e.value, "low": e.low, "high": e.high}
        for name, e in measures.items()
    }


def prompt_id(prompt: Prompt) -> str:
    """16 hexadecimal digits of a prompt and its reference answer, by which two evaluations are matched."""
    text = json.dumps([prompt.content, prompt.answer], default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def results_table(results: Mapping[str, Any]) -> Table:
    """A line for each metric and a column for each set, with 95 % intervals, and for their mean."""
    sets = results["sets"]
    columns = [(one["name"], one["metrics"]) for one in sets]
    columns += [("mean of sets", results["mean"])] if len(sets) > 1 else []
    table = Table("", *(name for name, _ in columns))
    table.add_row("prompts", *(str(one["prompts"]) for one in sets))
    table.add_row("answers each", *(str(results["samples"]) for _ in sets))
    for name in dict.fromkeys(name for _, metrics in columns for name in metrics):
        shown = [estimate_text(metrics[name], name) if name in metrics else "" for _, metrics in columns]
        table.add_row(_title(name, results["samples"]), *shown)
    return table


def tables_by(results: Mapping[str, Any]) -> list[Table]:
    """A table for each set and column of `evaluation.by`."""
    tables = []
    for one in results["sets"]:
        for column, parts in one["by"].items():
            names = list(dict.fromkeys(name for part in parts for name in part["metrics"]))
            # The first k of several would fill the screen; results.json has them all.
            names = [name for name in names if name in _main_names(names)]
            table = Table(column, "prompts", *(_title(name, results["samples"]) for name in names))
            for part in parts:
                cells = [
                    estimate_text(part["metrics"][name], name) if name in part["metrics"] else ""
                    for name in names
                ]
                table.add_row(part["value"], str(part["prompts"]), *cells)
            table.title = one["name"] if len(results["sets"]) > 1 else None
            tables.append(table)
    return tables


def estimate_text(estimate: Mapping[str, float | None], name: str) -> str:
    """A value with its interval: `0.412 [0.368, 0.457]`."""
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "none"
    if low is None or high is None:
        return f"{value:.4g}" if name in _NO_SHARES else f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _title(name: str, samples: int) -> str:
    return f"accuracy (mean@{samples})" if name == "accuracy" else name.replace("_", " ")


def _main_names(names: Sequence[str]) -> set[str]:
    """Accuracies of a part, with the largest k alone; rewards where there are none."""
    at_k = [name for name in names if "@" in name]
    largest = {kind: name for name in at_k for kind in [name.partition("@")[0]]}
    main = {name for name in names if name.endswith("accuracy")} | set(largest.values())
    return main if "accuracy" in names else {"reward", *largest.values()}


def _per_prompt(prompt: Prompt, answered: AnsweredPrompt) -> dict[str, Any]:
    """Means over the answers to a prompt, those without a reward left out of `reward`."""
    rewards = [a.reward for a in answered.samples if a.reward is not None]
    row: dict[str, Any] = {
        "index": prompt.index,
        "id": prompt_id(prompt),
        "reward": sum(rewards) / len(rewards) if rewards else None,
    }
    if answered.has_accuracy:
        row["accuracy"] = sum(a.correctness for a in answered.samples) / len(answered.samples)
    if answered.greedy and answered.has_accuracy:
        row["greedy/accuracy"] = answered.greedy.correctness
    return row


def _without_accuracy(prompts: Sequence[AnsweredPrompt], measured: Mapping[str, Estimate]) -> int:
    """Prompts left out of the accuracy, if there is one."""
    return sum(not prompt.has_accuracy for prompt in prompts) if "accuracy" in measured else 0
