"""Drivers of episodes from the settings of a run and what a program hands to its trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from verl.agents.environments.session import Environments
from verl.agents.episodes.driver import EpisodeDriver, ToolLoop
from verl.config.agent import AgentConfig
from verl.utils.tokens import TextCodec

# Functions that make the parts, by name: each loads packages that a run without it does not need.
_TOOLS = "verl.agents.tools.tool_set:build_tools"
_ENVIRONMENTS = "verl.agents.environments.process_environments:build_environments"
_PROGRAMS = "verl.agents.programs.program_driver:ProgramDriver"


@dataclass(frozen=True)
class GivenAgent:
    """Parts of episodes that a program hands over as Python objects.

    Attributes:
        tools: functions and tools besides those of `agent.tools`.
        environment: class, factory or `Environments` in place of `agent.environment`.
        program: async function in place of `agent.program`.
    """

    tools: Sequence[Any] = ()
    environment: Any = None
    program: Callable[..., Any] | None = None

    def rewards(self, config: AgentConfig) -> bool:
        """True if an environment or a program may reward its episodes."""
        named = (config.environment, config.environment_column, config.program)
        return any(part is not None for part in (*named, self.environment, self.program))


def build_driver(
    config: AgentConfig,
    given: GivenAgent,
    codec: TextCodec,
    *,
    note: Callable[[str], None],
) -> EpisodeDriver | None:
    """The driver of the episodes of a run; None for single answers.

    Args:
        config: names, options and limits.
        given: parts as Python objects.
        codec: of the policy.
        note: takes human-readable lines.

    Raises:
        ValueError: parts that do not go together, or cannot be loaded.
    """
    has_program = config.program is not None or given.program is not None
    has_tools = bool(config.tools or given.tools)
    has_environment = not has_program and given.rewards(config)
    if not (has_program or has_tools or has_environment):
        return None
    if has_program:
        if has_tools or config.environment or config.environment_column or given.environment is not None:
            raise ValueError(
                "need either a program, which brings its own tools, or tools and an environment, got both; "
                "leave agent.tools and agent.environment out, or agent.program"
            )
        make_program = _load(_PROGRAMS)
        driver: EpisodeDriver = make_program(config, codec, given=given.program, note=note)
        return driver
    parts: list[Environments] = []
    if isinstance(given.environment, Environments):
        parts.append(given.environment)
    elif has_environment:
        parts.append(_load(_ENVIRONMENTS)(config, given.environment, note=note))
    if has_tools:
        parts.append(_load(_TOOLS)(config, given.tools, note=note))
    return ToolLoop(parts[0] if len(parts) == 1 else combined(parts), offers_tools=has_tools)


def environment_rows(
    config: AgentConfig, given: GivenAgent, split: Literal["train", "test"], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the data of the environment of a run, see `Environments.rows`.

    Raises:
        ValueError: there is no environment, or it cannot be loaded, or it has no such option.
    """
    if not given.rewards(config) or config.program is not None or given.program is not None:
        raise ValueError(f"need agent.environment for data.{split}=environment, got none; name files instead")
    environments: Environments = _load(_ENVIRONMENTS)(config, given.environment)
    try:
        return environments.rows(split, options)
    finally:
        environments.close()


def combined(parts: Sequence[Environments]) -> Environments:
    """An environment and further tools as one."""
    joined: Environments = _load("verl.agents.environments.combined:CombinedEnvironments")(parts)
    return joined


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
