"""The engine as episodes of several turns use it: their number, and the waits of the engine for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from verl.monitoring.wait_tracker import WaitTracker
from verl.utils.sampling_types import Completion, PrefixAffinity, RolloutEngine, SamplingParams


class TurnSampler:
    """Samples turns, and tracks as the wait `environments` the time in which all episodes are elsewhere.

    Then the engine has nothing to do: tools, environments or programs are the bottleneck.

    Args:
        engine: answers; used in its event loop.
        waits: takes the waits.
    """

    def __init__(self, engine: RolloutEngine, waits: WaitTracker) -> None:
        self._engine, self._waits = engine, waits
        self._num_episodes = self._num_sampling = 0
        self._idle: ExitStack | None = None

    @contextmanager
    def episode(self) -> Iterator[None]:
        """Context of an episode."""
        with self._engine.episode():
            self._update(episodes=1)
            try:
                yield
            finally:
                self._update(episodes=-1)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        """Sample one turn, see `RolloutEngine.sample`."""
        self._update(sampling=1)
        try:
            return await self._engine.sample(prompt_ids, params, affinity)
        finally:
            self._update(sampling=-1)

    def _update(self, *, episodes: int = 0, sampling: int = 0) -> None:
        self._num_episodes += episodes
        self._num_sampling += sampling
        is_idle = self._num_episodes > 0 and not self._num_sampling
        if is_idle and self._idle is None:
            self._idle = ExitStack()
            self._idle.enter_context(self._waits.track("environments", self._description))
        elif not is_idle and self._idle is not None:
            self._idle.close()
            self._idle = None

    def _description(self) -> str:
        return f"tools and environments of {self._num_episodes} episodes"
