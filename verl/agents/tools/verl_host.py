"""Tools of verl in a process of one episode: created once, called, rewarded, and released once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.utils.user_code import import_function


@dataclass(frozen=True)
class VerlToolSpec:
    """An entry of a YAML file of tools, or a tool that a program handed over.

    Attributes:
        class_name: "package.module.Class", or "file.py:Class".
        config: handed to the class.
        tool_schema: handed to the class; None: the class makes it.
        tool: in place of all these.
    """

    class_name: str = ""
    config: Mapping[str, Any] | None = None
    tool_schema: Mapping[str, Any] | None = None
    tool: Any = None

    def made(self) -> Any:
        """A tool; raises whatever its class raises."""
        if self.tool is not None:
            return self.tool
        place, _, name = self.class_name.rpartition(":" if ".py:" in self.class_name else ".")
        schema = (
            None if self.tool_schema is None else OpenAIFunctionToolSchema.model_validate(self.tool_schema)
        )
        return import_function(place, name, keeps_class=True)(
            config=dict(self.config or {}), tool_schema=schema
        )


class VerlHost:
    """Tools of one episode.

    Args:
        specs: of the tools.
        kwargs: of the row, by name of the tool: `create_kwargs`, `execute_kwargs`, ...
    """

    def __init__(
        self, specs: Sequence[VerlToolSpec], kwargs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._tools = {tool.name: tool for tool in (spec.made() for spec in specs)}
        self._kwargs = kwargs or {}
        self._instances: dict[str, asyncio.Task[str]] = {}

    def describe(self) -> list[tuple[dict[str, Any], bool]]:
        """Schema of each tool, and True if it rewards episodes."""
        return [
            (schema_of(tool), getattr(type(tool), "calc_reward", None) is not BaseTool.calc_reward)
            for tool in self._tools.values()
        ]

    async def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """Result of a call, its reward, and metrics."""
        tool = self._tools[name]
        agent = SimpleNamespace(tools_kwargs=dict(self._kwargs), request_id="")
        own = {"agent_data": agent, **self._own(name, "execute_kwargs")}
        return await called(tool.execute, await self._instance(name), arguments, kwargs=own)

    async def rewards(self, names: Sequence[str]) -> dict[str, float]:
        """Reward of each of these tools."""
        return {
            name: float(
                await called(
                    self._tools[name].calc_reward,
                    await self._instance(name),
                    kwargs=self._own(name, "calc_reward_kwargs"),
                )
            )
            for name in names
        }

    async def release(self) -> None:
        """Release every tool that was created."""
        for name, instance in self._instances.items():
            await called(self._tools[name].release, await instance, kwargs=self._own(name, "release_kwargs"))

    def _own(self, name: str, kind: str) -> dict[str, Any]:
        return dict(self._kwargs.get(name, {}).get(kind) or {})

    async def _instance(self, name: str) -> str:
        """Id of the instance of a tool, which its first call creates."""
        if name not in self._instances:
            self._instances[name] = asyncio.ensure_future(self._create(name))
        return await self._instances[name]

    async def _create(self, name: str) -> str:
        own = self._own(name, "create_kwargs")
        # Older tools take the arguments themselves, newer ones take them as one.
        made = await called(self._tools[name].create, kwargs={"create_kwargs": own, **own})
        return str(made[0] if isinstance(made, tuple) else made)


def schema_of(tool: Any) -> dict[str, Any]:
    """Schema of a tool in OpenAI's form."""
    schema = tool.get_openai_tool_schema()
    return (
        dict(schema)
        if isinstance(schema, Mapping)
        else schema.model_dump(exclude_none=True, exclude_unset=True)
    )


async def called(method: Callable[..., Any], *args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Result of a method, plain or async, with those named arguments that it takes."""
    parameters = inspect.signature(method).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    own = {name: value for name, value in kwargs.items() if takes_all or name in parameters}
    result = method(*args, **own)
    return await result if inspect.isawaitable(result) else result
