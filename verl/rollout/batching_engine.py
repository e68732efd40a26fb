"""A batch generator behind the contract of generation: requests of one turn of the loop become one batch."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from typing_extensions import override

from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.utils.event_loops import Gatherer, OwnLoop, wait_for_thread
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    PrefixAffinity,
    RolloutEngine,
    SamplingParams,
)


class _Request(NamedTuple):
    prompt_ids: Sequence[int]
    params: SamplingParams
    affinity: PrefixAffinity | None

    def continues(self, other: _Request, count: int) -> bool:
        """True if this is the answer behind `count` answers of a group that begins with `other`."""
        expected = replace(other.params, sample_index=other.params.sample_index + count)
        return (
            self.affinity is not None
            and self.affinity is other.affinity
            and self.prompt_ids is other.prompt_ids
            and self.params == expected
        )


class BatchingEngine(OwnLoop, RolloutEngine):
    """Answers requests by a generator that takes turns with training, such as the policy's own ranks.

    Requests of one turn of the event loop are generated in one call. The answers of a group are answers to
    one prompt, which is computed once. An answer depends on its seed and number alone, so batches don't
    change it.

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

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        return await self._batches.ask(_Request(prompt_ids, params, affinity))

    @override
    async def sync_weights(self, version: int) -> None:
        # Generators share the trainer's storage, or take the weights with the next call.
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
        self.generator.close()

    def _generate(self, requests: list[_Request]) -> list[Completion]:
        groups: list[list[_Request]] = []
        for request in requests:
            if groups and request.continues(groups[-1][0], len(groups[-1])):
                groups[-1].append(request)
            else:
                groups.append([request])
        prompts = [group[0].prompt_ids for group in groups]
        params = [replace(group[0].params, n=len(group)) for group in groups]
        with (
            self._clock.phase("generate"),
            self._waits.track("generation", f"{len(requests)} answers to {len(groups)} prompts"),
        ):
            if self._in_thread:
                answers = wait_for_thread(lambda: self.generator.generate(prompts, params), name="generation")
            else:
                answers = self.generator.generate(prompts, params)
        counts, wanted = [len(group) for group in answers], [p.n for p in params]
        if counts != wanted:
            raise ValueError(
                f"{type(self.generator).__name__}.generate must return {reprlib.repr(wanted)} completions "
                f"for {len(wanted)} prompts, got {reprlib.repr(counts)}"
            )
        return [completion for group in answers for completion in group]
