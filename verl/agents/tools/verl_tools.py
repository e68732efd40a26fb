"""Tools of verl: its YAML files, its base class, and its decorated functions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from verl.agents.environments.session import EpisodeFailure, Reward
from verl.agents.processes.object_processes import ObjectProcess, ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.tools.function_tools import FunctionTools, ToolFunction, tool_function
from verl.agents.tools.tool_source import EpisodeTools, ToolEpisode, ToolFailure, ToolSource, tool_name
from verl.agents.tools.verl_host import VerlHost, VerlToolSpec
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY
from verl.utils.event_loops import BackgroundLoop
from verl.utils.user_code import exception_text, import_file


class VerlTools(ToolSource):
    """Tools with a state for each episode, in a process for each episode that calls one.

    Args:
        specs: of the tools.
        timeout_s: limit of a call.
        max_processes: episodes with such a process at a time.

    Raises:
        ValueError: a tool cannot be made.
    """

    def __init__(self, specs: Sequence[VerlToolSpec], *, timeout_s: float, max_processes: int) -> None:
        self.timeout_s = timeout_s
        self._specs = list(specs)
        preload = [spec.class_name for spec in specs if ".py:" in spec.class_name]
        self._processes = ObjectProcesses(
            VerlHost, max_processes=max_processes, name="verl tools", preload=preload
        )
        loop = BackgroundLoop("verl tools")
        try:
            described = loop.run(self._describe())
        except ProcessFailure as failure:
            self.close()
            raise ValueError(f"the tools of verl cannot be made: {failure.detail}") from failure
        finally:
            loop.close()
        self.schemas = tuple(schema for schema, _ in described)
        self.rewarding = [tool_name(schema) for schema, rewards in described if rewards]

    @override
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        extra = episode.columns.get("extra_info")
        kwargs = extra.get("tools_kwargs") if isinstance(extra, Mapping) else None
        return VerlEpisode(self, kwargs or episode.columns.get("tools_kwargs") or {})

    @override
    def close(self) -> None:
        self._processes.close()

    async def start(self, kwargs: Mapping[str, Any]) -> ObjectProcess:
        """The process of an episode; raises ProcessFailure."""
        return await self._processes.open(self._specs, kwargs, timeout_s=self.timeout_s)

    async def _describe(self) -> list[tuple[dict[str, Any], bool]]:
        process = await self._processes.open(self._specs)
        try:
            described: list[tuple[dict[str, Any], bool]] = await process.call(
                "describe", timeout_s=self.timeout_s
            )
            return described
        finally:
            await process.close()


class VerlEpisode(EpisodeTools):
    """Tools of verl in one episode.

    Args:
        tools: of the run.
        kwargs: of the row, by name of the tool.
    """

    def __init__(self, tools: VerlTools, kwargs: Mapping[str, Any]) -> None:
        self._tools, self._kwargs = tools, kwargs
        self._starting = asyncio.Lock()
        self._process: ObjectProcess | None = None
        self._loss: ProcessFailure | None = None

    @override
    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._loss is not None:
            detail = f"the tools of this episode have ended, and their state is lost: {self._loss.detail}"
            raise ToolFailure("crash", detail, "the tool has ended, and its state is lost")
        try:
            return await self._run("execute", name, arguments)
        except ProcessFailure as failure:
            raise ToolFailure.of_process(failure) from failure

    @override
    async def reward(self) -> Reward | None:
        if not self._tools.rewarding:
            return None
        try:
            if self._loss is not None:
                raise self._loss
            rewards: dict[str, float] = await self._run("rewards", self._tools.rewarding)
        except ProcessFailure as failure:
            raise EpisodeFailure(f"environment_{failure.outcome}", failure.detail) from failure
        total = sum(rewards.values())
        return {"reward": total, **rewards} if len(rewards) > 1 else total

    @override
    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            await process.call("release", timeout_s=self._tools.timeout_s)
        except ProcessFailure:
            pass  # it has ended already, or cannot release: it is killed
        finally:
            await process.close()

    async def _run(self, method: str, *args: Any) -> Any:
        async with self._starting:
            if self._process is None:
                self._process = await self._tools.start(self._kwargs)
        try:
            return await self._process.call(method, *args, timeout_s=self._tools.timeout_s)
        except ProcessFailure as failure:
            if failure.is_lost:
                self._loss = failure
            raise


def verl_tools(
    place: str, *, timeout_s: float, max_processes: int, note: Callable[[str], None]
) -> ToolSource:
    """Tools of a YAML file, or of a Python file with decorated functions.

    Args:
        place: path of the file.
        timeout_s: limit of a call.
        max_processes: at a time.
        note: takes sentences for the user.

    Raises:
        ValueError: it cannot be read, or has no tools.
    """
    path = Path(place).expanduser()
    if path.suffix == ".py":
        functions = decorated_functions(path)
        return FunctionTools(functions, timeout_s=timeout_s, max_processes=max_processes, note=note)
    return VerlTools(read_specs(path), timeout_s=timeout_s, max_processes=max_processes)


def read_specs(path: Path) -> list[VerlToolSpec]:
    """Tools of a YAML file of verl.

    Raises:
        ValueError: it cannot be read, or has no tools.
    """
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"need a YAML file with tools of verl, got {path}: {error}") from error
    entries = listed.get("tools") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"need `tools: [{{class_name, config, tool_schema}}]` in {path}")
    return [spec_of(entry, path) for entry in entries]


def spec_of(entry: Any, path: Path) -> VerlToolSpec:
    """An entry of a YAML file of verl.

    Raises:
        ValueError: it has no class, or is an MCP server.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise ValueError(
            f"need entries with class_name, config and tool_schema in {path}, got {str(entry)[:80]}"
        )
    config = entry.get("config") or {}
    if config.get("type", "native") != "native":
        raise ValueError(
            f"need tools of the type native in {path}, got {config['type']!r}; name an MCP server as "
            "mcp:ADDRESS in agent.tools"
        )
    return VerlToolSpec(entry["class_name"], config, entry.get("tool_schema"))


def decorated_functions(path: Path) -> list[ToolFunction]:
    """Functions of a file under `@function_tool`.

    Raises:
        ValueError: it cannot be imported, or has none.
    """
    place = str(path.resolve())
    try:
        import_file(path)
    except (Exception, SystemExit) as error:  # user code, which may raise anything
        raise ValueError(f"cannot import the tools of {path}: {exception_text(error)}") from error
    own = [each for each in FUNCTION_TOOL_REGISTRY.values() if each.function.__module__ == place]
    if not own:
        raise ValueError(
            f"need functions under @function_tool of verl.tools.function_tool in {path}, found none"
        )
    return [
        tool_function(
            each.function,
            place=f"{path}:{each.function.__name__}",
            imported_from=(place, each.function.__qualname__),
            schema=each.schema,
            name=each.name,
        )
        for each in own
    ]
