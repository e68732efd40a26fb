"""One engine of a pool through its life: it starts, takes weights, serves, fails, is restarted, and leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Literal

from verl.rollout.engine import Chunk, EngineError, Part, RefusedError, ServedEngine
from verl.rollout.groups import Broadcaster
from verl.rollout.weights import Update
from verl.utils.rollout import SamplingParams

# starting: not yet there; stale: there, without the policy's weights; draining: leaves when its requests have ended.
State = Literal["starting", "stale", "serving", "draining", "failed", "gone"]
# Restarts without one good answer between them, after which an engine is given up, and the pauses before them.
_MAX_RESTARTS, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5, 1.0, 30.0


class Member:
    """An engine and its state.

    Args:
        engine: not yet opened.
        max_running: requests that it gets at a time.
        vocabulary: its tokens are below.
        note: is told what happened, for people.

    Attributes:
        state: see `State`.
        version: of the weights that it serves; None: not known to be any.
        running: requests that it has.
        served: answers that it has finished.
        cause: of its last failure.
        restarts: since the last good answer.
        repaired: updates that were torn and made anew.
    """

    def __init__(self, engine: ServedEngine, *, max_running: int, vocabulary: int, note: Callable[[str], None]) -> None:
        self.engine = engine
        self.state: State = "starting"
        self.version: int | None = None
        self.running = 0
        self.served = 0
        self.cause = ""
        self.restarts = 0
        self.repaired = 0
        self.since_s = time.time()
        self._max_running = max_running
        self._vocabulary = vocabulary
        self._note = note
        self._group: Broadcaster | None = None

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.engine.spec.name

    @property
    def free(self) -> int:
        """Requests that it could take now."""
        return self._max_running - self.running if self.state == "serving" else 0

    def become(self, state: State) -> None:
        """Changes the state."""
        self.state, self.since_s = state, time.time()

    async def open(self) -> None:
        """Starts or joins the engine; afterwards it is stale, or serves if it does not follow the policy."""
        self.become("starting")
        self.version = None
        await self.engine.open()
        self.become("stale" if self.engine.follows else "serving")

    async def take(self, update: Update) -> None:
        """Takes a version of the policy, and serves it only if it is what was sent; a torn update is made anew once.

        Raises:
            EngineError: it does not come to have these weights.
        """
        if not self.engine.follows:
            self.version = update.version
            return
        self.become("stale")
        await self.engine.pause()
        problem = await self._taken(update)
        if problem:
            self._note(f"engine {self.name} did not get version {update.version} whole ({problem}); it is sent again")
            self.repaired += 1
            problem = await self._taken(update)
        if problem:
            raise EngineError(f"engine {self.name} did not get version {update.version} in two tries: {problem}")
        self.version = update.version
        await self.engine.resume()
        self.become("serving")

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int) -> AsyncIterator[Chunk]:
        """See `ServedEngine.sample`; what cannot be is an error of the engine."""
        self.running += 1
        try:
            async with aclosing(self._checked(prompt_ids, params, number)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            self.running -= 1

    async def _checked(self, prompt_ids: Sequence[int], params: SamplingParams, number: int) -> AsyncIterator[Chunk]:
        room, first = params.max_tokens, self.version
        async with aclosing(self.engine.sample(prompt_ids, params, number=number)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                room -= len(chunk.token_ids)
                self._check(chunk, room, first)
                ends = chunk.finish_reason is not None
                if ends:
                    self.served, self.restarts = self.served + 1, 0
                yield chunk
                if ends:
                    return
        raise EngineError(f"engine {self.name} ended an answer without saying why")

    def _check(self, chunk: Chunk, room: int, first: int | None) -> None:
        """Refuses garbage, and tokens of other weights than those from the `first` of the answer to the newest."""
        if chunk.text is not None:
            return
        if room < 0 or len(chunk.token_ids) != len(chunk.logprobs):
            raise EngineError(
                f"engine {self.name} gave {-min(room, 0)} tokens too many, {len(chunk.token_ids)} with {len(chunk.logprobs)} logprobs"
            )
        bad = [
            (token, logprob)
            for token, logprob in zip(chunk.token_ids, chunk.logprobs, strict=True)
            if not (0 <= token < self._vocabulary and -1e9 < logprob < 1e-3)
        ]
        if bad:
            raise EngineError(f"engine {self.name} gave what no policy can sample, (token, logprob) {bad[0]}")
        if chunk.version is not None and not _lies(chunk.version, first, self.version):
            raise EngineError(f"engine {self.name} sampled with version {chunk.version} of the weights, it was given {self.version}")

    async def restart(self, newest: Callable[[], Update | None]) -> None:
        """After a failure: ends it, starts it anew, gives it the newest weights; gives it up after several tries in vain."""
        pause_s = _FIRST_PAUSE_S
        while self.state == "failed":
            await self.engine.close()
            self._group = None
            if self.restarts >= _MAX_RESTARTS:
                self._note(f"engine {self.name} is given up after {self.restarts} restarts; last: {self.cause}")
                self.become("gone")
                return
            self.restarts += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                await self.open()
                if (update := newest()) is not None:
                    await self.take(update)
            except (EngineError, RefusedError, ValueError, asyncio.TimeoutError) as error:
                self.fail(str(error))

    def fail(self, cause: str) -> None:
        """Takes it out."""
        self.cause = cause
        self.version = None
        self.become("failed")
        self._note(f"engine {self.name} failed: {cause}")

    async def leave(self) -> None:
        """Ends it for good."""
        self.become("gone")
        await self.engine.close()
        self._group = None

    async def _taken(self, update: Update) -> str:
        """What is wrong with the weights that the engine has after an update; nothing if they are those that were sent."""
        try:
            got = await self._loaded(update)
        except EngineError as error:
            return str(error)
        return "" if got == update.expected else f"fingerprint {got}, sent {update.expected}"

    async def _loaded(self, update: Update) -> str:
        """Sends everything; the fingerprint of what the engine says that it took."""
        if update.additions is not None:
            return await self.engine.load_additions(update.additions, update.version)
        files = self.engine.via == "disk"
        parts = [await asyncio.to_thread(update.as_files, Path(self.engine.spec.model))] if files else update.parts
        await self.engine.begin_update()
        for part in parts:
            await self._load(part)
        return await self.engine.end_update(update.version)

    async def _load(self, part: Part) -> None:
        if self.engine.via != "group":
            await self.engine.load(part)
            return
        if self._group is None:
            self._group = await Broadcaster.meet(self.engine)
        await self._group.send(part, self.engine)


def _lies(version: int, first: int | None, last: int | None) -> bool:
    return (first is None or version >= first) and (last is None or version <= last)
