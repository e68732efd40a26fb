"""A pool of inference servers for synchronous code: its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from typing_extensions import override

from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.inference_pool import InferencePool, OnUpdate
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.supervisor import MakeEngine
from verl.rollout.pool.weight_publisher import WeightPublisher, WeightSnapshot
from verl.utils.event_loops import call_in_thread, wait_for
from verl.utils.sampling_types import Completion, PrefixAffinity, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")


class ThreadedInferencePool(RolloutEngine):
    """Runs an `InferencePool` in the event loop of a thread.

    The weights of a version are written once, into shared memory, and stay there until the next version, so
    an engine that joins or restarts gets the same.

    Args:
        specs: engines to start or join at first.
        make: makes the client of an engine from its spec.
        codec: of the policy.
        weights: publisher of the policy's weights; None: no engine takes them.
        vocabulary: tokens of the policy's vocabulary.
        context: of the policy, tokens.
        max_running: requests that run on an engine at a time.
        wait_s: longest time without a serving engine, seconds.
        sleeps: engines release their device memory on `sleep`.
        on_update: treatment of running requests when weights change, see `InferencePool`.
        note: takes human-readable lines on what happened.

    Attributes:
        inference_pool: the engines; its coroutines run in `loop`.
        loop: of the engines, see `run`.

    Raises:
        ValueError: an engine cannot use its spec.
        EngineError: none of the engines starts.
    """

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        make: MakeEngine,
        codec: TextCodec,
        weights: WeightPublisher | None,
        *,
        vocabulary: int,
        context: int,
        max_running: int = 256,
        wait_s: float = 1200.0,
        sleeps: bool = False,
        on_update: OnUpdate = "keep",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        sizes = {"vocabulary": vocabulary, "context": context, "max_running": max_running}
        self.inference_pool = InferencePool(
            make, codec, **sizes, wait_s=wait_s, on_update=on_update, note=note
        )
        self._weights, self._sleeps = weights, sleeps
        self._trainer_thread = threading.get_ident()
        self._sync_lock = asyncio.Lock()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        try:
            self.run(self.inference_pool.open(specs))
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> list[Replica]:
        """The engines."""
        return self.inference_pool.replicas

    @override
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        return await self.inference_pool.sample(prompt_ids, params, affinity)

    @override
    def sync_weights(self, version: int) -> Coroutine[Any, Any, None]:
        """Write the weights of a version and load them into all engines; `on_update` says what running
        requests do.

        The thread that calls this is the trainer's.
        """
        self._trainer_thread = threading.get_ident()
        return self._sync_weights(version)

    @property
    @override
    def needs_weights(self) -> bool:
        return self._weights is not None and self.inference_pool.snapshot is None

    @override
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop of the engines and wait for it; an interrupted wait cancels it.

        While the trainer's thread waits here, it asks nothing of the policy, so weights that only the policy
        has can be sent: engines that have come since the last time get them first.
        """
        is_trainer = threading.get_ident() == self._trainer_thread
        future = asyncio.run_coroutine_threadsafe(self._with_policy(work) if is_trainer else work, self.loop)
        try:
            return wait_for(future, check=self._check_loop)
        except BaseException:
            future.cancel()
            raise

    @override
    def sleep(self) -> None:
        """Release the device memory of engines that share a device with training; others go on."""
        if self._sleeps:
            self.run(self.inference_pool.sleep())

    def add(self, spec: ServerSpec) -> None:
        """Add an engine while the pool is running."""
        self.run(self.inference_pool.add(spec))

    def remove(self, name: str) -> None:
        """Remove an engine once its running requests have finished."""
        self.run(self.inference_pool.remove(name))

    @override
    def take_metrics(self) -> dict[str, float]:
        async def taken() -> dict[str, float]:
            return self.inference_pool.take_metrics()

        return self.run(taken())

    @override
    def close(self) -> None:
        if self.loop.is_closed():
            return
        try:
            self.run(self._end())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()
            if self._weights is not None:
                self._weights.close()

    async def _sync_weights(self, version: int) -> None:
        async with self._sync_lock:
            self.version = version
            await self.inference_pool.begin_update(version)
            snapshot = None if self._weights is None else await self._write(self._weights, version)
            await self.inference_pool.sync_weights(snapshot)

    async def _write(self, weights: WeightPublisher, version: int) -> WeightSnapshot:
        # In a thread, as it waits for the policy's ranks; running requests go on meanwhile.
        writing = asyncio.ensure_future(call_in_thread(lambda: weights.write(version), name="weights"))
        try:
            return await asyncio.shield(writing)
        finally:
            await asyncio.wait([writing])  # also an interrupted one: the policy must not learn meanwhile

    async def _with_policy(self, work: Coroutine[Any, Any, T]) -> T:
        """Result of a coroutine; meanwhile the policy can be asked for weights that only it has."""
        pool = self.inference_pool
        pool.policy_can_send = True
        try:
            if pool.needs_policy:
                await pool.sync_weights()
            return await work
        finally:
            pool.policy_can_send = False
            if pool.needs_policy:
                await pool.wait_synced()

    def _check_loop(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError(
                "the loop of the engines has ended, so nothing answers any more; see the output before this"
            )

    async def _end(self) -> None:
        await self.inference_pool.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
