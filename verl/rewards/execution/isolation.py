"""Place where a reward function runs, in the trainer or in worker processes, and its way there."""

from __future__ import annotations

import datetime
import dis
import enum
import functools
import inspect
import itertools
import logging
import numbers
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

import cloudpickle

from verl.rewards.execution.call_worker import Definition

# "inline": in the thread that asks for the reward, without a limit; for own functions that cannot hang.
Place = Literal["inline", "thread", "process"]

_keys = itertools.count(1)
# Values that two processes may have copies of, since nobody changes them.
_CONSTANTS = (
    type(None),
    str,
    bytes,
    numbers.Number,
    range,
    type,
    types.ModuleType,
    types.GenericAlias,
    re.Pattern,
    enum.Enum,
    PurePath,
    datetime.date,
    datetime.timedelta,
    logging.Logger,
    functools._lru_cache_wrapper,
)


@dataclass(eq=False)
class Callee:
    """A reward function and the place where it runs.

    Attributes:
        function: the function in the trainer's process.
        is_async: it returns coroutines.
        place: see `Place`.
        definition: what a worker process loads it from; None unless it runs in one.
        note: reason why it runs in the trainer although a process was asked for; else "".
        key: of the function among all.
        setting: in which such functions are named.
    """

    function: Callable[..., Any]
    is_async: bool
    place: Place = "thread"
    definition: Definition | None = None
    note: str = ""
    key: int = field(default_factory=lambda: next(_keys))
    setting: str = "rewards.functions"

    def keep_in_trainer(self, reason: str) -> None:
        """Runs it on threads of the trainer from now on."""
        self.place, self.definition = "thread", None
        self.note = (
            f"it runs on a thread of the trainer, since {reason}; a call that hangs there cannot be ended. "
            f"Name it as file.py:function in {self.setting} to run it in a process"
        )


def isolated(
    function: Callable[..., Any],
    *,
    is_async: bool,
    imported_from: tuple[str, str] | None = None,
    setting: str = "rewards.functions",
) -> Callee:
    """Prepare a function for worker processes, or for a thread where a process would change what it does.

    Args:
        function: any callable.
        is_async: it returns coroutines.
        imported_from: module or file, and name in it, of a function that only the run holds. The rest of the
            program may hold any other, and see what it changes; if it has state, it stays in the trainer.
        setting: in which such functions are named, for messages.
    """
    callee = Callee(function, is_async, setting=setting)
    if imported_from is not None:
        place, name = imported_from
        is_file = place.endswith(".py")  # The worker may be started in another folder.
        callee.place, callee.definition = "process", (str(Path(place).resolve()) if is_file else place, name)
        return callee
    shared = next(shared_objects(function), None)
    if shared is not None:
        callee.keep_in_trainer(f"it shares {shared} with the program")
        return callee
    try:
        callee.definition = cloudpickle.dumps(function)
    except Exception as error:  # What it holds may raise anything.
        callee.keep_in_trainer(f"it cannot be sent to another process ({type(error).__name__}: {error})")
    else:
        callee.place = "process"
    return callee


def shared_objects(function: Any, *, _seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """Names and types of the objects in a closure, defaults and globals that a function could change.

    A list, dict or set whose name is in capitals, and which is not empty, counts as a constant. Functions of
    the same module are looked into, those of others are not.
    """
    if isinstance(function, partial):
        yield from shared_objects(function.func)
        held = {f"argument {i}": value for i, value in enumerate(function.args)} | function.keywords
    elif inspect.isfunction(function):
        yield from (f"{name}, which it sets" for name in _rebound_names(function.__code__))
        yield from (f"its attribute {name}" for name in vars(function) if name != "__wrapped__")
        held = _held(function)
    elif _is_constant(function, ""):
        return
    else:
        yield f"an object of type {type(function).__name__}"
        return
    for name, value in held.items():
        if inspect.isfunction(value):
            if value.__module__ == function.__module__ and id(value) not in _seen:
                yield from shared_objects(value, _seen=_seen | {id(function), id(value)})
        elif not _is_constant(value, name):
            yield f"{name} ({type(value).__name__})"


def _rebound_names(code: types.CodeType) -> list[str]:
    """Globals and variables of the functions around it that the code assigns to."""
    outer = [
        step.argval
        for step in dis.get_instructions(code)
        if step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars)
    ]
    return sorted(set(outer))


def _held(function: types.FunctionType) -> dict[str, Any]:
    """Values that a function reaches: its globals, closure and defaults, by name."""
    codes = [function.__code__]
    for code in codes:  # The list grows: functions and comprehensions inside have a code of their own.
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    held = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # It is not filled yet.
            continue
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return held | {f"default {i}": value for i, value in enumerate(defaults)}


def _is_constant(value: Any, name: str) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_constant(item, "") for item in value)
    if isinstance(value, (list, set, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else list(value)
        # Inside a constant, lists are constant too.
        return name.isupper() and bool(value) and all(_is_constant(item, "CONSTANT") for item in items)
    if isinstance(value, types.BuiltinMethodType):  # such as math.sqrt, but not append of some list
        return isinstance(value.__self__, types.ModuleType | None)
    return inspect.isfunction(value) or isinstance(value, _CONSTANTS)
