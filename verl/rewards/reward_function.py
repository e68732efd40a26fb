"""A reward function: the forms of its signature, its calls, and the values that it may return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, SupportsFloat

from verl.data.batch import RemoteRow, Trajectory
from verl.rewards.calls import RewardCall
from verl.rewards.failures import RewardFailure
from verl.rewards.isolation import Callee, Place, isolated
from verl.utils.sampling_types import Prompt

FORMS: Final = (
    "f(prompt, response), f(prompt, response, answer), f(trajectory), or f(prompts, completions, **columns) "
    "over all rows at once, each plain or async"
)
Form = Literal["answer", "trajectory", "batched"]
_BATCHED = ("prompts", "completions", "completion_ids")
# Names that cannot mean what stands at that place: better an error than a number for the wrong text.
_NOT_FIRST = {"response", "completion", "answer", "ground_truth", "data_source"}
_NOT_SECOND = {"prompt", "answer", "ground_truth"}
_NOT_ALONE = _NOT_FIRST | {"prompt"}
_MISSING: Final = object()
_wrong_type = partial(RewardFailure, "reward_wrong_type")
# Finite numbers by name, `reward` among them; `turn_rewards` alone is a list of numbers.
Score = dict[str, Any]


class RewardFunction:
    """A user's function with its weight and options; its form is read from its signature.

    Forms, plain or async:
        f(prompt, response): one answer. `prompt` is the prompt's content, text or chat messages; `response`
            is the text. Further parameters are filled by name from the data: `answer` or `ground_truth` (the
            reference), `source`, or a column.
        f(trajectory): one answer with everything known about it.
        f(prompts, completions, **columns): all answers at once, as for TRL's trainers. A completion is text,
            or for chat messages a list with the assistant's message. Columns that are named, or all with
            `**columns`, come as lists over the rows; so do `answer` and `completion_ids` (token ids). It
            returns one value per row; None says that the function does not apply to that row, and adds
            nothing there.

    A value is a number, or a mapping with `reward` and further named scores, such as `accuracy`. Its
    `turn_rewards`, a number for each turn of the trajectory, are added to the reward, and each is credited to
    the end of its turn.

    Args:
        function: the function.
        name: key of its score; by default the function's own name.
        weight: factor of its value in the reward, finite.
        options: arguments for parameters that the form leaves free.
        imported_from: module or file, and name in it, where the settings name the function.
        place: "inline" or "thread" to run it in the trainer; None for a worker process if that can be.

    Raises:
        ValueError: it fits no form, or an option is not one of its parameters, or one that it needs is
            missing.
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
    ) -> None:
        self.function = function
        self.name = name or _name_of(function)
        self.weight = weight
        self.options = dict(options or {})
        if not math.isfinite(weight):
            raise ValueError(f"need a finite weight for reward function {self.name!r}, got {weight}")
        parameters = _parameters(function, self.name)
        self.form: Form = _form(parameters, self.name)
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self.callee = (
            Callee(function, is_async, place)
            if place
            else isolated(function, is_async=is_async, imported_from=imported_from)
        )
        self._takes_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
        # Parameters that the form itself fills; options and columns may fill the others.
        if self.form == "batched":
            self._own = [p.name for p in parameters if p.name in _BATCHED]
        else:
            self._own = [p.name for p in _leading(parameters)[: 1 if self.form == "trajectory" else 2]]
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._free = {p.name: p.default for p in by_name if p.name not in self._own}
        self._check_options()

    def calls(self, trajectories: Sequence[Trajectory], name: str) -> list[RewardCall]:
        """The calls that score these rows: one for each, or one for all if it is batched."""
        if self.form == "batched":
            return [self._call(name, self._batched_arguments, trajectories)]
        arguments = self._trajectory_arguments if self.form == "trajectory" else self._answer_arguments
        return [self._call(name, arguments, trajectory) for trajectory in trajectories]

    def scores(self, calls: Sequence[RewardCall], num_rows: int) -> list[Score | RewardFailure | None]:
        """Score of each row from settled calls; its failure, or None where the function does not apply."""
        if self.form != "batched":
            return [score_of(call.result) for call in calls]
        values = row_values(calls[0].result, num_rows)
        if isinstance(values, RewardFailure):
            return [values] * num_rows
        return [None if value is None else score_of(value) for value in values]

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Looks for the columns that the function cannot do without.

        Raises:
            ValueError: no prompt has one of them.
        """
        names = [name for name in self._free if name not in self.options and name not in _BATCHED]
        values = {
            name: _MISSING if all(_column(p, name) is _MISSING for p in prompts) else None for name in names
        }
        try:
            self._check_present(values, prompts)
        except ValueError as error:
            raise ValueError(f"reward function {self.name!r}: {error}") from error

    def _check_options(self) -> None:
        unknown = sorted(set(self.options) - set(self._free))
        if unknown:
            valid = ", ".join(self._free) or "none"
            raise ValueError(
                f"need options that reward function {self.name!r} takes ({valid}), got {', '.join(unknown)}"
            )
        needed = [
            name
            for name, default in self._free.items()
            if default is inspect.Parameter.empty and name not in self.options
        ]
        if self.form == "trajectory" and needed:
            raise ValueError(
                f"reward function {self.name!r} needs {', '.join(needed)} besides the trajectory; "
                "give it as an option"
            )

    def _call(
        self, name: str, arguments: Callable[[Any], tuple[Any, dict[str, Any]]], rows: Any
    ) -> RewardCall:
        """A call with these arguments, or one that has failed if the data lacks a column."""
        call = RewardCall(name, self.callee)
        try:
            call.args, call.kwargs = arguments(rows)
        except Exception as error:  # A column may be an object with code of its own.
            call.result = RewardFailure.from_exception(error)
        return call

    def _trajectory_arguments(self, trajectory: Trajectory) -> tuple[Any, dict[str, Any]]:
        if self.callee.place == "process" and isinstance(trajectory.response_ids, RemoteRow):
            trajectory = replace(trajectory, response_ids=list(trajectory.response_ids))
        if self.callee.place == "process" and isinstance(trajectory.rollout_logprobs, RemoteRow):
            trajectory = replace(trajectory, rollout_logprobs=list(trajectory.rollout_logprobs))
        return (trajectory,), self.options

    def _answer_arguments(self, trajectory: Trajectory) -> tuple[Any, dict[str, Any]]:
        prompt = trajectory.prompt
        values = {name: _column(prompt, name) for name in self._free if name not in self.options}
        if self._takes_columns:
            taken = {*self._own, *self.options}
            values |= {name: value for name, value in prompt.columns.items() if name not in taken}
        self._check_present(values, [prompt])
        return (prompt.content, trajectory.text), {**_present(values), **self.options}

    def _batched_arguments(self, trajectories: Sequence[Trajectory]) -> tuple[Any, dict[str, Any]]:
        prompts = [t.prompt for t in trajectories]
        names = set(self._free)
        if self._takes_columns:
            names |= {"answer", *(name for prompt in prompts for name in prompt.columns)}
        values: dict[str, Any] = {}
        for name in names - set(self.options) - set(_BATCHED):
            column = [_column(p, name) for p in prompts]
            is_missing = all(value is _MISSING for value in column)
            values[name] = _MISSING if is_missing else [None if v is _MISSING else v for v in column]
        self._check_present(values, prompts)
        inputs: dict[str, Any] = {
            "prompts": [p.content for p in prompts],
            # In the format of the prompt, as TRL hands them to its reward functions.
            "completions": [
                t.text if isinstance(t.prompt.content, str) else [{"role": "assistant", "content": t.text}]
                for t in trajectories
            ],
            "completion_ids": [list(t.response_ids) for t in trajectories],
        }
        named = inputs if self._takes_columns else {name: inputs[name] for name in self._own}
        return (), {**named, **_present(values), **self.options}

    def _check_present(self, values: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        missing = [
            name
            for name, value in values.items()
            if value is _MISSING and self._free.get(name) is inspect.Parameter.empty
        ]
        if missing:
            known = sorted({name for prompt in prompts for name in prompt.columns})
            known += ["answer"] if any(p.answer is not None for p in prompts) else []
            raise ValueError(
                f"the data needs the columns {', '.join(missing)}, it has {', '.join(known) or 'none'}; "
                "name one of these, or give an option"
            )


def score_of(value: Any) -> Score | RewardFailure:
    """The value for one row, a number or a mapping with `reward`, as finite numbers by name."""
    if isinstance(value, RewardFailure):
        return value
    named = value if isinstance(value, Mapping) else {"reward": value}
    if "reward" not in named:
        found = sorted(map(str, named))
        return _wrong_type(f"need a number or a mapping with 'reward', got a mapping with {found}")
    score: Score = {}
    for name, entry in named.items():
        if name == "turn_rewards":
            numbers = [_number(value) for value in entry] if isinstance(entry, list | tuple) else [None]
            if any(number is None or not math.isfinite(number) for number in numbers):
                return _wrong_type(f"need a list of finite numbers for 'turn_rewards', got {entry}")
            score[name] = numbers
            continue
        number = _number(entry)
        if number is None:
            hint = "; it did not return a value" if entry is None else ""
            return _wrong_type(f"need a number for {name!r}, got {type(entry).__name__}{hint}")
        if not math.isfinite(number):
            return RewardFailure("reward_not_finite", f"need a finite number for {name!r}, got {number}")
        score[str(name)] = number
    return score


def row_values(values: Any, num_rows: int) -> list[Any] | RewardFailure:
    """The value of a batched function as one value per row."""
    if isinstance(values, RewardFailure):
        return values
    if isinstance(values, (str, bytes, Mapping)) or not (
        isinstance(values, Iterable) and isinstance(values, Sized)
    ):
        return _wrong_type(f"need a list of numbers, got {type(values).__name__}")
    try:
        rows = list(values)
    except Exception as error:  # A tensor without dimensions has a length by its type only.
        return _wrong_type(f"need a list of numbers, got {type(values).__name__}: {error}")
    if len(rows) != num_rows:
        return RewardFailure("reward_wrong_count", f"need one value per row, got {len(rows)} for {num_rows}")
    return rows


def named_scores(scored: Mapping[str, Score]) -> Score:
    """Values by function, and further scores by their own name, or as function/name if that is taken."""
    named = {name: score["reward"] for name, score in scored.items()}
    for name, score in scored.items():
        for key, value in score.items():
            if key != "reward":
                named[key if key not in named else f"{name}/{key}"] = value
    return named


def _name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, partial) else function
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else name


def _parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"need a reward function whose signature can be read, got {name!r}; wrap it as one of {FORMS}"
        ) from error


def _form(parameters: Sequence[inspect.Parameter], name: str) -> Form:
    if any(p.name in _BATCHED for p in parameters):
        return "batched"
    first, second = [*(p.name for p in _leading(parameters)), "", ""][:2]
    if first == "trajectory" or (first and not second and first not in _NOT_ALONE):
        return "trajectory"
    if second and first not in _NOT_FIRST and second not in _NOT_SECOND:
        return "answer"
    signature = ", ".join(str(p) for p in parameters)
    raise ValueError(
        f"need a reward function of the form {FORMS}, with its first arguments in this order; "
        f"got {name}({signature})"
    )


def _leading(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """Positional parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in kinds and p.default is p.empty]


def _column(prompt: Prompt, name: str) -> Any:
    """Value for a parameter; an answer of None counts as missing, so that nothing is compared with it."""
    if name == "answer" or (name == "ground_truth" and name not in prompt.columns):
        return _MISSING if prompt.answer is None else prompt.answer
    if name == "source" and name not in prompt.columns:
        return prompt.source
    return prompt.columns.get(name, _MISSING)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not _MISSING}


def _number(value: Any) -> float | None:
    if type(value) is float:
        return value
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except Exception:  # User code or a tensor of several numbers: the caller records it as a wrong type.
        return None
