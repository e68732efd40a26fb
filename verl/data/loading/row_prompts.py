"""One row as a prompt: parsed, with the reward function and the sampling parameters of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
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
        self._own_functions = _own_functions(config, rewards)
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
        return row_reward(given, "Prompt.reward", allowed=self._own_functions)

    def _reward(self, row: Mapping[str, Any]) -> WeightedChoice | None:
        column = self._reward_column
        value = None if column is None else row.get(column)
        if value is None or value == "":
            return self._default
        # Rows with equal values share one object: a data set may have millions of rows.
        key = json.dumps(value, sort_keys=True, default=repr)
        if key not in self._choices:
            self._choices[key] = row_reward(value, f"the column {column!r}", allowed=self._own_functions)
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


def row_reward(value: Any, place: str, *, allowed: frozenset[str]) -> WeightedChoice:
    """Reward function that a row names: by its name, or as {name, options} or {name, OPTION: value, ...}.

    Args:
        value: text, mapping, or the JSON text of one.
        place: of the value, for messages.
        allowed: functions by module or file that a row may name. Data must not choose which code is run, so
            only those are taken that the settings name.

    Raises:
        MalformedRow: it is no name or mapping, or names code that the settings do not name.
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
    if ":" in given["name"] and given["name"] not in allowed:
        raise MalformedRow(
            f"need a built-in reward function in {place}, got {given['name']!r}: data may name a function of "
            "yours only if rewards.functions or the reward of a source names it, too"
        )
    try:
        return WeightedChoice.model_validate({**options, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise MalformedRow(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _own_functions(config: DataConfig, rewards: RewardsConfig) -> frozenset[str]:
    """Functions of the user that the settings name."""
    sources = [*sources_of(config.train), *sources_of(config.test)]
    choices = [*rewards.functions, *(one.reward for one in sources if one.reward is not None)]
    return frozenset(choice.name for choice in choices if ":" in choice.name)


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
            raise MalformedRow(f"need one JSON object per line, got invalid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise MalformedRow(f"need rows that are JSON objects, got {describe(raw)}")
    return raw
