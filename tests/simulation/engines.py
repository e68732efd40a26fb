"""Engines that are only modelled, on virtual time: they do what engines are asked, and all that may go wrong
with it, by a seed.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from verl.rollout.engine import EngineError, InferenceServer, ServerSpec, TokenChunk
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Completion, FinishReason, SamplingParams
from verl.weight_sync.types import TensorInfo, WeightChunk

T = TypeVar("T")
VOCABULARY, END = 1000, 1
# Other tokens are from here on.
_FIRST_TOKEN = 10
_MASK = 2**64 - 1
# As the fleet numbers the rest of an answer on an engine whose random numbers begin anew.
_NUMBERS = 2**20
_NUM_PARTS = 2

# What may go wrong, and where.
# kill: the process ends, and so does all that is asked of it; late: the same, but what it has sent comes in
# for a while. hang: the process stops and says nothing any more; silence: one call or stream of it does.
# slow: it takes many times as long, but not too long.
# lost: it is done, but the answer never comes; unheard: it is not even done.
# garbage: a chunk that no policy gives; torn: some of the weights are not those that were sent.
# twice: a request is answered twice, once for nobody.
_COMMANDS = ("pause", "resume", "begin_update", "load", "end_update", "check", "sleep", "wake")
PLACES: Mapping[str, tuple[str, ...]] = {
    "kill": ("open", "sample", "chunk", *_COMMANDS),
    "late": ("chunk", *_COMMANDS),
    "hang": ("open", "sample", "chunk", *_COMMANDS),
    "silence": ("sample", "chunk", *_COMMANDS),
    "slow": ("open", "sample", "chunk", "close", *_COMMANDS),
    "lost": ("sample", "chunk", *_COMMANDS),
    "unheard": _COMMANDS,
    "garbage": ("chunk",),
    "torn": ("load", "end_update"),
    "twice": ("sample",),
}
HARMLESS = ("slow", "twice")


class Faults:
    """What goes wrong, and where: drawn anew at each place that an engine passes.

    Args:
        seed: of all that is drawn.
        rates: of each kind of `PLACES`, the chance at each place.
        most: faults after which all is well; the harmless ones do not count.

    Attributes:
        happened: how often, by kind and place.
    """

    def __init__(self, seed: int, rates: Mapping[str, float], *, most: int = 8) -> None:
        self.random = random.Random(seed)
        self.left = most
        self.happened: Counter[str] = Counter()
        self._by_place = {
            place: [(kind, rate) for kind, rate in rates.items() if place in PLACES[kind]]
            for place in {place for places in PLACES.values() for place in places}
        }
        self._chances = {place: sum(rate for _, rate in kinds) for place, kinds in self._by_place.items()}

    @classmethod
    def of(cls, seed: int, *, most: int = 8) -> Faults:
        """Some kinds of faults, some of them often: what one run has much of, another one has not at all."""
        rng = random.Random(seed)
        kinds = [kind for kind in PLACES if rng.random() < 0.5]
        return cls(seed, {kind: rng.choice((0.002, 0.01, 0.05)) for kind in kinds}, most=rng.randint(0, most))

    @classmethod
    def none(cls) -> Faults:
        """All is well."""
        return cls(0, {})

    def at(self, place: str) -> str:
        """What goes wrong here; nothing: ""."""
        draw = self.random.random()
        if draw >= self._chances[place]:
            return ""
        for kind, rate in self._by_place[place]:
            draw -= rate
            if draw < 0 and (kind in HARMLESS or self.left > 0):
                self.left -= kind not in HARMLESS
                self.happened[f"{kind} at {place}"] += 1
                return kind
        return ""


@dataclass(frozen=True)
class Pace:
    """How long an engine takes for what, in seconds, and how much it does at once.

    Attributes:
        start_s: from its start to its first answer.
        prefill_s: for a prompt.
        step_s: for a token.
        part_tokens: that come together.
        command_s: for a command.
        load_s: for a part of the weights; there are two.
        slots: answers at a time; further ones wait.
        end_in: tokens of an answer, on average, if there is room.
    """

    start_s: float = 20.0
    prefill_s: float = 0.05
    step_s: float = 0.02
    part_tokens: int = 8
    command_s: float = 0.01
    load_s: float = 0.5
    slots: int = 64
    end_in: int = 20


@dataclass
class World:
    """What the engines of a run have in common.

    Attributes:
        faults: that happen.
        pace: of all engines.
        seeds_by_place: see `InferenceServer`.
        tells_versions: engines say of each chunk which weights sampled it.
        ends_apart: why an answer ended comes after its last tokens.
        breaches: what engines were asked that they must never be asked, in words.
        oldest: version below which none may sample any more, where it is known.
        num_processes: that were started and have not ended.
    """

    faults: Faults = field(default_factory=Faults.none)
    pace: Pace = field(default_factory=Pace)
    position_seeded: bool = True
    tells_versions: bool = True
    ends_apart: bool = False
    breaches: list[str] = field(default_factory=list)
    oldest: int = 0
    num_processes: int = 0
    _memory: str = ""
    _writes: int = 0

    def engine(self, spec: ServerSpec) -> SimulatedEngine:
        """Makes an engine, as a fleet wants to have it done."""
        return SimulatedEngine(spec, self)

    def specs(self, count: int, *, timeout_s: float = 10.0) -> list[ServerSpec]:
        """Engines to begin with."""
        return [
            ServerSpec(f"e{i}", "unused", timeout_s=timeout_s, start_timeout_s=60.0) for i in range(count)
        ]

    def write(self, version: int) -> WeightSnapshot:
        """Write a version of the policy, as `WeightPublisher` does; the memory of the one before is freed."""
        self._writes += 1
        self._memory = f"weights-{self._writes}"
        parts = tuple(
            WeightChunk(
                (TensorInfo(f"w{i}", (1,), "float32"),), "shm", {"path": self._memory, "version": version}
            )
            for i in range(_NUM_PARTS)
        )
        return WeightSnapshot(version, parts, None, f"print-{version}", 4 * _NUM_PARTS, 0.0, Path("unused"))

    def close(self) -> None:
        """As `WeightPublisher` is closed."""
        self._memory = ""

    def must(self, holds: bool, what: str) -> None:
        """Notes a breach where something does not hold."""
        if not holds:
            self.breaches.append(what)

    def is_memory(self, part: WeightChunk) -> bool:
        """Whether the memory of a part is not given back."""
        return part.location["path"] == self._memory


def state_of(row: Sequence[int]) -> int:
    """What a policy knows of a row."""
    state = 0
    for token in row:
        state = after(state, token)
    return state


def after(state: int, token: int) -> int:
    """The same with one more token."""
    return (state * 1_000_003 + token + 1) & _MASK


def drawn(state: int, seed: int, number: int, version: int, end_in: int) -> tuple[int, float]:
    """The token that a version of the policy samples after a row, and its logprob."""
    mixed = (
        state
        ^ (seed * 0x9E3779B97F4A7C15)
        ^ (number * 0xC2B2AE3D27D4EB4F)
        ^ ((version + 7) * 0x165667B19E3779F9)
    ) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    mixed ^= mixed >> 31
    token = END if mixed % end_in == 0 else _FIRST_TOKEN + (mixed >> 16) % (VOCABULARY - _FIRST_TOKEN)
    return token, -((mixed >> 40) % 5000 + 1) / 1000


def problem_of(
    answer: Completion,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    number: int,
    world: World,
    versions: tuple[int, int],
) -> str:
    """What is wrong with an answer, whatever engines and versions it went through; nothing: "".

    Args:
        answer: that came.
        prompt: that was asked.
        params: the same.
        number: of the answer among those to the prompt.
        world: in which.
        versions: the oldest and the newest that may have sampled it.
    """
    ids, logprobs, of = list(answer.token_ids), list(answer.logprobs or ()), list(answer.versions or ())
    if not ids or not len(ids) == len(logprobs) == len(of) or len(ids) > params.max_tokens:
        return f"{len(ids)} tokens, {len(logprobs)} logprobs, {len(of)} versions, at most {params.max_tokens}"
    if of != sorted(of) or answer.version != of[0] or of[0] < versions[0] or of[-1] > versions[1]:
        return f"versions {of} of an answer of version {answer.version}, allowed are {versions}"
    state, own = state_of(prompt), number
    for i, (token, logprob, version) in enumerate(zip(ids, logprobs, of, strict=True)):
        fits = drawn(state, params.seed, own, version, world.pace.end_in) == (token, logprob)
        if not fits and not world.position_seeded:
            own = number + _NUMBERS * i  # another engine goes on from here
            fits = drawn(state, params.seed, own, version, world.pace.end_in) == (token, logprob)
        if not fits:
            return f"token {i} is {token} with {logprob}, not what version {version} samples after {ids[:i]}"
        state = after(state, token)
    if END in ids[:-1]:
        return f"goes on after its end: {ids}"
    expected = "stop" if ids[-1] == END else "length" if len(ids) == params.max_tokens else "no end yet"
    return (
        ""
        if answer.finish_reason == expected
        else f"ended by {answer.finish_reason} after {len(ids)} tokens: {expected}"
    )


@dataclass(eq=False)
class _Wait:
    """A call or stream that waits for its process.

    Attributes:
        future: true: its time has passed; false: it was cut short.
        limit_s: longest silence.
        is_stream: it goes on with what there is when the process pauses.
        timer: that ends it; none: something else does.
    """

    future: asyncio.Future[bool]
    limit_s: float
    is_stream: bool
    timer: asyncio.TimerHandle | None = None


class _Server:
    """The process of an engine: what dies, hangs and forgets as a whole.

    Attributes:
        cause: why it is dead; nothing: it is not.
        weights: version that it has; below 0: torn ones; none: those it was started with.
        loading: versions of the parts of an update that has begun.
        busy: answers that have a slot.
        for_nobody: of these.
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
        """Whether that time has passed; a stream's may be cut short.

        Raises:
            EngineError: the process has ended, or nothing came within the limit.
        """
        if self.cause:
            raise EngineError(self.cause)
        wait = _Wait(self._loop.create_future(), limit_s, is_stream)
        if self.is_hung or seconds > limit_s:
            wait.timer = self._loop.call_later(limit_s, self._be_silent, wait)
        elif seconds < math.inf:
            wait.timer = self._loop.call_later(seconds, self._pass, wait, True)
        self._waits[wait] = None
        try:
            return await wait.future
        finally:
            del self._waits[wait]
            if wait.timer is not None:
                wait.timer.cancel()

    def wake(self) -> None:
        """All that waits looks again: there may be a slot, or the process goes on."""
        for wait in list(self._waits):
            if wait.timer is None:
                self._pass(wait, True)

    def pause(self) -> None:
        """Streams go on with the tokens that they have."""
        self.is_paused = True
        for wait in list(self._waits):
            if wait.is_stream and not self.is_hung:
                self._pass(wait, False)

    def hang(self) -> None:
        """Nothing comes from it any more."""
        self.is_hung = True
        for wait in self._waits:
            self._set_timer(wait, min(wait.limit_s, 1e6), self._be_silent, wait)

    def end(self, cause: str, *, is_late: bool = False) -> None:
        """It is dead; what its streams have sent may be on the way for a while."""
        if self.cause:
            return
        self.cause = cause
        self._world.num_processes -= 1
        for wait in list(self._waits):
            if is_late and wait.is_stream and not self.is_hung:
                self._set_timer(wait, self._world.faults.random.uniform(0.0, 8.0), self._pass, wait, True)
            elif not wait.future.done():
                wait.future.set_exception(EngineError(cause))

    def _set_timer(self, wait: _Wait, seconds: float, call: Callable[..., None], *args: Any) -> None:
        if wait.timer is not None:
            wait.timer.cancel()
        wait.timer = self._loop.call_later(seconds, call, *args)

    def _pass(self, wait: _Wait, is_whole: bool) -> None:
        if not wait.future.done():
            wait.future.set_result(is_whole)

    def _be_silent(self, wait: _Wait) -> None:
        if not wait.future.done():
            wait.future.set_exception(EngineError(f"{self._name} said nothing for {wait.limit_s:g} s"))


class SimulatedEngine(InferenceServer):
    """An engine whose answers are `drawn`, whose time is the loop's, and to which the faults of its world
    happen.
    """

    transports = ("shm",)

    def __init__(self, spec: ServerSpec, world: World) -> None:
        super().__init__(spec)
        self.position_seeded = world.position_seeded
        self._world, self._pace, self._faults = world, world.pace, world.faults
        self._server: _Server | None = None

    async def open(self) -> None:
        """See `InferenceServer.open`."""
        name, limit_s, start_s = self.spec.name, self.spec.start_timeout_s, self._pace.start_s
        await asyncio.sleep(0.1 * start_s)  # looks what is installed
        server = self._server = _Server(name, self._world)
        fate = self._faults.at("open")
        if fate == "kill":
            await asyncio.sleep(start_s * self._faults.random.random())
            server.end(f"{name} ended while it started")
        await server.wait(math.inf if fate == "hang" else self._time(fate, start_s, limit_s), limit_s)

    async def close(self) -> None:
        """See `InferenceServer.close`."""
        server, self._server = self._server, None
        if server is not None:
            if self._faults.at("close"):
                await asyncio.sleep(10.0)
            server.end(f"{self.spec.name} was closed")

    async def check(self) -> None:
        """See `InferenceServer.check`."""
        await self._command("check", self._pace.command_s, lambda server: None)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        """See `InferenceServer.sample`."""
        server, fate = self._asked, self._meet("sample")
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
            if fate == "twice":
                self._answer_nobody(server)
            state, have, wait_s = state_of(prompt_ids), 0, self._time(fate, self._pace.prefill_s)
            while True:
                chunk, state, wait_s = await self._chunk(
                    server, params, state, params.max_tokens - have, wait_s
                )
                have += len(chunk.token_ids)
                if chunk.finish_reason and self._world.ends_apart:
                    yield replace(chunk, finish_reason=None)
                    await server.wait(self._pace.step_s, self.spec.timeout_s)
                    chunk = TokenChunk((), (), chunk.finish_reason)
                if chunk.token_ids or chunk.finish_reason:
                    yield chunk
                if chunk.finish_reason or fate == "lost":
                    break
        finally:
            self._leave(server)
        if fate == "lost":
            raise EngineError(f"{self.spec.name}: the connection was reset by the peer")

    async def pause(self) -> None:
        """See `InferenceServer.pause`."""
        await self._command("pause", self._pace.command_s, _Server.pause)

    async def resume(self) -> None:
        """See `InferenceServer.resume`."""

        def go_on(server: _Server) -> None:
            self._world.must(
                server.weights is None or server.weights >= 0,
                f"{self.spec.name} was to go on with torn weights",
            )
            server.is_paused = False
            server.wake()

        await self._command("resume", self._pace.command_s, go_on)

    async def begin_update(self) -> None:
        """See `InferenceServer.begin_update`."""

        def begin(server: _Server) -> None:
            self._world.must(
                server.is_paused and not server.is_asleep,
                f"{self.spec.name} was given weights while it sampled or slept",
            )
            server.loading = []

        await self._command("begin_update", self._pace.command_s, begin)

    async def load(self, part: WeightChunk) -> None:
        """See `InferenceServer.load`."""

        def look() -> None:
            self._world.must(
                self._world.is_memory(part), f"{self.spec.name} read weights whose memory was given back"
            )

        def take(server: _Server, fate: str) -> None:
            look()
            if server.loading is None:
                raise EngineError(f"{self.spec.name}: need begin_update before weights are loaded")
            server.loading.append(-2 if fate == "torn" else part.location["version"])
            server.weights = -1  # neither the old nor the new ones

        look()
        await self._command("load", self._pace.load_s, take)

    async def end_update(self, version: int) -> str:
        """See `InferenceServer.end_update`."""

        def end(server: _Server, fate: str) -> str:
            parts, server.loading = server.loading, None
            if parts is None:
                raise EngineError(f"{self.spec.name}: need begin_update before end_update")
            is_whole = parts == [version] * _NUM_PARTS and fate != "torn"
            server.weights = version if is_whole else -3
            return f"print-{version}" if is_whole else f"torn-{version}"

        return await self._command("end_update", self._pace.command_s, end)

    async def sleep(self) -> None:
        """See `InferenceServer.sleep`."""

        def lie_down(server: _Server) -> None:
            asked = server.busy - server.for_nobody
            self._world.must(not asked, f"{self.spec.name} was sent to sleep with {asked} answers")
            server.is_asleep, server.weights = True, None

        await self._command("sleep", self._pace.command_s, lie_down)

    async def wake(self) -> None:
        """See `InferenceServer.wake`."""

        def get_up(server: _Server) -> None:
            server.is_asleep = False

        await self._command("wake", self._pace.command_s, get_up)

    @property
    def _asked(self) -> _Server:
        if self._server is None:
            raise EngineError(f"{self.spec.name} is closed")
        return self._server

    def _meet(self, place: str) -> str:
        """What goes wrong at a place; what happens to the process happens."""
        fate = self._faults.at(place)
        if fate in ("kill", "late"):
            self._asked.end(f"{self.spec.name} was killed at {place}", is_late=fate == "late")
        elif fate == "hang":
            self._asked.hang()
        return fate

    def _time(self, fate: str, seconds: float, limit_s: float | None = None) -> float:
        """How long something takes."""
        if fate == "silence":
            return math.inf
        longest_s = 0.9 * (limit_s or self.spec.timeout_s)
        return (
            min(longest_s, seconds * self._faults.random.choice((3.0, 30.0, 300.0)))
            if fate == "slow"
            else seconds
        )

    async def _command(self, place: str, seconds: float, do: Callable[..., T]) -> T:
        """Does something in the process."""
        server, fate = self._asked, self._meet(place)
        await server.wait(self._time(fate, seconds), self.spec.timeout_s)
        if fate == "unheard":
            raise EngineError(f"{self.spec.name} cannot be reached for {place}")
        done = do(server, fate) if place in ("load", "end_update") else do(server)
        if fate == "lost":
            raise EngineError(f"{self.spec.name} broke off its answer to {place}")
        return done

    async def _chunk(
        self, server: _Server, params: SamplingParams, state: int, room: int, first_s: float
    ) -> tuple[TokenChunk, int, float]:
        """The next tokens, maybe none; the row after them; and the time for what is not done yet."""
        while server.is_paused:
            await server.wait(math.inf, math.inf)
        pace, fate, version = self._pace, self._meet("chunk"), server.weights
        stale = f"{self.spec.name} sampled with version {version} after {self._world.oldest} was everywhere"
        self._world.must(version is None or version >= self._world.oldest or bool(server.cause), stale)
        ids: list[int] = []
        logprobs: list[float] = []
        states, end_in = [state], pace.end_in
        while len(ids) < min(pace.part_tokens, room) and not (ids and ids[-1] == END):
            token, logprob = drawn(
                states[-1], params.seed, params.sample_index, -9 if version is None else version, end_in
            )
            ids.append(token)
            logprobs.append(logprob)
            states.append(after(states[-1], token))
        start_s, whole_s = server._loop.time(), self._time(fate, first_s + len(ids) * pace.step_s)
        # One that is silent is so until the limit, whatever else happens.
        if not await server.wait(whole_s, self.spec.timeout_s, is_stream=whole_s < math.inf):
            passed_s = server._loop.time() - start_s - first_s
            done = min(len(ids), max(0, int(passed_s / pace.step_s)))
            ids, logprobs = ids[:done], logprobs[:done]
        if fate == "lost":
            raise EngineError(f"{self.spec.name}: the connection was reset by the peer")
        reason: FinishReason | None = (
            "stop" if ids and ids[-1] == END else "length" if len(ids) == room else None
        )
        chunk = TokenChunk(ids, logprobs, reason, version if self._world.tells_versions else None)
        if fate == "garbage":
            chunk = self._garbage(chunk, room)
        return chunk, states[len(ids)], 0.0 if ids else first_s

    def _garbage(self, chunk: TokenChunk, room: int) -> TokenChunk:
        """What no policy can have given."""
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

    def _answer_nobody(self, server: _Server) -> None:
        """The same request has a slot once more, for a while."""
        server.busy, server.for_nobody = server.busy + 1, server.for_nobody + 1

        def leave() -> None:
            server.for_nobody -= 1
            self._leave(server)

        server._loop.call_later(self._pace.step_s * self._pace.end_in, leave)

    def _leave(self, server: _Server) -> None:
        server.busy -= 1
        if server.busy == self._pace.slots - 1:
            server.wake()
