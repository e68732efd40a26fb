"""Functions as tools, under the name that verl gives their decorator."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from verl.tools.schemas import OpenAIFunctionToolSchema

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class FunctionTool:
    """A function that is a tool.

    Attributes:
        name: of the tool.
        function: plain or async.
        schema: None: its types and its docstring give it.
    """

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any] | None = None

    @property
    def tool_schema(self) -> OpenAIFunctionToolSchema:
        """Its schema.

        Raises:
            ValueError: the function has no types, or its docstring does not describe its parameters.
        """
        # Transformers is loaded only where a schema is made, not in processes that run the function.
        made = self.schema or importlib.import_module("verl.utils.tool_schemas").tool_schema(
            self.function, self.name
        )
        return OpenAIFunctionToolSchema.model_validate(made)


FUNCTION_TOOL_REGISTRY: dict[str, FunctionTool] = {}


def function_tool(
    name: Any = None, *, schema: Mapping[str, Any] | OpenAIFunctionToolSchema | None = None
) -> Any:
    """Decorate a function as a tool, with or without parentheses; the function stays as it is.

    Args:
        name: of the tool; None: that of the function.
        schema: None: its types and its docstring give it.
    """
    if callable(name):
        return function_tool()(name)

    def register(function: F) -> F:
        given = (
            schema.model_dump(exclude_none=True) if isinstance(schema, OpenAIFunctionToolSchema) else schema
        )
        own = name or (given or {}).get("function", {}).get("name") or function.__name__
        FUNCTION_TOOL_REGISTRY[own] = FunctionTool(own, function, dict(given) if given else None)
        return function

    return register


def get_function_tool(name: str) -> FunctionTool:
    """The tool of that name.

    Raises:
        KeyError: no function was decorated with it.
    """
    return FUNCTION_TOOL_REGISTRY[name]
