"""Schemas of the tools that a chat template offers to a model."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema


def load_tools(value: str) -> tuple[dict[str, Any], ...]:
    """Tools of the setting `data.tools`.

    Args:
        value: a JSON file with a list of schemas; or "package.module:name" or "file.py:name" of a function or
            a list of functions and schemas. The schema of a function is made of its types and its docstring,
            by Transformers.

    Raises:
        ValueError: they cannot be read, or one is no tool.
    """
    place, colon, name = value.rpartition(":")
    if not colon or value.endswith(".json"):
        return tuple(tool_schema(tool, value) for tool in _json_list(Path(value).expanduser()))
    try:
        found = getattr(_module(place), name)
    except (ImportError, OSError, SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(f"need data.tools that can be loaded, got {value!r}: {error}") from error
    listed = found if isinstance(found, Sequence) else [found]
    return tuple(tool_schema(tool, value) for tool in listed)


def tool_schema(tool: Mapping[str, Any] | Callable[..., Any], place: str) -> dict[str, Any]:
    """Schema of a function; a schema as it is.

    Raises:
        ValueError: it has no name, or no docstring and types that a schema can be made of.
    """
    if callable(tool):
        try:
            return dict(get_json_schema(tool))
        except Exception as error:  # of the user's annotations, which Transformers evaluates
            raise ValueError(
                f"need types and a docstring with an Args section for the tool {tool!r} of {place}: {error}"
            ) from error
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(
            f"need tools as {{type: function, function: {{name, description, parameters}}}} in {place}, got "
            f"{str(tool)[:80]}"
        )
    return dict(tool)


def _json_list(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"need data.tools as a JSON file with a list of schemas, got {path}: {error}"
        ) from error
    if not isinstance(tools, list) or not tools:
        raise ValueError(f"need a list of schemas in {path}, got {type(tools).__name__}")
    return tools


def _module(place: str) -> Any:
    """The module of a dotted name or of a Python file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"there is no file {place}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
