"""One engine of a pool through its lives: it starts, takes weights, serves, fails, is started again, and
leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from verl.rollout.engine import EngineError, InferenceServer, RefusedError, TokenChunk
from verl.rollout.pool.broadcast import Broadcaster
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.fingerprint import fingerprint_of_ranks
from verl.weight_sync.shared_memory import chunk_ranges
from verl.weight_sync.types import WeightChunk

T = TypeVar("T")
# starting: not yet there; stale: there, without the policy's weights; draining: leaves when its requests have
# ended.
State = Literal["starting", "stale", "serving", "draining", "failed", "gone"]


class RequestInterrupted(Exception):
    """A request was ended by us, not by its engine; it is to be asked again."""


class Incarnation:
    """From a start of an engine to its failure or end: the requests that it has.

    Args:
        changed: is called when it has one more or one less.

    Attributes:
        cause: why it is over; None: it is not.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.cause: str | None = None
        self._changed = changed
        # Dictionaries, whose order is the same in every run.
        self._requests: dict[asyncio.Future[Any], None] = {}
        self._interrupted: dict[asyncio.Future[Any], None] = {}

    @property
    def num_running(self) -> int:
        """Requests that it has."""
        return len(self._requests)

    def end(self, cause: str) -> None:
        """Ends it, and all its requests at once: a connection that is closed does not wake who reads from it."""
        self.cause = cause
        for request in self._requests:
            request.cancel()

    async def interrupt(self) -> None:
        """Ends its requests, but not itself; returns when the engine was told."""
        requests = list(self._requests)
        for request in requests:
            self._interrupted[request] = None
            request.cancel()
        if requests:
            await asyncio.wait(requests)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does a request within this life.

        Raises:
            EngineError: the life is over, or ends meanwhile.
            RequestInterrupted: `interrupt` ended it.
        """
        request = asyncio.ensure_future(work)
        self._requests[request] = None
        self._changed()
        try:
            if self.cause is None:
                # Not awaited itself: a cancellation from outside is told from one by `end`.
                ended = request.get_loop().create_future()
                request.add_done_callback(lambda _: _set(ended))
                await ended
            if self.cause is not None and (request.cancelled() or not request.done()):
                raise EngineError(self.cause)
            if request in self._interrupted and (request.cancelled() or request.exception() is not None):
                raise RequestInterrupted
            return request.result()
        finally:
            del self._requests[request]
            self._interrupted.pop(request, None)
            self._changed()
            _drop(request)


def _set(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _drop(request: asyncio.Future[Any]) -> None:
    """Ends a request, whose outcome nobody looks at any more; so it is not told as an error that was missed,
    either.
    """
    if request.cancel():
        request.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    elif not request.cancelled():
        request.exception()


class Replica:
    """An engine and its state.

    Args:
        engine: not yet opened.
        max_running: requests that it gets at a time.
        vocabulary: its tokens are below.
        clock: of the event loop, in seconds.
        changed: is called when it may have more or less room for requests than before.
        note: is told what happened, for people.

    Attributes:
        life: the present one.
        taken: the update that it has; None: not known to have any.
        is_draining: it gets no more requests.
        is_asleep: it has given its device memory back.
        served: answers that it has finished.
        cause: of its last failure.
        failures: since the last good answer.
        repaired: updates that were torn and made anew.
        synced_bytes: of its last update, over all of its ranks.
        state_since_s: of the state, by the clock.
        taking: held while it takes weights.
    """

    def __init__(
        self,
        engine: InferenceServer,
        *,
        max_running: int,
        vocabulary: int,
        clock: Callable[[], float],
        changed: Callable[[Replica], None],
        note: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._changed = lambda: changed(self)
        self.incarnation = Incarnation(self._changed)
        self.snapshot: WeightSnapshot | None = None
        self.is_draining = False
        self.is_asleep = False
        self.num_served = 0
        self.cause = ""
        self.num_consecutive_failures = 0
        self.num_repaired = self.synced_bytes = 0
        self.state_since_s = clock()
        self.sync_lock = asyncio.Lock()
        self._state: State = "starting"
        self._max_running = max_running
        self._vocabulary = vocabulary
        self._note = note
        self._group: Broadcaster | None = None

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.engine.spec.name

    @property
    def state(self) -> State:
        """See `State`."""
        return "draining" if self.is_draining and self._state != "gone" else self._state

    @property
    def version(self) -> int | None:
        """Of the weights that it has."""
        return self.snapshot.version if self.snapshot else None

    @property
    def num_free(self) -> int:
        """Requests that it could take now."""
        return self._max_running - self.incarnation.num_running if self.state == "serving" else 0

    @property
    def is_syncing(self) -> bool:
        """Whether it takes weights that it will serve, or waits for its turn to."""
        return self.sync_lock.locked() and self.state in ("stale", "serving")

    def start_draining(self) -> None:
        """It gets no more requests."""
        self.is_draining = True
        self._changed()

    async def open(self) -> None:
        """Starts or joins the engine; afterwards it is stale, or serves if it does not follow the policy."""
        life = self._set_state("starting").incarnation = Incarnation(self._changed)
        self.snapshot, self.is_asleep, self.engine.records = None, False, True
        try:
            await self.engine.open()
        finally:
            if life.cause is not None:
                await self.shut_down()  # it has left, when there may have been nothing to end yet
        if life.cause is None:
            self._set_state("stale" if self.engine.syncs_weights else "serving")

    async def load_weights(self, update: WeightSnapshot) -> None:
        """Takes a version of the policy, and serves it only if it is what was sent; a torn update is made
        anew once, whole.

        Raises:
            EngineError: it does not come to have these weights.
        """
        life = self.incarnation
        if life.cause is not None:
            raise EngineError(life.cause)
        self._set_state("stale")
        if self.is_asleep:
            await self.engine.wake()
            self.is_asleep = False
        await self.engine.pause()
        problem = await self._wrong_after(update)
        if problem:
            self._note(
                f"engine {self.name} did not get version {update.version} whole ({problem}); it is sent again"
            )
            self.num_repaired += 1
            # In plain tensors, if it was whole before: an engine may not know what to do with those that note
            # what is read of them.
            self.engine.records, self.engine.reads = self.engine.reads is not None, None
            problem = await self._wrong_after(update)
        if problem:
            raise EngineError(
                f"engine {self.name} did not get version {update.version} in two tries: {problem}"
            )
        if life.cause is None:
            self.snapshot = update  # before the first token of it comes
        await self.engine.resume()
        if life.cause is None:
            self._set_state("serving")

    async def sleep(self) -> None:
        """Gives its device memory back; it is stale until it takes weights again."""
        self._set_state("stale")
        self.snapshot, self.is_asleep = None, True
        await self.engine.sleep()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        """See `InferenceServer.sample`; what cannot be is an error of the engine."""
        room, first = params.max_tokens, self.version
        try:
            async with aclosing(self.engine.sample(prompt_ids, params, number=number)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    room -= len(chunk.token_ids)
                    self._check(chunk, room, first)
                    yield chunk
        except (EngineError, RefusedError):
            raise
        except (
            Exception
        ) as error:  # the border to a program that is not ours: whatever it did, another engine goes on
            raise EngineError(f"engine {self.name}: {type(error).__name__}: {error}") from error

    def record_success(self) -> None:
        """An answer came to its end."""
        self.num_served, self.num_consecutive_failures = self.num_served + 1, 0

    def fail(self, cause: str) -> None:
        """Takes it out, and ends its requests."""
        self.cause, self.snapshot, self._group = cause, None, None
        self.num_consecutive_failures += 1
        self._set_state("failed")
        self.incarnation.end(cause)
        self._note(f"engine {self.name} failed: {cause}")

    async def retire(self, cause: str) -> None:
        """Ends it for good."""
        self._set_state("gone")
        self.incarnation.end(cause)
        self._group = None
        await self.shut_down()

    async def shut_down(self) -> None:
        """Ends what the engine has started. It may not raise; if it does, that is told, and keeps it from
        nothing.
        """
        try:
            await self.engine.close()
        except Exception as error:  # the border to a program that is not ours
            self._note(f"engine {self.name} could not be ended: {type(error).__name__}: {error}")

    def _set_state(self, state: State) -> Replica:
        if self._state != "gone":
            self._state, self.state_since_s = state, self._clock()
        self._changed()
        return self

    def _check(self, chunk: TokenChunk, room: int, first: int | None) -> None:
        """Refuses garbage, and tokens of other weights than those from the `first` of the answer to the
        newest.
        """
        if chunk.finish_reason == "abort":
            raise EngineError(f"engine {self.name} aborted an answer")
        if chunk.text is not None:
            return
        if chunk.finish_reason == "length" and room > 0 and self.engine.syncs_weights:
            raise EngineError(f"engine {self.name} cut an answer off, {room} tokens before its longest")
        ids, logprobs = (
            chunk.token_ids,
            [0.0] * len(chunk.token_ids) if chunk.logprobs is None else chunk.logprobs,
        )
        if room < 0 or len(ids) != len(logprobs):
            raise EngineError(
                f"engine {self.name} gave {len(logprobs)} logprobs for {len(ids)} tokens, {max(0, -room)} of them too many"
            )
        for token, logprob in zip(ids, logprobs, strict=True):
            if not (type(token) is int and 0 <= token < self._vocabulary and -1e9 < logprob < 1e-3):
                raise EngineError(
                    f"engine {self.name} gave what no policy can sample, token {token!r} with logprob {logprob!r}"
                )
        newest = self.version
        if chunk.version is not None and not (
            (first or 0) <= chunk.version <= (chunk.version if newest is None else newest)
        ):
            raise EngineError(
                f"engine {self.name} sampled with version {chunk.version} of the weights, it was given {newest}"
            )

    async def _wrong_after(self, update: WeightSnapshot) -> str:
        """What is wrong with the weights that the engine has after an update; nothing if they are those that
        were sent.
        """
        try:
            got, expected = await self._loaded(update)
        except EngineError as error:
            return str(error)
        return "" if got == expected else f"fingerprint {got}, sent {expected}"

    async def _loaded(self, update: WeightSnapshot) -> tuple[str, str]:
        """Sends everything, or to each rank what it reads; the fingerprints of what the engine says that it
        took, and of what was sent.
        """
        engine = self.engine
        if update.lora_adapter is not None:
            self.synced_bytes = update.num_bytes
            return await engine.load_lora_adapter(update.lora_adapter, update.version), update.fingerprint
        files, reads = engine.via == "disk", engine.reads or ()
        if files or not update.can_verify(reads):
            reads = ()
        self.synced_bytes = update.num_bytes_of(reads) if reads else update.num_bytes * engine.num_ranks
        parts = (
            [await asyncio.to_thread(update.as_files, Path(engine.spec.model))] if files else update.chunks
        )
        digests: list[dict[str, int]] = [{} for _ in range(engine.num_ranks)]
        await engine.begin_update()
        for part in parts:
            sent = await self._load(replace(part, ranges=chunk_ranges(reads, part)), update)
            digests = (
                [{**before, **own} for before, own in zip(digests, sent, strict=True)] if sent else digests
            )
        got = await engine.end_update(update.version)
        if update.p2p_sender is not None:
            return got, fingerprint_of_ranks(digests)
        update.track(engine.reads or ())
        return got, update.fingerprint_of(reads) if reads else update.fingerprint

    async def _load(self, part: WeightChunk, update: WeightSnapshot) -> list[dict[str, int]]:
        """Sends a part; the digests of what each rank was sent, where it is not known before."""
        if update.p2p_sender is not None:
            return await update.p2p_sender.send(part, self.engine, self.incarnation)
        if self.engine.via != "group":
            await self.engine.load(part)
            return []
        if self._group is None:
            self._group = await Broadcaster.connect(self.engine)
        try:
            await self._group.send(part, self.engine)
            return []
        except BaseException:
            # A broadcast that failed leaves the group in no state to be used again.
            self._group = None
            raise
