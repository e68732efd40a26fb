"""Metrics of answered prompts with their intervals, from the facts of each answer alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.config.run import EvaluationConfig
from verl.data.trajectory import Trajectory
from verl.trainer.evaluation.estimators import best_at, majority_at, pass_at
from verl.trainer.evaluation.intervals import Estimate, mean_interval, mean_of, share_interval

# Names under which reward functions log the answer that they have read out of a text, the first one first;
# `pred` is verl's.
EXTRACTED = ("extracted_answer", "extracted", "pred")
Measures = dict[str, Estimate]


@dataclass(frozen=True)
class ScoredAnswer:
    """The facts of an answer that metrics read; those of a row of `answers.jsonl` are the same.

    Attributes:
        reward: None if there is none.
        accuracy: from the reward function; None if it gives none.
        text: the answer, white space made single.
        extracted: the answer that a reward function has read out of it; "" if it found none, None if none
            looked for one.
        num_tokens: of the answer.
        truncated: cut off at the length limit.
        outcome: "ok", or why there is no reward.
    """

    reward: float | None
    accuracy: float | None
    text: str
    extracted: str | None
    num_tokens: int
    truncated: bool
    outcome: str

    @classmethod
    def of(cls, t: Trajectory) -> ScoredAnswer:
        """The facts of a trajectory."""
        known = (t.reward, t.scores.get("accuracy"), one_spaced(t.text), extracted_answer(t.extras))
        return cls(*known, len(t.response_ids), t.truncated, t.outcome)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ScoredAnswer:
        """The facts of a row of `answers.jsonl`."""
        known = (row["reward"], row["scores"].get("accuracy"), one_spaced(row["response"]))
        extracted = extracted_answer(row.get("extras", {}))
        return cls(*known, extracted, row["tokens"], row["truncated"], row["outcome"])

    @property
    def failed(self) -> bool:
        """True if it has no reward for another reason than that nothing gives one."""
        return self.outcome != "ok"

    @property
    def correctness(self) -> float:
        """Its accuracy, 0 without one or without a reward."""
        return 0.0 if self.failed else self.accuracy or 0.0


@dataclass(frozen=True)
class AnsweredPrompt:
    """The answers to one prompt: those that were sampled, and the greedy one if there is one."""

    samples: tuple[ScoredAnswer, ...]
    greedy: ScoredAnswer | None = None

    @property
    def has_accuracy(self) -> bool:
        """True unless its reward functions give no accuracy; an answer that failed could have had one."""
        answers = [*self.samples, *([self.greedy] if self.greedy else [])]
        return any(answer.accuracy is not None or answer.failed for answer in answers)


def one_spaced(text: str) -> str:
    """The text without white space at its ends, and with single spaces in it."""
    return " ".join(text.split())


def extracted_answer(extras: Mapping[str, Any]) -> str | None:
    """The answer that a reward function has logged; "" if it found none, None if none looked for one."""
    name = next((name for name in EXTRACTED if name in extras), None)
    if name is None:
        return None
    return "" if extras[name] is None else one_spaced(str(extras[name]))


def votes_of(answers: Sequence[ScoredAnswer]) -> list[str | int | None]:
    """The vote of each answer to a prompt: its extracted answer, else its whole text.

    An answer without an extracted one beside answers that have some does not vote. One that failed votes for
    something that no other answer does, so that it counts as wrong.
    """
    uses_extracted = any(answer.extracted is not None for answer in answers)
    votes: list[str | int | None] = []
    for number, answer in enumerate(answers):
        text = answer.extracted if uses_extracted else answer.text
        votes.append(number if answer.failed else text or None)
    return votes


def ks_of(evaluation: EvaluationConfig) -> list[int]:
    """The k of pass@k and maj@k: those of the settings, else 2, 4, 8, ... and the number of answers."""
    samples = evaluation.samples
    if evaluation.pass_at:
        return sorted(set(evaluation.pass_at))
    return sorted({samples, *(2**i for i in range(1, samples.bit_length()))} - {1}) if samples > 1 else []


def measure(prompts: Sequence[AnsweredPrompt], ks: Sequence[int]) -> Measures:
    """Metrics of answered prompts.

    Args:
        prompts: at least one, with the same number of samples each.
        ks: of pass@k, maj@k and best@k, each at most that number.

    Returns:
        reward: mean over the answers that have one, NaN if all failed; absent if nothing gives rewards.
        accuracy: mean@n, the share of correct answers. An answer that failed counts as wrong.
        pass@k, maj@k: see `verl.trainer.evaluation.estimators`.
        best@k: the same of the rewards, where there is no accuracy.
        greedy/accuracy, greedy/reward: of the greedy answers, where there are some.
        response_tokens, truncated_share, failed_share: means over the sampled answers.
        Without a reward function that gives `accuracy`, accuracies are absent; prompts whose own functions
        give none are left out of them.
    """
    measured = _rewards([prompt.samples for prompt in prompts])
    judged = [prompt for prompt in prompts if prompt.has_accuracy]
    if any(answer.accuracy is not None for prompt in judged for answer in _all(prompt)):
        measured |= _accuracies(judged, ks)
    elif "reward" in measured and ks:
        measured |= {f"best@{k}": best for k in ks if (best := _best(prompts, k)) is not None}
    if prompts[0].greedy is not None:
        greedy = [(prompt.greedy,) for prompt in prompts if prompt.greedy is not None]
        rewards = _rewards(greedy)
        measured |= {f"greedy/{name}": estimate for name, estimate in rewards.items()}
    answers = [answer for prompt in prompts for answer in prompt.samples]
    means: dict[str, Callable[[ScoredAnswer], float]] = {
        "response_tokens": lambda a: a.num_tokens,
        "truncated_share": lambda a: a.truncated,
        "failed_share": lambda a: a.failed,
    }
    return measured | {name: Estimate(sum(map(of, answers)) / len(answers)) for name, of in means.items()}


def outcomes(prompts: Sequence[AnsweredPrompt]) -> dict[str, int]:
    """Number of answers of each outcome, the greedy ones included."""
    return dict(sorted(Counter(answer.outcome for prompt in prompts for answer in _all(prompt)).items()))


def mean_over_sets(measures: Sequence[Measures]) -> Measures:
    """Mean over sets, each with the same weight, of the metrics that all of them have."""
    shared = [name for name in measures[0] if all(name in one for one in measures)]
    return {name: mean_of([one[name] for one in measures]) for name in shared}


def over_sets(of_sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of one set as they are; of several as `eval/SET/METRIC`, and their mean as `eval/METRIC`.

    The mean is over sets, each with the same weight, and of the metrics that all of them have.
    """
    first, *others = of_sets.values()
    if not others:
        return dict(first)
    shared = [name for name in first if all(name in one for one in others)]
    means = {name: sum(one[name] for one in of_sets.values()) / len(of_sets) for name in shared}
    own = {
        name.replace("eval/", f"eval/{of}/", 1): value
        for of, one in of_sets.items()
        for name, value in one.items()
    }
    return means | own


def _rewards(groups: Sequence[Sequence[ScoredAnswer]]) -> Measures:
    rewards = [[a.reward for a in group if a.reward is not None] for group in groups]
    num_rewards = sum(map(len, rewards))
    if not num_rewards:
        any_failed = any(answer.failed for group in groups for answer in group)
        return {"reward": Estimate(float("nan"))} if any_failed else {}
    value = sum(map(sum, rewards)) / num_rewards
    interval = mean_interval(list(map(sum, rewards)), list(map(len, rewards)))
    return {"reward": Estimate.between(value, interval)}


def _accuracies(prompts: Sequence[AnsweredPrompt], ks: Sequence[int]) -> Measures:
    groups = [[answer.correctness for answer in prompt.samples] for prompt in prompts]
    size = len(groups[0])
    measured = {"accuracy": _share([sum(group) / size for group in groups], draws=size)}
    for k in ks:
        passed = [pass_at(size, sum(value >= 1 for value in group), k) for group in groups]
        measured[f"pass@{k}"] = _share(passed, draws=size / k)
    votes = [votes_of(prompt.samples) for prompt in prompts]
    for k in (k for k in ks if k > 1):
        won = [majority_at(v, group, k) for v, group in zip(votes, groups, strict=True)]
        measured[f"maj@{k}"] = _share(won, draws=size / k)
    if prompts[0].greedy is not None:
        measured["greedy/accuracy"] = _share([p.greedy.correctness for p in prompts if p.greedy])
    return measured


def _best(prompts: Sequence[AnsweredPrompt], k: int) -> Estimate | None:
    """best@k over the prompts that have k rewards."""
    rewards = [[a.reward for a in prompt.samples if a.reward is not None] for prompt in prompts]
    values = [best_at(group, k) for group in rewards if len(group) >= k]
    if not values:
        return None
    return Estimate.between(sum(values) / len(values), mean_interval(values, [1] * len(values)))


def _share(values: Sequence[float], *, draws: float = 1.0) -> Estimate:
    if not all(0 <= value <= 1 for value in values):  # an accuracy of a user's own scale
        return Estimate.between(sum(values) / len(values), mean_interval(values, [1] * len(values)))
    return Estimate.between(sum(values) / len(values), share_interval(values, draws=draws))


def _all(prompt: AnsweredPrompt) -> tuple[ScoredAnswer, ...]:
    return (*prompt.samples, *((prompt.greedy,) if prompt.greedy else ()))
