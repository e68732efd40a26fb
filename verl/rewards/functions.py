"""Reward functions: the forms that a user's may have, the table of built-in ones, and their weighted sum over
trajectories.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal, SupportsFloat

from verl.config.data import RewardsConfig
from verl.config.layers import nearest_key
from verl.data.batch import Trajectory, turn_ends
from verl.rewards.calls import CallPool, RewardCall, RewardFailure
from verl.rewards.tasks import exact, position_share, prefix_share
from verl.utils.sampling_types import Prompt

# Name -> function, or "module:function" where its module is heavy.
REWARDS: dict[str, Callable[..., Any] | str] = {
    "exact": exact,
    "position_share": position_share,
    "prefix_share": prefix_share,
    "model": "verl.rewards.model:model",
}

# Name -> what gets a built-in function ready, called with its options before the first step, outside of any
# time limit.
PREPARATIONS: dict[str, str] = {"model": "verl.rewards.model:prepare"}

FORMS: Final = (
    "f(prompt, response), f(prompt, response, answer), f(trajectory), or f(prompts, completions, **columns) over all rows at once, "
    "each plain or async"
)
_BATCHED = ("prompts", "completions", "completion_ids")
# Names that cannot mean what stands at that place: better an error than a number for the wrong text.
_NOT_FIRST = {"response", "completion", "answer", "ground_truth", "data_source"}
_NOT_SECOND = {"prompt", "answer", "ground_truth"}
_NOT_ALONE = _NOT_FIRST | {"prompt"}
_MISSING: Final = object()

Form = Literal["answer", "trajectory", "batched"]
# Numbers by name; `turn_rewards` alone is a list of them.
Score = dict[str, Any]


class RewardFunction:
    """A user's function with its weight and options; its form is read from its signature.

    Forms, plain or async:
        f(prompt, response): one answer. `prompt` is the prompt's content, text or chat messages; `response`
        the text.
            Further parameters are filled by name from the data: `answer` or `ground_truth` (the reference),
            `source`, or a column.
        f(trajectory): one answer with everything known about it.
        f(prompts, completions, **columns): all answers at once, as for TRL's trainers. A completion is text,
        or for
            chat messages a list with the assistant's message. Columns that are named, or all with
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
    ) -> None:
        self.function = function
        self.name = name or _name_of(function)
        self.weight = weight
        self.options = dict(options or {})
        if not math.isfinite(weight):
            raise ValueError(f"need a finite weight for reward function {self.name!r}, got {weight}")
        parameters = _parameters(function, self.name)
        self.form: Form = _form(parameters, self.name)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self._takes_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._own = _own_parameters(parameters, self.form)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._free = {p.name: p.default for p in by_name if p.name not in self._own}
        self._check_options()

    def calls(self, trajectories: Sequence[Trajectory], name: str) -> list[RewardCall]:
        """The calls that score these rows: one for each, or one for all if it is batched."""
        if self.form == "batched":
            return [RewardCall(name, partial(self._call_batched, trajectories), is_async=self.is_async)]
        call = self._call_trajectory if self.form == "trajectory" else self._call_answer
        return [
            RewardCall(name, partial(call, trajectory), is_async=self.is_async) for trajectory in trajectories
        ]

    def scores(self, calls: Sequence[RewardCall], num_rows: int) -> list[Score | RewardFailure | None]:
        """What the settled calls say of each row: named finite numbers, a failure, or None where it does not
        apply.
        """
        if self.form != "batched":
            return [_score(call.result) for call in calls]
        values = calls[0].result
        if not isinstance(values, RewardFailure):
            values = _rows(values, num_rows)
        if isinstance(values, RewardFailure):
            return [values] * num_rows
        return [None if value is None else _score(value) for value in values]

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
                f"reward function {self.name!r} needs {', '.join(needed)} besides the trajectory; give it as an option"
            )

    def _call_trajectory(self, trajectory: Trajectory) -> Any:
        return self.function(trajectory, **self.options)

    def _call_answer(self, trajectory: Trajectory) -> Any:
        prompt = trajectory.prompt
        values = {name: _column(prompt, name) for name in self._free if name not in self.options}
        if self._takes_columns:
            values |= {
                name: value
                for name, value in prompt.columns.items()
                if name not in self._own and name not in self.options
            }
        self._check_present(values, [prompt])
        return self.function(prompt.content, trajectory.text, **_present(values), **self.options)

    def _call_batched(self, trajectories: Sequence[Trajectory]) -> Any:
        prompts = [t.prompt for t in trajectories]
        names = set(self._free)
        if self._takes_columns:
            names |= {"answer", *(name for prompt in prompts for name in prompt.columns)}
        columns = {
            name: [_column(p, name) for p in prompts] for name in names - set(self.options) - set(_BATCHED)
        }
        values = {
            name: _MISSING if all(v is _MISSING for v in c) else [_none(v) for v in c]
            for name, c in columns.items()
        }
        self._check_present(values, prompts)
        inputs: dict[str, Any] = {
            "prompts": [p.content for p in prompts],
            "completions": [_completion(t) for t in trajectories],
            "completion_ids": [t.response_ids for t in trajectories],
        }
        named = inputs if self._takes_columns else {name: inputs[name] for name in self._own}
        return self.function(**named, **_present(values), **self.options)

    def _check_present(self, values: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
        missing = [
            name
            for name, value in values.items()
            if value is _MISSING and self._free.get(name) is inspect.Parameter.empty
        ]
        if missing:
            known = sorted({name for prompt in prompts for name in prompt.columns})
            has = (
                ", ".join([*known, *(["answer"] if any(p.answer is not None for p in prompts) else [])])
                or "none"
            )
            raise ValueError(
                f"the data needs the columns {', '.join(missing)}, it has {has}; name one of these, or give an option"
            )


class RewardFunctions:
    """Scores trajectories with several functions at once; what a function cannot score has no reward, and
    says why.

    Args:
        functions: at least one. Of two with the same name the second is called `name_2`.
        timeout_s: limit of one call in seconds, from when the function is entered.
        max_failed_share: share of the trajectories of one `score` without a reward above which it raises, in
            [0, 1].

    Raises:
        ValueError: no functions.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], *, timeout_s: float, max_failed_share: float
    ) -> None:
        if not functions:
            names = ", ".join(REWARDS)
            raise ValueError(
                f"need at least one reward function, got none; name one in rewards.functions ({names}) or pass reward_fn"
            )
        self._functions: dict[str, RewardFunction] = {}
        for function in functions:
            self._functions[_unused(function.name, self._functions)] = function
        self._max_failed_share = max_failed_share
        self._pool = CallPool(timeout_s=timeout_s)

    @property
    def names(self) -> list[str]:
        """Of the functions."""
        return list(self._functions)

    def score(self, trajectories: Sequence[Trajectory]) -> None:
        """As `attempt`, and refuses that too many fail.

        Raises:
            RuntimeError: too many failed, or too many calls never return.
        """
        self.attempt(rows := [t for t in trajectories if t.outcome == "ok"])
        self.check_failed(rows)

    def attempt(self, trajectories: Sequence[Trajectory]) -> None:
        """Fills `reward`, `scores`, `outcome` and `detail`, in place.

        The reward is the sum of weight times value over the functions that apply. `scores` holds each value
        by function name, and the further scores of mappings by their own (as `function/name` if that is
        taken). A trajectory that a function fails on has no reward, the outcome `reward_error`,
        `reward_timeout`, `reward_not_finite`, `reward_wrong_type` or `reward_wrong_count`, or
        `reward_not_applicable` if no function applies. Trajectories whose outcome is not "ok" already, or
        that have a reward, are left as they are.

        Raises:
            RuntimeError: too many calls never return.
        """
        rows = [t for t in trajectories if t.outcome == "ok" and t.reward is None]
        if not rows:
            return
        calls = {name: function.calls(rows, name) for name, function in self._functions.items()}
        self._pool.run([call for of_function in calls.values() for call in of_function])
        results = {
            name: function.scores(calls[name], len(rows)) for name, function in self._functions.items()
        }
        for i, trajectory in enumerate(rows):
            self._write(trajectory, {name: of_function[i] for name, of_function in results.items()})

    def check_failed(self, trajectories: Sequence[Trajectory]) -> None:
        """Refuses answers of which too many have no reward.

        Raises:
            RuntimeError: more than `max_failed_share` have none.
        """
        failed = [t for t in trajectories if t.reward is None]
        if len(failed) <= self._max_failed_share * len(trajectories):
            return
        counts = ", ".join(
            f"{outcome} {count}" for outcome, count in Counter(t.outcome for t in failed).most_common()
        )
        raise RuntimeError(
            f"need a reward for at least {1 - self._max_failed_share:.0%} of the answers, {len(failed)} of {len(trajectories)} have none "
            f"({counts}); first: {failed[0].detail}; correct the function, or raise rewards.timeout_s or rewards.max_failed_share"
        )

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts without a column that a function cannot do without; see
        `RewardFunction.check_data`.
        """
        for function in self._functions.values():
            function.check_data(prompts)

    def close(self) -> None:
        """Ends the threads that calls run on."""
        self._pool.close()

    def _write(self, trajectory: Trajectory, results: Mapping[str, Score | RewardFailure | None]) -> None:
        scored = {name: result for name, result in results.items() if isinstance(result, dict)}
        failures = {name: result for name, result in results.items() if isinstance(result, RewardFailure)}
        turns = {name: score.pop("turn_rewards") for name, score in scored.items() if "turn_rewards" in score}
        failures |= _wrong_turns(trajectory, turns)
        for name, values in turns.items():
            scored[name]["reward"] += sum(values)
        reward = sum(self._functions[name].weight * score["reward"] for name, score in scored.items())
        if not scored and not failures:
            failures = {
                ", ".join(results): RewardFailure(
                    "reward_not_applicable", "no function applies to this prompt"
                )
            }
        elif not math.isfinite(reward):
            failures = failures or {
                ", ".join(results): RewardFailure("reward_not_finite", f"the weighted sum is {reward}")
            }
        trajectory.scores.update(_named_scores(scored))
        # In the order of the functions, whichever apply: the parts of siblings are compared one by one.
        weights = {name: function.weight for name, function in self._functions.items()}
        weighted = [
            [weights[name] * value for value in values] for name, values in turns.items() if not failures
        ]
        trajectory.turn_rewards = [sum(of_turn) for of_turn in zip(*weighted, strict=True)]
        trajectory.parts = [
            (weights[name], scored[name]["reward"]) if name in scored else (0.0, 0.0) for name in weights
        ]
        trajectory.reward = None if failures else reward
        for name, failure in list(failures.items())[:1]:
            trajectory.outcome, trajectory.detail = failure.outcome, f"{name}: {failure.detail}"


def build_rewards(
    config: RewardsConfig,
    reward_fn: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    *,
    placed: Mapping[str, Callable[..., Any]] | None = None,
) -> RewardFunctions:
    """The functions of the settings and those given as Python objects, which have weight 1.

    Args:
        config: names, options and limits.
        reward_fn: further functions.
        placed: functions in place of those of the same name, whose models run elsewhere.

    Raises:
        ValueError: there is none, a name is unknown, or a function fits no form (see `RewardFunction`).
    """
    given = [] if reward_fn is None else [reward_fn] if callable(reward_fn) else list(reward_fn)
    functions = []
    placed = placed or {}
    for choice in config.functions:
        name = choice.name if choice.name in REWARDS else None
        function = placed.get(choice.name) or load_function(choice.name)
        functions.append(RewardFunction(function, name=name, weight=choice.weight, options=choice.options))
        if choice.name in PREPARATIONS and choice.name not in placed:
            load_function(PREPARATIONS[choice.name])(**choice.options)
    functions += [RewardFunction(function) for function in given]
    return RewardFunctions(functions, timeout_s=config.timeout_s, max_failed_share=config.max_failed_share)


def load_function(name: str) -> Callable[..., Any]:
    """A reward function by its name in `REWARDS`, as "package.module:function", or as
    "path/file.py:function".

    Raises:
        ValueError: there is no such name, module, file or function.
    """
    known = REWARDS.get(name, name)
    if not isinstance(known, str):
        return known
    place, colon, attribute = known.rpartition(":")
    if not colon:
        names = f"{', '.join(REWARDS)}; the nearest is {nearest_key(name, list(REWARDS))}"
        raise ValueError(
            f'need a reward function by name ({names}), as "package.module:function" or "file.py:function", got {name!r}'
        )
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"need a module that can be imported for reward function {name!r}, got {type(error).__name__}: {error}; "
            'correct it, put its folder on the path, or give "path/file.py:function"'
        ) from error
    function = vars(module).get(attribute)
    if not callable(function):
        raise ValueError(
            f"need a function {attribute!r} in {place!r}, there is {'none' if function is None else type(function).__name__}"
        )
    return function


def overlong_penalty(length: int, *, max_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """What an answer's length adds to its reward: 0 up to max - buffer, from there linearly to -penalty at
    max and beyond.

    Soft overlong punishment, DAPO, https://arxiv.org/abs/2503.14476, section 3.4, equation 13.

    Args:
        length: of the answer, in tokens.
        max_tokens: longest answer, in tokens.
        buffer_tokens: last part of it in which the reward falls, in tokens; 0: no punishment.
        penalty: lost at the full length, unit of the reward.

    Returns:
        A number in [-penalty, 0].

    Raises:
        ValueError: the buffer is negative or longer than the longest answer.
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"need 0 <= buffer_tokens <= max_tokens, got buffer_tokens={buffer_tokens} and max_tokens={max_tokens}"
        )
    over = length - (max_tokens - buffer_tokens)
    return -penalty * min(over / buffer_tokens, 1.0) if buffer_tokens and over > 0 else 0.0


def _name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, partial) else function
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else name


def _unused(name: str, taken: Iterable[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


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
        f"need a reward function of the form {FORMS}, with its first arguments in this order; got {name}({signature})"
    )


def _leading(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """Positional parameters without a default."""
    return [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]


def _own_parameters(parameters: Sequence[inspect.Parameter], form: Form) -> list[str]:
    """Names of the parameters that the form itself fills; options and columns may fill the others."""
    if form == "batched":
        return [p.name for p in parameters if p.name in _BATCHED]
    return [p.name for p in _leading(parameters)[: 1 if form == "trajectory" else 2]]


def _column(prompt: Prompt, name: str) -> Any:
    """The value for a parameter of that name; no reference answer is a missing one, so that it is not
    compared with None.
    """
    if name == "answer" or (name == "ground_truth" and name not in prompt.columns):
        return _MISSING if prompt.answer is None else prompt.answer
    if name == "source" and name not in prompt.columns:
        return prompt.source
    return prompt.columns.get(name, _MISSING)


def _none(value: Any) -> Any:
    return None if value is _MISSING else value


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not _MISSING}


def _completion(trajectory: Trajectory) -> str | list[dict[str, str]]:
    """The answer in its prompt's format, as TRL hands it to its reward functions."""
    if isinstance(trajectory.prompt.content, str):
        return trajectory.text
    return [{"role": "assistant", "content": trajectory.text}]


def _load_file(path: Path) -> ModuleType:
    key = str(path.resolve())
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, key)
    assert spec is not None and spec.loader is not None  # The name ends in .py.
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # Dataclasses look their module up while it is being executed.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _rows(values: Any, num_rows: int) -> list[Any] | RewardFailure:
    """The values that a batched function returned, one per row."""
    if isinstance(values, (str, bytes, Mapping)) or not (
        isinstance(values, Iterable) and isinstance(values, Sized)
    ):
        return RewardFailure("reward_wrong_type", f"need a list of numbers, got {type(values).__name__}")
    try:
        rows = list(values)
    except Exception as error:  # A tensor without dimensions has a length by its type only.
        return RewardFailure(
            "reward_wrong_type", f"need a list of numbers, got {type(values).__name__}: {error}"
        )
    if len(rows) != num_rows:
        return RewardFailure("reward_wrong_count", f"need one value per row, got {len(rows)} for {num_rows}")
    return rows


def _score(value: Any) -> Score | RewardFailure:
    """A row's value as finite numbers by name, `reward` among them."""
    if isinstance(value, RewardFailure):
        return value
    named = value if isinstance(value, Mapping) else {"reward": value}
    if "reward" not in named:
        return RewardFailure(
            "reward_wrong_type",
            f"need a number or a mapping with 'reward', got a mapping with {sorted(map(str, named))}",
        )
    score: Score = {}
    for name, entry in named.items():
        if name == "turn_rewards":
            numbers = [_number(value) for value in entry] if isinstance(entry, list | tuple) else [None]
            if any(number is None or not math.isfinite(number) for number in numbers):
                return RewardFailure(
                    "reward_wrong_type", f"need a list of finite numbers for 'turn_rewards', got {entry}"
                )
            score[name] = numbers
            continue
        number = _number(entry)
        if number is None:
            hint = "; it did not return a value" if entry is None else ""
            return RewardFailure(
                "reward_wrong_type", f"need a number for {name!r}, got {type(entry).__name__}{hint}"
            )
        if not math.isfinite(number):
            return RewardFailure("reward_not_finite", f"need a finite number for {name!r}, got {number}")
        score[str(name)] = number
    return score


def _number(value: Any) -> float | None:
    if type(value) is float:
        return value
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except Exception:  # User code or a tensor of several numbers: the caller records it as a wrong type.
        return None


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


def _named_scores(scored: Mapping[str, Score]) -> Score:
    named = {name: score["reward"] for name, score in scored.items()}
    for name, score in scored.items():
        for key, value in score.items():
            if key != "reward":
                named[key if key not in named else f"{name}/{key}"] = value
    return named
