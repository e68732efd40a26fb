"""Client of an MCP server, in a process of its own: it starts or connects to the server, and calls its tools.

The process runs nothing else, so a server over stdio is its child and ends with it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

McpOutcome = Literal["ok", "error", "crash"]
# Errors of JSON-RPC and MCP after which the connection is as good as before.
_ANSWERED = {-32600, -32601, -32602, -32603}
_MAX_PAGES = 100


@dataclass(frozen=True)
class McpAddress:
    """Address of an MCP server.

    Attributes:
        url: of a server over streamable HTTP; "": the command starts one over stdio.
        command: words of the command.
        env: variables of the server, besides those of this process.
        cwd: folder in which it starts; None: that of the run.
        headers: of the requests over HTTP.
    """

    url: str = ""
    command: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class McpHost:
    """A session with an MCP server; a session that is lost is opened again by the next call.

    Args:
        address: of the server.
    """

    def __init__(self, address: McpAddress) -> None:
        self._address = address
        self._mcp = importlib.import_module("mcp")
        self._client: Any = None
        self._owner: asyncio.Task[None] | None = None
        self._lock: asyncio.Lock | None = None

    async def list_tools(self) -> list[dict[str, Any]]:
        """Name, description and schema of the arguments of each tool."""
        client = await self._connected()
        tools: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += [
                {"name": each.name, "description": each.description or "", "parameters": each.input_schema}
                for each in page.tools
            ]
            cursor = page.next_cursor
            if cursor is None:
                break
        return tools

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> tuple[McpOutcome, Any]:
        """Outcome of a call, and its result as a text or as parts of a message, or its error.

        The outcome is `error` where the tool or the server says that it failed, and `crash` where there is no
        connection.
        """
        try:
            client = await self._connected()
        except ConnectionError as error:
            return "crash", str(error)
        try:
            result = await client.call_tool(name, arguments)
        except Exception as error:
            if getattr(error, "code", None) in _ANSWERED:
                return "error", str(error)
            await self._forget(client)
            return "crash", f"the connection to the MCP server was lost: {first_cause(error)}"
        parts = [part_of(block) for block in result.content]
        if not parts and result.structured_content is not None:
            parts = [{"type": "text", "text": json.dumps(result.structured_content, ensure_ascii=False)}]
        if result.is_error or all(part["type"] == "text" for part in parts):
            text = "\n".join(part["text"] for part in parts if part["type"] == "text")
            return ("error" if result.is_error else "ok"), text
        return "ok", parts

    async def close(self) -> None:
        """Close the session, and end a server that it has started."""
        await self._forget(self._client)

    async def _connected(self) -> Any:
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if self._owner is not None and self._owner.done():
                self._client = None
            if self._client is None:
                await self._connect()
            return self._client

    async def _connect(self) -> None:
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        # A session must be opened and closed by the same task.
        self._owner = asyncio.create_task(self._hold(ready, self._stop))
        self._client = await ready

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        try:
            async with self._mcp.Client(self._transport(), cache=None) as client:
                ready.set_result(client)
                await stop.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(
                    ConnectionError(f"cannot connect to the MCP server: {first_cause(error)}")
                )
            elif isinstance(error, asyncio.CancelledError):
                raise

    async def _forget(self, client: Any) -> None:
        if client is not None and client is self._client:
            self._client = None
            self._stop.set()
            if self._owner is not None:
                await asyncio.wait({self._owner}, timeout=5.0)

    def _transport(self) -> Any:
        address = self._address
        if address.url:
            http = importlib.import_module("mcp.client.streamable_http")
            utils = importlib.import_module("mcp.shared._httpx_utils")
            client = utils.create_mcp_http_client(headers=dict(address.headers)) if address.headers else None
            return http.streamable_http_client(address.url, http_client=client)
        stdio = importlib.import_module("mcp.client.stdio")
        command, *args = address.command
        parameters = self._mcp.StdioServerParameters(
            command=sys.executable if command == "python" else command,
            args=args,
            env={**os.environ, **address.env},
            cwd=address.cwd,
        )
        return stdio.stdio_client(parameters, errlog=sys.stderr)


def part_of(block: Any) -> dict[str, Any]:
    """A block of a result as a part of a message; what a model cannot be shown is named."""
    if block.type == "text":
        return {"type": "text", "text": block.text}
    if block.type == "image":
        return {"type": "image_url", "image_url": {"url": f"data:{block.mime_type};base64,{block.data}"}}
    if block.type == "resource" and hasattr(block.resource, "text"):
        return {"type": "text", "text": block.resource.text}
    where = getattr(block, "uri", None) or getattr(getattr(block, "resource", None), "uri", "")
    return {"type": "text", "text": f"[{block.type} {where}]"}


def first_cause(error: BaseException) -> str:
    """The first error of a group, in words."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"
