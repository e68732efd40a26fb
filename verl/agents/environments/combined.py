"""An environment with further tools beside its own."""

from __future__ import annotations

from collections.abc import Sequence

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
        for session in self._sessions:
            for schema in session.schemas:
                name = schema.get("function", schema)["name"]
                if name in self._owners:
                    raise EpisodeFailure(
                        "environment_error", f"need tools with different names, got two of the name {name}"
                    )
                self._owners[name] = session
        self.schemas = tuple(schema for session in self._sessions for schema in session.schemas)
        self._stepping = next((session for session in self._sessions if session.steps), None)
        self.steps = self._stepping is not None

    @override
    async def reset(self) -> Sequence[Message]:
        return [message for session in self._sessions for message in await session.reset()]

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
        return [results[i] for i in range(len(calls))]

    @override
    async def step(self, message: Message) -> StepResult:
        if self._stepping is None:
            return StepResult()
        result = await self._stepping.step(message)
        self.is_over = self._stepping.is_over
        return result

    @override
    async def reward(self) -> Reward | None:
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
    def close(self) -> None:
        for part in self._parts:
            part.close()
