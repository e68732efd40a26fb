"""An environment in its own process: its methods called by name, with plain values at its border.

A process imports this module and no torch. It may run another Python, which has the environment's package and
not those of verl.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from verl.agents.environments.observation import EnvironmentLost, Observation, is_number, observed
from verl.agents.processes.object_host import loaded, seed_libraries
from verl.rewards.execution.call_worker import Definition
from verl.utils.user_code import exception_text

# Methods of the contract, which are no tools.
CONTRACT = ("reset", "step", "get_reward", "close", "tool_schemas", "call_tool", "rows")
# Attributes that end the episode once they are true; the environments in TRL's documents have `done`.
_ENDS = ("is_over", "done")


class HostedEnvironment:
    """One environment, made for one episode.

    Its methods give plain values, or coroutines of such where the environment's own method is asynchronous.

    Args:
        definition: module (or file whose path ends in .py) and name of the class, or of the function that
            makes the environment; or its pickle.
        options: keyword arguments of that class or function.
        seed: of the random numbers of Python and NumPy in this process.
    """

    def __init__(self, definition: Definition, options: Mapping[str, Any], seed: int) -> None:
        make = loaded(definition)
        seed_libraries(seed)
        self._environment = make(**options)
        self._methods = public_methods(self._environment)
        seed_libraries(seed)  # what the constructor drew must not change the start

    def facts(self, *, with_schemas: bool = True) -> dict[str, Any]:
        """Facts about the environment that are the same in all episodes.

        Args:
            with_schemas: make the schemas of the public methods, which loads Transformers.

        Returns:
            The fields of `EnvironmentFacts`.

        Raises:
            ValueError: a method has no types and docstring that a schema can be made of, or there is nothing
                that answers the policy.
        """
        kind = type(self._environment).__name__
        parameters = inspect.signature(self._environment.reset).parameters if self._has("reset") else {}
        needs = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if not (self._methods or self._has("step") or self._has("call_tool")):
            raise ValueError(
                f"need public methods (tools) or `step` of the environment {kind}, it has neither"
            )
        schemas: list[dict[str, Any]] = []
        if with_schemas and self._methods:
            make = importlib.import_module("verl.utils.tool_schemas").tool_schema
            schemas = [make(method, f"the environment {kind}") for method in self._methods.values()]
        rewards = (
            inspect.signature(self._environment.get_reward).parameters if self._has("get_reward") else {}
        )
        return {
            "steps": self._has("step"),
            "answers_calls": getattr(self._environment, "answers_calls", False),
            "reads_messages": "messages" in rewards,
            "needs": tuple(name for name in needs if name not in ("seed", "prompt")),
            "schemas": tuple(schemas),
        }

    def rows(self, split: str, options: Mapping[str, Any]) -> Any:
        """Rows of the environment's own data; None: it has none."""
        return self._environment.rows(split=split, **options) if self._has("rows") else None

    def reset(self, columns: Mapping[str, Any], seed: int) -> Any:
        """Begin the episode.

        Args:
            columns: of the row; `reset` gets those that it takes by name, or all if it takes `**columns`.
            seed: given to `reset` if it takes it by name and the row has no column `seed`.

        Returns:
            The answer, with `schemas` of the environment's own tools; None: those of its public methods.
        """
        value = None
        if self._has("reset"):
            value = self._environment.reset(**taken(self._environment.reset, columns, seed))
        return finished(value, self._begun)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Answer of a tool; one that fails has an outcome that says so, and the episode goes on."""
        if self._has("call_tool"):
            return self._called(self._environment.call_tool, {"name": name, "arguments": dict(arguments)})
        method = self._methods.get(name)
        if method is None:
            text = f"there is no tool {name!r}, there are {', '.join(self._methods) or 'none'}"
            return {**plain(Observation(f"Error: {text}")), "outcome": "unknown_tool", "detail": text}
        try:
            inspect.signature(method).bind(**arguments)
        except TypeError as error:
            text = f"{name}: {error}"
            return {**plain(Observation(f"Error: {text}")), "outcome": "bad_arguments", "detail": text}
        return self._called(method, arguments)

    def step(self, message: Mapping[str, Any]) -> Any:
        """Answer to a turn without calls."""
        return finished(self._environment.step(dict(message)), lambda value: self._answer(value, "step"))

    def reward(self, messages: list[dict[str, Any]] | None = None) -> Any:
        """Reward of the episode as the environment gives it; None: it has no `get_reward`.

        Args:
            messages: the conversation, for a `get_reward` that takes it.
        """
        if not self._has("get_reward"):
            return None
        given = {} if messages is None else {"messages": messages}
        return finished(self._environment.get_reward(**given), plain_reward)

    def close(self) -> Any:
        """Let the environment release what it holds."""
        return finished(self._environment.close() if self._has("close") else None, lambda value: None)

    def _has(self, name: str) -> bool:
        return callable(getattr(self._environment, name, None))

    def _begun(self, value: Any) -> dict[str, Any]:
        schemas = getattr(self._environment, "tool_schemas", None)
        return {**self._answer(value, "reset"), "schemas": schemas}

    def _called(self, method: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            value = method(**arguments)
            if inspect.isawaitable(value):
                return self._called_later(value)
            return self._answer(value, "a tool")
        except EnvironmentLost:
            raise
        except Exception as error:  # of the environment's own code, which TRL tells the policy too
            return self._failed(error)

    async def _called_later(self, value: Awaitable[Any]) -> dict[str, Any]:
        try:
            return self._answer(await value, "a tool")
        except EnvironmentLost:
            raise
        except Exception as error:
            return self._failed(error)

    def _failed(self, error: Exception) -> dict[str, Any]:
        answer = self._answer(f"Error: {type(error).__name__}: {error}", "a tool")
        return {**answer, "outcome": "error", "detail": exception_text(error)}

    def _answer(self, value: Any, place: str) -> dict[str, Any]:
        observation = observed(value, place)
        is_over = any(getattr(self._environment, name, False) is True for name in _ENDS)
        state = getattr(self._environment, "state", None)
        return {
            **plain(observation),
            "is_over": observation.is_over or is_over,
            "state": state if isinstance(state, str) else None,
        }


def finished(value: Any, finish: Callable[[Any], Any]) -> Any:
    """The end of a method: of its value, or of what its coroutine gives."""
    return _finished_later(value, finish) if inspect.isawaitable(value) else finish(value)


async def _finished_later(value: Awaitable[Any], finish: Callable[[Any], Any]) -> Any:
    return finish(await value)


def plain_reward(value: Any) -> Any:
    """The reward of an episode with numbers of Python.

    Raises:
        TypeError: it is no number, dict or None.
    """
    if value is None or is_number(value):
        return value if value is None else float(value)
    if isinstance(value, Mapping):
        return {str(key): float(entry) if is_number(entry) else entry for key, entry in value.items()}
    raise TypeError(f"need a number, a dict or None from get_reward, got {value!r}")


def public_methods(environment: Any) -> dict[str, Any]:
    """The tools of an environment: its methods without an underscore that are not of the contract."""
    if hasattr(environment, "call_tool"):
        return {}
    members = inspect.getmembers(environment, inspect.ismethod)
    return {name: method for name, method in members if name[0] != "_" and name not in CONTRACT}


def taken(function: Any, columns: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Columns that a function takes by name, all with `**columns`; and the seed, if it names it.

    The seed of a row, its column `seed`, goes over that of the episode.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in columns.items() if takes_all or name in parameters}
    return {"seed": seed, **given} if "seed" in parameters else given


def plain(observation: Observation) -> dict[str, Any]:
    """An answer as a dict of plain values."""
    reward = observation.reward
    return {
        "text": observation.text,
        "reward": None if reward is None else float(reward),
        "is_over": observation.is_over,
        "metrics": {str(name): float(value) for name, value in observation.metrics.items()},
        "messages": [dict(message) for message in observation.messages],
        "replaces_prompt": observation.replaces_prompt,
        "outcome": "ok",
        "detail": "",
    }
