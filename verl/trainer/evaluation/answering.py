"""Evaluation of a policy on held-out prompts: its answers, at once or in portions, and their metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from verl.agents.collector import DataCollector
from verl.agents.group_sampler import evaluation_params
from verl.config.run import PairsConfig, SFTConfig, TrainerConfig
from verl.data.trajectory import Trajectory
from verl.trainer.evaluation.eval_sets import EvalSet, values_by_prompt
from verl.trainer.evaluation.measures import (
    AnsweredPrompt,
    Measures,
    ScoredAnswer,
    ks_of,
    mean_over_sets,
    measure,
)
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec

# Seeds of training count prompts from 0; those of evaluation start far beyond them.
_FIRST_SEED = 1 << 62
# Answers of the first portion, and of the largest.
_FIRST_PORTION, _LARGEST_PORTION = 64, 4096
# Sampling parameters that a greedy answer does not have.
_RANDOM = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# Metrics whose intervals are metrics, too.
_WITH_BOUNDS = ("accuracy", "greedy/accuracy")


@dataclass(frozen=True)
class EvalQuestion:
    """A prompt of a set, to be answered `params.n` times.

    Attributes:
        set: position of the set.
        number: position of the prompt in its set.
        greedy: its most likely answer is asked for.
        prompt: with its own sampling parameters, except those that a greedy answer does not have.
        params: of the settings.
    """

    set: int
    number: int
    greedy: bool
    prompt: Prompt
    params: SamplingParams

    @property
    def key(self) -> tuple[int, bool, int]:
        """Its place among all questions of an evaluation."""
        return self.set, self.greedy, self.number


def evaluation_schedule(config: TrainerConfig | SFTConfig | PairsConfig) -> tuple[int, bool]:
    """Steps between evaluations (0: none at all), and True if one comes before the first step.

    Without `every_steps` there is one before the first and one after the last step.
    """
    every_steps, at_start = config.evaluation.every_steps, config.evaluation.at_start
    if isinstance(config, PairsConfig) and every_steps == 0:
        every_steps = config.eval_every_steps
    if config.data.test is None or every_steps is None:
        return 0, False
    return every_steps or sys.maxsize, at_start


def questions_of(sets: Sequence[EvalSet], config: TrainerConfig, codec: TextCodec) -> list[EvalQuestion]:
    """Everything that an evaluation asks: all sets sampled, then all of them greedily if it is wanted.

    The seeds are fixed, so the same weights always give the same answers; those to one set don't depend on
    the others.
    """
    params = evaluation_params(config, codec, config.evaluation.samples)
    questions = [
        EvalQuestion(i, number, False, prompt, replace(params, seed=_FIRST_SEED + number))
        for i, one in enumerate(sets)
        for number, prompt in enumerate(one.prompts)
    ]
    if not config.evaluation.greedy:
        return questions
    return questions + [
        EvalQuestion(
            q.set,
            q.number,
            True,
            replace(
                q.prompt, sampling={k: v for k, v in q.prompt.sampling.items() if k not in (*_RANDOM, "n")}
            ),
            replace(q.params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, n=1),
        )
        for q in questions
    ]


def answer_all(
    collector: DataCollector, prompts: Sequence[Prompt], config: TrainerConfig
) -> list[list[Trajectory]]:
    """`config.evaluation.samples` rewarded answers to every prompt.

    The seeds are fixed, so the same weights always give the same answers.
    """
    sampling = evaluation_params(config, collector.codec, config.evaluation.samples)
    return collector.answer(prompts, [replace(sampling, seed=_FIRST_SEED + i) for i in range(len(prompts))])


def portions_of(
    questions: Sequence[EvalQuestion], *, in_turn: bool, first: int = _FIRST_PORTION
) -> list[list[EvalQuestion]]:
    """The questions in portions, each of which is answered by itself and kept or lost as a whole.

    The last bits of an answer's logprobs depend on what is generated beside it, so the portions of an engine
    in the policy's process are always the same. Each holds twice as many answers as the one before it, up to
    a limit: so the first are soon there, and little time is lost at their ends, where few answers are left.
    With servers, each question is a portion.
    """
    if not in_turn:
        return [[question] for question in questions]
    portions, size, room = list[list[EvalQuestion]](), first, 0
    for question in questions:
        if room <= 0:
            portions.append([])
            room, size = size, min(2 * size, _LARGEST_PORTION)
        portions[-1].append(question)
        room -= question.params.n
    return portions


def answer_in_portions(
    collector: DataCollector,
    portions: Sequence[Sequence[EvalQuestion]],
    done: Callable[[Sequence[tuple[EvalQuestion, list[Trajectory]]]], None],
) -> None:
    """Answer and reward questions, and hand over what is complete.

    Args:
        collector: answers.
        portions: of `portions_of`.
        done: takes the answered questions; called in another thread if servers answer.

    Raises:
        RuntimeError: too many answers have no reward. Their portion is not handed over.
    """
    questions = [question for portion in portions for question in portion]
    asked = [[(question.prompt, question.params) for question in portion] for portion in portions]
    collector.answer_each(asked, lambda groups: done([(questions[i], group) for i, group in groups]))


def evaluate(
    collector: DataCollector, sets: Sequence[EvalSet] | Sequence[Prompt], config: TrainerConfig
) -> dict[str, float]:
    """Answer all prompts of some sets, or of one that is given as its prompts; returns `metrics_of`."""
    given = [one for one in sets if isinstance(one, EvalSet)]
    prompts = tuple(one for one in sets if isinstance(one, Prompt))
    named = [*given, *([EvalSet("test", "the given prompts", prompts)] if prompts else [])]
    questions = questions_of(named, config, collector.codec)
    groups = collector.answer([q.prompt for q in questions], [q.params for q in questions])
    scored = {q.key: [*map(ScoredAnswer.of, group)] for q, group in zip(questions, groups, strict=True)}
    return metrics_of(named, [answered_set(scored, i, one) for i, one in enumerate(named)], config)


def answered_set(
    scored: dict[tuple[int, bool, int], list[ScoredAnswer]], position: int, one: EvalSet
) -> list[AnsweredPrompt]:
    """The answered prompts of a set, in its order, from the answers to all questions by their keys."""
    greedy = [scored.get((position, True, i), [None])[0] for i in range(len(one.prompts))]
    return [AnsweredPrompt(tuple(scored[position, False, i]), greedy[i]) for i in range(len(one.prompts))]


def metrics_of(
    sets: Sequence[EvalSet], answered: Sequence[Sequence[AnsweredPrompt]], config: TrainerConfig
) -> dict[str, float]:
    """Metrics of an evaluation by name.

    Returns:
        Of one set, `eval/METRIC` for the metrics of `verl.trainer.evaluation.measures.measure`. Of several,
        `eval/SET/METRIC` for each, and `eval/METRIC`, the mean over sets of what all of them have. Accuracies
        also as METRIC_low and METRIC_high, the bounds of their 95 % intervals; and with `evaluation.by`, the
        accuracy (or else the reward) of each part as COLUMN=VALUE/METRIC.
    """
    ks, metrics, of_sets = ks_of(config.evaluation), dict[str, float](), list[Measures]()
    for one, prompts in zip(sets, answered, strict=True):
        of_sets.append(measure(prompts, ks))
        prefix = f"eval/{one.name}/" if len(sets) > 1 else "eval/"
        metrics |= _flat(of_sets[-1], prefix)
        for column, parts in measures_by(sets, one, prompts, config).items():
            for value, (_, part) in parts.items():
                main = "accuracy" if "accuracy" in part else "reward"
                metrics |= _flat({k: v for k, v in part.items() if k == main}, f"{prefix}{column}={value}/")
    return metrics if len(sets) == 1 else _flat(mean_over_sets(of_sets), "eval/") | metrics


def measures_by(
    sets: Sequence[EvalSet], one: EvalSet, answered: Sequence[AnsweredPrompt], config: TrainerConfig
) -> dict[str, dict[str, tuple[int, Measures]]]:
    """By column of `evaluation.by` and value: number of prompts of a set, and their metrics.

    Numbers have the same bins in all sets.
    """
    ks, found = ks_of(config.evaluation), dict[str, dict[str, tuple[int, Measures]]]()
    first = sum(len(other.prompts) for other in sets[: sets.index(one)])
    for column in config.evaluation.by:
        values = values_by_prompt([prompt for other in sets for prompt in other.prompts], column)
        own = values[first : first + len(one.prompts)]
        parts: dict[str, list[AnsweredPrompt]] = {}
        for value, prompt in zip(own, answered, strict=True):
            parts.setdefault(value, []).append(prompt)
        found[column] = {value: (len(parts[value]), measure(parts[value], ks)) for value in ordered(parts)}
    return found


def ordered(values: Sequence[str] | dict[str, list[AnsweredPrompt]]) -> list[str]:
    """Values of a column for a reader: numbers by size, then texts."""

    def place(value: str) -> tuple[float, str]:
        try:
            return float(value.partition("..")[0]), ""
        except ValueError:
            return float("inf"), value

    return sorted(values, key=place)


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Metrics `eval/...` of answered groups of k answers each, as those of one set in `metrics_of`."""
    prompts = [AnsweredPrompt(tuple(map(ScoredAnswer.of, group))) for group in groups]
    config = TrainerConfig().evaluation.model_copy(update={"samples": max(map(len, groups))})
    return _flat(measure(prompts, ks_of(config)), "eval/")


def _flat(measures: Measures, prefix: str) -> dict[str, float]:
    metrics = {}
    for name, estimate in measures.items():
        metrics[prefix + name] = estimate.value
        if name in _WITH_BOUNDS and estimate.low is not None and estimate.high is not None:
            metrics |= {f"{prefix}{name}_low": estimate.low, f"{prefix}{name}_high": estimate.high}
    return metrics
