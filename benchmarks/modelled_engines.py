"""Modelled inference engines on virtual time, made for speed: one timer for each answer, none for tokens.

A modelled token stands for a block of real ones. For the pipeline and the inference pool this changes nothing
but the number of tokens, and makes the simulation faster.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from verl.rollout.inference_server import InferenceServer, ServerSpec, TokenChunk
from verl.rollout.pool.inference_pool import OnUpdate
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.types import WeightChunk

TOKEN, VOCABULARY = 7, 10
# An answer counts as complete if less than this part of a token is left.
_ROUNDING = 1e-6
# The pool checks the health of engines every two seconds, but waits for the last answer before: a slow answer
# makes checks rare.
_CHECK_S = 3600.0
# Turns of the event loop until chunks that engines send have reached the pool.
_DELIVERY_TURNS = 3


@dataclass(frozen=True)
class Pace:
    """Times of an engine; a decoding step takes base_s + answer_s * answers + token_s * tokens in the cache.

    Attributes:
        base_s: of a step, to read the weights.
        answer_s: of a step, for each answer.
        token_s: of a step, for each token in the cache.
        prefill_s: for each token of a prefill, during which the engine does not decode.
        slots: answers that an engine decodes at the same time.
        load_s: from the pause until the new weights are loaded.
        switch_s: to free the device memory for training, and again to take it back.
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
    """Lengths of answers in tokens, log-normally distributed.

    Attributes:
        mean: before truncation.
        sigma: standard deviation of the logarithm; 0: all answers are equally long.
        longest: longer answers are truncated to this length.
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
        """Lengths of the answers to a prompt; equal in every run."""
        normal = np.random.default_rng((self.seed, number)).standard_normal(samples)
        lengths = self.mean * np.exp(self.sigma * normal - self.sigma**2 / 2)
        return np.clip(lengths, 1, self.longest).tolist()

    @property
    def average(self) -> float:
        """Mean length after truncation."""
        if not self.sigma:
            return min(self.mean, self.longest)
        cut = math.log(self.longest / self.mean) / self.sigma
        below, above = _normal_cdf(cut - self.sigma / 2), 1 - _normal_cdf(cut + self.sigma / 2)
        return self.mean * below + self.longest * above

    def blocks(self, tokens: float) -> int:
        """Number of modelled tokens of an answer or a prompt."""
        return math.ceil(tokens / self.block)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@dataclass
class Totals:
    """Sums over all engines and groups since the start.

    Attributes:
        decoded: tokens that engines sampled.
        trained: of these, trained on.
        thrown: of these, thrown away.
        prefilled: tokens that were prefilled.
        slot_s: busy seconds of all slots, in decoding or prefill.
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
    """State that the engines of a run share.

    Attributes:
        pace: of each.
        lengths: of answers.
        samples: answers to a prompt.
        totals: sums since the start.
        sampled: tokens sampled for a group, by its number, until it is trained on or dropped.
        on_update: rule for answers in flight when new weights come.
        partial_blocks: (group, answer) -> tokens of the last, incomplete block of an answer that was
            interrupted and will be resumed.
        engines: of the run.
    """

    pace: Pace
    lengths: Lengths
    samples: int
    on_update: OnUpdate = "keep"
    totals: Totals = field(default_factory=Totals)
    sampled: Counter[int] = field(default_factory=Counter)
    partial_blocks: dict[tuple[int, int], float] = field(default_factory=dict)
    engines: list[ModelledEngine] = field(default_factory=list)
    _drawn: dict[int, list[float]] = field(default_factory=dict)

    def engine(self, spec: ServerSpec) -> ModelledEngine:
        """Make an engine; the factory of an `InferencePool`."""
        self.engines.append(ModelledEngine(spec, self))
        return self.engines[-1]

    def tokens(self, group: int) -> list[float]:
        """Lengths of the answers of a group."""
        if group not in self._drawn:
            self._drawn[group] = self.lengths.of_group(group, self.samples)
        return self._drawn[group]

    def forget(self, group: int) -> float:
        """Forget a group that was trained on or dropped; return the tokens that were sampled for it."""
        for number in range(self.samples):
            self.partial_blocks.pop((group, number), None)
        self._drawn.pop(group, None)
        return self.sampled.pop(group, 0.0)

    async def deliver(self) -> None:
        """Let all engines send what they have sampled.

        Real engines do so all the time; here it is done only before something depends on it.
        """
        for engine in self.engines:
            engine.send()
        for _ in range(_DELIVERY_TURNS):
            await asyncio.sleep(0)

    def advance(self) -> None:
        """Bring the totals up to the present time."""
        for engine in self.engines:
            engine.advance()


class _RunningAnswer:
    """An answer that an engine decodes.

    Attributes:
        group: number of its group.
        number: of the answer in its group.
        start: progress of the engine when the answer began there.
        had: tokens of the answer from other engines or earlier tries.
        left: tokens that were still missing when it began.
        sent: blocks of the answer that were sent or are in `ready`.
        ready: (version of the weights, blocks) to be sent.
        is_over: the answer is complete.
        woken: future that ends when there is something to send.
    """

    __slots__ = ("group", "had", "is_over", "left", "number", "ready", "sent", "start", "woken")

    def __init__(self, group: int, number: int, *, start: float, had: float, left: float, sent: int) -> None:
        self.group, self.number, self.start = group, number, start
        self.had, self.left, self.sent = had, left, sent
        self.ready: list[tuple[int, int]] = []
        self.is_over = False
        self.woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the stream of the answer: there is something to send."""
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)


class ModelledEngine(InferenceServer):
    """An engine that only takes the time of its world's pace.

    All its answers proceed at the same speed, which depends on their number. With `n` answers and `k` tokens
    in the cache, `x` further tokens of each answer take `(base_s + answer_s n + token_s k) x + token_s n x^2
    / 2` seconds: each step adds `n` tokens to the cache.
    """

    transports = ("shm",)
    position_seeded = True

    def __init__(self, spec: ServerSpec, world: World) -> None:
        super().__init__(spec)
        self._world, self._pace, self._block = world, world.pace, world.lengths.block
        self._prompt_blocks = world.lengths.blocks(world.lengths.prompt)
        self._running: dict[_RunningAnswer, None] = {}
        # Heap of (progress at which an answer ends, order of arrival, answer).
        self._ends: list[tuple[float, int, _RunningAnswer]] = []
        self._prompts: Counter[int] = Counter()
        self._progress = self._cached = self._prefill_s = self._now_s = 0.0
        self._num_begun = self._version = 0
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None

    @override
    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()

    @override
    async def close(self) -> None:
        self._is_paused = True
        self._plan()

    @override
    async def check(self) -> None:
        await asyncio.sleep(_CHECK_S)

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        answer = self._begin(params.seed, params.sample_index, len(prompt_ids) - self._prompt_blocks)
        try:
            is_over = False
            while not is_over:
                if not (answer.ready or answer.is_over):
                    answer.woken = self._loop.create_future()
                    await answer.woken
                is_over, ready = answer.is_over, answer.ready or [(self._version, 0)]
                answer.ready = []
                for i, (version, blocks) in enumerate(ready, 1):
                    yield TokenChunk(
                        [TOKEN] * blocks, None, "stop" if is_over and i == len(ready) else None, version
                    )
        finally:
            self._leave(answer)

    @override
    async def pause(self) -> None:
        self.advance()
        self._is_paused = True
        self._plan()

    @override
    async def begin_update(self) -> None:
        pass

    @override
    async def load(self, part: WeightChunk) -> None:
        await asyncio.sleep(self._pace.load_s)

    @override
    async def end_update(self, version: int) -> str:
        for answer in self._running:
            self._note(answer)
        self._version = version
        return f"print-{version}"

    @override
    async def resume(self) -> None:
        # Caches are kept.
        self.advance()
        self._is_paused = False
        self._plan()

    @override
    async def sleep(self) -> None:
        await asyncio.sleep(self._pace.switch_s)

    @override
    async def wake(self) -> None:
        await asyncio.sleep(self._pace.switch_s)

    def send(self) -> None:
        """Send all tokens that were sampled so far."""
        self.advance()
        for answer in self._running:
            self._note(answer)
            if answer.ready:
                answer.wake()

    def advance(self) -> None:
        """Bring progress, cache and totals up to the present time."""
        now_s = self._loop.time()
        passed_s, self._now_s = now_s - self._now_s, now_s
        num = len(self._running)
        if self._is_paused or not num or not passed_s:
            return
        self._world.totals.slot_s += num * passed_s
        prefill_s = min(passed_s, self._prefill_s)
        self._prefill_s -= prefill_s
        passed_s -= prefill_s
        step_s, growth_s = self._step_s(), self._pace.token_s * num
        tokens = 2 * passed_s / (step_s + math.sqrt(step_s * step_s + 2 * growth_s * passed_s))
        self._progress += tokens
        self._cached += num * tokens

    def _step_s(self) -> float:
        return (
            self._pace.base_s + self._pace.answer_s * len(self._running) + self._pace.token_s * self._cached
        )

    def _begin(self, group: int, number: int, blocks: int) -> _RunningAnswer:
        """Start an answer that already has some blocks."""
        self.advance()
        world, prompt = self._world, self._world.lengths.prompt
        partial = world.partial_blocks.pop((group, number), 0.0)
        had = blocks * self._block + partial
        left = world.tokens(group)[number] - had
        answer = _RunningAnswer(group, number, start=self._progress, had=had, left=left, sent=blocks)
        read = had + (prompt if not self._prompts[group] else 0)
        self._prefill_s += read * self._pace.prefill_s
        world.totals.prefilled += read
        self._prompts[group] += 1
        self._cached += prompt + had
        self._running[answer] = None
        self._num_begun += 1
        heapq.heappush(self._ends, (self._progress + left, self._num_begun, answer))
        self._plan()
        return answer

    def _leave(self, answer: _RunningAnswer) -> None:
        """Remove an answer that is complete or was interrupted."""
        self.advance()
        del self._running[answer]
        tokens = min(answer.left, self._progress - answer.start)
        self._cached -= self._world.lengths.prompt + answer.had + tokens
        self._world.sampled[answer.group] += tokens
        self._world.totals.decoded += tokens
        if self._world.on_update == "recompute" and not answer.is_over:
            self._world.partial_blocks[answer.group, answer.number] = max(
                0.0, answer.had + tokens - answer.sent * self._block
            )
        self._prompts[answer.group] -= 1
        if not self._prompts[answer.group]:
            del self._prompts[answer.group]
        if not self._running:
            self._progress = self._cached = 0.0  # so that rounding errors do not add up
            self._ends.clear()
        self._plan()

    def _note(self, answer: _RunningAnswer) -> None:
        """Make blocks that were sampled since the last call ready to send, with the present version."""
        tokens = answer.had + min(answer.left, self._progress - answer.start)
        blocks = self._world.lengths.blocks(tokens) if answer.is_over else int(tokens / self._block)
        if blocks > answer.sent:
            answer.ready.append((self._version, blocks - answer.sent))
            answer.sent = blocks

    def _plan(self) -> None:
        """Set the timer to the next end of an answer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and self._ends[0][2] not in self._running:
            heapq.heappop(self._ends)
        if self._is_paused or not self._ends:
            return
        tokens = max(0.0, self._ends[0][0] - self._progress)
        seconds = (
            self._prefill_s
            + self._step_s() * tokens
            + self._pace.token_s * len(self._running) * tokens * tokens / 2
        )
        self._timer = self._loop.call_at(self._now_s + seconds, self._end)

    def _end(self) -> None:
        """End the next answer, and all that end at the same progress."""
        self._timer = None
        self.advance()
        self._progress = max(self._progress, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self._progress + _ROUNDING:
            answer = heapq.heappop(self._ends)[2]
            if answer in self._running:
                answer.is_over = True
                self._note(answer)
                answer.wake()
        self._plan()
