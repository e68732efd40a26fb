"""A batch generator behind the contract of generation: requests of one turn of the loop become one batch."""

from __future__ import annotations

import itertools
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from typing_extensions import override

from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.group_sampling import completions_of, prompts_of_groups
from verl.rollout.turn_batching import TurnBatcher
from verl.utils.event_loops import Gatherer, OwnLoop, wait_for_thread
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    PrefixAffinity,
    RolloutEngine,
    SampleRequest,
    SamplingParams,
    groups_of,
)

T = TypeVar("T")


class BatchingEngine(OwnLoop, RolloutEngine):
    """Answers requests by a generator that takes turns with training, such as the policy's own ranks.

    Requests of one turn of the event loop are generated in one call, for which the loop stands still. The
    answers of a group are answers to one prompt, which is computed once. An answer depends on its seed and
    number alone, so batches don't change it.

    While episodes are played (`episode`), generation runs in a thread instead, and requests come at any time:
    see `TurnBatcher`.

    Args:
        generator: generates batches.
        in_thread: call it in a thread, since code of a user may block or run its own event loop; else in the
            thread of the trainer, where an interrupt ends it.
        clock: takes the seconds of `generate`.
        waits: takes the waits for `generate`.
    """

    in_turn = True

    def __init__(
        self,
        generator: BatchGenerator,
        *,
        in_thread: bool = False,
        clock: Clock | None = None,
        waits: WaitTracker | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self._in_thread = in_thread
        self._clock, self._waits = clock or Clock(), waits or WaitTracker()
        self._batches = Gatherer(self._generate)
        self._turns: TurnBatcher | None = None  # made for the first episode
        self._numbers = itertools.count()

    @override
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return super().run(self._until_idle(work))

    @override
    def episode(self) -> AbstractContextManager[None]:
        if self._turns is None:
            times: dict[str, Any] = {"clock": self._clock, "waits": self._waits}
            self._turns = TurnBatcher(self.generator, **times)
        return self._turns.episode()

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        if self._turns is not None and self._turns.has_episodes:
            return await self._turns.sample(prompt_ids, params)
        return await self._batches.ask(SampleRequest(next(self._numbers), prompt_ids, params))

    @override
    async def sync_weights(self, version: int) -> None:
        if self._turns is not None:
            await self._turns.wait_idle()
        # Generators share the trainer's storage, or take the weights with the next call. What they keep of
        # earlier prompts goes with the version, and with `sleep` before the policy learns.
        self.version = self.generator.version = version

    @override
    def sleep(self) -> None:
        self.generator.sleep()

    @override
    def take_metrics(self) -> dict[str, float]:
        return self.generator.take_metrics()

    @override
    def close(self) -> None:
        self.close_loop()
        if self._turns is not None:
            self._turns.close()
        self.generator.close()

    async def _until_idle(self, work: Coroutine[Any, Any, T]) -> T:
        """Result of a coroutine, when nothing is generated any more: the policy learns next."""
        result = await work
        if self._turns is not None:
            await self._turns.wait_idle()
        return result

    def _generate(self, requests: list[SampleRequest]) -> list[Completion]:
        groups = groups_of(requests)
        prompts, params = prompts_of_groups(groups)
        what = f"{len(requests)} answers to {len(groups)} prompts"
        with self._clock.phase("generate"), self._waits.track("generation", what):
            if self._in_thread:
                answers = wait_for_thread(lambda: self.generator.generate(prompts, params), name="generation")
            else:
                answers = self.generator.generate(prompts, params)
        return completions_of(self.generator, answers, params)
