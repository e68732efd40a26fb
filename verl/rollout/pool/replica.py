"""One engine of a pool and its state, from start to failure, restart and removal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar

from verl.rollout.inference_server import EngineError, InferenceServer, RefusedError, TokenChunk
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.rollout.pool.weight_transfer import WeightTransfer
from verl.utils.sampling_types import SamplingParams

T = TypeVar("T")
# stale: started, but without the current weights. draining: takes no new requests and ends after the running
# ones. failed: waits for its restart. gone: removed or given up.
State = Literal["starting", "stale", "serving", "draining", "failed", "gone"]


class RequestInterrupted(Exception):
    """A request was interrupted by the pool, not by its engine; it must be continued."""


class Incarnation:
    """Requests of an engine between one start and the next failure or end.

    Args:
        on_change: is called when it has one request more or less.

    Attributes:
        cause: why it has ended; None: it has not.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.cause: str | None = None
        self._on_change = on_change
        # Dictionaries instead of sets: their order is the same in every run.
        self._requests: dict[asyncio.Future[Any], None] = {}
        self._interrupted: dict[asyncio.Future[Any], None] = {}

    @property
    def num_running(self) -> int:
        """Running requests."""
        return len(self._requests)

    def end(self, cause: str) -> None:
        """End it and its requests.

        Each request is cancelled by itself, since closing a connection does not wake a task that reads from
        it.
        """
        self.cause = cause
        for request in self._requests:
            request.cancel()

    async def interrupt(self) -> None:
        """Cancel all requests, which raise `RequestInterrupted`; return when the engine knows of it."""
        requests = list(self._requests)
        for request in requests:
            self._interrupted[request] = None
            request.cancel()
        if requests:
            await asyncio.wait(requests)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a request of this incarnation.

        Raises:
            EngineError: the incarnation has ended, or ends before the request does.
            RequestInterrupted: `interrupt` cancelled the request.
        """
        request = asyncio.ensure_future(work)
        self._requests[request] = None
        self._on_change()
        try:
            if self.cause is None:
                # Not `await request`: a cancellation of the caller would look like one by `end`.
                await asyncio.wait([request])
            if self.cause is not None and (request.cancelled() or not request.done()):
                raise EngineError(self.cause)
            if request in self._interrupted and (request.cancelled() or request.exception() is not None):
                raise RequestInterrupted
            return request.result()
        finally:
            del self._requests[request]
            self._interrupted.pop(request, None)
            self._on_change()
            # Nobody will look at its outcome: retrieve a late exception, which asyncio would log otherwise.
            if request.cancel():
                request.add_done_callback(lambda late: late.cancelled() or late.exception())
            elif not request.cancelled():
                request.exception()


class Replica:
    """An engine, its state, its requests and its weights.

    Args:
        engine: not yet opened.
        max_running: requests that it gets at a time.
        vocabulary: size of the vocabulary.
        clock: of the event loop, in seconds.
        on_change: is called when it may have more or fewer free slots than before.
        note: is called with human-readable messages.

    Attributes:
        incarnation: the present one.
        snapshot: the weights that it has; None: unknown or none.
        transfer: by which it gets weights.
        is_draining: it gets no further requests.
        is_asleep: it has freed its device memory.
        num_served: requests that it has finished.
        cause: of its last failure.
        num_consecutive_failures: since the last finished request.
        state_since_s: when the state began, by the clock.
        sync_lock: held while it loads weights.
    """

    def __init__(
        self,
        engine: InferenceServer,
        *,
        max_running: int,
        vocabulary: int,
        clock: Callable[[], float],
        on_change: Callable[[Replica], None],
        note: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.transfer = WeightTransfer(engine, note)
        self.incarnation = Incarnation(lambda: on_change(self))
        self.snapshot: WeightSnapshot | None = None
        self.is_draining = False
        self.is_asleep = False
        self.num_served = 0
        self.cause = ""
        self.num_consecutive_failures = 0
        self.state_since_s = clock()
        self.sync_lock = asyncio.Lock()
        self._state: State = "starting"
        self._max_running, self._vocabulary = max_running, vocabulary
        self._clock, self._on_change, self._note = clock, on_change, note

    @property
    def name(self) -> str:
        """Name of the engine."""
        return self.engine.spec.name

    @property
    def state(self) -> State:
        """The state; "draining" hides all others but "gone"."""
        return "draining" if self.is_draining and self._state != "gone" else self._state

    @property
    def version(self) -> int | None:
        """Version of its weights; None: unknown or none."""
        return self.snapshot.version if self.snapshot else None

    @property
    def num_free(self) -> int:
        """Free slots for requests."""
        return self._max_running - self.incarnation.num_running if self.state == "serving" else 0

    @property
    def is_syncing(self) -> bool:
        """True while it loads weights that it will serve, or waits for its turn to load."""
        return self.sync_lock.locked() and self.state in ("stale", "serving")

    def start_draining(self) -> None:
        """Take no further requests."""
        self.is_draining = True
        self._on_change(self)

    async def open(self) -> None:
        """Start or join the engine; afterwards it is stale, or serves if it keeps its own weights."""
        incarnation = Incarnation(lambda: self._on_change(self))
        self._set_state("starting")
        self.incarnation = incarnation
        self.snapshot, self.is_asleep, self.engine.records_reads = None, False, True
        try:
            await self.engine.open()
        finally:
            if incarnation.cause is not None:
                # It was retired while it started, when there may have been nothing to end yet.
                await self.shut_down()
        if incarnation.cause is None:
            self._set_state("stale" if self.engine.syncs_weights else "serving")

    async def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Load a version of the policy, verify it, and serve it.

        Raises:
            EngineError: the engine did not load exactly these weights.
        """
        incarnation = self.incarnation
        if incarnation.cause is not None:
            raise EngineError(incarnation.cause)
        self._set_state("stale")
        if self.is_asleep:
            await self.engine.wake()
            self.is_asleep = False
        await self.engine.pause()
        await self.transfer.load(snapshot, incarnation)
        if incarnation.cause is None:
            # Before `resume`: kept requests then sample their next tokens with the new version.
            self.snapshot = snapshot
        await self.engine.resume()
        if incarnation.cause is None:
            self._set_state("serving")

    async def sleep(self) -> None:
        """Free the device memory; the replica is stale until it loads weights again."""
        self._set_state("stale")
        self.snapshot, self.is_asleep = None, True
        await self.engine.sleep()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        """Stream a completion as `InferenceServer.sample` does; an invalid chunk raises `EngineError`."""
        room, first_version = params.max_tokens, self.version or 0
        try:
            stream = self.engine.sample(prompt_ids, params)
            async with aclosing(stream) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    room -= len(chunk.token_ids)
                    self._check_chunk(chunk, room, first_version)
                    yield chunk
        except (EngineError, RefusedError):
            raise
        except Exception as error:  # foreign code: whatever it raised, another engine can continue
            raise EngineError(f"engine {self.name}: {type(error).__name__}: {error}") from error

    def record_success(self) -> None:
        """Count a finished request."""
        self.num_served, self.num_consecutive_failures = self.num_served + 1, 0

    def fail(self, cause: str) -> None:
        """Take it out of service, and end its requests."""
        self.cause, self.snapshot = cause, None
        self.transfer.disconnect()
        self.num_consecutive_failures += 1
        self._set_state("failed")
        self.incarnation.end(cause)
        self._note(f"engine {self.name} failed: {cause}")

    async def retire(self, cause: str) -> None:
        """End it for good."""
        self._set_state("gone")
        self.incarnation.end(cause)
        self.transfer.disconnect()
        await self.shut_down()

    async def shut_down(self) -> None:
        """End what the engine has started. Never raises; an error is reported."""
        try:
            await self.engine.close()
        except Exception as error:  # foreign code: an engine may raise anything
            self._note(f"engine {self.name} could not be ended: {type(error).__name__}: {error}")

    def _set_state(self, state: State) -> None:
        if self._state != "gone":
            self._state, self.state_since_s = state, self._clock()
        self._on_change(self)

    def _check_chunk(self, chunk: TokenChunk, room: int, first_version: int) -> None:
        """Raise EngineError for a chunk that the policy cannot have sampled.

        Args:
            chunk: to check.
            room: tokens that may still follow it; negative: it has too many.
            first_version: of the weights when the request began.
        """
        if chunk.finish_reason == "abort":
            raise EngineError(f"engine {self.name} aborted an answer")
        if chunk.text is not None:
            return
        if chunk.finish_reason == "length" and room > 0 and self.engine.syncs_weights:
            raise EngineError(f"engine {self.name} cut an answer off, {room} tokens before its longest")
        ids = chunk.token_ids
        logprobs = [0.0] * len(ids) if chunk.logprobs is None else chunk.logprobs
        if room < 0 or len(ids) != len(logprobs):
            raise EngineError(
                f"engine {self.name} gave {len(logprobs)} logprobs for {len(ids)} tokens, "
                f"{max(0, -room)} of them too many"
            )
        for token, logprob in zip(ids, logprobs, strict=True):
            # Slightly above 0 is rounding.
            if not (type(token) is int and 0 <= token < self._vocabulary and -1e9 < logprob < 1e-3):
                raise EngineError(
                    f"engine {self.name} gave what no policy can sample, "
                    f"token {token!r} with logprob {logprob!r}"
                )
        newest = self.version
        if chunk.version is not None and not (
            first_version <= chunk.version <= (chunk.version if newest is None else newest)
        ):
            raise EngineError(
                f"engine {self.name} sampled with version {chunk.version} of the weights, "
                f"it was given {newest}"
            )
