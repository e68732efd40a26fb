"""Engines that are only modelled, made for speed: a timer for each answer's end, and none for its tokens.

A modelled token stands for a block of real ones, which costs the pipeline and the fleet less and is all the
same to them.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl.rollout.engine import InferenceServer, ServerSpec, TokenChunk
from verl.rollout.pool.inference_pool import OnUpdate
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.types import WeightChunk

TOKEN, VOCABULARY = 7, 10
# An answer counts as complete if less than this is left of its last token.
_ROUNDING = 1e-6
# Engines are asked every two seconds whether they are well. One that takes its time is asked less often.
_CHECK_S = 3600.0
# Rounds of the loop in which what engines send comes to the fleet.
_DELIVERY = 3


@dataclass(frozen=True)
class Pace:
    """Seconds that an engine takes, for a step of `base_s + answer_s * answers + token_s * tokens in its
    cache`.

    Attributes:
        base_s: of each step, to read the weights.
        answer_s: of each step for each answer.
        token_s: of each step for each token in the cache.
        prefill_s: for a token that is read into the cache, in which nothing is sampled.
        slots: answers at a time.
        load_s: from pause to the new weights.
        switch_s: to give the device memory to training, and again to take it back.
    """

    base_s: float = 8e-3
    answer_s: float = 4e-5
    token_s: float = 2.5e-8
    prefill_s: float = 4e-5
    slots: int = 32
    load_s: float = 2.0
    switch_s: float = 2.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of answers, log-normal.

    Attributes:
        mean: of those that are not cut off.
        sigma: of their logarithm; 0: all are equal.
        longest: where they are cut off.
        prompt: tokens of a prompt.
        block: real tokens that one modelled token stands for.
        seed: of the lengths.
    """

    mean: float = 4000.0
    sigma: float = 1.0
    longest: int = 32_000
    prompt: int = 512
    block: int = 128
    seed: int = 0

    def of_group(self, number: int, samples: int) -> list[float]:
        """Of the answers to a prompt; the same in every run."""
        normal = np.random.default_rng((self.seed, number)).standard_normal(samples)
        lengths = self.mean * np.exp(self.sigma * normal - self.sigma**2 / 2)
        return np.clip(lengths, 1, self.longest).tolist()

    @property
    def average(self) -> float:
        """Mean of what is sampled."""
        if not self.sigma:
            return min(self.mean, self.longest)
        cut = math.log(self.longest / self.mean) / self.sigma
        below, above = _normal(cut - self.sigma / 2), 1 - _normal(cut + self.sigma / 2)
        return self.mean * below + self.longest * above

    def blocks(self, tokens: float) -> int:
        """Modelled tokens of an answer or a prompt."""
        return math.ceil(tokens / self.block)


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@dataclass
class Totals:
    """Sums over all engines and groups since the start.

    Attributes:
        decoded: tokens that engines sampled.
        trained: of these, in batches.
        thrown: of these, thrown away.
        prefilled: tokens that were read into caches.
        slot_s: seconds of slots in which an answer was sampled or read.
        training_s: seconds of training.
    """

    decoded: float = 0.0
    trained: float = 0.0
    thrown: float = 0.0
    prefilled: float = 0.0
    slot_s: float = 0.0
    training_s: float = 0.0


@dataclass
class World:
    """What the engines of a run have in common.

    Attributes:
        pace: of each.
        lengths: of answers.
        samples: answers to a prompt.
        totals: what was done.
        of_group: tokens that were sampled for a group, by its number, while it is neither trained on nor
            dropped.
        on_update: what becomes of answers that are sampled when weights come.
        parts: of answers that were cut, and go on: the tokens of their last block, which is not complete.
        engines: all of them.
    """

    pace: Pace
    lengths: Lengths
    samples: int
    on_update: OnUpdate = "keep"
    totals: Totals = field(default_factory=Totals)
    of_group: Counter[int] = field(default_factory=Counter)
    parts: dict[tuple[int, int], float] = field(default_factory=dict)
    engines: list[ModelledEngine] = field(default_factory=list)
    _drawn: dict[int, list[float]] = field(default_factory=dict)

    def engine(self, spec: ServerSpec) -> ModelledEngine:
        """Makes an engine, as a fleet wants to have it done."""
        self.engines.append(ModelledEngine(spec, self))
        return self.engines[-1]

    def tokens(self, group: int) -> list[float]:
        """Lengths of the answers of a group."""
        if group not in self._drawn:
            self._drawn[group] = self.lengths.of_group(group, self.samples)
        return self._drawn[group]

    def forget(self, group: int) -> float:
        """A group is done with; the tokens that were sampled for it."""
        for number in range(self.samples):
            self.parts.pop((group, number), None)
        self._drawn.pop(group, None)
        return self.of_group.pop(group, 0.0)

    async def deliver(self) -> None:
        """Engines send what they have sampled so far, as they do all the time; here it is done when it will
        be asked for.
        """
        for engine in self.engines:
            engine.send()
        for _ in range(_DELIVERY):
            await asyncio.sleep(0)

    def advance(self) -> None:
        """The totals hold all that was sampled until now."""
        for engine in self.engines:
            engine.advance()


class _Work:
    """An answer that an engine samples.

    Attributes:
        group: it is of.
        number: of the answer.
        start: progress of the engine when it began.
        had: tokens of the answer before this.
        left: tokens that it had to sample then.
        sent: blocks of the answer that are sent, or ready to be.
        ready: blocks that are to be sent, with the version of the weights that sampled them.
        is_over: nothing comes after these.
        woken: is set when something is to be sent.
    """

    __slots__ = ("group", "had", "is_over", "left", "number", "ready", "sent", "start", "woken")

    def __init__(self, group: int, number: int, start: float, had: float, left: float, sent: int) -> None:
        self.group, self.number, self.start, self.had, self.left, self.sent = (
            group,
            number,
            start,
            had,
            left,
            sent,
        )
        self.ready: list[tuple[int, int]] = []
        self.is_over = False
        self.woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Something is to be sent."""
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)


class ModelledEngine(InferenceServer):
    """An engine that takes the time of its world's pace; all its answers go on at the same speed, which hangs
    on how many there are.

    While `n` answers with `k` tokens in the cache are sampled, `x` further tokens of each take
    `(base_s + answer_s n + token_s k) x + token_s n x^2 / 2` seconds: with each step the cache has `n` tokens
    more.
    """

    transports = ("shm",)
    position_seeded = True

    def __init__(self, spec: ServerSpec, world: World) -> None:
        super().__init__(spec)
        self._world, self._pace, self._block = world, world.pace, world.lengths.block
        self._prompt_blocks = world.lengths.blocks(world.lengths.prompt)
        self._works: dict[_Work, None] = {}
        self._ends: list[tuple[float, int, _Work]] = []
        self._prompts: Counter[int] = Counter()
        self._progress = self._cached = self._prefill_s = self._now_s = 0.0
        self._num_works = self._version = 0
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """See `InferenceServer.open`."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """See `InferenceServer.close`."""
        self._is_paused = True
        self._plan()

    async def check(self) -> None:
        """See `InferenceServer.check`."""
        await asyncio.sleep(_CHECK_S)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        """See `InferenceServer.sample`."""
        work = self._begin(params.seed, number, len(prompt_ids) - self._prompt_blocks)
        try:
            is_over = False
            while not is_over:
                if not (work.ready or work.is_over):
                    work.woken = self._loop.create_future()
                    await work.woken
                is_over, ready = work.is_over, work.ready or [(self._version, 0)]
                work.ready = []
                for i, (version, blocks) in enumerate(ready, 1):
                    yield TokenChunk(
                        [TOKEN] * blocks, None, "stop" if is_over and i == len(ready) else None, version
                    )
        finally:
            self._leave(work)

    async def pause(self) -> None:
        """See `InferenceServer.pause`."""
        self.advance()
        self._is_paused = True
        self._plan()

    async def begin_update(self) -> None:
        """See `InferenceServer.begin_update`."""

    async def load(self, part: WeightChunk) -> None:
        """See `InferenceServer.load`."""
        await asyncio.sleep(self._pace.load_s)

    async def end_update(self, version: int) -> str:
        """See `InferenceServer.end_update`."""
        for work in self._works:
            self._note(work)
        self._version = version
        return f"print-{version}"

    async def resume(self) -> None:
        """See `InferenceServer.resume`; here caches are kept."""
        self.advance()
        self._is_paused = False
        self._plan()

    async def sleep(self) -> None:
        """See `InferenceServer.sleep`."""
        await asyncio.sleep(self._pace.switch_s)

    async def wake(self) -> None:
        """See `InferenceServer.wake`."""
        await asyncio.sleep(self._pace.switch_s)

    def send(self) -> None:
        """All answers send what they have."""
        self.advance()
        for work in self._works:
            self._note(work)
            if work.ready:
                work.wake()

    def advance(self) -> None:
        """Brings all that is counted to the present time."""
        now_s = self._loop.time()
        passed_s, self._now_s = now_s - self._now_s, now_s
        num = len(self._works)
        if self._is_paused or not num or not passed_s:
            return
        self._world.totals.slot_s += num * passed_s
        reading_s = min(passed_s, self._prefill_s)
        self._prefill_s -= reading_s
        passed_s -= reading_s
        step_s, growth_s = self._step_s(), self._pace.token_s * num
        tokens = 2 * passed_s / (step_s + math.sqrt(step_s * step_s + 2 * growth_s * passed_s))
        self._progress += tokens
        self._cached += num * tokens

    def _step_s(self) -> float:
        return self._pace.base_s + self._pace.answer_s * len(self._works) + self._pace.token_s * self._cached

    def _begin(self, group: int, number: int, blocks: int) -> _Work:
        """An answer of which there are so many blocks."""
        self.advance()
        world, prompt = self._world, self._world.lengths.prompt
        part = world.parts.pop((group, number), 0.0)
        had = blocks * self._block + part
        left = world.tokens(group)[number] - had
        work = _Work(group, number, self._progress, had, left, blocks)
        read = had + (prompt if not self._prompts[group] else 0)
        self._prefill_s += read * self._pace.prefill_s
        world.totals.prefilled += read
        self._prompts[group] += 1
        self._cached += prompt + had
        self._works[work] = None
        self._num_works += 1
        heapq.heappush(self._ends, (self._progress + left, self._num_works, work))
        self._plan()
        return work

    def _leave(self, work: _Work) -> None:
        """An answer is complete, or was cut."""
        self.advance()
        del self._works[work]
        tokens = min(work.left, self._progress - work.start)
        self._cached -= self._world.lengths.prompt + work.had + tokens
        self._world.of_group[work.group] += tokens
        self._world.totals.decoded += tokens
        if self._world.on_update == "recompute" and not work.is_over:
            self._world.parts[work.group, work.number] = max(0.0, work.had + tokens - work.sent * self._block)
        self._prompts[work.group] -= 1
        if not self._prompts[work.group]:
            del self._prompts[work.group]
        if not self._works:
            self._progress = self._cached = 0.0  # rounding does not add up
            self._ends.clear()
        self._plan()

    def _note(self, work: _Work) -> None:
        """What was sampled of an answer since the last time is of the present version."""
        tokens = work.had + min(work.left, self._progress - work.start)
        blocks = self._world.lengths.blocks(tokens) if work.is_over else int(tokens / self._block)
        if blocks > work.sent:
            work.ready.append((self._version, blocks - work.sent))
            work.sent = blocks

    def _plan(self) -> None:
        """Sets the timer to the next end of an answer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and self._ends[0][2] not in self._works:
            heapq.heappop(self._ends)
        if self._is_paused or not self._ends:
            return
        tokens = max(0.0, self._ends[0][0] - self._progress)
        seconds = (
            self._prefill_s
            + self._step_s() * tokens
            + self._pace.token_s * len(self._works) * tokens * tokens / 2
        )
        self._timer = self._loop.call_at(self._now_s + seconds, self._end)

    def _end(self) -> None:
        """The next answer has come to its end, and those of the same length."""
        self._timer = None
        self.advance()
        self._progress = max(self._progress, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self._progress + _ROUNDING:
            work = heapq.heappop(self._ends)[2]
            if work in self._works:
                work.is_over = True
                self._note(work)
                work.wake()
        self._plan()
