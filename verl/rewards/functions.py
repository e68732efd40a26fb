"""Reward of an answer: the weighted sum of built-in functions and those of the user."""

from __future__ import annotations

import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.config.data import RewardsConfig, WeightedChoice
from verl.data.loading.prompt_store import PromptView
from verl.data.trajectory import Trajectory
from verl.rewards.data_sources import choices_of, described_choices
from verl.rewards.execution.call_pool import CallPool
from verl.rewards.execution.isolation import Place
from verl.rewards.failures import RewardFailure
from verl.rewards.library.reward_table import BY_DATA_SOURCE, REWARDS
from verl.rewards.library.spellings import spellings
from verl.rewards.parameters import CallContext, columns_of
from verl.rewards.reward_function import RewardFunction
from verl.rewards.reward_values import Score, named_scores
from verl.rewards.selection import FunctionSelection, built_function, chosen_function
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

_LOG = logging.getLogger(__name__)
_NO_CONTEXT = CallContext()


class RewardFunctions:
    """Weighted sum of several functions; an answer that one of them fails on has no reward, and says why.

    Args:
        functions: at least one, or the choice of the functions of each prompt. Of two with the same name the
            second is called `name_2`.
        timeout_s: limit of one call in seconds, from when the function is entered.
        max_failed_share: share of the trajectories of one `score` without a reward above which it raises, in
            [0, 1].
        context: facts of the run that functions may ask for.
        note: called with a sentence about each function that cannot run in a worker process.

    Attributes:
        with_accuracy: names of the functions that have given an accuracy so far.

    Raises:
        ValueError: no functions.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction] | FunctionSelection,
        *,
        timeout_s: float,
        max_failed_share: float,
        context: CallContext = _NO_CONTEXT,
        note: Callable[[str], None] = _LOG.warning,
    ) -> None:
        if not functions:
            raise ValueError(no_functions())
        if not isinstance(functions, FunctionSelection):
            functions = FunctionSelection(given=functions)
        self._selection, self.with_accuracy = functions, set[str]()
        for name, function in self._functions.items():
            if function.callee.note:
                note(f"reward function {name}: {function.callee.note}")
        self._max_failed_share, self._context = max_failed_share, context
        self._pool = CallPool(timeout_s=timeout_s, note=note)

    @property
    def names(self) -> list[str]:
        """Names of the functions."""
        return list(self._functions)

    def score(self, trajectories: Sequence[Trajectory]) -> None:
        """As `attempt`, but too many failures are an error.

        Raises:
            RuntimeError: too many failed, or too many calls never return.
        """
        self.attempt(rows := [t for t in trajectories if t.outcome == "ok"])
        self.check_failed(rows)

    def attempt(self, trajectories: Sequence[Trajectory]) -> None:
        """Fills `reward`, `scores`, `outcome` and `detail`, in place.

        The reward is the sum of weight times value over the functions that apply. `scores` holds each value
        by function name, and the further scores of mappings by their own (as `function/name` if that is
        taken). A trajectory that a function fails on has no reward, and the outcome `reward_error`,
        `reward_timeout`, `reward_crash` (the process died), `reward_not_finite`, `reward_wrong_type` or
        `reward_wrong_count`, or `reward_not_applicable` if no function applies. Trajectories whose outcome is
        not "ok" already, or that have a reward, are left as they are.

        Raises:
            RuntimeError: too many calls on threads of the trainer never return.
        """
        rows = [t for t in trajectories if t.outcome == "ok" and t.reward is None]
        if not rows:
            return
        results = self._results(rows)
        for i, trajectory in enumerate(rows):
            self._write(trajectory, {name: of_function[i] for name, of_function in results.items()})

    def try_out(self, prompts: Sequence[Prompt], codec: TextCodec) -> list[str]:
        """Call each function once, with the reference answer of its first prompt, or an empty answer.

        Returns:
            A sentence with the value of each function.

        Raises:
            ValueError: a function fails.
        """
        first: dict[str, Prompt] = {}
        for prompt in prompts:
            first |= {name: prompt for name in self._selection.names_for(prompt) if name not in first}
        lines, failures = [], []
        for name, prompt in first.items():
            answer = _example_answer(prompt)
            where = f"{'its reference answer' if answer else 'an empty answer'} to row {prompt.index}"
            ids = codec.encode_answer(answer, prompt)
            mask, versions = [True] * len(ids), [0] * len(ids)
            row = Trajectory(prompt, codec.encode_prompt(prompt), ids, mask, None, versions, 0, text=answer)
            result = self._results([row], [name])[name][0]
            if isinstance(result, RewardFailure):
                failures.append(f"reward function {name!r} fails for {where}: {result.detail}")
            value = f"{result.reward:g}" if isinstance(result, Score) else "not applicable"
            lines.append(f"reward function {name}: {value} for {where}")
        if failures:
            raise ValueError("\n".join(failures))
        return lines

    def check_failed(self, trajectories: Sequence[Trajectory], *, of: int | None = None) -> None:
        """Raises RuntimeError if more than `max_failed_share` of the trajectories have no reward.

        Args:
            trajectories: rewarded.
            of: the number that the failed ones are compared with; None: all that are given.
        """
        failed = [t for t in trajectories if t.reward is None]
        total = len(trajectories) if of is None else of
        if len(failed) <= self._max_failed_share * total:
            return
        outcomes = Counter(t.outcome for t in failed).most_common()
        counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes)
        raise RuntimeError(
            f"need a reward for at least {1 - self._max_failed_share:.0%} of the answers, {len(failed)} of "
            f"{total} have none ({counts}); first: {failed[0].detail}; correct the function, or "
            "raise rewards.timeout_s or rewards.max_failed_share"
        )

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Make the functions of all prompts, and check each with its prompts, without a call of a user's one.

        Raises:
            ValueError: a function needs a column, or a reference answer, that a prompt does not have, or
                cannot be used, or a prompt has none.
        """
        places: dict[str, array[int]] = {}
        without = array("q")
        for place, prompt in enumerate(prompts):
            try:
                names = self._selection.names_for(prompt)
            except ValueError as error:
                if prompt.reward is None:
                    raise
                raise ValueError(f"reward of row {prompt.index} of {prompt.source}: {error}") from error
            for name in names:
                places.setdefault(name, array("q")).append(place)
            if not names:
                without.append(place)
        if without:
            first = prompts[without[0]]
            raise ValueError(
                f"{len(without)} of {len(prompts)} rows have no reward function, the first is row "
                f"{first.index} of {first.source}; {no_functions()}"
            )
        for name, own in places.items():
            self._functions[name].check_data(PromptView(prompts, own))

    def check_without_tokens(self) -> None:
        """Raises ValueError for a function that needs tokens, where answers have none."""
        for name, function in self._functions.items():
            if function.needs_tokens:
                raise ValueError(
                    f"reward function {name!r} needs the tokens of an answer (completion_ids), and a file of "
                    "answers has texts alone; let it read `completions` or `responses`"
                )

    def close(self) -> None:
        """Ends the processes and threads that calls run in, and the servers of judges."""
        self._pool.close()
        self._selection.close()

    @property
    def _functions(self) -> dict[str, RewardFunction]:
        return self._selection.functions

    def _results(
        self, rows: Sequence[Trajectory], only: Sequence[str] | None = None
    ) -> dict[str, list[Score | RewardFailure | None]]:
        """Result of each function for each row; None where it is not one of the row's functions."""
        places: dict[str, list[int]] = {}
        results: dict[str, list[Score | RewardFailure | None]] = {}
        for place, row in enumerate(rows):
            try:
                names = self._selection.names_for(row.prompt) if only is None else only
            except ValueError as error:  # a row that was not there to be checked before the first step
                none: list[Score | RewardFailure | None] = [None] * len(rows)
                results.setdefault("rewards", none)[place] = RewardFailure("reward_error", str(error))
                continue
            for name in names:
                places.setdefault(name, []).append(place)
        functions = {name: f for name, f in self._functions.items() if name in places}
        calls = {
            name: function.calls([rows[place] for place in places[name]], name, self._context)
            for name, function in functions.items()
        }
        self._pool.run([call for of_function in calls.values() for call in of_function])
        for name, function in functions.items():
            results[name] = [None] * len(rows)
            own = function.scores(calls[name], len(places[name]))
            for place, result in zip(places[name], own, strict=True):
                results[name][place] = result
        return results

    def _write(self, trajectory: Trajectory, results: Mapping[str, Score | RewardFailure | None]) -> None:
        """Writes the results of all functions for one trajectory."""
        scored = {name: result for name, result in results.items() if isinstance(result, Score)}
        failures = {name: result for name, result in results.items() if isinstance(result, RewardFailure)}
        turns = {n: score.turn_rewards for n, score in scored.items() if score.turn_rewards is not None}
        failures |= _wrong_turns(trajectory, turns)
        for name, values in turns.items():
            scored[name].reward += sum(values)
        reward = sum(self._functions[name].weight * score.reward for name, score in scored.items())
        if not scored and not failures:
            cause = "no function applies to this prompt"
            failures = {", ".join(results): RewardFailure("reward_not_applicable", cause)}
        elif not failures and not math.isfinite(reward):
            cause = f"the weighted sum is {reward}"
            failures = {", ".join(results): RewardFailure("reward_not_finite", cause)}
        trajectory.scores.update(named_scores(scored))
        self.with_accuracy.update(name for name, score in scored.items() if "accuracy" in score.named)
        for name, score in scored.items():
            for key, value in score.extras.items():
                trajectory.extras[key if key not in trajectory.extras else f"{name}/{key}"] = value
            for key, value in score.logged.items():
                trajectory.logged[key if key not in trajectory.logged else f"{name}/{key}"] = value
        # In the order of the functions, whichever apply: the parts of siblings are compared one by one.
        weights = {name: function.weight for name, function in self._functions.items()}
        weighted = [
            [weights[name] * value for value in values] for name, values in turns.items() if not failures
        ]
        trajectory.turn_rewards = [sum(of_turn) for of_turn in zip(*weighted, strict=True)]
        trajectory.parts = [
            (weights[name], scored[name].reward) if name in scored else (0.0, 0.0) for name in weights
        ]
        trajectory.reward = None if failures else reward
        for name, failure in list(failures.items())[:1]:
            trajectory.outcome, trajectory.detail = failure.outcome, f"{name}: {failure.detail}"


def build_rewards(
    config: RewardsConfig,
    reward_fn: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    *,
    placed: Mapping[str, Callable[..., Any]] | None = None,
    context: CallContext = _NO_CONTEXT,
    prompts: Sequence[Prompt] = (),
    note: Callable[[str], None] = _LOG.warning,
) -> RewardFunctions:
    """Functions of the settings, and those that are given as Python objects, which have weight 1.

    A prompt with a function of its own (`Prompt.reward`) has that one alone. If neither settings nor program
    name one, those of public data sets are chosen by the names of the data sets.

    Args:
        config: names, options and limits.
        reward_fn: further functions.
        placed: functions in place of those of the same name, whose models run elsewhere.
        context: facts of the run that functions may ask for.
        prompts: the data, as far as it is known.
        note: called with a sentence about each function that cannot run in a worker process, and about those
            that are chosen by the data set.

    Raises:
        ValueError: there is none, a name is unknown, or a function fits no form (see `RewardFunction`).
    """
    given = [] if reward_fn is None else [reward_fn] if callable(reward_fn) else list(reward_fn)
    columns = columns_of(prompts)

    def make(choice: WeightedChoice) -> RewardFunction:
        if choice.name in REWARDS and REWARDS[choice.name].build:
            return built_function(choice, folder=context.folder, note=note)
        return chosen_function(choice, config, placed=(placed or {}).get(choice.name), columns=columns)

    choices = config.functions
    if not choices and not given:
        sources = list(dict.fromkeys(prompt.source for prompt in prompts if prompt.reward is None))
        if any(choices_of(source) is None for source in sources):
            raise ValueError(no_functions())
        if sources:
            choices = (WeightedChoice(name=BY_DATA_SOURCE),)
            chosen = described_choices(sources)
            note(f"no reward function is named, so they are chosen by the data set ({chosen})")
    if not (choices or given or prompts or config.column):
        raise ValueError(no_functions())
    on_thread: Place | None = "thread" if config.isolation == "thread" else None
    objects = [RewardFunction(f, place=on_thread, columns=columns) for f in given]
    return RewardFunctions(
        FunctionSelection(choices, objects, make),
        timeout_s=config.timeout_s,
        max_failed_share=config.max_failed_share,
        context=context,
        note=note,
    )


def no_functions() -> str:
    """Message on a run without a reward function."""
    return (
        f"need at least one reward function, got none; name one in rewards.functions ({', '.join(REWARDS)}), "
        "in the reward of a source of the data or in a column (rewards.column), or pass reward_fn"
    )


def _example_answer(prompt: Prompt) -> str:
    """The reference answer as a text; empty if there is none."""
    if isinstance(prompt.answer, str):
        return prompt.answer
    try:
        return spellings(prompt.answer)[0]
    except (ValueError, IndexError):
        return ""


def _wrong_turns(trajectory: Trajectory, turns: Mapping[str, list[float]]) -> dict[str, RewardFailure]:
    """A failure for each function whose turn rewards are not one per turn."""
    count = trajectory.num_turns if turns else 0
    return {
        name: RewardFailure(
            "reward_wrong_count", f"need a turn reward for each of {count} turns, got {len(values)}"
        )
        for name, values in turns.items()
        if len(values) != count
    }
