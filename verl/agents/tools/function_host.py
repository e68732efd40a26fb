"""Functions of users and built-in ones, as one object of a process that runs their calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.agents.processes.object_host import loaded
from verl.rewards.execution.call_worker import Definition


class ToolFunctionHost:
    """Functions in a process of their own; made there.

    Args:
        definitions: of the functions, with the options that are bound to each.
    """

    def __init__(self, definitions: Sequence[tuple[Definition, Mapping[str, Any]]]) -> None:
        self._definitions = definitions
        self._functions: dict[int, Callable[..., Any]] = {}

    def run(self, number: int, arguments: Mapping[str, Any]) -> Any:
        """Value, or coroutine, of a call of the function with that number."""
        if number not in self._functions:
            definition, options = self._definitions[number]
            self._functions[number] = bound(loaded(definition), options)
        return self._functions[number](**arguments)


def bound(found: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A function with options, or the object of a class made with them."""
    if isinstance(found, type):
        made: Callable[..., Any] = found(**options)
        return made
    if not options:
        return found
    return lambda **arguments: found(**options, **arguments)


def is_coroutine(function: Callable[..., Any]) -> bool:
    """True if a function, or an object that is called, is async."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )
