"""Tools of MCP servers over stdio and HTTP: real servers of the official package."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.agents.tools.test_tool_set import call
from verl.agents.environments.session import EpisodeStart
from verl.agents.tools.tool_set import build_tools
from verl.config.agent import AgentConfig
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall

pytest.importorskip("mcp")
SERVER = '''
import asyncio, os, sys
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("memory")
notes = []

@server.tool()
def note(text: str) -> str:
    """Note a text."""
    notes.append(text)
    return " ".join(notes)

@server.tool()
def pid() -> int:
    """Number of the process."""
    return os.getpid()

@server.tool()
def fail() -> str:
    """Fail."""
    raise ToolError("no luck")

@server.tool()
async def wait() -> str:
    """Wait."""
    await asyncio.sleep(1000)

if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SERVER)
    return path


@pytest.fixture(scope="module")
def tools(file):
    built = build_tools(AgentConfig(tools=[f"mcp:{sys.executable} {file}"], call_timeout_s=20.0))
    yield built
    built.close()


def test_a_server_over_stdio_lists_its_tools_and_keeps_its_state(tools):
    names = [schema["function"]["name"] for schema in tools.schemas]
    assert names == ["note", "pid", "fail", "wait"]
    assert call(tools, "note", text="a").text == "a"
    assert call(tools, "note", text="b").text == "a b"
    assert call(tools, "note", text=3).text == "a b 3"
    assert call(tools, "note").outcome == "bad_arguments"


def test_an_error_of_a_tool_is_told(tools):
    result = call(tools, "fail")
    assert result.outcome == "error" and "no luck" in result.text


def test_a_server_that_dies_is_a_failure_of_the_call_and_is_started_again(tools):
    pid = int(call(tools, "pid").text)
    os.kill(pid, signal.SIGKILL)
    failed = call(tools, "pid")
    while failed.outcome == "ok":  # the signal is on its way
        failed = call(tools, "pid")
    assert (
        failed.outcome == "crash" and failed.text == "Error: the connection to the tool was lost; try again"
    )
    assert int(call(tools, "pid").text) != pid


def test_a_call_that_hangs_is_ended_and_the_session_lives_on(tools, monkeypatch):
    pid = call(tools, "pid").text
    with monkeypatch.context() as patch:
        patch.setattr(tools._sources[0]._shared, "_timeout_s", 0.2)
        assert call(tools, "wait").text == "Error: no result within 0.2 s"
    assert call(tools, "pid").text == pid


@pytest.mark.servers
def test_each_episode_may_have_a_server_of_its_own(file):
    option = {
        "name": f"mcp:{sys.executable} {file}",
        "per_episode": True,
        "include": ["note"],
        "prefix": "my_",
    }
    tools = build_tools(AgentConfig(tools=[option], call_timeout_s=20.0))

    async def notes():
        sessions = [await tools.open(EpisodeStart(Prompt("q"))) for _ in range(2)]
        for session, word in zip(sessions, "ab", strict=True):
            await session.call([ToolCall("my_note", {"text": word})])
        results = [await session.call([ToolCall("my_note", {"text": "!"})]) for session in sessions]
        for session in sessions:
            await session.close()
        return [result.text for (result,) in results]

    assert asyncio.run(notes()) == ["a !", "b !"]
    assert [schema["function"]["name"] for schema in tools.schemas] == ["my_note"]
    tools.close()


@pytest.mark.servers
def test_a_server_over_http_that_restarts_is_found_again(file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = started(file, port)
    tools = build_tools(AgentConfig(tools=[f"mcp:http://127.0.0.1:{port}/mcp"], call_timeout_s=20.0))
    assert call(tools, "note", text="x").text == "x"
    server.kill()
    server.wait()
    assert call(tools, "note", text="y").outcome == "crash"
    server = started(file, port)
    results = [call(tools, "note", text="z") for _ in range(2)]
    assert results[-1].text.endswith("z")
    server.kill()
    server.wait()
    tools.close()


def started(file, port):
    server = subprocess.Popen([sys.executable, str(file), str(port)], stderr=subprocess.DEVNULL)
    for _ in range(1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.02)
    raise AssertionError("the server does not start")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "mcp:http://127.0.0.1:9/mcp",
            "need an MCP server that can be reached at http://127.0.0.1:9/mcp, got: ",
        ),
        ("mcp:/no/such/program", "need an MCP server that can be reached at /no/such/program"),
        (
            {"name": "mcp:python", "tools": 1},
            "need options of an MCP server among per_episode, include, .* got tools",
        ),
        ("mcp:", 'need a URL or a command behind "mcp:"'),
    ],
)
def test_servers_that_cannot_be_used_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        build_tools(AgentConfig(tools=[option]))


@pytest.mark.servers
def test_a_tool_that_the_server_does_not_have_is_named(file):
    option = {"name": f"mcp:{sys.executable} {file}", "include": ["fly"]}
    with pytest.raises(
        ValueError, match=r"need tools that the MCP server .* has \(note, pid, fail, wait\), got fly"
    ):
        build_tools(AgentConfig(tools=[option]))
