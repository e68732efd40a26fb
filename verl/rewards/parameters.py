"""Parameters of reward functions: the names of this and of other trainers, and the values they stand for.

A parameter is known by its name alone, never by its place. A name that is none of these is a column of the
data. The names of other trainers come from their documents: verl (custom reward functions), TRL (reward
functions of `GRPOTrainer`), OpenRLHF (`--remote_rm_url FILE.py`), SkyRL and verifiers (`Rubric`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from verl.data.batch import RemoteRow
from verl.data.trajectory import EpisodeRecord, Trajectory
from verl.rewards.reward_log import LOG_NAMES, RewardLog, TrainerState
from verl.utils.sampling_types import Prompt

MISSING: Final = object()
_RUN_NAMES = ("trainer_state", *LOG_NAMES)
# Besides all columns: what TRL hands to a function with **kwargs, and the reference answer.
_OF_TRL = {"prompts", "completions", "completion_ids", "answer", *_RUN_NAMES}
Parameter = inspect.Parameter


def _text_of(prompt: Prompt) -> str:
    if isinstance(prompt.content, str):
        return prompt.content
    raise ValueError(
        "need the tokenizer for the text of a chat prompt; give build_rewards prompt_text=codec.prompt_text"
    )


@dataclass(frozen=True)
class CallContext:
    """Facts of the run that a reward function may ask for.

    Attributes:
        prompt_text: the text that the model reads for a prompt.
        state: progress of the run.
        folder: of the run's files; None: there is none.
    """

    prompt_text: Callable[[Prompt], str] = _text_of
    state: Callable[[], TrainerState] = TrainerState
    folder: Path | None = None


def completion_of(trajectory: Trajectory) -> str | list[dict[str, Any]]:
    """The answer in the format of its prompt: a text, or the list of the messages behind the prompt."""
    if trajectory.episode is not None and not isinstance(trajectory.prompt.content, str):
        return messages_behind_prompt(trajectory.episode)
    if isinstance(trajectory.prompt.content, str):
        return trajectory.text
    return [{"role": "assistant", "content": trajectory.text}]


def messages_behind_prompt(episode: EpisodeRecord) -> list[dict[str, Any]]:
    """Messages of an episode from the first turn of the policy on."""
    messages = episode.messages
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return copy.deepcopy(messages[first:])


def messages_of(trajectory: Trajectory) -> list[dict[str, Any]]:
    """All messages of an answer, those of its prompt included."""
    if trajectory.episode is not None:
        return copy.deepcopy(trajectory.episode.messages)
    content = trajectory.prompt.content
    asked = [{"role": "user", "content": content}] if isinstance(content, str) else copy.deepcopy(content)
    return [*asked, {"role": "assistant", "content": trajectory.text}]


def _own_copy(value: Any) -> Any:
    """The value for one row of one call, which may change it: rows share their prompt, and steps the data."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def _truth(prompt: Prompt) -> Any:
    """The reference answer; None counts as missing, so that nothing is compared with it."""
    return MISSING if prompt.answer is None else prompt.answer


def with_fetched_tokens(trajectory: Trajectory) -> Trajectory:
    """The trajectory with its tokens in this process, to be sent to another."""
    ids, logprobs = trajectory.response_ids, trajectory.rollout_logprobs
    return replace(
        trajectory,
        response_ids=list(ids) if isinstance(ids, RemoteRow) else ids,
        rollout_logprobs=list(logprobs) if isinstance(logprobs, RemoteRow) else logprobs,
    )


def _rollout_state(trajectory: Trajectory) -> dict[str, Any]:
    """The dictionary that verifiers hands to its functions as `state`, as far as it exists here."""
    prompt = trajectory.prompt
    state = {"prompt": prompt.content, "completion": completion_of(trajectory), "answer": prompt.answer}
    return _own_copy(state | {"task": prompt.source, "info": prompt.columns.get("info", {})})


# A function that has one of these parameters is called for each answer.
ROW_VALUES: dict[str, Callable[[Trajectory], Any]] = {
    "trajectory": lambda t: t,
    "response": lambda t: t.text,
    "completion": completion_of,
    "solution_str": lambda t: t.text,
    "state": _rollout_state,
    "messages": messages_of,
}
# A function that has one of these is called once for all answers, with a list for each parameter.
BATCH_VALUES: dict[str, Callable[[Trajectory], Any]] = {
    "completions": completion_of,
    "trajectories": lambda t: t,
    "completion_ids": lambda t: list(t.response_ids),
    "completions_ids": lambda t: list(t.response_ids),
    "responses": lambda t: t.text,
    "solution_strs": lambda t: t.text,
    "queries": lambda t: t.text,  # behind the text of the prompt, see `Signature`
}
# Values of a prompt that both kinds of functions know, unless the data has a column of that name.
DATA_VALUES: dict[str, Callable[[Prompt], Any]] = {
    "answer": _truth,
    "ground_truth": _truth,
    "label": _truth,
    "data_source": lambda prompt: prompt.source,
    "source": lambda prompt: prompt.source,
    "task": lambda prompt: prompt.source,
    "extra_info": lambda prompt: {},
    "info": lambda prompt: {},
    "tools": lambda prompt: list(prompt.tools),
}
# In a function over all answers: the column that a plural stands for.
PLURALS = {
    "ground_truths": "ground_truth",
    "labels": "label",
    "data_sources": "data_source",
    "extra_infos": "extra_info",
}
KNOWN_NAMES: Final = (
    "for each answer: prompt, prompt_text, response, completion, solution_str, trajectory, state, messages; "
    "over all answers: prompts, completions, responses, trajectories, completion_ids, queries, "
    "solution_strs; in both: answer, ground_truth, label, data_source, source, task, extra_info, info, "
    "tools, trainer_state, and every column of the data"
)


class Signature:
    """The parameters of a reward function, filled by name.

    Args:
        function: the function.
        name: of the function, for messages.
        options: values of parameters that the settings give.
        columns: names of the columns of the data, for messages.

    Attributes:
        is_batched: it is called once for all answers.
        needs_tokens: one of its parameters is the tokens of the answers.
        takes_trajectories: one of its parameters is the trajectory, or all of them.

    Raises:
        ValueError: its parameters cannot be read, none of them takes the answer, or an option is not one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        options: Mapping[str, Any],
        *,
        columns: Collection[str] = (),
    ) -> None:
        self._name, self._options = name, dict(options)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward function {name!r}: need parameters that Python can read; wrap it in a function of "
                "your own, such as f(prompt, response)"
            ) from error
        self._takes_rest = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        unnamed = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
        self._parameters = {p.name: p for p in parameters if p.kind not in unnamed}
        named = [p for p in self._parameters if p not in options]
        self.is_batched = any(p in BATCH_VALUES for p in named)
        self.takes_trajectories = ("trajectories" if self.is_batched else "trajectory") in named
        self.needs_tokens = not {"completion_ids", "completions_ids"}.isdisjoint(named)
        # As in verl: what is not one of its four parameters is an option, with or without a default.
        self._is_of_verl = not {"solution_str", "solution_strs"}.isdisjoint(named)
        self._own = BATCH_VALUES if self.is_batched else ROW_VALUES
        if not any(p in self._own for p in named):
            raise ValueError(self._no_answer(parameters, columns))
        self._check_options()

    def arguments(
        self, trajectories: Sequence[Trajectory], context: CallContext
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call for these rows, one row unless it is batched.

        Raises:
            ValueError: the data has no value for a parameter without a default.
        """
        prompts = [t.prompt for t in trajectories]
        values: dict[str, Any] = {}
        if self.is_batched:
            log = RewardLog(len(trajectories))
            values |= {"log_extra": log.log_extra, "log_metric": log.log_metric}
            values |= self._own_lists(trajectories, context)
        else:
            values |= {"prompt": _own_copy(prompts[0].content)}
            if "prompt_text" in self._parameters and "prompt_text" not in prompts[0].columns:
                values["prompt_text"] = context.prompt_text(prompts[0])
            values |= {
                name: of(trajectories[0]) for name, of in ROW_VALUES.items() if name in self._parameters
            }
        values["trainer_state"] = context.state()
        values |= {name: self._column(name, prompts) for name in self._column_names(prompts, set(values))}
        taken = self._parameters.keys() | (self._rest(prompts) if self._takes_rest else set())
        given = {n: v for n, v in values.items() if n in taken and v is not MISSING} | self._options
        missing = [name for name in self._required if name not in given]
        if missing:
            raise ValueError(self._no_value(missing, prompts))
        placed = [p for p in self._parameters.values() if p.kind is Parameter.POSITIONAL_ONLY]
        return tuple(given.pop(p.name, p.default) for p in placed), given

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check that the data has a value for each parameter without a default.

        Raises:
            ValueError: no prompt has one; or some have none, if the function is called for each answer.
        """
        own = {*self._own, *_RUN_NAMES}
        own |= {"prompts"} if self.is_batched else {"prompt", "prompt_text"}
        names = [name for name in self._required if name not in own]
        lacking = {n: [p for p in prompts if self._data_value(n, p) is MISSING] for n in names}
        absent = [name for name, without in lacking.items() if without and len(without) == len(prompts)]
        if absent:
            raise ValueError(f"reward function {self._name!r}: {self._no_value(absent, prompts)}")
        for name, without in lacking.items():
            if without and not self.is_batched:
                raise ValueError(
                    f"reward function {self._name!r}: need {name} in every row, {len(without)} of "
                    f"{len(prompts)} have none, the first is row {without[0].index} of {without[0].source}; "
                    "add it, leave those rows out, or give the parameter a default"
                )

    def _own_lists(self, trajectories: Sequence[Trajectory], context: CallContext) -> dict[str, list[Any]]:
        """Lists over all answers of the names that stand for prompts and answers."""
        # OpenRLHF hands over texts, TRL what the data has.
        has_texts = "queries" in self._parameters
        prompts = [
            context.prompt_text(t.prompt) if has_texts else _own_copy(t.prompt.content) for t in trajectories
        ]
        wanted = self._parameters.keys() | (_OF_TRL if self._takes_rest else set())
        lists = {name: [of(t) for t in trajectories] for name, of in BATCH_VALUES.items() if name in wanted}
        if has_texts:
            lists["queries"] = [f"{p}{t.text}" for p, t in zip(prompts, trajectories, strict=True)]
        return {"prompts": prompts, **lists}

    def _rest(self, prompts: Sequence[Prompt]) -> set[str]:
        """Names that `**columns` takes: all columns, and over all answers what TRL hands over as well."""
        if self._is_of_verl:
            return set()
        columns = {name for prompt in prompts for name in prompt.columns} - {"prompt"}
        return columns | _OF_TRL if self.is_batched else columns

    def _column_names(self, prompts: Sequence[Prompt], filled: set[str]) -> set[str]:
        """Names among its parameters, or for `**columns`, that stand for values of the data."""
        names = {
            name
            for name, parameter in self._parameters.items()
            if not self._is_of_verl
            or parameter.default is Parameter.empty
            or PLURALS.get(name, name) in DATA_VALUES
        }
        return (names | (self._rest(prompts) if self._takes_rest else set())) - filled

    def _column(self, name: str, prompts: Sequence[Prompt]) -> Any:
        values = [_own_copy(self._data_value(name, prompt)) for prompt in prompts]
        if not self.is_batched:
            return values[0]
        if all(value is MISSING for value in values):
            return MISSING
        return [None if value is MISSING else value for value in values]

    def _data_value(self, name: str, prompt: Prompt) -> Any:
        if name in prompt.columns and name != "answer":
            return prompt.columns[name]
        singular = PLURALS.get(name, name) if self.is_batched else name
        if singular in prompt.columns and singular != "answer":
            return prompt.columns[singular]
        return DATA_VALUES[singular](prompt) if singular in DATA_VALUES else MISSING

    @property
    def _required(self) -> list[str]:
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is Parameter.empty and name not in self._options
        ]

    def _check_options(self) -> None:
        valid = [name for name in self._parameters if name not in self._own and name != "prompt"]
        unknown = sorted(set(self._options) - set(valid))
        if unknown and not self._takes_rest:
            raise ValueError(
                f"need options that reward function {self._name!r} takes ({', '.join(valid) or 'none'}), "
                f"got {', '.join(unknown)}"
            )

    def _no_answer(self, parameters: Sequence[Parameter], columns: Collection[str]) -> str:
        return (
            f"reward function {self._name!r}: need a parameter that takes the answer of the policy, such as "
            f"`response` (its text), got {self._name}({', '.join(map(str, parameters))}); rename its "
            f"parameters, which are known by name alone ({KNOWN_NAMES}{_listed(columns)})"
        )

    def _no_value(self, missing: Sequence[str], prompts: Sequence[Prompt]) -> str:
        return (
            f"need a column of the data for the parameter {', '.join(missing)}, got the columns "
            f"{', '.join(columns_of(prompts)) or 'none'}; rename it, give it as an option, or take a known "
            f"name ({KNOWN_NAMES})"
        )


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    """Names of the columns of some prompts, `answer` among them if there are reference answers."""
    names = {name for prompt in prompts for name in prompt.columns}
    return sorted(names | ({"answer"} if any(p.answer is not None for p in prompts) else set()))


def _listed(columns: Collection[str]) -> str:
    return f": {', '.join(sorted(columns))}" if columns else ""
