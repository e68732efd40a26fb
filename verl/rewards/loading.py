"""Functions by their place and name; imports nothing heavy, for worker processes load functions by it too."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class MissingFunctionError(ValueError):
    """A module that has no such function."""


def import_function(place: str, attribute: str) -> Callable[..., Any]:
    """The function of that name in a module, or in a file whose path ends in .py.

    Raises:
        MissingFunctionError: there is no such function.
        Exception: whatever the import raises.
    """
    module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = vars(module).get(attribute)
    if not callable(function):
        found = "none" if function is None else type(function).__name__
        raise MissingFunctionError(f"need a function {attribute!r} in {place!r}, there is {found}")
    return function


def _import_file(path: Path) -> ModuleType:
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
