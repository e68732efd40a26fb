"""Modelled engines on virtual time: they behave as real ones, with random faults from a seed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from tests.simulation.faults import Faults
from tests.simulation.modelled_policy import (
    END,
    VOCABULARY,
    next_state,
    problem_of,
    sample_token,
    state_of,
)
from verl.rollout.inference_server import EngineError, InferenceServer, ServerSpec, TokenChunk
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Completion, FinishReason, SamplingParams
from verl.weight_sync.types import TensorInfo, WeightChunk

T = TypeVar("T")
_NUM_CHUNKS = 2


@dataclass(frozen=True)
class Pace:
    """Durations of an engine's work in seconds, and its capacity.

    Attributes:
        start_s: from its start to its first reply.
        prefill_s: for a prompt.
        step_s: for a token.
        chunk_tokens: tokens that are sent together.
        command_s: for a command.
        load_s: for a chunk of the weights.
        slots: answers at a time; further ones wait.
        mean_tokens: mean length of an answer without a limit.
    """

    start_s: float = 20.0
    prefill_s: float = 0.05
    step_s: float = 0.02
    chunk_tokens: int = 8
    command_s: float = 0.01
    load_s: float = 0.5
    slots: int = 64
    mean_tokens: int = 20


@dataclass
class World:
    """State that the engines of a run share.

    Attributes:
        faults: that happen.
        pace: of all engines.
        position_seeded: as of `InferenceServer`.
        reports_versions: engines send with each chunk the version that sampled it.
        sends_end_apart: the finish reason comes in a chunk of its own, after the last tokens.
        breaches: forbidden calls of engines, as messages.
        oldest: no engine may sample with a lower version any more.
        num_processes: started and not ended.
    """

    faults: Faults = field(default_factory=Faults.none)
    pace: Pace = field(default_factory=Pace)
    position_seeded: bool = True
    reports_versions: bool = True
    sends_end_apart: bool = False
    breaches: list[str] = field(default_factory=list)
    oldest: int = 0
    num_processes: int = 0
    _memory: str = ""
    _num_writes: int = 0

    def engine(self, spec: ServerSpec) -> SimulatedEngine:
        """Create an engine, as a `MakeEngine` of a pool."""
        return SimulatedEngine(spec, self)

    def specs(self, count: int, *, timeout_s: float = 10.0) -> list[ServerSpec]:
        """Specs of the first engines."""
        return [
            ServerSpec(f"e{i}", "unused", timeout_s=timeout_s, start_timeout_s=60.0) for i in range(count)
        ]

    def write(self, version: int) -> WeightSnapshot:
        """Write a version of the policy, as `WeightPublisher` does; the memory of the one before is freed."""
        self._num_writes += 1
        self._memory = f"weights-{self._num_writes}"
        location = {"path": self._memory, "version": version}
        chunks = tuple(
            WeightChunk((TensorInfo(f"w{i}", (1,), "float32"),), "shm", location) for i in range(_NUM_CHUNKS)
        )
        return WeightSnapshot(version, chunks, None, f"print-{version}", 4 * _NUM_CHUNKS, 0.0, Path("unused"))

    def close(self) -> None:
        """Free the memory, as `WeightPublisher` does."""
        self._memory = ""

    def must(self, holds: bool, message: str) -> None:
        """Note a breach if a condition does not hold."""
        if not holds:
            self.breaches.append(message)

    def has_memory(self, chunk: WeightChunk) -> bool:
        """True if the memory of a chunk is not freed."""
        return chunk.location["path"] == self._memory

    def problem_of(
        self, answer: Completion, prompt: Sequence[int], params: SamplingParams, *, versions: tuple[int, int]
    ) -> str:
        """What is wrong with an answer, see `problem_of`."""
        return problem_of(
            answer,
            prompt,
            params,
            versions=versions,
            mean_tokens=self.pace.mean_tokens,
            position_seeded=self.position_seeded,
        )


@dataclass(eq=False)
class _Wait:
    """A call or stream that waits for its process.

    Attributes:
        future: True: its time has passed; False: it was interrupted.
        limit_s: longest silence.
        is_stream: a pause of the process interrupts it.
        timer: ends it; None: another event does.
    """

    future: asyncio.Future[bool]
    limit_s: float
    is_stream: bool
    timer: asyncio.TimerHandle | None = None


class _Server:
    """The process of an engine, which dies and hangs as a whole.

    Attributes:
        cause: why it has ended; "": it is running.
        weights: version that it has; below 0: torn weights; None: those that it was started with.
        loading: versions of the chunks of an update that has begun; None: no update has.
        busy: answers that have a slot.
        for_nobody: those of them that no client reads.
    """

    def __init__(self, name: str, world: World) -> None:
        world.num_processes += 1
        self.cause = ""
        self.is_hung = self.is_paused = self.is_asleep = False
        self.weights: int | None = None
        self.loading: list[int] | None = None
        self.busy = self.for_nobody = 0
        self._name, self._world = name, world
        self._loop = asyncio.get_running_loop()
        self._waits: dict[_Wait, None] = {}

    async def wait(self, seconds: float, limit_s: float, *, is_stream: bool = False) -> bool:
        """Wait for a duration; False if a stream was interrupted before.

        Raises:
            EngineError: the process has ended, or the limit has passed.
        """
        if self.cause:
            raise EngineError(self.cause)
        wait = _Wait(self._loop.create_future(), limit_s, is_stream)
        if self.is_hung or seconds > limit_s:
            wait.timer = self._loop.call_later(limit_s, self._time_out, wait)
        elif seconds < math.inf:
            wait.timer = self._loop.call_later(seconds, self._finish, wait, True)
        self._waits[wait] = None
        try:
            return await wait.future
        finally:
            del self._waits[wait]
            if wait.timer is not None:
                wait.timer.cancel()

    def wake(self) -> None:
        """Let all calls without a timer check again: a slot is free, or the process continues."""
        for wait in list(self._waits):
            if wait.timer is None:
                self._finish(wait, True)

    def pause(self) -> None:
        """Pause; streams send the tokens that they have."""
        self.is_paused = True
        for wait in list(self._waits):
            if wait.is_stream and not self.is_hung:
                self._finish(wait, False)

    def hang(self) -> None:
        """Answer nothing any more."""
        self.is_hung = True
        for wait in self._waits:
            self._set_timer(wait, min(wait.limit_s, 1e6), self._time_out, wait)

    def end(self, cause: str, *, is_late: bool = False) -> None:
        """End; if late, tokens that were sent still arrive for a while."""
        if self.cause:
            return
        self.cause = cause
        self._world.num_processes -= 1
        for wait in list(self._waits):
            if is_late and wait.is_stream and not self.is_hung:
                self._set_timer(wait, self._world.faults.random.uniform(0.0, 8.0), self._finish, wait, True)
            elif not wait.future.done():
                wait.future.set_exception(EngineError(cause))

    def _set_timer(self, wait: _Wait, seconds: float, call: Callable[..., None], *args: Any) -> None:
        if wait.timer is not None:
            wait.timer.cancel()
        wait.timer = self._loop.call_later(seconds, call, *args)

    def _finish(self, wait: _Wait, is_whole: bool) -> None:
        if not wait.future.done():
            wait.future.set_result(is_whole)

    def _time_out(self, wait: _Wait) -> None:
        if not wait.future.done():
            wait.future.set_exception(EngineError(f"{self._name} said nothing for {wait.limit_s:g} s"))


class SimulatedEngine(InferenceServer):
    """An engine of the modelled policy, in the time of the event loop, with the faults of its world."""

    transports = ("shm",)

    def __init__(self, spec: ServerSpec, world: World) -> None:
        super().__init__(spec)
        self.position_seeded = world.position_seeded
        self._world, self._pace, self._faults = world, world.pace, world.faults
        self._server: _Server | None = None

    @override
    async def open(self) -> None:
        name, limit_s, start_s = self.spec.name, self.spec.start_timeout_s, self._pace.start_s
        await asyncio.sleep(0.1 * start_s)  # checks the installed version
        server = self._server = _Server(name, self._world)
        fault = self._faults.draw("open")
        if fault == "kill":
            await asyncio.sleep(start_s * self._faults.random.random())
            server.end(f"{name} ended while it started")
        await server.wait(math.inf if fault == "hang" else self._time(fault, start_s, limit_s), limit_s)

    @override
    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            if self._faults.draw("close"):
                await asyncio.sleep(10.0)
            server.end(f"{self.spec.name} was closed")

    @override
    async def check(self) -> None:
        await self._command("check", self._pace.command_s, lambda server: None)

    @override
    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        server, fault = self._running, self._draw_fault("sample")
        is_ready = (
            server.weights is not None
            and server.weights >= 0
            and server.loading is None
            and not server.is_asleep
        )
        self._world.must(
            is_ready or bool(server.cause), f"{self.spec.name} was asked while it had no version whole"
        )
        while server.busy >= self._pace.slots or server.is_paused:
            await server.wait(math.inf, math.inf)
        server.busy += 1
        try:
            if fault == "twice":
                self._run_for_nobody(server)
            state, have, wait_s = state_of(prompt_ids), 0, self._time(fault, self._pace.prefill_s)
            while True:
                chunk, state, wait_s = await self._chunk(
                    server, params, state, params.max_tokens - have, wait_s
                )
                have += len(chunk.token_ids)
                if chunk.finish_reason and self._world.sends_end_apart:
                    yield replace(chunk, finish_reason=None)
                    await server.wait(self._pace.step_s, self.spec.timeout_s)
                    chunk = TokenChunk((), (), chunk.finish_reason)
                if chunk.token_ids or chunk.finish_reason:
                    yield chunk
                if chunk.finish_reason or fault == "lost":
                    break
        finally:
            self._free_slot(server)
        if fault == "lost":
            raise EngineError(f"{self.spec.name}: the connection was reset by the peer")

    @override
    async def pause(self) -> None:
        await self._command("pause", self._pace.command_s, _Server.pause)

    @override
    async def resume(self) -> None:
        def go_on(server: _Server) -> None:
            self._world.must(
                server.weights is None or server.weights >= 0,
                f"{self.spec.name} was to go on with torn weights",
            )
            server.is_paused = False
            server.wake()

        await self._command("resume", self._pace.command_s, go_on)

    @override
    async def begin_update(self) -> None:
        def begin(server: _Server) -> None:
            self._world.must(
                server.is_paused and not server.is_asleep,
                f"{self.spec.name} was given weights while it sampled or slept",
            )
            server.loading = []

        await self._command("begin_update", self._pace.command_s, begin)

    @override
    async def load(self, chunk: WeightChunk) -> None:
        def check_memory() -> None:
            self._world.must(
                self._world.has_memory(chunk), f"{self.spec.name} read weights whose memory was given back"
            )

        def take(server: _Server, fault: str) -> None:
            check_memory()
            if server.loading is None:
                raise EngineError(f"{self.spec.name}: need begin_update before weights are loaded")
            server.loading.append(-2 if fault == "torn" else chunk.location["version"])
            server.weights = -1  # neither the old nor the new weights

        check_memory()
        await self._command("load", self._pace.load_s, take)

    @override
    async def end_update(self, version: int) -> str:
        def end(server: _Server, fault: str) -> str:
            versions, server.loading = server.loading, None
            if versions is None:
                raise EngineError(f"{self.spec.name}: need begin_update before end_update")
            is_whole = versions == [version] * _NUM_CHUNKS and fault != "torn"
            server.weights = version if is_whole else -3
            return f"print-{version}" if is_whole else f"torn-{version}"

        return await self._command("end_update", self._pace.command_s, end)

    @override
    async def sleep(self) -> None:
        def go_to_sleep(server: _Server) -> None:
            answers = server.busy - server.for_nobody
            self._world.must(not answers, f"{self.spec.name} was sent to sleep with {answers} answers")
            server.is_asleep, server.weights = True, None

        await self._command("sleep", self._pace.command_s, go_to_sleep)

    @override
    async def wake(self) -> None:
        def wake_up(server: _Server) -> None:
            server.is_asleep = False

        await self._command("wake", self._pace.command_s, wake_up)

    @property
    def _running(self) -> _Server:
        if self._server is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._server

    def _draw_fault(self, place: str) -> str:
        """Draw the fault at a place, and let it happen to the process."""
        fault = self._faults.draw(place)
        if fault in ("kill", "late"):
            self._running.end(f"{self.spec.name} was killed at {place}", is_late=fault == "late")
        elif fault == "hang":
            self._running.hang()
        return fault

    def _time(self, fault: str, seconds: float, limit_s: float | None = None) -> float:
        """Duration of a call or stream with a fault."""
        if fault == "silence":
            return math.inf
        longest_s = 0.9 * (limit_s or self.spec.timeout_s)
        return (
            min(longest_s, seconds * self._faults.random.choice((3.0, 30.0, 300.0)))
            if fault == "slow"
            else seconds
        )

    async def _command(self, place: str, seconds: float, do: Callable[..., T]) -> T:
        """Run a command in the process."""
        server, fault = self._running, self._draw_fault(place)
        await server.wait(self._time(fault, seconds), self.spec.timeout_s)
        if fault == "unheard":
            raise EngineError(f"{self.spec.name} cannot be reached for {place}")
        done = do(server, fault) if place in ("load", "end_update") else do(server)
        if fault == "lost":
            raise EngineError(f"{self.spec.name} broke off its answer to {place}")
        return done

    async def _chunk(
        self, server: _Server, params: SamplingParams, state: int, room: int, first_s: float
    ) -> tuple[TokenChunk, int, float]:
        """The next tokens, possibly none; the hash of the row after them; prefill seconds still to come."""
        while server.is_paused:
            await server.wait(math.inf, math.inf)
        pace, fault, version = self._pace, self._draw_fault("chunk"), server.weights
        stale = f"{self.spec.name} sampled with version {version} after {self._world.oldest} was everywhere"
        self._world.must(version is None or version >= self._world.oldest or bool(server.cause), stale)
        ids: list[int] = []
        logprobs: list[float] = []
        states, seeds = [state], (params.seed, params.sample_index)
        while len(ids) < min(pace.chunk_tokens, room) and not (ids and ids[-1] == END):
            sampled = -9 if version is None else version
            token, logprob = sample_token(states[-1], *seeds, version=sampled, mean_tokens=pace.mean_tokens)
            ids.append(token)
            logprobs.append(logprob)
            states.append(next_state(states[-1], token))
        start_s, whole_s = server._loop.time(), self._time(fault, first_s + len(ids) * pace.step_s)
        # A silent stream stays silent until its time limit, even if the process pauses.
        if not await server.wait(whole_s, self.spec.timeout_s, is_stream=whole_s < math.inf):
            passed_s = server._loop.time() - start_s - first_s
            done = min(len(ids), max(0, int(passed_s / pace.step_s)))
            ids, logprobs = ids[:done], logprobs[:done]
        if fault == "lost":
            raise EngineError(f"{self.spec.name}: the connection was reset by the peer")
        reason: FinishReason | None = (
            "stop" if ids and ids[-1] == END else "length" if len(ids) == room else None
        )
        chunk = TokenChunk(ids, logprobs, reason, version if self._world.reports_versions else None)
        if fault == "garbage":
            chunk = self._garbage(chunk, room)
        return chunk, states[len(ids)], 0.0 if ids else first_s

    def _garbage(self, chunk: TokenChunk, room: int) -> TokenChunk:
        """A chunk that no policy can have sampled."""
        ids, logprobs, version = (
            list(chunk.token_ids) or [50],
            list(chunk.logprobs or ()) or [-1.0],
            chunk.version,
        )
        kinds = [
            TokenChunk([*ids[:-1], VOCABULARY], logprobs, chunk.finish_reason, version),
            TokenChunk([*ids[:-1], -1], logprobs, chunk.finish_reason, version),
            TokenChunk(ids, [*logprobs[:-1], math.nan], chunk.finish_reason, version),
            TokenChunk(ids, [*logprobs[:-1], 0.5], chunk.finish_reason, version),
            TokenChunk(ids, logprobs[:-1], chunk.finish_reason, version),
            TokenChunk([50] * (room + 1), [-1.0] * (room + 1), "length", version),
            TokenChunk(ids, logprobs, "abort", version),
            TokenChunk(["50"], [-1.0], None, version),  # type: ignore[list-item]
            TokenChunk(ids, logprobs, chunk.finish_reason, 10**6),
            TokenChunk(ids, logprobs, "length" if len(ids) < room else "abort", version),
        ]
        return self._faults.random.choice(kinds)

    def _run_for_nobody(self, server: _Server) -> None:
        """Run a request a second time, for no client."""
        server.busy, server.for_nobody = server.busy + 1, server.for_nobody + 1

        def leave() -> None:
            server.for_nobody -= 1
            self._free_slot(server)

        server._loop.call_later(self._pace.step_s * self._pace.mean_tokens, leave)

    def _free_slot(self, server: _Server) -> None:
        server.busy -= 1
        if server.busy == self._pace.slots - 1:
            server.wake()
