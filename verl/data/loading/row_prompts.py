"""One row as a prompt: parsed, with the reward function and the sampling parameters of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from json import JSONDecodeError
from typing import Any

from pydantic import ValidationError

from verl.config.data import DataConfig, DataSource, RewardsConfig, WeightedChoice
from verl.config.rollout import SamplingConfig
from verl.data.reading.layouts import ParsedRow
from verl.data.reading.row_cells import STRICT_JSON, MalformedRow, describe, parsed_json
from verl.data.reading.sources import name_of, sources_of
from verl.utils.sampling_types import Prompt

# Sampling parameters that a row or a source may set.
ROW_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "repetition_penalty")
# Built-in rewards with options that name a file or a server: these options, or none if most of them do.
REACHING: Mapping[str, frozenset[str]] = {
    "model": frozenset(),
    "judge": frozenset(),
    "judge_pairwise": frozenset(),
    "judge_ranking": frozenset(),
    "json_schema": frozenset({"schema_file"}),
}
_NO_REWARDS = RewardsConfig()


class RowPrompts:
    """Makes prompts of the rows of one source.

    Args:
        source: of the rows; its reward and its sampling parameters are those of rows that have none.
        config: names of the columns.
        parse: prompt and answer of a row.
        rewards: name of the column with the reward function, and functions that rows may name.

    Raises:
        ValueError: the source has sampling parameters that there are not.
    """

    def __init__(
        self,
        source: DataSource,
        config: DataConfig,
        parse: Callable[[dict[str, Any]], ParsedRow],
        *,
        rewards: RewardsConfig = _NO_REWARDS,
    ) -> None:
        self._name, self._parse, self._default = name_of(source), parse, source.reward
        self._config = config
        self._reward_column, self._sampling_key = rewards.column, config.sampling_key
        sources = [*sources_of(config.train), *sources_of(config.test), source]
        self._named = [*rewards.functions, *(one.reward for one in sources if one.reward is not None)]
        try:
            self._sampling = row_sampling(source.sampling.values)
        except MalformedRow as problem:
            raise ValueError(f"sampling of the source {source.path!r}: {problem}") from None
        self._choices: dict[str, WeightedChoice] = {}
        self._missing = {name for name in (self._reward_column, self._sampling_key) if name is not None}

    @property
    def missing_columns(self) -> set[str]:
        """Columns that the settings name for rewards and sampling, and that no row had so far."""
        return set(self._missing)

    def __call__(self, raw: Any, number: int) -> Prompt:
        """The prompt of a row.

        Args:
            raw: mapping of its columns, bytes of its JSON text, or a `Prompt` of a program, whose own source,
                reward and sampling parameters stay.
            number: of the row, which becomes `Prompt.index`.

        Raises:
            MalformedRow: the row cannot be used.
        """
        if isinstance(raw, Prompt):
            made = self(self._columns(raw), number)
            own = {**made.sampling, **row_sampling(raw.sampling)} if raw.sampling else made.sampling
            reward = made.reward if raw.reward is None else self._own_reward(raw.reward)
            return replace(made, source=raw.source or made.source, reward=reward, sampling=own)
        row = as_row(raw)
        parsed = self._parse(row)
        if isinstance(parsed.answer, float) and parsed.answer != parsed.answer:
            raise MalformedRow("need an answer, got NaN")
        columns = {name: value for name, value in row.items() if name not in parsed.used}
        if variables := columns.get("chat_template_kwargs"):
            variables = columns["chat_template_kwargs"] = parsed_json(variables, "chat_template_kwargs")
            if not isinstance(variables, dict):
                raise MalformedRow(f"need chat_template_kwargs that are an object, got {describe(variables)}")
        self._missing -= row.keys()
        named = row.get("data_source")
        return Prompt(
            parsed.content,
            parsed.answer,
            self._name if named is None else str(named),
            number,
            columns,
            parsed.tools,
            self._reward(row),
            self._row_sampling(row),
        )

    def _columns(self, prompt: Prompt) -> dict[str, Any]:
        """The row that a prompt in memory would be."""
        row = {**prompt.columns, self._config.prompt_key: prompt.content}
        if prompt.answer is not None:
            row[self._config.answer_key] = prompt.answer
        return row | ({"tools": list(prompt.tools)} if prompt.tools else {})

    def _own_reward(self, given: Any) -> WeightedChoice:
        """Reward of a prompt in memory, where it may also be written as in a row."""
        if isinstance(given, WeightedChoice):
            return given
        return row_reward(given, "Prompt.reward", named=self._named)

    def _reward(self, row: Mapping[str, Any]) -> WeightedChoice | None:
        column = self._reward_column
        value = None if column is None else row.get(column)
        if value is None or value == "":
            return self._default
        # Rows with equal values share one object: a data set may have millions of rows.
        key = json.dumps(value, sort_keys=True, default=repr)
        if key not in self._choices:
            self._choices[key] = row_reward(value, f"the column {column!r}", named=self._named)
        return self._choices[key]

    def _row_sampling(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        column = self._sampling_key
        value = None if column is None else row.get(column)
        if value is None or value == "":
            return self._sampling
        value = parsed_json(value, f"the column {column!r}")
        if not isinstance(value, dict):
            raise MalformedRow(
                f"need sampling parameters as an object in the column {column!r}, got {describe(value)}"
            )
        try:
            return {**self._sampling, **row_sampling(value)}
        except MalformedRow as problem:
            raise MalformedRow(f"column {column!r}: {problem}") from None


def row_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters of a row, checked; nulls are left out, as a table fills cells with them.

    Raises:
        MalformedRow: a name is unknown, or a value out of its bounds.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in given if name not in ROW_SAMPLING]:
        near = difflib.get_close_matches(unknown[0], ROW_SAMPLING, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MalformedRow(
            f"need sampling parameters among {', '.join(ROW_SAMPLING)}, got {unknown[0]!r}{hint}"
        )
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    try:
        checked = SamplingConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise MalformedRow(f"{name}: {first['msg']}, got {describe(first['input'])}") from None
    return {name: vars(checked)[name] for name in given}


def row_reward(value: Any, place: str, *, named: Sequence[WeightedChoice]) -> WeightedChoice:
    """Reward function that a row names: by its name, or as {name, options} or {name, OPTION: value, ...}.

    Data must not choose which code is run, which file is read or which server is asked: of functions of the
    user and of those in `REACHING`, a row chooses among those that the settings name.

    Args:
        value: text, mapping, or the JSON text of one.
        place: of the value, for messages.
        named: functions that the settings name.

    Raises:
        MalformedRow: it is no name or mapping, or names what the settings do not name.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parsed_json(value, place)
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"].strip():
        raise MalformedRow(
            f"need a reward function by name, or {{name, options}}, in {place}, got {describe(value)}"
        )
    given = {name: option for name, option in given.items() if option is not None}
    options = given.pop("options", {})
    if not isinstance(options, dict):
        raise MalformedRow(f"need options that are an object in {place}, got {describe(options)}")
    options = {name: option for name, option in options.items() if option is not None}
    if ":" in given["name"] and given["name"] not in {choice.name for choice in named}:
        raise MalformedRow(
            f"need a built-in reward function in {place}, got {given['name']!r}: data may name a function of "
            "yours only if rewards.functions or the reward of a source names it, too"
        )
    try:
        choice = WeightedChoice.model_validate({**options, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise MalformedRow(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    reaching = REACHING.get(choice.name)
    if reaching is None or (reaching and reaching.isdisjoint(choice.options)):
        return choice
    known = named_choice(choice, named, place)
    return known.model_copy(update={"weight": choice.weight}) if "weight" in given else known


def named_choice(choice: WeightedChoice, named: Sequence[WeightedChoice], place: str) -> WeightedChoice:
    """The one function of the settings that a row means: of the same name, with the options of the row.

    Raises:
        MalformedRow: there is none, or there are several with different options.
    """
    fitting = [one for one in named if one.name == choice.name]
    fitting = [one for one in fitting if choice.options.items() <= one.options.items()]
    fitting = [one for one in fitting if one.options == choice.options] or fitting
    if not fitting or any(one.options != fitting[0].options for one in fitting):
        options = f" with {', '.join(choice.options)}" if choice.options else ""
        found = f"{len(fitting)} such functions" if fitting else "none"
        raise MalformedRow(
            f"need a function of the settings for {choice.name!r}{options} in {place}, got {found}: data may "
            "choose a model, a server or a file only among those of rewards.functions and of the rewards of "
            "sources; name it there"
        )
    return fitting[0]


def as_row(raw: Any) -> dict[str, Any]:
    """Columns of a row as a reader gives it: a mapping, or bytes of JSON; raises `MalformedRow`."""
    if isinstance(raw, MalformedRow):
        raise raw
    if isinstance(raw, bytes):
        try:
            raw = STRICT_JSON.decode(raw.decode("utf-8-sig"))
        except MalformedRow:
            raise
        except (ValueError, RecursionError) as error:
            # Without line and column, which JSON counts within this line.
            cause = f"{error.msg} at character {error.pos}" if isinstance(error, JSONDecodeError) else error
            raise MalformedRow(f"need one JSON object per line, got invalid JSON: {cause}") from error
    if not isinstance(raw, dict):
        raise MalformedRow(f"need rows that are JSON objects, got {describe(raw)}")
    return raw
