"""Turns of episodes over a blocking generator: it runs in a thread while tools and environments go on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.group_sampling import completions_of, prompts_of_groups
from verl.rollout.inference_server import RefusedError
from verl.utils.event_loops import SerialThread
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    SampleAnswer,
    SampleRequest,
    SamplingParams,
    groups_of,
)

# A generator that takes no requests while it generates waits for episodes that are with their tools, at most
# this share of the seconds that its last call took: without them it would run half empty, and they would wait
# for it.
_WAIT_SHARE = 0.1


class TurnBatcher:
    """Answers the turns of episodes, which ask at any time, in the event loop of the episodes.

    A generator with `advance` takes new requests every few tokens. Another one answers those that are there
    in one call, and waits a little before it for episodes that have not asked again yet.

    Args:
        generator: called in a thread, one call at a time. A cancellation of the tasks of the loop, as by an
            interrupt, also interrupts the call.
        clock: takes the seconds of `generate`.
        waits: takes the waits for answers.
    """

    def __init__(
        self,
        generator: BatchGenerator,
        *,
        clock: Clock,
        waits: WaitTracker,
    ) -> None:
        self._generator, self._clock, self._waits = generator, clock, waits
        self._thread = SerialThread("generation")
        self._numbers = itertools.count()
        self._new: dict[int, SampleRequest] = {}
        self._futures: dict[int, asyncio.Future[Completion]] = {}
        self._dropped: list[int] = []
        self._running: asyncio.Task[None] | None = None
        self._asked: asyncio.Event | None = None  # of the present run
        self._num_episodes = 0
        self._last_s = 0.0

    @property
    def has_episodes(self) -> bool:
        """True while episodes are played."""
        return self._num_episodes > 0

    @contextmanager
    def episode(self) -> Iterator[None]:
        """Context of an episode."""
        self._num_episodes += 1
        try:
            yield
        finally:
            self._num_episodes -= 1
            if self._asked is not None:
                self._asked.set()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Answer to one request; a cancellation drops it.

        Raises:
            RefusedError: it does not fit the model.
        """
        loop, number = asyncio.get_running_loop(), next(self._numbers)
        future = self._futures[number] = loop.create_future()
        self._new[number] = SampleRequest(number, prompt_ids, replace(params, n=1))
        if self._running is None:
            self._asked = asyncio.Event()
            # Behind the tasks that are ready now, which make the other requests of this turn of the loop.
            self._running = loop.create_task(self._run())
        elif self._asked is not None:
            self._asked.set()
        try:
            return await future
        finally:
            del self._futures[number]
            was_sent = self._new.pop(number, None) is None
            if was_sent and future.cancelled():
                self._dropped.append(number)

    async def wait_idle(self) -> None:
        """Return when the generator is in no call, such as one whose last requests were cancelled."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    async def _run(self) -> None:
        """Answer until nobody waits for an answer."""
        try:
            while self._futures:
                await self._gather()
                requests, self._new = list(self._new.values()), {}
                dropped, self._dropped = self._dropped, []
                answers = await self._call(requests, dropped)
                self._hand_over(answers)
                # Episodes whose tools answer at once make their next requests here.
                await asyncio.sleep(0)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._running = self._asked = None

    async def _gather(self) -> None:
        """Wait for requests of the episodes that are with their tools, if the generator gains by it."""
        if self._generator.can_advance or self._asked is None:
            return
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _WAIT_SHARE * self._last_s
        while len(self._new) < self._num_episodes and loop.time() < end_s:
            self._asked.clear()
            timer = loop.call_at(end_s, self._asked.set)
            await self._asked.wait()
            timer.cancel()

    async def _call(self, requests: Sequence[SampleRequest], dropped: Sequence[int]) -> list[SampleAnswer]:
        def advance() -> list[SampleAnswer]:
            return self._generator.advance(requests, dropped)

        def generate() -> list[SampleAnswer]:
            prompts, params = prompts_of_groups(groups_of(requests))
            answers = self._generator.generate(prompts, params) if requests else []
            completions = completions_of(self._generator, answers, params)
            return [SampleAnswer(r.number, c) for r, c in zip(requests, completions, strict=True)]

        begun_s = time.perf_counter()
        with self._waits.track("generation", f"turns of {len(self._futures)} episodes"):
            answers = await self._thread.run(advance if self._generator.can_advance else generate)
        self._last_s = time.perf_counter() - begun_s
        self._clock.add("generate", self._last_s)
        return answers

    def _hand_over(self, answers: Sequence[SampleAnswer]) -> None:
        for answer in answers:
            future = self._futures.get(answer.number)
            if future is None or future.done():
                continue  # it was dropped meanwhile
            if answer.completion is None:
                future.set_exception(RefusedError(answer.refusal))
            else:
                future.set_result(answer.completion)

    def _fail(self, error: BaseException) -> None:
        """Let all requests fail; an interrupt cancels them."""
        self._new, self._dropped = {}, []
        for future in self._futures.values():
            if not future.done() and isinstance(error, Exception):
                future.set_exception(error)
            elif not future.done():
                future.cancel()
