"""Agents in the process of a test, which speak to a real gateway in front of a scripted policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI
from typing_extensions import override

from tests.agents.episodes.scripted import ScriptedEngine, play
from verl.agents.episodes.driver import EpisodeDriver
from verl.agents.episodes.live_episode import LiveEpisode
from verl.agents.programs.gateway import Access, Gateway
from verl.agents.programs.program_session import ProgramSession
from verl.data.trajectory import Trajectory

Agent = Callable[[AsyncOpenAI], Awaitable[Any]]
ASK = {"role": "user", "content": "2+3?"}


class InProcess(EpisodeDriver):
    """Runs an agent in the loop of the episode; keeps the last access and the notes."""

    def __init__(self, gateway: Gateway, agent: Agent) -> None:
        self.gateway, self.agent = gateway, agent
        self.notes: list[str] = []
        self.access: Access | None = None

    @override
    async def run(self, live: LiveEpisode) -> None:
        session = ProgramSession(live, self.notes.append)
        with self.gateway.opened(session) as self.access:
            options = {"base_url": self.access.url, "api_key": self.access.key, "max_retries": 0}
            async with AsyncOpenAI(**options) as client:
                live.record.reward = await self.agent(client)
        live.record.ending = session.ending or live.record.ending


def episode(gateway: Gateway, agent: Agent, texts: Any, **settings: Any) -> tuple[Trajectory, ScriptedEngine]:
    """One episode of an agent."""
    (trajectory,), engine = play(texts, driver=InProcess(gateway, agent), **settings)
    return trajectory, engine


def sampled_texts(trajectory: Trajectory, engine: ScriptedEngine) -> list[list[str]]:
    """Texts of the turns of each segment."""
    return [[text for text, sampled in runs if sampled] for runs in texts_of(trajectory, engine)]


def texts_of(trajectory: Trajectory, engine: ScriptedEngine) -> list[list[tuple[str, bool]]]:
    """Texts of each segment with whether they were sampled, its prompt first."""
    segments = []
    for row in trajectory.rows():
        runs = [(engine.codec.decode_all(row.prompt_ids), False)]
        start = 0
        for end in range(1, len(row.response_mask) + 1):
            if end == len(row.response_mask) or row.response_mask[end] != row.response_mask[start]:
                ids = list(row.response_ids)[start:end]
                runs.append((engine.codec.decode_all(ids), row.response_mask[start]))
                start = end
        segments.append(runs)
    return segments
