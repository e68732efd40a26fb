"""Comparison of two evaluations over the prompts that both have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from verl.trainer.evaluation.answers_file import FORMAT
from verl.trainer.evaluation.intervals import Difference, paired_difference

_METRICS = ("accuracy", "greedy/accuracy", "reward")


def read_results(place: Path) -> dict[str, Any]:
    """The content of a `results.json`, given as the file or its folder.

    Raises:
        ValueError: there is none, or it is not of this version.
    """
    path = place / "results.json" if place.is_dir() else place
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"need results.json of an evaluation that is complete, cannot read {path}: {error}"
        ) from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "sets" not in results:
        raise ValueError(f"need results.json as verl eval writes it, format {FORMAT}, got another in {path}")
    return results


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Differences of the second evaluation and the first, by set and metric.

    Prompts are matched by their content and reference answer within sets of the same name; if each has one
    set, their names may differ.

    Returns:
        By set: `differences` by metric, each a `Difference` with the means of both, and `only_first` and
        `only_second`, the numbers of prompts that the other does not have.

    Raises:
        ValueError: no prompt is in both.
    """
    one_each = len(first["sets"]) == len(second["sets"]) == 1
    found: dict[str, dict[str, Any]] = {}
    for one in first["sets"]:
        other = next((s for s in second["sets"] if one_each or s["name"] == one["name"]), None)
        if other is None:
            continue
        rows, others = by_prompt(one["per_prompt"]), by_prompt(other["per_prompt"])
        both = [key for key in rows if key in others]
        if not both:
            continue
        found[one["name"]] = {
            "differences": {
                name: difference
                for name in _METRICS
                if (difference := _difference([rows[k] for k in both], [others[k] for k in both], name))
            },
            "only_first": len(rows) - len(both),
            "only_second": len(others) - len(both),
        }
    if not found:
        raise ValueError("need evaluations of the same prompts, got two that share none")
    return found


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Rows of `per_prompt` by prompt; one that occurs several times is numbered."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        number = counts[row["id"]] = counts.get(row["id"], -1) + 1
        found[row["id"], number] = row
    return found


def comparison_table(compared: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each set and metric."""
    table = Table("set", "metric", "prompts", "A", "B", "B - A [95 %]", "p", "better", "worse")
    for name, one in compared.items():
        for metric, (a, b, d) in one["differences"].items():
            shown = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            cells = (name, metric, d.prompts, f"{a:.3f}", f"{b:.3f}", shown, f"{d.p_value:.2g}")
            table.add_row(*map(str, (*cells, d.better, d.worse)))
    return table


def _difference(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], name: str
) -> tuple[float, float, Difference] | None:
    """Means of both and their difference over the prompts for which both have the metric; None without."""
    pairs = [
        (float(row[name]), float(other[name]))
        for row, other in zip(rows, others, strict=True)
        if row.get(name) is not None and other.get(name) is not None
    ]
    if not pairs:
        return None
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    bounded = name != "reward" and all(0 <= value <= 1 for value in (*first, *second))
    means = sum(first) / len(first), sum(second) / len(second)
    return (*means, paired_difference(first, second, bounded=bounded))
