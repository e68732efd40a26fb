"""Environments of verifiers, `verifiers:NAME`, of both of its contracts: whatever the installed package has.

https://github.com/PrimeIntellect-ai/verifiers. Up to 0.1 a package has `load_environment`, whose environment
answers turns and whose rubric rewards them; later ones have a taskset, see `verifiers_taskset`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from verl.agents.environments.adapters.verifiers_preload import has_load_environment
from verl.agents.environments.adapters.verifiers_taskset import VerifiersTaskset
from verl.agents.environments.observation import Observation

# Column with the whole row of the environment's data set.
COLUMN = "verifiers_row"
_SIZES = {"train": 500, "test": 100}
# Environments get a client of a model, which only judges use: it leads nowhere.
_NO_ADDRESS = "http://127.0.0.1:9/v1"


def VerifiersEnvironment(name: str, **options: Any) -> Any:
    """The environment of an installed package.

    Args:
        name: as in `load_environment` or in the configuration of a taskset.
        **options: of either.
    """
    if has_load_environment():
        return VerifiersConversation(name, **options)
    return VerifiersTaskset(name, **options)


class VerifiersConversation:
    """One rollout of a `MultiTurnEnv`, `ToolEnv` or `SingleTurnEnv`.

    Args:
        name: of the package.
        **options: of its `load_environment`.
    """

    answers_calls = True

    def __init__(self, name: str, **options: Any) -> None:
        self._vf = importlib.import_module("verifiers")
        self._normalized = importlib.import_module("verifiers.utils.message_utils").normalize_messages
        self._environment = self._vf.load_environment(name, **options)
        self._state: Any = None
        self._messages: list[Any] = []
        self.tool_schemas: list[dict[str, Any]] = []

    def rows(self, split: str, size: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """Rows of the environment's data set."""
        get = self._environment.get_dataset if split == "train" else self._environment.get_eval_dataset
        rows = get(size or _SIZES[split], seed)
        return [{"prompt": plain(row["prompt"]), COLUMN: plain(row)} for row in rows]

    async def reset(self, seed: int, prompt: Any, **columns: Any) -> Observation:
        """Begin the rollout of the row; of a row without one, the one that the seed draws."""
        row = columns.get(COLUMN)
        if row is None:
            rows = self._environment.get_dataset()
            row = rows[seed % len(rows)]
        types = importlib.import_module("verifiers.types")
        client = types.ClientConfig(api_base_url=_NO_ADDRESS, api_key_var="VERL_NO_KEY")
        self._state = await self._environment.init_state(row, client, "policy")
        await self._environment.setup_state(self._state)
        self._messages = list(await self._environment.get_prompt_messages(self._state))
        self.tool_schemas = [schema_of(tool) for tool in self._state["tool_defs"]]
        messages = [chat_message(message) for message in self._messages]
        return Observation() if prompt == messages else Observation(messages=messages, replaces_prompt=True)

    async def step(self, message: Mapping[str, Any]) -> Observation:
        """Messages of the environment after a turn, those of tools among them."""
        await self._take(message, is_truncated=False)
        if await self._environment.is_completed(self._state):
            return Observation(is_over=True)
        before = len(self._messages)
        self._messages = list(await self._environment.get_prompt_messages(self._state))
        is_over = self._state.get("final_env_response") is not None
        new = [chat_message(one) for one in self._messages[before:]]
        return Observation(messages=new, is_over=is_over or not new)

    async def get_reward(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Reward of the rubric, with each of its functions by name."""
        if messages and messages[-1]["role"] == "assistant":
            turns = sum(m["role"] == "assistant" for m in messages)
            if turns > sum(getattr(m, "role", "") == "assistant" for m in self._messages):
                await self._take(messages[-1], is_truncated=True)
        self._state["is_completed"] = True
        await self._environment.cleanup(self._state)
        await self._environment.rubric.score_rollout(self._state)
        metrics = {name: float(value) for name, value in (self._state["metrics"] or {}).items()}
        return {**metrics, "reward": float(self._state["reward"])}

    async def _take(self, message: Mapping[str, Any], *, is_truncated: bool) -> None:
        """Note a turn of the policy."""
        turn = {"role": "assistant", "content": message.get("content") or ""}
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [
                {
                    "id": call["id"],
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"]),
                }
                for call in calls
            ]
        completion = self._normalized([turn], field_name="turn")
        step = {
            "prompt": list(self._messages),
            "completion": completion,
            "response": None,
            "tokens": None,
            "reward": None,
            "advantage": None,
            "is_truncated": is_truncated,
            "trajectory_id": self._state["trajectory_id"],
            "extras": {},
        }
        await self._environment.add_trajectory_step(self._state, step)
        self._messages += completion


def schema_of(tool: Any) -> dict[str, Any]:
    """A tool of verifiers in OpenAI's form."""
    known = tool if isinstance(tool, Mapping) else tool.model_dump(exclude_none=True)
    function = {key: known[key] for key in ("name", "description", "parameters") if key in known}
    return {"type": "function", "function": function}


def chat_message(message: Any) -> dict[str, Any]:
    """A message of verifiers as a chat message."""
    known = dict(message) if isinstance(message, Mapping) else message.model_dump(exclude_none=True)
    keys = ("role", "content", "tool_call_id", "name")
    return {key: known[key] for key in keys if known.get(key) is not None}


def plain(value: Any) -> Any:
    """A value of a data set with messages as dicts."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
