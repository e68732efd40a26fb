"""Episodes of an environment that lives in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from verl.agents.environments.session import (
    EnvironmentSession,
    EpisodeFailure,
    Message,
    Reward,
    StepResult,
    ToolResult,
)
from verl.agents.processes.object_processes import ObjectProcess
from verl.agents.processes.process_failure import ProcessFailure
from verl.utils.tool_calls.calls import ToolCall

# For an environment to release what it holds; then its process is killed.
_CLOSE_LIMIT_S = 5.0
_OVER = "Error: the episode is over"


@dataclass(frozen=True)
class EnvironmentFacts:
    """Facts about an environment that are the same in all episodes.

    Attributes:
        steps: it answers turns without calls.
        answers_calls: its `step` answers turns with calls too.
        reads_messages: its `get_reward` takes the conversation.
        needs: columns that its `reset` needs.
        schemas: of its public methods, which are tools.
    """

    steps: bool
    answers_calls: bool
    reads_messages: bool
    needs: tuple[str, ...]
    schemas: tuple[dict[str, Any], ...]


class ProcessSession(EnvironmentSession):
    """One episode of an environment in a process.

    Args:
        process: holds a `HostedEnvironment`.
        facts: of the environment.
        seed: of the episode, equal for siblings.
        name: of the environment, for messages.
        columns: of the row, without those that are for this package.
        call_timeout_s: time limit of each call.
        max_chars: longer texts are cut in their middle.
    """

    def __init__(
        self,
        process: ObjectProcess,
        facts: EnvironmentFacts,
        seed: int,
        *,
        name: str,
        columns: Mapping[str, Any],
        call_timeout_s: float,
        max_chars: int,
    ) -> None:
        self.schemas, self.steps, self.answers_calls = facts.schemas, facts.steps, facts.answers_calls
        self._reads_messages = facts.reads_messages
        self._process, self._seed, self._columns = process, seed, columns
        self._name, self._timeout_s, self._max_chars = name, call_timeout_s, max_chars

    @override
    async def reset(self) -> Sequence[Message]:
        answer = await self.ask("reset", self._columns, self._seed)
        if answer["schemas"] is not None:
            self.schemas = tuple(answer["schemas"])
        if answer["is_over"]:
            raise EpisodeFailure(
                "environment_error", f"{self._name}: the episode is over before its first turn"
            )
        self.replaces_prompt, self.state = answer["replaces_prompt"], answer["state"]
        return self.messages_of(answer)

    @override
    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        results = []
        for call in calls:
            if self.is_over:
                results.append(ToolResult(_OVER, "error", "called after the end of the episode"))
                continue
            try:
                answer = await self._process.call(
                    "call", call.name, dict(call.arguments), timeout_s=self._timeout_s
                )
            except ProcessFailure as failure:
                if failure.is_lost or failure.outcome == "error":
                    raise self.failure(call.name, failure) from failure
                results.append(ToolResult(f"Error: {failure.detail}", "timeout", failure.detail))
                continue
            self.is_over, self.state = answer["is_over"], answer.get("state")
            results.append(self.result_of(answer))
        return results

    @override
    async def step(self, message: Message) -> StepResult:
        answer = await self.ask("step", message)
        messages = self.messages_of(answer)
        self.is_over, self.state = answer["is_over"] or not messages, answer["state"]
        return StepResult(() if self.is_over else messages, answer["reward"], answer["metrics"])

    @override
    async def reward(self) -> Reward | None:
        reward: Reward | None = await self.ask(
            "reward", list(self.conversation) if self._reads_messages else None
        )
        return reward

    @override
    async def close(self) -> None:
        try:
            if not self._process.is_lost:
                with suppress(ProcessFailure):  # the process ends anyway
                    await self._process.call("close", timeout_s=min(self._timeout_s, _CLOSE_LIMIT_S))
        finally:
            await self._process.close()

    async def ask(self, method: str, *args: Any) -> Any:
        """Value of a method of the environment.

        Raises:
            EpisodeFailure: it gave none.
        """
        try:
            return await self._process.call(method, *args, timeout_s=self._timeout_s)
        except ProcessFailure as failure:
            raise self.failure("get_reward" if method == "reward" else method, failure) from failure

    def failure(self, method: str, failure: ProcessFailure) -> EpisodeFailure:
        """The failure of the episode, for that of a call."""
        return environment_failure(f"{self._name}, {method}", failure)

    def messages_of(self, answer: Mapping[str, Any]) -> list[Message]:
        """Messages of an answer of `reset` or `step`; none if it says nothing."""
        if answer["messages"]:
            return [
                {**m, "content": self.cut(m["content"])} if isinstance(m.get("content"), str) else m
                for m in answer["messages"]
            ]
        text = answer["text"]
        if text is None:
            return []
        return [{"role": "user", "content": self.cut(text) if isinstance(text, str) else text}]

    def result_of(self, answer: Mapping[str, Any]) -> ToolResult:
        """The result of a call."""
        text = answer["text"]
        parts = text if isinstance(text, list) else None
        return ToolResult(
            "" if text is None or parts is not None else self.cut(text),
            answer["outcome"],
            answer["detail"],
            answer["reward"],
            answer["metrics"],
            parts,
        )

    def cut(self, text: str) -> str:
        """A text that is not too long; a longer one loses its middle."""
        return without_middle(text, self._max_chars)


def environment_failure(place: str, failure: ProcessFailure) -> EpisodeFailure:
    """The failure of an episode, for that of a call in its process."""
    return EpisodeFailure(f"environment_{failure.outcome}", f"{place}: {failure.detail}")


def without_middle(text: str, max_chars: int) -> str:
    """A text of at most about `max_chars` characters; of a longer one both ends are kept."""
    if len(text) <= max_chars:
        return text
    front = (max_chars + 1) // 2
    back = text[len(text) - (max_chars - front) :]
    return f"{text[:front]}\n... {len(text) - max_chars} characters left out ...\n{back}"
