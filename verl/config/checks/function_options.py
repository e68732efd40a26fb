"""Options of a chosen function, checked against its signature before it is called."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from verl.config.layers import nearest_key


def option_parameters(
    function: Callable[..., Any], *, without: Collection[str] = ()
) -> dict[str, inspect.Parameter]:
    """Options of a function or class: its keyword-only parameters.

    Args:
        function: the function or class.
        without: parameters that the caller itself gives.
    """
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in without}


def check_names(user: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    """Check the names of options.

    Args:
        user: of the options, for the message.
        known: options that there are.
        options: those that are given.

    Raises:
        ValueError: one is unknown.
    """
    if unknown := sorted(options.keys() - known.keys()):
        near = f"; the nearest is {nearest_key(unknown[0], list(known))}" if known else ""
        raise ValueError(
            f"need options that {user} takes ({', '.join(known) or 'none'}), got {', '.join(unknown)}{near}"
        )


def check_values(user: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options brought to the types of their parameters.

    Args:
        user: of the options, for the message.
        function: with annotations of these parameters.
        options: name -> value.

    Raises:
        ValueError: a value is of another type, or out of its bounds.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    checked = dict(options)
    for option in options.keys() & hints.keys():
        try:
            checked[option] = TypeAdapter(hints[option]).validate_python(options[option])
        except ValidationError as error:
            causes = "; or ".join(dict.fromkeys(fault["msg"] for fault in error.errors()[:4]))
            raise ValueError(f"{user}, option {option}: {causes}; got {options[option]!r}") from error
    return checked
