"""Built-in reward `json_schema`: the answer is JSON of a given form.

A worker process imports this module, so it loads nothing heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import referencing
from jsonschema.validators import validator_for

from verl.rewards.library.answer_text import without_thoughts
from verl.rewards.library.extraction import Extract, extracted

# A block may stand in one line, or lack its end where a stop text has taken it.
_FENCE = re.compile(r"^[ \t]*(```|~~~)[ \t]*\w*\s(.*?)(?:\1|\Z)", re.DOTALL | re.MULTILINE)
Schema = dict[str, Any] | bool | str


def json_schema(
    response: str,
    *,
    schema: Schema | None = None,
    schema_file: str | None = None,
    schema_key: str = "schema",
    partial: bool = False,
    extract: Extract = "whole",
    **columns: Any,
) -> dict[str, Any]:
    """1 if the answer, or its last fenced block, is JSON that validates against a schema; else 0.

    Thoughts are no part of the answer. Prose around JSON without a fence makes it none.

    Args:
        response: text of the answer.
        schema: JSON schema as a mapping, or its JSON text.
        schema_file: JSON file with it.
        schema_key: column with the schema of the row, a mapping or its JSON text, if neither is given.
        partial: for an object, the share of its fields that are right: those of the schema's `properties`
            and `required`, each with its value; the answer itself must be a JSON object.
        extract: part of the answer that is read; within it the last fenced block.
        columns: of the row.

    Returns:
        The reward; the accuracy, 1 if all of it validates; and the first fault in words as `json_error`.
    """
    part = extracted(response, extract)
    try:
        value = parsed(without_thoughts(part or ""))
    except ValueError as error:
        return {"score": 0.0, "acc": 0.0, "json_error": f"no JSON: {error}"}
    rules = chosen_schema(schema, schema_file)
    rules = loaded_schema(columns[schema_key]) if rules is None else rules
    validator = validator_for(rules, default=jsonschema.Draft202012Validator)(
        rules,
        registry=referencing.Registry(),  # nothing is fetched
    )
    errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    right = float(not errors)
    reward = _share_of_fields(value, rules, errors) if partial and errors else right
    return {"score": reward, "acc": right, "json_error": _in_words(errors[0]) if errors else ""}


def prepare_schema(*, schema: Schema | None = None, schema_file: str | None = None, **_: Any) -> None:
    """Check the schema of the options, if there is one.

    Raises:
        ValueError: it is no JSON schema, its file cannot be read, or both options are given.
    """
    if schema is not None and schema_file is not None:
        raise ValueError("need a schema or a schema_file for the reward function 'json_schema', got both")
    chosen_schema(schema, schema_file)


def check_schema(
    prompt: Any,
    *,
    schema: Schema | None = None,
    schema_file: str | None = None,
    schema_key: str = "schema",
    **_: Any,
) -> None:
    """Check the schema in the column `schema_key` of a prompt, unless the options give one.

    Raises:
        ValueError: there is none, or it is no JSON schema.
    """
    if schema is not None or schema_file is not None:
        return
    place = f"row {prompt.index} of {prompt.source or 'the data'}, column {schema_key!r}"
    given = prompt.columns.get(schema_key)
    if given is None:
        raise ValueError(
            f"{place}: need a JSON schema, got none; add the column, or give one for all rows: {{name: "
            "json_schema, schema_file: FILE.json}"
        )
    try:
        loaded_schema(given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def parsed(text: str) -> Any:
    """The value of a text that is JSON, or else of the last fenced block in it.

    Raises:
        ValueError: neither is JSON.
    """
    text = text.strip().removeprefix("\ufeff")
    blocks = [] if text.startswith("{") else [block for _, block in _FENCE.findall(text)]
    try:
        return json.loads(blocks[-1] if blocks else text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def chosen_schema(schema: Schema | None, schema_file: str | None) -> Any:
    """The schema of the options; None if they give none.

    Raises:
        ValueError: it is no JSON schema, or its file cannot be read.
    """
    if schema_file is not None:
        return _parsed_schema(_file_text(schema_file))
    return None if schema is None else loaded_schema(schema)


def loaded_schema(schema: Any) -> Any:
    """A schema from a mapping, or from its JSON text; checked.

    Raises:
        ValueError: it is no JSON schema.
    """
    return _parsed_schema(schema) if isinstance(schema, str) else _checked(schema)


@lru_cache(maxsize=1024)
def _parsed_schema(text: str) -> Any:
    try:
        return _checked(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"need a JSON schema, got a text that is no JSON: {error}") from error


@lru_cache(maxsize=64)
def _file_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"need a file with a JSON schema, got {path!r}, which cannot be read: {error.strerror}"
        ) from error


def _checked(schema: Any) -> Any:
    try:
        kind = validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, TypeError) as error:
        cause = error.message if isinstance(error, jsonschema.SchemaError) else error
        raise ValueError(f"need a JSON schema, got one that is not valid: {cause}") from error
    return schema


def _share_of_fields(value: Any, schema: Any, errors: list[Any]) -> float:
    if not isinstance(value, dict) or not isinstance(schema, Mapping):
        return 0.0
    required = set(schema.get("required", ()))
    fields = required | set(schema.get("properties", ()))
    wrong = {str(error.absolute_path[0]) for error in errors if error.absolute_path}
    right = [name for name in fields if (name in value or name not in required) and name not in wrong]
    # A fault of the object as a whole, such as a field that must not be there, counts as one more field.
    of_whole = any(not error.absolute_path and error.validator != "required" for error in errors)
    return len(right) / (len(fields) + of_whole) if fields else 0.0


def _in_words(error: Any) -> str:
    place = ".".join(map(str, error.absolute_path))
    message = error.message if len(error.message) <= 200 else error.message[:197] + "..."
    return f"{place}: {message}" if place else message


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
