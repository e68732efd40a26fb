"""Settings of episodes: tools, environments, programs, and the limits of an episode."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from verl.config.fields import Choice, Section, setting

Ending = Literal["max_turns", "max_calls", "max_tokens", "bad_calls", "timeout"]
Treatment = Literal["reward", "mask", "fail"]
_ENDINGS: dict[Ending, Treatment] = {
    "max_turns": "reward",
    "max_calls": "reward",
    "max_tokens": "reward",
    "bad_calls": "reward",
    "timeout": "fail",
}


class AgentConfig(Section):
    """Episodes of several turns: who answers the policy between its turns, and the limits."""

    tools: tuple[Choice, ...] = setting(
        (),
        'Functions that the policy may call: calculator, search, python, "file.py:function", '
        '"package.module:function", "mcp:ADDRESS", "verl:FILE.yaml".',
    )
    environment: Choice | None = setting(
        None,
        'Environment of the episodes: "file.py:Class", "openenv:ADDRESS", "verifiers:NAME", "gym:NAME", '
        '"reasoning-gym:NAME", "textarena:NAME", "skyrl-gym:NAME".',
    )
    environment_column: str | None = setting(
        None,
        "Column with the environment of the row, by name or as {name, options}; a row without one has that "
        "of `environment`.",
    )
    program: str | tuple[str, ...] | None = setting(
        None,
        'Agent that runs its own loop over an OpenAI-compatible endpoint: "file.py:function", or a command '
        "as a list of its words.",
    )
    max_turns: int = setting(16, "Turns of the policy in an episode.", unit="turns", ge=1)
    max_calls: int | None = setting(
        None, "Calls of tools in an episode; none: no limit but the turns.", unit="calls", ge=1
    )
    max_tokens: int | None = setting(
        None,
        "Tokens of an episode after its prompt, those of tools and environment included; none: the model's "
        "context.",
        unit="tokens",
        ge=1,
    )
    max_bad_calls: int = setting(
        3, "Malformed calls one after the other that end an episode; each is told to the policy.", ge=1
    )
    timeout_s: float = setting(600.0, "Time limit of an episode.", unit="s", gt=0)
    call_timeout_s: float = setting(
        30.0, "Time limit of one call of a tool or an environment.", unit="s", gt=0
    )
    max_result_chars: int = setting(
        16_384, "Longer results of tools are cut in their middle.", unit="characters", ge=1
    )
    tool_format: str = setting(
        "auto",
        "Form in which the policy writes calls: auto (that of the chat template), tokenizer (its "
        "response_template), a name of `verl.utils.tool_calls.formats`, or a parser of yours as "
        '"file.py:Class".',
    )
    endings: dict[Ending, Treatment] = setting(
        _ENDINGS,
        "For episodes that a limit ends: reward (as any other), mask (compared with its siblings, but not "
        "learned from), or fail (no reward).",
        source="compact filtering of DeepSWE for mask",
    )
    max_processes: int = setting(
        64, "Processes of tools and environments at a time; further episodes wait.", unit="processes", ge=1
    )

    @field_validator("endings")
    @classmethod
    def _add_default_endings(cls, endings: dict[Ending, Treatment]) -> dict[Ending, Treatment]:
        return {**_ENDINGS, **endings}

    @property
    def is_on(self) -> bool:
        """True if answers are episodes of several turns."""
        return bool(self.tools or self.environment or self.environment_column or self.program)
