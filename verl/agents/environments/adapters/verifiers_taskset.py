"""Tasksets of verifiers 1, `verifiers:NAME`: their prompts, their tools and their rewards.

https://github.com/PrimeIntellect-ai/verifiers. The agent is the policy itself, in place of a harness in a
runtime; what needs a runtime (containers, hooks with files) is refused. For these run the harness as
`agent.program`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from verl.agents.environments.observation import Observation

# Column of a row with the data of its task.
COLUMN = "verifiers_task"
_SIZES = {"train": 500, "test": 100}
# Every fifth task is held out.
_HELD_OUT = 5


class VerifiersTaskset:
    """One task of a taskset.

    Args:
        name: of the installed package.
        **options: of the taskset's configuration.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self._vf = importlib.import_module("verifiers.v1")
        config = self._vf.taskset_config_type(name).model_validate({"id": name, **options})
        self._taskset = self._vf.load_taskset(config)
        self._task: Any = None
        self._tools: dict[str, tuple[Any, str]] = {}
        self._num_given = 0
        self.tool_schemas: list[dict[str, Any]] = []

    def rows(self, split: str, size: int | None = None) -> list[dict[str, Any]]:
        """Rows of the tasks: every fifth one is held out."""
        wanted = islice(
            (t for t in self._taskset if (t.data.idx % _HELD_OUT == _HELD_OUT - 1) == (split == "test")),
            size or _SIZES[split],
        )
        return [
            {"prompt": self._messages(task), COLUMN: task.data.model_dump(mode="json")} for task in wanted
        ]

    async def reset(self, seed: int, prompt: Any, **columns: Any) -> Observation:
        """Begin the task of the row; of a row without one, the one that the seed draws."""
        data = columns.get(COLUMN)
        if data is None:
            tasks = list(islice(iter(self._taskset), _SIZES["train"]))
            self._task = tasks[seed % len(tasks)]
        else:
            kind = self._taskset.task_type()
            self._task = kind(kind.data_type().model_validate(data), self._taskset.config.task)
        self._refuse_runtimes()
        toolsets = [*type(self._taskset).toolsets(self._taskset.config)]
        toolsets += type(self._task).toolsets(self._task.config)
        for toolset in toolsets:
            await self._offer(toolset)
        messages = self._messages(self._task)
        self._num_given = len(messages)
        return Observation() if prompt == messages else Observation(messages=messages, replaces_prompt=True)

    async def call_tool(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Result of a tool."""
        if name not in self._tools:
            raise ValueError(f"there is no tool {name!r}, there are {', '.join(self._tools) or 'none'}")
        server, own_name = self._tools[name]
        result = await server.call_tool(own_name, dict(arguments))
        text = "\n".join(part.text for part in result.content if getattr(part, "text", None) is not None)
        if result.is_error:
            raise RuntimeError(text)
        return Observation(text)

    async def get_reward(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Sum of the weighted rewards, with each of them and the metrics by name."""
        vf = self._vf
        trace = vf.Trace(
            task=vf.TraceTask(type=type(self._task).__name__, data=self._task.data, key=self._task.key),
            agent=vf.AgentInfo(config=vf.AgentConfig()),
        )
        for number, message in enumerate(messages):
            trace.nodes.append(
                vf.MessageNode(
                    parent=number - 1 if number else None,
                    message=self._typed(message),
                    sampled=message["role"] == "assistant" and number >= self._num_given,
                )
            )
        await self._task.score(trace)
        scores = {name: part.score for name, part in trace.rewards.items() if part is not None}
        metrics = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        return {"reward": float(trace.reward), **scores, **metrics}

    def _refuse_runtimes(self) -> None:
        task, base = self._task, self._vf.Task
        hooks = [
            name for name in ("setup", "finalize") if getattr(type(task), name) is not getattr(base, name)
        ]
        for fn in (*task.hooks("metric"), *task.hooks("reward")):
            parameter = inspect.signature(fn).parameters.get("runtime")
            if parameter is not None and parameter.default is parameter.empty:
                hooks.append(fn.__name__)
        if task.NEEDS_CONTAINER or hooks:
            needs = "a container" if task.NEEDS_CONTAINER else f"a runtime for {', '.join(hooks)}"
            raise ValueError(f"this task needs {needs}; run its harness as agent.program")

    async def _offer(self, toolset: Any) -> None:
        """Offer the tools of a toolset, called in this process."""
        if type(toolset.state) is not self._vf.State:
            raise ValueError(
                f"the tools of {type(toolset).__name__} share state with a harness; run it as agent.program"
            )
        server = importlib.import_module("mcp.server.mcpserver").MCPServer(toolset.server_name or "tools")
        await toolset.setup()
        await toolset.setup_task(self._task.data)
        toolset.register(server)
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for tool in await server.list_tools():
            name = f"{prefix}{tool.name}"
            self._tools[name] = (server, tool.name)
            function = {
                "name": name,
                "description": tool.description or "",
                "parameters": dict(tool.input_schema),
            }
            self.tool_schemas.append({"type": "function", "function": function})

    def _messages(self, task: Any) -> list[dict[str, Any]]:
        prompt = task.data.prompt
        if prompt is None:
            raise ValueError(
                "the task has no prompt: a user opens its conversation; run its harness as agent.program"
            )
        system = [] if task.data.system_prompt is None else [("system", task.data.system_prompt)]
        given = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
        return [{"role": role, "content": content} for role, content in (*system, *given)]

    def _typed(self, message: Mapping[str, Any]) -> Any:
        vf, role, content = self._vf, message["role"], message.get("content") or ""
        if role == "assistant":
            calls = [
                vf.ToolCall(
                    id=call["id"],
                    name=call["function"]["name"],
                    arguments=json.dumps(call["function"]["arguments"]),
                )
                for call in message.get("tool_calls") or ()
            ]
            thoughts = message.get("reasoning_content")
            return vf.AssistantMessage(content=content, reasoning_content=thoughts, tool_calls=calls or None)
        if role == "tool":
            return vf.ToolMessage(tool_call_id=message["tool_call_id"], content=content)
        return vf.SystemMessage(content=content) if role == "system" else vf.UserMessage(content=content)
