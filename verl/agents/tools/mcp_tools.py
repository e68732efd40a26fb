"""Tools of MCP servers, over stdio or streamable HTTP, with the official client.

https://modelcontextprotocol.io
"""

from __future__ import annotations

import asyncio
import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from typing_extensions import override

from verl.agents.processes.object_processes import ObjectProcess, ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.tools.mcp_host import McpAddress, McpHost
from verl.agents.tools.tool_source import EpisodeTools, ToolEpisode, ToolFailure, ToolSource, without_place
from verl.utils.event_loops import BackgroundLoop

# For a server to start and to list its tools.
CONNECT_LIMIT_S = 120.0
_LOST = "the connection to the tool was lost; try again"


@dataclass(frozen=True)
class McpOptions:
    """Options of an MCP server in `agent.tools`.

    Attributes:
        per_episode: each episode has a session, and a server over stdio, of its own; else the run has one.
        include: names of the tools that are offered; (): all.
        prefix: in front of the names of its tools, where two servers have tools of the same name.
        env, cwd: of a server over stdio.
        headers: of requests over HTTP.
    """

    per_episode: bool = False
    include: Sequence[str] = ()
    prefix: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class McpSession:
    """A session with a server in a process of its own, which is replaced when it is lost.

    All methods run in one event loop.

    Args:
        processes: makes it.
        address: of the server.
        timeout_s: limit of a call.
    """

    def __init__(self, processes: ObjectProcesses, address: McpAddress, *, timeout_s: float) -> None:
        self._processes, self._address, self._timeout_s = processes, address, timeout_s
        self._process: ObjectProcess | None = None
        self._opening = asyncio.Lock()

    async def list_tools(self) -> list[dict[str, Any]]:
        """The tools of the server.

        Raises:
            ProcessFailure: there is no connection.
        """
        process = await self.process()
        tools: list[dict[str, Any]] = await process.call("list_tools", timeout_s=CONNECT_LIMIT_S)
        return tools

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Result of a call; a connection that was lost is opened again by the next one.

        Raises:
            ToolFailure: it gave none.
        """
        try:
            process = await self.process()
            outcome, value = await process.call("call_tool", name, arguments, timeout_s=self._timeout_s)
        except ProcessFailure as failure:
            told = _LOST if failure.is_lost else without_place(failure.detail)
            raise ToolFailure(failure.outcome, failure.detail, told) from failure
        if outcome != "ok":
            raise ToolFailure(outcome, value, _LOST if outcome == "crash" else "")
        return value

    async def process(self) -> ObjectProcess:
        """Its process; calls at the same time share one."""
        async with self._opening:
            if self._process is None or self._process.is_lost:
                await self.close()
                self._process = await self._processes.open(self._address)
            return self._process

    async def close(self) -> None:
        """End the process, and a server that it has started."""
        process, self._process = self._process, None
        if process is not None:
            await process.close()


class McpTools(ToolSource):
    """Tools of one MCP server.

    Args:
        address: of the server.
        options: which tools, and how many sessions.
        timeout_s: limit of a call.
        max_processes: sessions at a time, if each episode has one.

    Raises:
        ValueError: it cannot be reached, or does not have the tools.
    """

    def __init__(
        self, address: McpAddress, options: McpOptions, *, timeout_s: float, max_processes: int
    ) -> None:
        if importlib.util.find_spec("mcp") is None:
            raise ValueError('need the package mcp for tools of MCP servers: pip install "verl[mcp]"')
        self.place = address.url or shlex.join(address.command)
        short = address.url or " ".join(Path(word).name for word in address.command)
        self._address, self._options, self._timeout_s = address, options, timeout_s
        self._loop = BackgroundLoop(f"MCP {self.place}")
        # One more, for the session that has listed the tools.
        self._processes = ObjectProcesses(
            McpHost, max_processes=max_processes + 1, name=f"mcp {short}", preload=["mcp:Client"]
        )
        self._shared = self.session()
        try:
            listed = self._loop.run(self._shared.list_tools())
            self.schemas = self._chosen(listed)
        except BaseException as error:
            self.close()
            if isinstance(error, ProcessFailure):
                raise ValueError(
                    f"need an MCP server that can be reached at {self.place}, got: {error.detail}; start it, "
                    "or correct agent.tools"
                ) from error
            raise

    @override
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        return McpEpisode(self, self.session() if self._options.per_episode else self._shared)

    @override
    def close(self) -> None:
        self._processes.close()
        self._loop.close()

    def session(self) -> McpSession:
        """A new session, which connects at its first call."""
        return McpSession(self._processes, self._address, timeout_s=self._timeout_s)

    async def call(self, session: McpSession, name: str, arguments: dict[str, Any]) -> Any:
        """Result of a call; raises ToolFailure."""
        return await self._loop.result_of(session.call(name.removeprefix(self._options.prefix), arguments))

    async def end(self, session: McpSession) -> None:
        """Close a session, unless it is that of the run."""
        if session is not self._shared:
            await self._loop.result_of(session.close())

    def _chosen(self, listed: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
        names = [each["name"] for each in listed]
        if unknown := sorted(set(self._options.include) - set(names)):
            raise ValueError(
                f"need tools that the MCP server {self.place} has ({', '.join(names)}), got "
                f"{', '.join(unknown)}"
            )
        kept = [each for each in listed if not self._options.include or each["name"] in self._options.include]
        if not kept:
            raise ValueError(f"need an MCP server with tools, {self.place} has none")
        prefix = self._options.prefix
        return tuple(
            {"type": "function", "function": {**each, "name": prefix + each["name"]}} for each in kept
        )


class McpEpisode(EpisodeTools):
    """Tools of a server in one episode.

    Args:
        tools: of the run.
        session: of the episode, or of the run.
    """

    def __init__(self, tools: McpTools, session: McpSession) -> None:
        self._tools, self._session = tools, session

    @override
    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self._tools.call(self._session, name, arguments)

    @override
    async def close(self) -> None:
        await self._tools.end(self._session)


def mcp_tools(address: str, options: Mapping[str, Any], *, timeout_s: float, max_processes: int) -> McpTools:
    """Tools of the server at an address.

    Args:
        address: a URL, or a command that starts a server over stdio, as in a shell.
        options: see `McpOptions`.
        timeout_s: limit of a call.
        max_processes: sessions at a time, if each episode has one.

    Raises:
        ValueError: an option is unknown, or the server cannot be reached.
    """
    known = [each.name for each in fields(McpOptions)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"need options of an MCP server among {', '.join(known)}, got {', '.join(unknown)}")
    own = McpOptions(**options)
    is_url = address.startswith(("http://", "https://"))
    place = McpAddress(
        url=address if is_url else "",
        command=() if is_url else tuple(shlex.split(address)),
        env=own.env,
        cwd=own.cwd,
        headers=own.headers,
    )
    if not is_url and not place.command:
        raise ValueError('need a URL or a command behind "mcp:", got nothing')
    return McpTools(place, own, timeout_s=timeout_s, max_processes=max_processes)
