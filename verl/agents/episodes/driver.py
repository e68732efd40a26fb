"""Drivers of episodes: who decides on what follows a turn of the policy."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from verl.agents.environments.session import Environments, EnvironmentSession, Message, ToolResult
from verl.agents.episodes.live_episode import EpisodeEnd, LiveEpisode
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ParsedTurn


class EpisodeDriver(ABC):
    """Plays episodes to their end.

    Attributes:
        offers_tools: every episode has tools, so that the chat template must write them.
    """

    offers_tools: bool = False

    @abstractmethod
    async def run(self, live: LiveEpisode) -> None:
        """Play one episode; returns when it is over, with its reward in `live.record` if it gives one.

        Raises:
            EpisodeEnd: a limit ended it.
            EpisodeFailure: it cannot go on.
            ValueError: the chat template does not take its messages.
        """

    def check_data(self, prompts: Sequence[Prompt]) -> None:
        """Check the rows of the data before the first step; here nothing.

        Raises:
            ValueError: a row lacks what an episode needs.
        """
        return

    def close(self) -> None:
        """End all processes and servers; may be called again."""
        return


class SingleAnswer(EpisodeDriver):
    """One answer to the prompt; nothing follows it."""

    @override
    async def run(self, live: LiveEpisode) -> None:
        await live.answer()


class ToolLoop(EpisodeDriver):
    """Tools and environments answer the policy until it calls none, they are over, or a limit is reached.

    Args:
        environments: opens a session for each episode.
        offers_tools: see `EpisodeDriver`; tools of an environment are known when it is opened.
    """

    def __init__(self, environments: Environments, *, offers_tools: bool = False) -> None:
        self._environments, self.offers_tools = environments, offers_tools

    @override
    async def run(self, live: LiveEpisode) -> None:
        with live.outside():
            session = await self._environments.open(live.start)
        try:
            try:
                await self._play(live, session)
            except EpisodeEnd as end:
                live.record.ending = end.ending
            with live.outside():
                live.record.reward = await session.reward()
        finally:
            # Also after a cancellation: a process that is not given back is lost to later episodes.
            await asyncio.shield(session.close())

    @override
    def check_data(self, prompts: Sequence[Prompt]) -> None:
        self._environments.check_data(prompts)

    @override
    def close(self) -> None:
        self._environments.close()

    async def _play(self, live: LiveEpisode, session: EnvironmentSession) -> None:
        with live.outside():
            first = await session.reset()
        opening = list(first) if session.replaces_prompt else live.first_messages(first)
        live.begin(opening, session.schemas, state=session.state)
        session.conversation = live.record.messages
        while True:
            turn = await live.answer()
            if live.is_cut:  # it has no end, so nothing may follow it
                raise EpisodeEnd("max_tokens")
            messages = await self._answer_of(session, live, turn)
            if session.is_over or not messages:
                live.record.ending = "environment" if session.is_over else "answer"
                return
            live.add(messages, state=session.state)

    async def _answer_of(
        self, session: EnvironmentSession, live: LiveEpisode, turn: ParsedTurn
    ) -> Sequence[Message]:
        """Messages that follow a turn; none: the episode is over."""
        if turn.error:
            live.count_bad_call()
            return [bad_call_message(turn)]
        if turn.calls:
            live.count_calls(len(turn.calls))
        if turn.calls and not session.answers_calls:
            with live.outside():
                results = await session.call(turn.calls)
            live.note_results(results)
            return [tool_message(call.name, call.id, r) for call, r in zip(turn.calls, results, strict=True)]
        if not session.steps:
            return ()
        with live.outside():
            step = await session.step(turn.message)
        live.note_step(step)
        return step.messages


def tool_message(name: str, call_id: str, result: ToolResult) -> Message:
    """The result of a call as a chat message."""
    content = result.text if result.content is None else result.content
    return {"role": "tool", "name": name, "tool_call_id": call_id, "content": content}


def bad_call_message(turn: ParsedTurn) -> Message:
    """Message to the policy after a call that cannot be parsed."""
    return {"role": "user", "content": f"Error: the call cannot be read: {turn.error}"}
