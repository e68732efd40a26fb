"""A reward function with its weight and options: its calls, and what they give for each row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from verl.data.trajectory import Trajectory
from verl.rewards.execution.call_pool import RewardCall
from verl.rewards.execution.isolation import Callee, Place, isolated
from verl.rewards.failures import RewardFailure
from verl.rewards.parameters import CallContext, Signature, with_fetched_tokens
from verl.rewards.reward_log import Logged
from verl.rewards.reward_values import Score, plain, row_values, score_of
from verl.utils.sampling_types import Prompt

_NO_CONTEXT = CallContext()


class RewardFunction:
    """A user's function with its weight and options; its parameters are known by their names.

    Plain or async, it is called for each answer, such as f(prompt, response, answer), f(trajectory) or
    compute_score(data_source, solution_str, ground_truth, extra_info), or once for all answers, such as
    f(prompts, completions, **columns) or f(queries, prompts, labels); `verl.rewards.parameters` has all
    names. A function over all answers returns one value per row; None says that the function does not apply
    to that row, and adds nothing there.

    A value is a number, or a mapping with `reward` and further named scores, such as `accuracy`. Its
    `turn_rewards`, a number for each turn of the trajectory, are added to the reward, and each is credited to
    the end of its turn. Other mappings: `verl.rewards.reward_values`.

    Args:
        function: the function.
        name: key of its score; by default the function's own name.
        weight: factor of its value in the reward, finite.
        options: arguments for parameters, or for `**kwargs`.
        imported_from: module or file, and name in it, where the settings name the function.
        place: "inline" or "thread" to run it in the trainer; None for a worker process if that can be.
        check: raises ValueError for a prompt that it cannot score.
        close: ends what it has started.
        score_of_failure: value of an answer that is itself to blame for the failure of its call, or None.
        columns: names of the columns of the data, for messages.

    Raises:
        ValueError: no parameter takes the answer, or an option is not one of its parameters.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        weight: float = 1.0,
        options: Mapping[str, Any] | None = None,
        imported_from: tuple[str, str] | None = None,
        place: Place | None = None,
        check: Callable[[Prompt], object] | None = None,
        close: Callable[[], None] = lambda: None,
        score_of_failure: Callable[[RewardFailure], Any] | None = None,
        columns: Collection[str] = (),
    ) -> None:
        self.name = name or _name_of(function)
        self.weight, self.close = weight, close
        if not math.isfinite(weight):
            raise ValueError(f"need a finite weight for reward function {self.name!r}, got {weight}")
        self._signature = Signature(function, self.name, options or {}, columns=columns)
        self._check, self._score_of_failure = check, score_of_failure
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self.callee = (
            Callee(function, is_async, place)
            if place
            else isolated(function, is_async=is_async, imported_from=imported_from)
        )

    def calls(
        self, trajectories: Sequence[Trajectory], name: str, context: CallContext = _NO_CONTEXT
    ) -> list[RewardCall]:
        """The calls that score these rows: one for each, or one for all if it is batched."""
        if self._signature.is_batched:
            return [self._call(name, trajectories, context)]
        return [self._call(name, [trajectory], context) for trajectory in trajectories]

    def scores(self, calls: Sequence[RewardCall], num_rows: int) -> list[Score | RewardFailure | None]:
        """Score of each row from settled calls; its failure, or None where the function does not apply."""
        if not self._signature.is_batched:
            return [score_of(self._blamed(call.result)) for call in calls]
        result = calls[0].result
        log = result.log if isinstance(result, Logged) else None
        values = row_values(result.value if isinstance(result, Logged) else result, num_rows)
        if isinstance(values, RewardFailure):
            return [values] * num_rows
        scores = [None if value is None else score_of(value) for value in values]
        for row, score in enumerate(scores):
            if log and isinstance(score, Score):
                score.extras |= {name: plain(column[row]) for name, column in log.extras.items()}
                score.logged |= log.metrics
        return scores

    @property
    def needs_tokens(self) -> bool:
        """True if one of its parameters is the tokens of the answers."""
        return self._signature.needs_tokens

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check what can be known of the data without a call of the function.

        Raises:
            ValueError: a parameter without a default has no value, or a prompt cannot be scored.
        """
        self._signature.check_data(prompts)
        for prompt in prompts if self._check else ():
            self._check_prompt(prompt)

    def _blamed(self, result: Any) -> Any:
        """The result; in place of a failure the value of an answer that is to blame for it."""
        if isinstance(result, RewardFailure) and self._score_of_failure is not None:
            value = self._score_of_failure(result)
            return result if value is None else value
        return result

    def _check_prompt(self, prompt: Prompt) -> None:
        assert self._check is not None
        try:
            self._check(prompt)
        except ValueError as error:
            raise ValueError(f"reward function {self.name!r}: {error}") from error

    def _call(self, name: str, rows: Sequence[Trajectory], context: CallContext) -> RewardCall:
        """A call for these rows, or one that has failed if the data has no value for a parameter."""
        call = RewardCall(name, self.callee)
        if self.callee.place == "process" and self._signature.takes_trajectories:
            rows = [with_fetched_tokens(row) for row in rows]
        try:
            call.args, call.kwargs = self._signature.arguments(rows, context)
        except Exception as error:  # A column may be an object with code of its own.
            call.result = RewardFailure.from_exception(error)
        return call


def _name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, partial) else function
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else name
