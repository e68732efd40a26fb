"""Sets of held-out prompts, each evaluated for itself, and their parts by the value of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl.config.data import DataSource
from verl.config.run import EvaluationConfig, TrainerConfig
from verl.data.dataset import LoadReport
from verl.data.reading.sources import SourceSetting, listed, metric_names, sources_of
from verl.utils.sampling_types import Prompt

# Parts of a set by a column: more values than this are refused, more numbers are put into bins.
MAX_VALUES, MAX_NUMBERS, NUM_BINS = 24, 8, 4
MISSING = "none"
# Parts of metric names, which a set cannot have as its name.
_TAKEN = ("greedy",)


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts of one source.

    Attributes:
        name: in metrics and files, different from that of any other set.
        source: as the settings name it, for people.
        prompts: in the order of the source, at most `evaluation.prompts`.
    """

    name: str
    source: str
    prompts: tuple[Prompt, ...]


def read_sets(
    setting: SourceSetting | None,
    evaluation: EvaluationConfig,
    read: Callable[[SourceSetting | None], tuple[Sequence[Prompt], LoadReport]],
    *,
    note: Callable[[str], None],
) -> list[EvalSet]:
    """The sets of `data.test`, one for each of its sources.

    Args:
        setting: value of `data.test`, or rows in memory.
        evaluation: number of prompts of a set, and columns.
        read: reads a source; refuses None.
        note: takes sentences on renamed sets and on what is left out.

    Raises:
        ValueError: there is no source, nothing usable in one, or a column of `evaluation.by` is not there.
    """
    sets = []
    names = set_names(sources_of(setting), note=note)
    for source, name in zip(listed(setting), names, strict=True) if names else [(None, "")]:
        prompts, report = read(source)
        if report.num_too_long:
            note(f"data.test: {report.num_too_long} rows of {name} are too long and left out")
        for line in report.notes:
            note(f"data.test: {line}")
        label = source.name or source.path if isinstance(source, DataSource) else report.source
        sets.append(EvalSet(name, label, tuple(prompts[: evaluation.prompts])))
    prompts_of_all = [prompt for one in sets for prompt in one.prompts]
    for column in evaluation.by:
        values_by_prompt(prompts_of_all, column)  # a mistake is found before anything is answered
    return sets


def set_names(sources: Sequence[DataSource], *, note: Callable[[str], None]) -> list[str]:
    """Names of sets: those of their sources, with a number behind a name that is taken."""
    names = metric_names(sources, taken=_TAKEN)
    for source, name in zip(sources, names, strict=True):
        if name != (plain := metric_names([source])[0]):
            note(
                f"data.test: {source.path} is called {name}, since {plain} is taken; a name of its own can "
                "be set: {path: ..., name: ...}"
            )
    return names


def evaluation_size(sets: Sequence[EvalSet], config: TrainerConfig) -> str:
    """The number of prompts and answers of an evaluation, in words."""
    listed = ", ".join(f"{len(one.prompts)} prompts of {one.source}" for one in sets)
    e = config.evaluation
    counts = [f"{e.samples} answers each"] if e.samples > 1 else []
    counts += ["a greedy one each"] if e.greedy else []
    return ", ".join([listed, " and ".join(counts)] if counts else [listed])


def interleaved(sets: Sequence[EvalSet]) -> list[Prompt]:
    """The prompts of all sets: the first of each, then the second of each, and so on."""
    longest = max(len(one.prompts) for one in sets)
    return [one.prompts[i] for i in range(longest) for one in sets if i < len(one.prompts)]


def values_by_prompt(prompts: Sequence[Prompt], column: str) -> list[str]:
    """The value of a column for each prompt, as text; numbers of many values are put into bins.

    Args:
        prompts: at least one.
        column: of `Prompt.columns`, `level` in a column `extra_info` as `extra_info.level`, or
            `data_source`. A prompt without it has the value `none`.

    Raises:
        ValueError: no prompt has the column, its values are lists or objects, or there are too many.
    """
    values = [column_value(prompt, column) for prompt in prompts]
    given = [value for value in values if value is not None]
    if not given:
        known = ", ".join(sorted({name for prompt in prompts for name in prompt.columns})) or "no others"
        raise ValueError(
            f"need a column of data.test in evaluation.by, got {column!r}, which no prompt has; the data has "
            f"data_source, {known}"
        )
    if any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in given):
        raise ValueError(
            f"need texts or numbers in a column of evaluation.by, got {type(given[0]).__name__} in {column!r}"
        )
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given)
    if is_number and len(set(given)) > MAX_NUMBERS:
        return _bins(values)
    texts = [MISSING if value is None else as_text(value) for value in values]
    if (count := len(set(texts))) > MAX_VALUES:
        few = ", ".join(repr(text) for text, _ in Counter(texts).most_common(3))
        raise ValueError(
            f"need a column of at most {MAX_VALUES} values in evaluation.by, got {count} in {column!r} "
            f"({few}, ...); name a coarser one"
        )
    return texts


def column_value(prompt: Prompt, column: str) -> Any:
    """Value of a column, or of a field `extra_info.level` in one; None if it is not there, or NaN."""
    if column == "data_source":
        return prompt.source or None
    value: Any = prompt.columns
    for part in [column] if column in prompt.columns else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is None or value != value else value


def as_text(value: Any) -> str:
    """A value in the name of a metric: one word, 5.0 as 5."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "_".join(str(value).replace("/", "_").split()) or "empty"


def _bins(values: Sequence[Any]) -> list[str]:
    """The bin of each number: quarters of the prompts, named by their smallest and largest number."""
    given = np.array(sorted(value for value in values if value is not None), dtype=np.float64)
    edges = np.unique(given[[len(given) * i // NUM_BINS for i in range(1, NUM_BINS)]])
    members = np.searchsorted(edges, given, side="right")
    names = {
        int(i): f"{given[members == i].min():g}..{given[members == i].max():g}" for i in np.unique(members)
    }
    return [
        MISSING if value is None else names[int(np.searchsorted(edges, value, side="right"))]
        for value in values
    ]
