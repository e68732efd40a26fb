"""Scores of answers outside of training, with the same functions, checks and limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from verl.config.data import DataSource, RewardsConfig, WeightedChoice
from verl.data.trajectory import Trajectory
from verl.rewards.answer_files import AnswerColumns, read_answers
from verl.rewards.functions import build_rewards
from verl.rewards.parameters import CallContext
from verl.utils.sampling_types import Prompt

# Answers that are scored at a time; functions over all answers get so many at most.
_AT_ONCE = 512
_NO_COLUMNS, _NO_SETTINGS = AnswerColumns(), RewardsConfig()


@dataclass(frozen=True)
class ScoreReport:
    """Scored answers.

    Attributes:
        answers: with `reward`, `scores`, `outcome` and `detail`; those of one row share their `group`.
        columns: that were read.
        names: of the reward functions, in their order.
        with_accuracy: those that gave an accuracy.
        notes: sentences for the user, such as functions that were chosen by the data set.
    """

    answers: Sequence[Trajectory]
    columns: AnswerColumns
    names: Sequence[str]
    with_accuracy: Collection[str]
    notes: Sequence[str] = ()

    def figures(self) -> dict[str, Any]:
        """Means and counts: of all answers, by function and by data source; JSON values.

        reward: over the answers that have one; accuracy: share of right answers, one without a reward counts
        as wrong; pass: share of rows with a right answer, where rows have several; failed: answers without a
        reward, outcomes: their causes.
        """
        sources: dict[str, list[Trajectory]] = {}
        for answer in self.answers:
            sources.setdefault(answer.prompt.source, []).append(answer)
        return {
            **_figures(self.answers),
            "functions": {name: self._of_function(name) for name in self.names},
            "sources": {source: _figures(answers) for source, answers in sources.items()},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each answer, with its scores; JSON values where the columns are."""
        for answer in self.answers:
            yield {
                "prompt": answer.prompt.content,
                "response": answer.text,
                "reference": answer.prompt.answer,
                "data_source": answer.prompt.source,
                "row": answer.prompt.index,
                "reward": answer.reward,
                "scores": answer.scores,
                "outcome": answer.outcome,
                "detail": answer.detail,
                **({"extras": answer.extras} if answer.extras else {}),
            }

    def worst(self, count: int) -> list[Trajectory]:
        """Some answers to look at: those without a reward first, then those with the lowest."""
        by_reward = sorted(self.answers, key=lambda a: (a.reward is not None, a.reward or 0.0))
        return by_reward[:count]

    def _of_function(self, name: str) -> dict[str, Any]:
        values = [answer.scores[name] for answer in self.answers if name in answer.scores]
        right = [self._accuracy(answer, name) for answer in self.answers]
        known = [value for value in right if value is not None]
        mean = fmean(values) if values else None
        return {"mean": mean, "answers": len(values), **({"accuracy": fmean(known)} if known else {})}

    def _accuracy(self, answer: Trajectory, name: str) -> float | None:
        """Accuracy by one function; that of the first one that gave one has no prefix."""
        givers = (other for other in self.names if other in self.with_accuracy and other in answer.scores)
        return answer.scores.get("accuracy" if name == next(givers, None) else f"{name}/accuracy")


def score_answers(
    source: str | DataSource | Sequence[Mapping[str, Any]],
    functions: Sequence[str | Mapping[str, Any] | WeightedChoice] = (),
    *,
    reward_fn: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    columns: AnswerColumns = _NO_COLUMNS,
    settings: RewardsConfig = _NO_SETTINGS,
) -> ScoreReport:
    """Score the answers of a file or of rows in memory, with the functions that training would use.

    No model is loaded, and answers have no tokens: functions get texts.

    Args:
        source: file of answers, or its rows as mappings.
        functions: by name or with options, as in `rewards.functions`; none: those of the settings, or those
            that suit the public data set of each row.
        reward_fn: further functions.
        columns: names of the columns; those that are None are found by known names.
        settings: time limit, isolation, and the column with the function of a row.

    Returns:
        The scored answers.

    Raises:
        ValueError: the file cannot be read, or a function cannot score its rows.
    """
    if functions:
        settings = RewardsConfig.model_validate({**dict(settings), "functions": tuple(functions)})
    where = DataSource(path=source) if isinstance(source, str) else source
    answers, found = read_answers(where, columns, settings)
    prompts = list({answer.group: answer.prompt for answer in answers}.values())
    notes = greedy_note(answers)
    context = CallContext(prompt_text=plain_prompt_text)
    rewards = build_rewards(settings, reward_fn, prompts=prompts, context=context, note=notes.append)
    try:
        rewards.check_without_tokens()
        rewards.check_data(prompts)
        for start in range(0, len(answers), _AT_ONCE):
            rewards.attempt(answers[start : start + _AT_ONCE])
    finally:
        rewards.close()
    return ScoreReport(answers, found, rewards.names, rewards.with_accuracy, notes)


def plain_prompt_text(prompt: Prompt) -> str:
    """The texts of a prompt, without a chat template: there is no tokenizer."""
    if isinstance(prompt.content, str):
        return prompt.content
    return "\n".join(str(message.get("content", "")) for message in prompt.content)


def greedy_note(answers: Sequence[Trajectory]) -> list[str]:
    """A sentence on the greedy answers in a file of `verl eval`, if there are sampled ones, too."""
    columns = [answer.prompt.columns for answer in answers]
    count = sum(of_answer.get("greedy") is True and "sample" in of_answer for of_answer in columns)
    if not 0 < count < len(answers):
        return []
    return [f"{count} of {len(answers)} answers are greedy ones, which count as the sampled ones do"]


def check_output(path: Path | None) -> None:
    """Check that a file can be written, before anything is computed.

    Raises:
        ValueError: its folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"need an existing folder for {str(path)!r}; make {str(path.parent)!r} first")


def _figures(answers: Sequence[Trajectory]) -> dict[str, Any]:
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    outcomes = Counter(answer.outcome for answer in answers if answer.reward is None)
    groups: dict[int, list[float]] = {}
    for answer in answers:
        groups.setdefault(answer.group, []).append(answer.scores.get("accuracy", 0.0))
    right = [value for values in groups.values() for value in values]
    has_accuracy = any("accuracy" in answer.scores for answer in answers)
    several = has_accuracy and len(groups) < len(answers)
    return {
        "rows": len(groups),
        "answers": len(answers),
        "reward": fmean(rewards) if rewards else None,
        **({"accuracy": fmean(right)} if has_accuracy else {}),
        **({"pass": fmean(float(max(values) >= 1) for values in groups.values())} if several else {}),
        "failed": len(answers) - len(rewards),
        "outcomes": dict(outcomes.most_common()),
    }
