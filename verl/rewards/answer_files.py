"""Answers from outside of a run: the columns of a file, or rows in memory, as trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from verl.config.data import DataSource, RewardsConfig
from verl.data.loading.row_prompts import as_row, row_reward
from verl.data.reading.file_readers import numbered
from verl.data.reading.row_cells import MalformedRow, describe
from verl.data.reading.sources import name_of, read_rows
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Prompt

# Names that columns go by, the first that is there. `answer` is the answer of a model only where another
# column holds the reference.
_PROMPTS = ("prompt", "question", "problem", "instruction", "messages", "query", "input")
_RESPONSES = (
    *("response", "responses", "completion", "completions", "output", "outputs", "generation", "generations"),
    *("generated_text", "prediction", "predictions", "model_output", "answers"),
)
_REFERENCES = ("reference", "ground_truth", "reward_model", "answer", "target", "label", "solution", "gold")
_MAX_PROBLEMS = 5


@dataclass(frozen=True)
class AnswerColumns:
    """Columns of a file of answers.

    Attributes:
        prompt: text or chat messages; None: there is none.
        response: the answer, or a list of several.
        reference: truth that rewards compare with; None: there is none.
    """

    prompt: str | None = None
    response: str | None = None
    reference: str | None = None

    def found_in(self, row: Mapping[str, Any]) -> AnswerColumns:
        """The same, with columns of known names in place of those that are not given.

        Raises:
            ValueError: there is no column with answers, or one that is named does not exist.
        """
        for field in fields(self):
            name = vars(self)[field.name]
            if name is not None and name not in row:
                raise ValueError(
                    f"need a column {name!r} for the {field.name}, the file has {', '.join(row)}; name "
                    f"another with --{field.name}-key"
                )
        taken = {name for name in vars(self).values() if name}

        def first(names: Iterable[str]) -> str | None:
            return next((name for name in names if name in row and name not in taken), None)

        response = self.response or first(_RESPONSES)
        if response is None and first(name for name in _REFERENCES if name != "answer"):
            response = first(("answer",))
        if response is None:
            raise ValueError(
                f"need a column with the answers of the model ({', '.join(_RESPONSES[:8])}), the file has "
                f"{', '.join(row)}; name it with --response-key"
            )
        taken.add(response)
        return AnswerColumns(self.prompt or first(_PROMPTS), response, self.reference or first(_REFERENCES))

    def in_words(self) -> str:
        """One line that says which column is read as what."""
        return "; ".join(f"{name}: {column or 'none'}" for name, column in vars(self).items())


def read_answers(
    source: DataSource | Sequence[Mapping[str, Any]],
    columns: AnswerColumns,
    rewards: RewardsConfig,
) -> tuple[list[Trajectory], AnswerColumns]:
    """Answers of a file, or of rows in memory, as trajectories without tokens.

    The answers of a row are a group. In the file of `verl eval` each answer has a row, with the other columns
    of its prompt in `columns`; answers to one prompt are a group there too.

    Args:
        source: the file, or its rows.
        columns: names of columns; those that are None are found by known names.
        rewards: names the column with the reward function of a row, and functions that rows may name.

    Returns:
        The answers in their order, and the columns that were read.

    Raises:
        ValueError: the file cannot be read, a row has no answer, or there is none at all.
    """
    if isinstance(source, DataSource):
        rows, name = read_rows(source, "test"), name_of(source)
    else:
        rows, name = numbered(source), "rows"
    answers: list[Trajectory] = []
    problems: list[str] = []
    known: AnswerColumns | None = None
    groups: dict[Any, int] = {}
    number = 0
    for place, raw in rows:
        try:
            row = as_row(dict(raw) if isinstance(raw, Mapping) else raw)
            known = known or columns.found_in(row)
            prompt = _prompt(row, known, number, name)
            if rewards.column is not None and row.get(rewards.column) not in (None, ""):
                column = f"the column {rewards.column!r}"
                choice = row_reward(row[rewards.column], column, named=rewards.functions)
                prompt = Prompt(**{**vars(prompt), "reward": choice})
            texts = answer_texts(row.get(known.response or ""))
            key = (row.get("set"), row.get("index"), row.get("greedy")) if _is_of_evaluation(row) else number
            group = groups.setdefault(key, len(groups))
            answers += [Trajectory(prompt, [], [], [], None, [], group, text=text) for text in texts]
        except MalformedRow as problem:
            problems.append(f"{place}: {problem}")
        number += 1
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:_MAX_PROBLEMS])
        raise ValueError(f"{len(problems)} of {number} rows cannot be used:{listed}\ncorrect or remove them")
    if not answers or known is None:
        raise ValueError(f"need at least one answer, {name} has none")
    return answers, known


def answer_texts(cell: Any) -> list[str]:
    """Texts of one or several answers: a text, an assistant's messages, or a list of them.

    Raises:
        MalformedRow: there is none, or one without a text.
    """
    values = list(cell) if isinstance(cell, list | tuple) else [cell]
    if values and all(isinstance(value, Mapping) for value in values):
        values = [values]  # the messages of one answer
    texts = [_text(value) for value in values]
    if not texts:
        raise MalformedRow("need at least one answer, got an empty list")
    return texts


def _text(value: Any) -> str:
    message = value[-1] if isinstance(value, list | tuple) and value else value
    text = message.get("content") if isinstance(message, Mapping) else message
    if not isinstance(text, str):
        raise MalformedRow(f"need an answer as a text or as messages, got {describe(value)}")
    return text


def _is_of_evaluation(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("columns"), Mapping) and "index" in row


def _prompt(row: Mapping[str, Any], columns: AnswerColumns, number: int, default_source: str) -> Prompt:
    own = row["columns"] if isinstance(row.get("columns"), Mapping) else {}
    given = {**row, **own}
    reference = None if columns.reference is None else row.get(columns.reference)
    if columns.reference == "reward_model" and isinstance(reference, Mapping):
        reference = reference.get("ground_truth")
    content = "" if columns.prompt is None else row.get(columns.prompt)
    if _is_of_evaluation(row) and row.get("messages"):
        content = row["messages"]  # `prompt` is the text of the last one
    if not isinstance(content, str):
        content = [dict(message) for message in content or () if isinstance(message, Mapping)]
    source = next((given[key] for key in ("data_source", "source") if given.get(key)), default_source)
    used = {columns.prompt, columns.response, columns.reference, "columns"} - {"reward_model"}
    others = {name: value for name, value in given.items() if name not in used}
    return Prompt(content, reference, str(source), number, others)
