"""Code of users: functions by their place and name, and the words for an error that one of them raises.

Imports nothing heavy, since the worker processes of rewards load functions by it too.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Files whose lines say nothing to the author of a function; "<" begins the names of frozen modules.
_OWN_FILES = ("<", f"{Path(__file__).parents[1]}{os.sep}", f"{Path(importlib.__file__).parent}{os.sep}")
_MAX_ERROR_CHARS = 300
_MISSING = object()


class MissingFunctionError(ValueError):
    """A module that has no such function."""


def load_function(name: str, *, user: str, keeps_class: bool = False) -> Callable[..., Any]:
    """The function of "package.module:function" or "path/file.py:function".

    Args:
        name: with a colon.
        user: the part that calls it, for messages, such as "reward function".
        keeps_class: return a class as it is, in place of an object that can be called.

    Raises:
        ValueError: its module cannot be imported, or has no such function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        return import_function(place, attribute, keeps_class=keeps_class)
    except MissingFunctionError as error:
        raise MissingFunctionError(f"{user} {name}: {error}") from error
    # The user's module may raise anything; a script may end the program, even without an error.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{place}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{user} {name}: {place!r} needs the module {error.name}, which this Python does not have; "
                f"install its package (pip install {str(error.name).partition('.')[0]})"
            ) from error
        raise ValueError(
            f"{user} {name}: cannot import {place!r}: {exception_text(error)}; correct it, put its folder on "
            'PYTHONPATH, or give "path/file.py:function"'
        ) from error


def import_function(place: str, attribute: str, *, keeps_class: bool = False) -> Callable[..., Any]:
    """The function of that name in a module, or in a file whose path ends in .py.

    The name may have dots, such as `judge.score`. Of a class that can be called, an object is made, unless
    the class is kept.

    Raises:
        MissingFunctionError: there is no such function.
        Exception: whatever the import raises.
    """
    module = import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found: Any = module
    for name in attribute.split("."):
        found = getattr(found, name, _MISSING)
    if isinstance(found, type) and not keeps_class:
        return _object_of(found, place)
    if callable(found):
        return found
    there = "none" if found is _MISSING else type(found).__name__
    near = difflib.get_close_matches(attribute, [name for name in vars(module) if name[:2] != "__"], n=1)
    hint = f"; did you mean {near[0]!r}?" if near and found is _MISSING else ""
    raise MissingFunctionError(f"need a function {attribute!r} in {place!r}, there is {there}{hint}")


def exception_text(error: BaseException) -> str:
    """Type and message of an error, and the last line reached in the first file outside of verl."""
    cause = " ".join("".join(traceback.format_exception_only(error)).split())[:_MAX_ERROR_CHARS]
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    outside = [(file, line) for file, line in frames if not file.startswith(_OWN_FILES)]
    # A line inside a library says little to the author of the function that called the library.
    lines = [line for file, line in outside if file == outside[0][0]]
    return cause + (f" ({outside[0][0]}:{lines[-1]})" if outside else "")


def _object_of(found: type, place: str) -> Callable[..., Any]:
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise MissingFunctionError(
            f"need a function or a class with __call__, got {found.__name__!r} in {place!r}; "
            "name one of its methods, or a function"
        )
    try:
        made: Callable[..., Any] = found()
    except TypeError as error:
        raise MissingFunctionError(
            f"need a class that is made without arguments, got {found.__name__!r} in {place!r}: {error}; "
            f"make an object in the module, and name that"
        ) from error
    return made


def import_file(path: Path) -> ModuleType:
    """The module of a Python file, imported once; raises whatever the import raises."""
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
