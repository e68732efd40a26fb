"""Reward of an answer: the weighted sum of built-in functions and those of the user."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from verl.config.data import RewardsConfig, WeightedChoice
from verl.data.batch import Trajectory, turn_ends
from verl.rewards.execution.calls import CallPool
from verl.rewards.execution.isolation import Place
from verl.rewards.failures import RewardFailure
from verl.rewards.library.reward_table import REWARDS, checked_options, load_function
from verl.rewards.library.spellings import spellings
from verl.rewards.parameters import CallContext
from verl.rewards.reward_function import RewardFunction
from verl.rewards.reward_values import Score, named_scores
from verl.utils import user_code
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

_LOG = logging.getLogger(__name__)
_NO_CONTEXT = CallContext()


class RewardFunctions:
    """Weighted sum of several functions; an answer that one of them fails on has no reward, and says why.

    Args:
        functions: at least one. Of two with the same name the second is called `name_2`.
        timeout_s: limit of one call in seconds, from when the function is entered.
        max_failed_share: share of the trajectories of one `score` without a reward above which it raises, in
            [0, 1].
        context: facts of the run that functions may ask for.
        note: called with a sentence about each function that cannot run in a worker process.

    Raises:
        ValueError: no functions.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        timeout_s: float,
        max_failed_share: float,
        context: CallContext = _NO_CONTEXT,
        note: Callable[[str], None] = _LOG.warning,
    ) -> None:
        if not functions:
            raise ValueError(
                f"need at least one reward function, got none; name one in rewards.functions "
                f"({', '.join(REWARDS)}) or pass reward_fn"
            )
        self._functions: dict[str, RewardFunction] = {}
        for function in functions:
            name = _unused(function.name, self._functions)
            self._functions[name] = function
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

    def try_out(self, prompt: Prompt, codec: TextCodec) -> list[str]:
        """Call each function once, with the reference answer of a prompt as its answer, or an empty one.

        Returns:
            A sentence with the value of each function.

        Raises:
            ValueError: a function fails.
        """
        answer = _example_answer(prompt)
        ids = codec.encode_answer(answer, prompt)
        row = Trajectory(
            prompt, codec.encode_prompt(prompt), ids, [True] * len(ids), None, [0] * len(ids), 0, text=answer
        )
        said = "its reference answer" if answer else "an empty answer"
        lines, failures = [], []
        for name, (result,) in self._results([row]).items():
            if isinstance(result, RewardFailure):
                failures.append(
                    f"reward function {name!r} fails for {said} to row {prompt.index}: {result.detail}"
                )
            value = f"{result.reward:g}" if isinstance(result, Score) else "not applicable"
            lines.append(f"reward function {name}: {value} for {said} to row {prompt.index}")
        if failures:
            raise ValueError("\n".join(failures))
        return lines

    def check_failed(self, trajectories: Sequence[Trajectory]) -> None:
        """Raises RuntimeError if more than `max_failed_share` of the trajectories have no reward."""
        failed = [t for t in trajectories if t.reward is None]
        if len(failed) <= self._max_failed_share * len(trajectories):
            return
        outcomes = Counter(t.outcome for t in failed).most_common()
        counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes)
        raise RuntimeError(
            f"need a reward for at least {1 - self._max_failed_share:.0%} of the answers, {len(failed)} of "
            f"{len(trajectories)} have none ({counts}); first: {failed[0].detail}; correct the function, or "
            "raise rewards.timeout_s or rewards.max_failed_share"
        )

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check the data before the first step, without a call of a user's function.

        Raises:
            ValueError: a function needs a column, or a reference answer, that a prompt does not have.
        """
        for function in self._functions.values():
            function.check_data(prompts)

    def close(self) -> None:
        """Ends the processes and threads that calls run in, and the servers of judges."""
        self._pool.close()
        for function in self._functions.values():
            function.close()

    def _results(self, rows: Sequence[Trajectory]) -> dict[str, list[Score | RewardFailure | None]]:
        """Result of each function for each row."""
        calls = {name: f.calls(rows, name, self._context) for name, f in self._functions.items()}
        self._pool.run([call for of_function in calls.values() for call in of_function])
        return {name: f.scores(calls[name], len(rows)) for name, f in self._functions.items()}

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
    columns: Collection[str] = (),
    note: Callable[[str], None] = _LOG.warning,
) -> RewardFunctions:
    """Functions of the settings, and those that are given as Python objects, which have weight 1.

    Args:
        config: names, options and limits.
        reward_fn: further functions.
        placed: functions in place of those of the same name, whose models run elsewhere.
        context: facts of the run that functions may ask for.
        columns: names of the columns of the data, for messages.
        note: called with a sentence about each function that cannot run in a worker process.

    Raises:
        ValueError: there is none, a name is unknown, or a function fits no form (see `RewardFunction`).
    """
    given = [] if reward_fn is None else [reward_fn] if callable(reward_fn) else list(reward_fn)
    functions: list[RewardFunction] = []
    try:
        for choice in config.functions:
            elsewhere = (placed or {}).get(choice.name)
            if choice.name in REWARDS and REWARDS[choice.name].build:
                functions.append(_built_function(choice, folder=context.folder, note=note))
            else:
                functions.append(_chosen_function(choice, config, placed=elsewhere, columns=columns))
    except BaseException:
        for function in functions:
            function.close()
        raise
    on_thread: Place | None = "thread" if config.isolation == "thread" else None
    functions += [RewardFunction(f, place=on_thread, columns=columns) for f in given]
    return RewardFunctions(
        functions,
        timeout_s=config.timeout_s,
        max_failed_share=config.max_failed_share,
        context=context,
        note=note,
    )


def _chosen_function(
    choice: WeightedChoice,
    config: RewardsConfig,
    *,
    placed: Callable[..., Any] | None,
    columns: Collection[str],
) -> RewardFunction:
    """The function of a choice, with its options checked; a built-in one is made ready."""
    built_in = REWARDS.get(choice.name)
    function, options = placed or load_function(choice.name), choice.options
    imported_from, check, score_of_failure = choice.name, None, None
    place: Place | None = "thread" if config.isolation == "thread" else None
    if built_in:
        options = options if placed else checked_options(choice.name, function, options)
        imported_from = built_in.function
        # One for a process holds nothing that it could share, and relies on its limits.
        place = None if built_in.place == "process" else built_in.place
        if built_in.check:
            check = partial(load_function(built_in.check), **options)
        if built_in.score_of_failure:
            score_of_failure = load_function(built_in.score_of_failure)
    module, _, attribute = imported_from.rpartition(":")
    made = RewardFunction(
        function,
        name=choice.name if built_in else None,
        weight=choice.weight,
        options=options,
        imported_from=(module, attribute),
        place="thread" if placed else place,
        check=check,
        score_of_failure=score_of_failure,
        columns=columns,
    )
    if built_in and built_in.prepare and not placed:
        load_function(built_in.prepare)(**options)
    return made


def _built_function(
    choice: WeightedChoice, *, folder: Path | None, note: Callable[[str], None]
) -> RewardFunction:
    """The built-in function with state of a choice."""
    build = user_code.load_function(
        REWARDS[choice.name].build, user=f"reward function {choice.name}", keeps_class=True
    )
    try:
        made = build(choice.options, folder=folder, note=note)
    except ValueError as error:
        raise ValueError(f"reward function {choice.name!r}: {error}") from error
    return RewardFunction(
        made, name=choice.name, weight=choice.weight, place="inline", check=made.check, close=made.close
    )


def _example_answer(prompt: Prompt) -> str:
    """The reference answer as a text; empty if there is none."""
    if isinstance(prompt.answer, str):
        return prompt.answer
    try:
        return spellings(prompt.answer)[0]
    except (ValueError, IndexError):
        return ""


def _unused(name: str, taken: Iterable[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _wrong_turns(trajectory: Trajectory, turns: Mapping[str, list[float]]) -> dict[str, RewardFailure]:
    """A failure for each function whose turn rewards are not one per turn."""
    count = len(turn_ends(trajectory)) if turns else 0
    return {
        name: RewardFailure(
            "reward_wrong_count", f"need a turn reward for each of {count} turns, got {len(values)}"
        )
        for name, values in turns.items()
        if len(values) != count
    }
