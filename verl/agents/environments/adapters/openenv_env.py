"""Environments of OpenEnv servers, `openenv:http://HOST:PORT`, over the client of the package `openenv`.

https://github.com/meta-pytorch/OpenEnv. Each episode has a connection, and with it a session of the server,
of its own: the server must allow as many as there are episodes at a time (`max_concurrent_envs`).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from verl.agents.environments.adapters.text_actions import action_text
from verl.agents.environments.observation import EnvironmentLost, Observation

# Fields of every action and observation, which are not part of what is said.
_COMMON = ("metadata", "done", "reward")
_STEP = "step"


class OpenEnvEnvironment:
    """One session on a server.

    A server with MCP tools offers these. Else a turn is the action, if actions have one field of text; and
    else there is one tool, `step`, whose parameters are the fields of an action.

    Args:
        name: address of the server.
        field: field of the action that a turn is written into; None: the only one of type string.
        columns: columns of the row that are given to `reset` of the server.
        headers: of the connection, such as an authorization.
        timeout_s: time limit of one message.
        **options: given to `reset` of the server.
    """

    def __init__(
        self,
        name: str,
        *,
        field: str | None = None,
        columns: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        self._address, self._headers, self._timeout_s = name.rstrip("/"), dict(headers or {}), timeout_s
        client = importlib.import_module("openenv").GenericEnvClient
        self._client = client(base_url=name, message_timeout_s=timeout_s, headers=self._headers or None)
        self._field, self._columns, self._options = field, tuple(columns), options
        self.tool_schemas: list[dict[str, Any]] | None = None
        self._has_mcp = self._is_rewarded = False
        self._num_steps = 0
        self._socket: Any = None

    async def reset(self, seed: int, **columns: Any) -> Observation:
        """Begin an episode on the server."""
        await self._client.connect()
        given = {name: columns[name] for name in self._columns}
        result = await self._client.reset(seed=seed % 2**31, **self._options, **given)
        self._socket = getattr(self._client, "_ws", None)
        action = (await asyncio.to_thread(self._schema))["action"]
        await self._choose_form(action)
        return Observation(text_of(result.observation) or None, is_over=bool(result.done))

    async def step(self, message: Mapping[str, Any]) -> Observation:
        """The observation after a turn; where the action is no text the turn ends the episode."""
        if self._field is None:
            return Observation(is_over=True)
        return self._observation(await self._result({self._field: action_text(message)}))

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Result of a tool."""
        known = [schema["function"]["name"] for schema in self.tool_schemas or ()]
        if name not in known:
            raise ValueError(f"there is no tool {name!r}, there are {', '.join(known) or 'none'}")
        call = {"type": "call_tool", "tool_name": name, "arguments": dict(arguments)}
        result = await self._result(call if self._has_mcp else dict(arguments))
        if not self._has_mcp:
            return self._observation(result)
        if error := result.observation.get("error"):
            raise ValueError(error.get("message", error) if isinstance(error, Mapping) else str(error))
        return self._observation(result, mcp_text(result.observation.get("result")))

    def get_reward(self) -> float | None:
        """Reward beside those of the steps; None if the server rewarded none of them."""
        return None if self._num_steps and not self._is_rewarded else 0.0

    async def close(self) -> None:
        """End the session."""
        await self._client.close()

    async def _result(self, action: Mapping[str, Any]) -> Any:
        """Result of a step of the server.

        Raises:
            RuntimeError: the server refuses the action, which the policy is told.
            EnvironmentLost: the server does not answer, or the session is lost.
        """
        try:
            result = await self._client.step(action)
        except RuntimeError:
            raise
        except Exception as error:
            raise EnvironmentLost(f"no answer of {self._address}: {error}") from error
        # The client connects again by itself, to a session in which nothing has happened yet.
        if getattr(self._client, "_ws", None) is not self._socket:
            raise EnvironmentLost(f"the connection to {self._address} was lost, and with it the episode")
        return result

    async def _choose_form(self, action: Mapping[str, Any]) -> None:
        fields = {n: f for n, f in action.get("properties", {}).items() if n != "metadata"}
        if "tool_name" in fields and self._field is None:
            listed = (await self._client.step({"type": "list_tools"})).observation["tools"]
            self._has_mcp = True
            self.tool_schemas = [
                schema_of(tool["name"], tool.get("description", ""), tool["input_schema"]) for tool in listed
            ]
            return
        texts = [name for name, field in fields.items() if field.get("type") == "string"]
        required = action.get("required", list(fields))
        if self._field is None and len(texts) == 1 and set(required) <= set(texts):
            self._field = texts[0]
        if self._field is None:
            parameters = {**action, "properties": fields}
            self.tool_schemas = [schema_of(_STEP, action.get("description", "Act."), parameters)]
        else:
            self.tool_schemas = []

    def _schema(self) -> dict[str, Any]:
        http = self._address.replace("ws://", "http://", 1).replace("wss://", "https://", 1)
        request = urllib.request.Request(f"{http}/schema", headers=self._headers)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def _observation(self, result: Any, text: str | None = None) -> Observation:
        self._num_steps += 1
        self._is_rewarded |= result.reward is not None
        told = text_of(result.observation) if text is None else text
        return Observation(told, result.reward, bool(result.done))


def schema_of(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def text_of(observation: Mapping[str, Any]) -> str:
    """An observation as text: the value of its only field, else a line for each."""
    fields = {n: v for n, v in observation.items() if n not in _COMMON and v not in (None, "", [], {})}
    texts = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in fields.items()}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{name}: {text}" for name, text in texts.items())


def mcp_text(result: Any) -> str:
    """The result of an MCP tool as text."""
    if isinstance(result, Mapping):
        if isinstance(result.get("data"), str):
            return str(result["data"])
        parts = [p["text"] for p in result.get("content") or () if isinstance(p, Mapping) and "text" in p]
        if parts:
            return "\n".join(parts)
        result = result.get("data", result)
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
