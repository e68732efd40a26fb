"""The contract of tools: a source has tools, and gives each episode its own view of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from verl.agents.environments.session import CallOutcome, EpisodeStart, Reward
from verl.agents.processes.process_failure import ProcessFailure
from verl.utils.sampling_types import Prompt


class ToolFailure(Exception):
    """A call that gave no result; the episode goes on.

    Args:
        outcome: kind of the failure, which is counted.
        detail: cause, for people.
        text: cause for the policy; "": `detail`.
    """

    def __init__(self, outcome: CallOutcome, detail: str, text: str = "") -> None:
        super().__init__(detail)
        self.outcome: CallOutcome = outcome
        self.detail, self.text = detail, text or detail

    @classmethod
    def of_process(cls, failure: ProcessFailure) -> ToolFailure:
        """The failure of a call in a process."""
        return cls(failure.outcome, failure.detail, without_place(failure.detail))


def without_place(detail: str) -> str:
    """The words of an error without the file and line of the user, which say nothing to the policy."""
    head, bracket, place = detail.rpartition(" (")
    return head if bracket and place.endswith(")") and place[:-1].rpartition(":")[2].isdigit() else detail


@dataclass(frozen=True)
class ToolEpisode:
    """Facts of an episode, for tools with a parameter `episode`.

    Attributes:
        id: unique within the run.
        number: of the answer among its siblings.
        attempt: number of times that the group was begun before.
        seed: equal for siblings.
        columns: of the row of the data.
        answer: reference answer of the row.
        prompt: text or messages of the row.
    """

    id: str = ""
    number: int = 0
    attempt: int = 0
    seed: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    answer: Any = None
    prompt: Any = None

    @classmethod
    def of(cls, start: EpisodeStart) -> ToolEpisode:
        """Facts of an episode that starts."""
        row = start.prompt
        return cls(
            start.episode_id, start.number, start.attempt, start.seed, row.columns, row.answer, row.content
        )


class EpisodeTools(ABC):
    """The tools of a source in one episode."""

    @abstractmethod
    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Result of a call whose arguments were checked; several may run at once.

        Raises:
            ToolFailure: it gave none.
        """

    async def reward(self) -> Reward | None:
        """Reward of the episode; None: the tools give none.

        Raises:
            EpisodeFailure: it cannot be computed.
        """
        return None

    async def close(self) -> None:
        """Release what the episode holds; called once."""
        return


class SharedTools(EpisodeTools):
    """Tools that are the same in every episode.

    Args:
        run: calls one by its name and its arguments.
    """

    def __init__(self, run: Callable[[str, dict[str, Any]], Awaitable[Any]]) -> None:
        self._run = run

    @override
    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return await self._run(name, arguments)


class ToolSource(ABC):
    """Tools of one kind.

    Attributes:
        schemas: of the tools, in OpenAI's form.
    """

    schemas: tuple[dict[str, Any], ...] = ()

    @abstractmethod
    def open(self, episode: ToolEpisode) -> EpisodeTools:
        """The tools for one episode; starts nothing that takes time."""

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check the rows of the data; here nothing.

        Raises:
            ValueError: a row lacks what a tool needs.
        """
        return

    def close(self) -> None:
        """End all processes and connections; may be called again."""
        return


def tool_name(schema: Mapping[str, Any]) -> str:
    """Name of the tool of a schema, with or without OpenAI's `function` around it."""
    return str(schema.get("function", schema)["name"])
