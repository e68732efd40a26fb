"""Tools of a run: builds them from the settings, and answers the calls of an episode."""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from verl.agents.environments.session import (
    Environments,
    EnvironmentSession,
    EpisodeFailure,
    EpisodeStart,
    Reward,
    ToolResult,
)
from verl.agents.tools.calculator import calculator
from verl.agents.tools.call_arguments import ArgumentCheck
from verl.agents.tools.function_tools import FunctionTools, ToolFunction, tool_function
from verl.agents.tools.mcp_tools import mcp_tools
from verl.agents.tools.python_code import checked_options
from verl.agents.tools.search_tools import search_tools
from verl.agents.tools.tool_results import failed_result, tool_result
from verl.agents.tools.tool_source import EpisodeTools, ToolEpisode, ToolFailure, ToolSource, tool_name
from verl.agents.tools.verl_host import VerlToolSpec
from verl.agents.tools.verl_tools import VerlTools, verl_tools
from verl.config.agent import AgentConfig
from verl.config.fields import Choice
from verl.rewards.execution.isolation import Callee
from verl.tools.base_tool import BaseTool
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.user_code import load_function

BUILT_IN = ("calculator", "search", "python")
_LOG = logging.getLogger(__name__)


class ToolSession(EnvironmentSession):
    """The tools of one episode.

    Args:
        tools: of each source, with the schemas that are offered in this episode.
        checks: of the arguments of each tool.
        max_chars: longer results are cut.
    """

    def __init__(
        self,
        tools: Sequence[tuple[EpisodeTools, Sequence[dict[str, Any]]]],
        checks: dict[str, ArgumentCheck],
        *,
        max_chars: int,
    ) -> None:
        self.schemas = tuple(schema for _, schemas in tools for schema in schemas)
        self._parts = [part for part, _ in tools]
        self._owners = {tool_name(schema): part for part, schemas in tools for schema in schemas}
        self._checks, self._max_chars = checks, max_chars

    @override
    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return await gather_all([self._answer(call) for call in calls])

    @override
    async def reward(self) -> Reward | None:
        rewards = [await part.reward() for part in self._parts]
        given = [reward for reward in rewards if reward is not None]
        if len(given) > 1:
            raise EpisodeFailure("environment_error", f"need one reward of the tools, got {len(given)}")
        return given[0] if given else None

    @override
    async def close(self) -> None:
        await asyncio.gather(*[part.close() for part in self._parts], return_exceptions=True)

    async def _answer(self, call: ToolCall) -> ToolResult:
        try:
            return tool_result(await self._value(call), max_chars=self._max_chars)
        except ToolFailure as failure:
            return failed_result(failure, max_chars=self._max_chars)

    async def _value(self, call: ToolCall) -> Any:
        owner = self._owners.get(call.name)
        if owner is None:
            near = difflib.get_close_matches(call.name, self._owners, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            names = ", ".join(self._owners) or "none"
            raise ToolFailure(
                "unknown_tool", f"there is no tool {call.name[:80]!r}; the tools are {names}{hint}"
            )
        arguments, fault = self._checks[call.name].checked(call.arguments)
        if fault:
            raise ToolFailure("bad_arguments", f"{call.name}: {fault}")
        return await owner.call(call.name, arguments)


class ToolSet(Environments):
    """Tools for all episodes of a run; a row may choose some of them by its column `tools`.

    Args:
        sources: of tools.
        max_chars: longer results are cut.

    Raises:
        ValueError: two tools have the same name.
    """

    def __init__(self, sources: Sequence[ToolSource], *, max_chars: int) -> None:
        self._sources, self._max_chars = list(sources), max_chars
        self.schemas = [schema for source in sources for schema in source.schemas]
        names = [tool_name(schema) for schema in self.schemas]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"need tools with different names, got several of the name {', '.join(twice)}; rename a "
                "function, or give the tool another name in its options"
            )
        self._checks = {tool_name(schema): ArgumentCheck(schema) for schema in self.schemas}

    @override
    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        try:
            offered = self._offered(start.prompt)
        except ValueError as error:
            raise EpisodeFailure("environment_error", str(error)) from error
        episode = ToolEpisode.of(start)
        parts = [
            (source.open(episode), [each for each in source.schemas if tool_name(each) in offered])
            for source in self._sources
            if any(tool_name(each) in offered for each in source.schemas)
        ]
        return ToolSession(parts, self._checks, max_chars=self._max_chars)

    @override
    def check_data(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._offered(prompt)
        for source in self._sources:
            source.check_data(prompts)

    @override
    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _offered(self, prompt: Prompt) -> set[str]:
        """Names of the tools of a row: those of its schemas, else all.

        Raises:
            ValueError: the run does not have one of them.
        """
        if not prompt.tools:
            return set(self._checks)
        names = {tool_name(schema) for schema in prompt.tools}
        if unknown := sorted(names - self._checks.keys()):
            raise ValueError(
                f"row {prompt.index} names tools that the run does not have: {', '.join(unknown)}; it has "
                f"{', '.join(self._checks)}; add them to agent.tools"
            )
        return names


def build_tools(
    config: AgentConfig,
    given: Sequence[Any] = (),
    *,
    note: Callable[[str], None] = _LOG.warning,
) -> ToolSet:
    """The tools of a run.

    Args:
        config: names and options of tools, time limit, longest result, processes.
        given: further tools as Python objects: functions, objects that are called, tools of verl, or names as
            in `agent.tools`.
        note: takes sentences for the user.

    Raises:
        ValueError: one cannot be loaded, or two have the same name.
    """
    named = [each if isinstance(each, Choice) else Choice(name=each) for each in given if is_named(each)]
    choices = [*config.tools, *named]
    sources: list[ToolSource] = []
    functions: list[ToolFunction] = []
    try:
        for choice in choices:
            built = chosen(choice, config, note)
            if isinstance(built, ToolFunction):
                functions.append(built)
            else:
                sources.append(built)
        objects = [each for each in given if not is_named(each) and not isinstance(each, BaseTool)]
        specs = [VerlToolSpec(tool=each) for each in given if isinstance(each, BaseTool)]
        if specs:
            sources.append(VerlTools(specs, **limits_of(config)))
        functions += [tool_function(each, place=repr(each)) for each in objects]
        if functions:
            sources.insert(0, FunctionTools(functions, **limits_of(config), note=note))
        return ToolSet(sources, max_chars=config.max_result_chars)
    except BaseException:
        for source in sources:
            source.close()
        raise


def limits_of(config: AgentConfig) -> dict[str, Any]:
    """Limits of tools that run in processes."""
    return {"timeout_s": config.call_timeout_s, "max_processes": config.max_processes}


def is_named(given: Any) -> bool:
    """True for a tool that is given by its name."""
    return isinstance(given, (str, Choice))


def chosen(choice: Choice, config: AgentConfig, note: Callable[[str], None]) -> ToolFunction | ToolSource:
    """A tool, or a source of several, by its name.

    Raises:
        ValueError: there is none, or its options are others.
    """
    name, options = choice.name, choice.options
    if name == "calculator":
        built = tool_function(calculator, place=name, options=options)
        built.callee = Callee(calculator, is_async=False, place="inline")
        return built
    if name == "search":
        return search_tools(options, timeout_s=config.call_timeout_s)
    if name == "python":
        limits = {"cpu_s": config.call_timeout_s, "memory_mb": 1024, **checked_options(options)}
        return imported_tool("verl.agents.tools.python_code:python", limits)
    if name.startswith("mcp:"):
        return mcp_tools(name.removeprefix("mcp:"), options, **limits_of(config))
    if name.startswith("verl:"):
        if options:
            raise ValueError(f"need {name} without options, got {', '.join(options)}; they are in its file")
        return verl_tools(name.removeprefix("verl:"), **limits_of(config), note=note)
    if ":" in name:
        return imported_tool(name, options)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    raise ValueError(
        f'need a tool among {", ".join(BUILT_IN)}, "file.py:function", "mcp:ADDRESS" or "verl:FILE.yaml", '
        f"got {name!r}{f'; did you mean {near[0]}?' if near else ''}"
    )


def imported_tool(name: str, options: dict[str, Any]) -> ToolFunction:
    """The tool of "file.py:function" or "package.module:function"."""
    place, _, attribute = name.rpartition(":")
    found = load_function(name, user="tool", keeps_class=True)
    return tool_function(found, place=name, options=options, imported_from=(place, attribute))
