"""The table of all built-in tasks, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from verl.data.tasks.answer_tasks import ANSWER_TASKS, Task, near_miss
from verl.data.tasks.episode_tasks import EPISODE_TASKS, EpisodeTask

TASKS: dict[str, Task | EpisodeTask] = {**ANSWER_TASKS, **EPISODE_TASKS}
# Form of a file -> its content.
FORMS = {
    "rows": "prompts with answers",
    "pairs": "pairs of the right answer and a near miss",
    "traces": "conversations of a scripted teacher, with its calls of tools",
    "documents": "the texts that the tool searches",
}
Form = Literal["rows", "pairs", "traces", "documents"]


def write_jsonl(
    task: Task | EpisodeTask,
    split: Literal["train", "test"],
    path: str | Path,
    *,
    seed: int = 0,
    form: Form = "rows",
) -> int:
    """Write a split as a JSONL file, one row per line, and return the number of rows.

    Args:
        task: of `TASKS`.
        split: training or held-out rows; documents have no splits.
        path: of the file.
        seed: draws the training rows, and what a teacher does.
        form: {prompt, answer} and columns of the task; pairs {prompt, chosen, rejected}; traces {messages,
            tools}; documents {text}.

    Raises:
        ValueError: the task has no such form.
    """
    rows = rows_of(task, split, seed=seed, form=form)
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return len(lines)


def rows_of(
    task: Task | EpisodeTask, split: Literal["train", "test"], *, seed: int = 0, form: Form = "rows"
) -> Iterable[dict[str, Any]]:
    """Rows of a form, as `write_jsonl` writes them."""
    if form == "rows":
        return task.rows(split, seed)
    if form == "pairs" and isinstance(task, Task):
        pairs = ((row["prompt"], row["answer"]) for row in task.rows(split, seed))
        return [{"prompt": p, "chosen": a, "rejected": near_miss(a, key=p)} for p, a in pairs]
    if form == "traces" and isinstance(task, EpisodeTask):
        return task.traces(split, seed)
    if form == "documents" and isinstance(task, EpisodeTask) and task.documents:
        return [{"text": text} for text in task.documents]
    known = [name for name, one in TASKS.items() if has_form(one, form)]
    raise ValueError(f"need a task with {FORMS[form]}, got {task.name}; there are {', '.join(known)}")


def has_form(task: Task | EpisodeTask, form: Form) -> bool:
    """True if a task can be written in this form."""
    if isinstance(task, Task):
        return form in ("rows", "pairs")
    return form in ("rows", "traces") or (form == "documents" and bool(task.documents))
