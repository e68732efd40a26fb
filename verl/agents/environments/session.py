"""The contract between an episode and what answers the policy in it: tools, games, simulated users."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall

Message = dict[str, Any]
CallOutcome = Literal["ok", "error", "timeout", "crash", "unknown_tool", "bad_arguments", "limit"]
Reward = float | Mapping[str, Any]


class EpisodeFailure(Exception):
    """A failure after which an episode has no reward.

    Args:
        outcome: of the trajectory: environment_error, environment_timeout, environment_crash, ...
        detail: human-readable cause.
    """

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


@dataclass(frozen=True)
class EpisodeStart:
    """Facts that an environment may build an episode from; equal for siblings, except the numbers of answer.

    Attributes:
        prompt: the row of the data.
        seed: equal for the answers to one prompt, so that they start in the same state.
        number: of the answer among its siblings.
        attempt: number of times that the group was begun before.
        episode_id: unique within the run.
    """

    prompt: Prompt
    seed: int = 0
    number: int = 0
    attempt: int = 0
    episode_id: str = ""


@dataclass(frozen=True)
class ToolResult:
    """The result of one call.

    Attributes:
        text: told to the policy.
        outcome: "ok", or the kind of failure, which is counted; the episode goes on.
        detail: cause of a failure, for people; the policy reads `text`.
        reward: added to the reward of the turn with the call; None: none.
        metrics: numbers by name, averaged over episodes.
        content: parts of a message in place of `text`, such as images; None: `text` alone.
    """

    text: str
    outcome: CallOutcome = "ok"
    detail: str = ""
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    content: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class StepResult:
    """Reply of an environment to a turn of the policy.

    Attributes:
        messages: appended to the conversation before the next turn; none: the episode is over.
        reward: of the turn; None: none.
        metrics: numbers by name, averaged over episodes.
    """

    messages: Sequence[Message] = ()
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class EnvironmentSession(ABC):
    """One episode of tools or an environment. Methods are called one at a time, in one event loop.

    Attributes:
        schemas: of the tools that the policy may call.
        steps: the environment answers turns without calls (`step`); else such a turn ends the episode.
        is_over: the episode ends after the results of the last calls or the last step.
        state: of the environment before the next turn, as a text, for advantages that compare turns from
            equal states; None: what the policy was told last.
        answers_calls: `step` answers turns with calls too, by messages of role `tool`.
        replaces_prompt: the messages of `reset` are the whole prompt; else they follow it.
        conversation: all messages so far, kept up to date by the driver.
    """

    schemas: tuple[dict[str, Any], ...] = ()
    steps: bool = False
    is_over: bool = False
    state: str | None = None
    answers_calls: bool = False
    replaces_prompt: bool = False
    conversation: Sequence[Message] = ()

    async def reset(self) -> Sequence[Message]:
        """Messages that follow those of the prompt; here none.

        A user message directly behind the last user message of the prompt is appended to its text, as in TRL.

        Raises:
            EpisodeFailure: it cannot begin.
        """
        return ()

    @abstractmethod
    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Results of the calls of one turn, in their order; a call that fails has a result that says so.

        Raises:
            EpisodeFailure: the episode cannot go on.
        """

    async def step(self, message: Message) -> StepResult:
        """Answer to a turn without calls, or to any turn with `answers_calls`; here the episode ends.

        Raises:
            EpisodeFailure: the episode cannot go on.
        """
        return StepResult()

    async def reward(self) -> Reward | None:
        """Reward of the whole episode, as reward functions return it; None: it gives none.

        Raises:
            EpisodeFailure: it cannot be computed.
        """
        return None

    async def close(self) -> None:
        """Release what the episode holds; called once, also after a failure or a cancellation."""
        return


class Environments(ABC):
    """Opens a session for each episode of a run."""

    @abstractmethod
    async def open(self, start: EpisodeStart) -> EnvironmentSession:
        """A session for one episode.

        Raises:
            EpisodeFailure: there is none for this row.
        """

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check that rows have what their environments need, before the first step; here nothing.

        Raises:
            ValueError: a row has not.
        """
        return

    def rows(self, split: Literal["train", "test"], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of the environment's own data.

        Args:
            split: train or test.
            options: `size`, the number of rows; `seed`, another one draws other rows; and others of the
                environment.

        Raises:
            ValueError: it has none, or no such option.
        """
        raise ValueError(
            "need an environment for rows of its own data, got tools alone; name files in data.train"
        )

    def close(self) -> None:
        """End all processes and connections; may be called again."""
        return
