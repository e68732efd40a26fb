"""An environment with further tools beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import override

from verl.agents.environments.session import (
    Environments,
    EnvironmentSession,
    EpisodeFailure,
    EpisodeStart,
    Message,
    Reward,
    StepResult,
    ToolResult,
)
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall


class CombinedSession(EnvironmentSession):
    """Sessions of one episode: each has its own tools, and the first one that steps answers the policy.

    Args:
        sessions: at least one.

    Raises:
        EpisodeFailure: two have a tool of the same name.
    """

    def __init__(self, sessions: Sequence[EnvironmentSession]) -> None:
        self._sessions = list(sessions)
        self._owners: dict[str, EnvironmentSession] = {}
        self.collect_tools()
        self._stepping = next((session for session in self._sessions if session.steps), None)
        self.steps = self._stepping is not None

    def collect_tools(self) -> None:
        """Take the tools of all sessions, some of which have theirs after `reset`.

        Raises:
            EpisodeFailure: two have a tool of the same name.
        """
        self._owners.clear()
        for session in self._sessions:
            if session.answers_calls:
                raise EpisodeFailure(
                    "environment_error",
                    "need an environment without calls of its own beside agent.tools; leave agent.tools out",
                )
            for schema in session.schemas:
                name = schema.get("function", schema)["name"]
                if name in self._owners:
                    raise EpisodeFailure(
                        "environment_error", f"need tools with different names, got two of the name {name}"
                    )
                self._owners[name] = session
        self.schemas = tuple(schema for session in self._sessions for schema in session.schemas)

    @override
    async def reset(self) -> Sequence[Message]:
        messages = [message for session in self._sessions for message in await session.reset()]
        self.replaces_prompt = any(session.replaces_prompt for session in self._sessions)
        self.collect_tools()
        self.take_state()
        return messages

    @override
    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        # A call of an unknown tool goes to the first one, which says so.
        owners = [self._owners.get(call.name, self._sessions[0]) for call in calls]
        results: dict[int, ToolResult] = {}
        for session in dict.fromkeys(owners):
            places = [i for i, owner in enumerate(owners) if owner is session]
            answered = await session.call([calls[i] for i in places])
            results |= dict(zip(places, answered, strict=True))
        self.is_over = any(session.is_over for session in self._sessions)
        self.take_state()
        return [results[i] for i in range(len(calls))]

    @override
    async def step(self, message: Message) -> StepResult:
        if self._stepping is None:
            return StepResult()
        result = await self._stepping.step(message)
        self.is_over = self._stepping.is_over
        self.take_state()
        return result

    def take_state(self) -> None:
        """Take the state of the first session that tells one."""
        self.state = next((s.state for s in self._sessions if s.state is not None), None)

    @override
    async def reward(self) -> Reward | None:
        for session in self._sessions:
            session.conversation = self.conversation
        rewards = [await session.reward() for session in self._sessions]
        given = [reward for reward in rewards if reward is not None]
        if len(given) > 1:
            raise EpisodeFailure(
                "environment_error",
                f"need one reward of the episode, got {len(given)}; let tools reward their calls instead",
            )
        return given[0] if given else None

    @override
    async def close(self) -> None:
        await gather_all([session.close() for session in self._sessions])


class CombinedEnvironments(Environments):
    """Several sources of sessions as one.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Environments]) -> None:
        self._parts = list(parts)

    @override
    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        sessions: list[EnvironmentSession] = []
        try:
            for part in self._parts:
                sessions.append(await part.open(start))
            return CombinedSession(sessions)
        except BaseException:
            for session in sessions:
                await session.close()
            raise

    @override
    def check_data(self, prompts: Sequence[Prompt]) -> None:
        for part in self._parts:
            part.check_data(prompts)

    @override
    def rows(self, split: Literal["train", "test"], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._parts[0].rows(split, options)

    @override
    def close(self) -> None:
        for part in self._parts:
            part.close()
