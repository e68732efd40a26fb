"""Answers of an evaluation on disk: appended as they are complete, read again by a continued evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.data.trajectory import Trajectory
from verl.trainer.evaluation.answering import EvalQuestion
from verl.trainer.evaluation.eval_sets import EvalSet
from verl.trainer.evaluation.measures import ScoredAnswer
from verl.trainer.evaluation.sample_rows import answer_row
from verl.utils.jsonl import json_line
from verl.utils.tokens import TextCodec

# Version of the files of an evaluation.
FORMAT = 1
_PARTS = {
    "format": "the version of its files",
    "model": "the model",
    "engine": "the engine or its precision",
    "data": "the prompts, as the model reads them, or their columns",
    "sampling": "the sampling parameters, or the number of answers",
    "rewards": "the reward functions, or their code",
    "agent": "the tools, the environment or the program, their code, or the limits of an episode",
}
Key = tuple[int, bool, int]


class AnswersFile:
    """The file `answers.jsonl` of an evaluation, beside `evaluation.json`, which says of what.

    Every answered question is one line for each answer. Of a portion that is not complete, all lines are
    dropped, and its questions are asked again.

    Args:
        folder: of the evaluation, created if absent.
        identity: fingerprints of all that the answers depend on, by part.
        sets: that are evaluated.
        portions: all questions, in portions that are kept or dropped as a whole.
        codec: of the policy.
        fresh: drop the answers of an earlier evaluation in the folder.

    Attributes:
        path: of the file.
        scored: answers to each question that is answered.

    Raises:
        ValueError: the folder has answers of another evaluation, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        sets: Sequence[EvalSet],
        portions: Sequence[Sequence[EvalQuestion]],
        *,
        codec: TextCodec,
        fresh: bool,
    ) -> None:
        self.path = folder / "answers.jsonl"
        self.scored: dict[Key, list[ScoredAnswer]] = {}
        self._sets, self._codec = sets, codec
        self._portions, questions = portions, [q for portion in portions for q in portion]
        self._places = {
            (sets[q.set].name, q.greedy, sets[q.set].prompts[q.number].index): q for q in questions
        }
        assert len(self._places) == len(questions), "need a number of its own for each row of a set"
        known = folder / "evaluation.json"
        if not fresh and not known.exists() and self.path.exists():
            raise ValueError(
                f"need a folder for each evaluation, but {folder} has a file answers.jsonl that is of none; "
                "take another --output, or --fresh to replace it"
            )
        if fresh or not known.exists():
            self.path.unlink(missing_ok=True)
            (folder / "results.json").unlink(missing_ok=True)
            write_json(known, {"format": FORMAT, "identity": dict(identity)})
            return
        changed = [part for part, value in identity.items() if _identity_in(known).get(part) != value]
        if changed:
            listed = "; ".join(_PARTS.get(part, part) for part in changed)
            raise ValueError(
                f"need a folder for each evaluation, but {folder} has answers of another one, which differs "
                f"in {listed}; take another --output, or --fresh to replace them"
            )
        if self.path.exists():
            self._read()

    def missing(self) -> list[Sequence[EvalQuestion]]:
        """The portions without answers, in order."""
        return [portion for portion in self._portions if any(q.key not in self.scored for q in portion)]

    def append(self, answered: Sequence[tuple[EvalQuestion, list[Trajectory]]]) -> None:
        """Write the answers to some questions, all of which are on disk when this returns.

        Raises:
            RuntimeError: they cannot be written.
        """
        lines = []
        for question, group in answered:
            for sample, trajectory in enumerate(group):
                trajectory.prompt = self._sets[question.set].prompts[question.number]
                place = {"set": self._sets[question.set].name, "sample": sample, "greedy": question.greedy}
                lines.append(json_line(place | answer_row(trajectory, self._codec)))
        with writing(self.path), self.path.open("ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.scored |= {question.key: [*map(ScoredAnswer.of, group)] for question, group in answered}

    def sort(self) -> None:
        """Put the lines in the order of the questions, in which an interruption leaves no trace."""
        order = {q.key: i for i, q in enumerate(self._places.values())}
        rows = [(order[q.key], row["sample"], at) for at, row, q in self._rows()]
        if rows != sorted(rows):
            self._keep([at for _, _, at in sorted(rows)])

    def shown(self, count: int) -> list[dict[str, Any]]:
        """Rows of the first answers, in turn from each set."""
        wanted = {
            (set_number, False, number)
            for number in range(count)
            for set_number in range(len(self._sets))
            if number * len(self._sets) + set_number < count
        }
        found = {q.key: row for _, row, q in self._rows() if q.key in wanted and row["sample"] == 0}
        return [found[key] for key in sorted(found, key=lambda key: (key[2], key[0]))]

    def _read(self) -> None:
        """Take over the portions that have all their answers, and drop the lines of the others."""
        scored: dict[Key, list[ScoredAnswer]] = {}
        places: dict[Key, list[int]] = {}
        for at, row, question in self._rows():
            scored.setdefault(question.key, []).append(ScoredAnswer.of_row(row))
            places.setdefault(question.key, []).append(at)
        for portion in self._portions:
            if all(len(scored.get(q.key, ())) == q.params.n for q in portion):
                self.scored |= {q.key: scored[q.key] for q in portion}
        self._keep(sorted(at for key in self.scored for at in places[key]))

    def _rows(self) -> Iterator[tuple[int, dict[str, Any], EvalQuestion]]:
        """Place in the file, content and question of every whole line."""
        at = 0
        with self.path.open("rb") as file:
            for line in file:
                row = _row_of(line)
                if row and (question := self._places.get((row["set"], row["greedy"], row["index"]))):
                    yield at, row, question
                at += len(line)

    def _keep(self, places: Sequence[int]) -> None:
        """Replace the file by the lines at these places, in this order."""
        part = self.path.with_suffix(".jsonl.part")
        with writing(self.path), self.path.open("rb") as file, part.open("wb") as kept:
            for at in places:
                file.seek(at)
                kept.write(file.readline())
        os.replace(part, self.path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A file is written inside; raises RuntimeError, which names it, if that fails."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path}: {error.strerror}; make room or correct its folder: the same command goes "
            "on with the answers that are kept"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one go; NaN and infinities become null.

    Raises:
        RuntimeError: it cannot be written.
    """
    part = path.with_suffix(".json.part")
    text = json.dumps(json.loads(json_line(content)), indent=2, ensure_ascii=False)
    with writing(path):
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def _identity_in(path: Path) -> Mapping[str, str]:
    try:
        known: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read {path}, which says what the answers beside it are of; take another --output, or "
            "--fresh to replace them"
        ) from error
    return known


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it was cut off."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"set", "greedy", "index", "sample"} <= row.keys() else None
