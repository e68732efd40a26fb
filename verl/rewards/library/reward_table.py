"""Table of the built-in rewards, and their options checked against the functions' own signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from verl.config.checks.function_options import check_names, check_values, option_parameters
from verl.config.layers import nearest_key
from verl.rewards.execution.isolation import Place
from verl.utils import user_code

_HERE = "verl.rewards.library"


@dataclass(frozen=True)
class BuiltInReward:
    """A built-in reward. All functions are named as "module:function", and loaded when they are needed.

    Attributes:
        function: its keyword-only parameters are its options; their annotations are checked before the first
            step. It returns a number or a mapping, as a user's function does.
        check: called before the first step with each prompt that it is to score and with its options,
            `check(prompt, **options)`; raises ValueError for a truth that it cannot compare; "": none.
        prepare: called once before the first step, `prepare(**options)`, without a time limit: loads a model,
            or raises ValueError for options that do not fit together. "": none.
        place: "inline" in the trainer for what cannot hang; "thread" in the trainer for what holds a model;
            "process" in a worker process, which is ended at the time limit. An async function runs on an
            event loop of its place. The module of a function that runs in a process should not load torch,
            since each worker imports it.
        build: class of a function with state, in place of `function`: `build(options, folder=..., note=...)`
            checks its options itself, and its objects have `check(prompt)` and `close()`. It runs inline, and
            keeps time limits of its own; "": none.
        score_of_failure: called with the `RewardFailure` of a call; returns the value of an answer that is to
            blame, as one that keeps a checker busy for ever; None leaves it without a reward. "": none.
        refusal: reason why it cannot be used, with what to do in its place; "": it can.
    """

    function: str = ""
    check: str = ""
    prepare: str = ""
    place: Place = "inline"
    build: str = ""
    score_of_failure: str = ""
    refusal: str = ""


_COMPARES_TEXT = f"{_HERE}.spellings:check_normal_spellings"
# Chosen by the name of a row's data set, see `verl.rewards.data_sources`.
BY_DATA_SOURCE = "by_data_source"
# Name in rewards.functions -> the function.
REWARDS: dict[str, BuiltInReward] = {
    "exact": BuiltInReward(f"{_HERE}.text_match:exact", check=_COMPARES_TEXT),
    "position_share": BuiltInReward(f"{_HERE}.text_match:position_share", check=_COMPARES_TEXT),
    "prefix_share": BuiltInReward(f"{_HERE}.text_match:prefix_share", check=_COMPARES_TEXT),
    "math": BuiltInReward(
        f"{_HERE}.math_verification:math_reward",
        check=f"{_HERE}.math_verification:check_truth",
        prepare=f"{_HERE}.math_verification:prepare",
        place="process",
        score_of_failure=f"{_HERE}.math_verification:score_of_failure",
    ),
    "gsm8k": BuiltInReward(f"{_HERE}.gsm8k:gsm8k", check=f"{_HERE}.gsm8k:check_number"),
    "contains": BuiltInReward(
        f"{_HERE}.containment:contains",
        check=f"{_HERE}.containment:check_contains",
        prepare=f"{_HERE}.containment:prepare_contains",
    ),
    "similarity": BuiltInReward(f"{_HERE}.similarity:similarity", check=_COMPARES_TEXT),
    "choice": BuiltInReward(f"{_HERE}.choice:choice", check=f"{_HERE}.choice:check_choice"),
    "regex": BuiltInReward(
        f"{_HERE}.patterns:regex",
        check=f"{_HERE}.patterns:check_regex",
        prepare=f"{_HERE}.patterns:prepare_regex",
        place="process",
    ),
    "json_schema": BuiltInReward(
        f"{_HERE}.json_answers:json_schema",
        check=f"{_HERE}.json_answers:check_schema",
        prepare=f"{_HERE}.json_answers:prepare_schema",
        place="process",
    ),
    "format": BuiltInReward(
        f"{_HERE}.patterns:format_tags", prepare=f"{_HERE}.patterns:prepare_format", place="process"
    ),
    "repetition": BuiltInReward(f"{_HERE}.similarity:repetition"),
    "environment": BuiltInReward(f"{_HERE}.environment:environment"),
    "model": BuiltInReward(
        "verl.rewards.model_scoring:model", prepare="verl.rewards.model_scoring:prepare", place="thread"
    ),
    "judge": BuiltInReward(build="verl.rewards.judge.absolute:ScoreJudge"),
    "judge_pairwise": BuiltInReward(build="verl.rewards.judge.pairwise:PairwiseJudge"),
    "judge_ranking": BuiltInReward(build="verl.rewards.judge.ranking:RankingJudge"),
    # In a process: some generators compute what a model wrote, which may take forever.
    "reasoning_gym": BuiltInReward(f"{_HERE}.reasoning_gym:reasoning_gym", place="process"),
    "code": BuiltInReward(
        refusal="it would run the code of an answer, which needs a sandbox that verl does not have; start a "
        "sandbox of your own, such as Sandbox Fusion, and name a function that sends the answer to it, as "
        '"file.py:function"'
    ),
}


def load_function(name: str) -> Callable[..., Any]:
    """Reward function by its name in `REWARDS`, as "package.module:function", or as "file.py:function".

    Raises:
        ValueError: there is no such name, module, file or function, or it cannot be used.
    """
    built_in = REWARDS.get(name)
    if built_in and built_in.refusal:
        raise ValueError(f"reward function {name!r} cannot be used: {built_in.refusal}")
    target = built_in.function if built_in else name
    if ":" not in target:
        names = f"{', '.join(REWARDS)}; the nearest is {nearest_key(name, list(REWARDS))}"
        raise ValueError(
            f'need a reward function by name ({names}), as "package.module:function" or "file.py:function", '
            f"got {name!r}"
        )
    return user_code.load_function(target, user="reward function")


def checked_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a built-in function, those that are given brought to the type of their parameter.

    With their defaults too, so that a column of the data does not take the place of an option.

    Raises:
        ValueError: a name that is no option, or a value of another type or out of its bounds.
    """
    user, known = f"reward function {name!r}", option_parameters(function)
    check_names(user, known, options)
    defaults = {n: p.default for n, p in known.items() if p.default is not p.empty}
    return defaults | check_values(user, function, options)


def check_own_limit(
    name: str, function: Callable[..., Any], options: Mapping[str, Any], limit_s: float
) -> None:
    """Check that a function with a time limit of its own ends before its call is ended.

    Raises:
        ValueError: it does not.
    """
    own_s = options["timeout_s"] if "timeout_s" in option_parameters(function) else 0.0
    if own_s >= limit_s:
        raise ValueError(
            f"reward function {name!r}: need its timeout_s below rewards.timeout_s, which leaves an answer "
            f"without a reward, got {own_s:g} and {limit_s:g}; lower the first or raise the second"
        )


def reward_summary(name: str) -> tuple[str, str]:
    """First line of the documentation of a built-in reward, and its options with their defaults."""
    entry = REWARDS[name]
    if entry.refusal:
        return f"cannot be used yet: {entry.refusal}", ""
    function = user_code.load_function(entry.function or entry.build, user=name, keeps_class=True)
    meaning = (inspect.getdoc(function) or "").partition("\n")[0]
    if entry.build:
        return meaning, "see its page"
    options = option_parameters(function).items()
    shown = (n if p.default is p.empty else f"{n}={p.default!r}".replace("'", "") for n, p in options)
    return meaning, ", ".join(shown)


def reward_lines() -> list[str]:
    """One line for each built-in reward: name, meaning and options."""
    lines = []
    for name in REWARDS:
        meaning, options = reward_summary(name)
        lines.append(f"{name:15} {meaning}{f' [{options}]' if options else ''}")
    sources = "the functions that suit the public data set of a row, as verl chooses them"
    return [*lines, f"{BY_DATA_SOURCE:15} {sources}"]


def rewards_markdown() -> str:
    """Table of the built-in rewards, as Markdown."""
    rows = ["| name | reward | options and their defaults |", "|---|---|---|"]
    for name in REWARDS:
        cells = [f"`{name}`", *reward_summary(name)]
        cells[2] = f"`{cells[2]}`" if cells[2] and not REWARDS[name].build else cells[2]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)
