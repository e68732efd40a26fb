"""A fleet of engines behind the contract of one: it works in a thread of its own, and is asked from others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any, TypeVar

from typing_extensions import override

from verl.rollout.engine import ServerSpec
from verl.rollout.pool.inference_pool import InferencePool, OnUpdate
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.supervisor import MakeEngine
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.utils.sampling_types import Completion, RolloutEngine, SamplingParams, check_requests
from verl.utils.tokens import TextCodec

T = TypeVar("T")
# Between two looks whether the loop still runs.
_LOOK_S = 1.0


class ThreadedInferencePool(RolloutEngine):
    """Lets several engines answer, see `InferencePool`, in an event loop in a thread of their own.

    Weights of a version are written once, into shared memory, and stay there until the next, so that an
    engine that comes later, or again, gets the same. While `publish` or `generate` is at work in one thread,
    another one may ask the fleet, in its loop.

    Args:
        specs: of the engines to begin with.
        make: makes an engine from what describes it.
        codec: of the policy.
        weights: of the policy; None: no engine follows it.
        vocabulary: of the policy.
        context: of the policy, in tokens.
        max_running: requests that an engine gets at a time.
        wait_s: longest time without any engine that serves.
        sleeps: engines give their device memory back on `sleep`.
        on_update: what becomes of requests that run when weights come, see `InferencePool`.
        note: is told what happened, for people.

    Attributes:
        fleet: the engines, to be asked in `loop`.
        loop: theirs; see `run`.

    Raises:
        ValueError: what was given cannot be used by an engine.
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
        self.fleet = InferencePool(make, codec, **sizes, wait_s=wait_s, on_update=on_update, note=note)
        self._weights, self._context, self._sleeps = weights, context, sleeps
        self._publisher = threading.get_ident()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        try:
            self.run(self.fleet.open(specs))
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> list[Replica]:
        """The engines."""
        return self.fleet.replicas

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs something in the loop of the engines, and waits for it; where the wait is broken off, so is
        the work.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            # Again and again: an exception that is sent to a thread gets in only between two waits.
            while not wait([future], timeout=_LOOK_S).done:
                if not self._thread.is_alive():
                    raise RuntimeError(
                        "the loop of the engines has ended, so nothing answers any more; see the output before this"
                    )
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context; or an engine
                refuses a request.
            RuntimeError: no engine serves, or answers fail on one engine after the other.
        """
        check_requests(prompts, params, context=self._context)
        if self._weights is not None and self.fleet.snapshot is None:
            self.publish(self.version)
        with self.policy_sends():
            return self.run(self.fleet.generate(prompts, params))

    def publish(self, version: int) -> None:
        """See `RolloutEngine.publish`; what becomes of requests that run, `on_update` says."""
        super().publish(version)
        self._publisher = threading.get_ident()
        self.run(self.fleet.begin_update(version))
        update = None if self._weights is None else self._weights.write(version)
        with self.policy_sends():
            self.run(self.fleet.sync_weights(update))

    @contextmanager
    def policy_sends(self) -> Iterator[None]:
        """Inside, the policy can be asked for weights that only it has: the thread that publishes waits and
        asks nothing else of it.

        Engines that have come since the last time get the weights at once. In other threads it says nothing.
        """
        is_outermost = not self.fleet.policy_can_send and threading.get_ident() == self._publisher
        self.fleet.policy_can_send |= is_outermost
        try:
            if is_outermost and self.fleet.needs_policy:
                self.run(self.fleet.sync_weights())
            yield
        finally:
            if is_outermost:
                self.fleet.policy_can_send = False
            if is_outermost and self.fleet.needs_policy:
                self.run(self.fleet.wait_synced())

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; those that share no device go on."""
        if self._sleeps:
            self.run(self.fleet.sleep())

    def add(self, spec: ServerSpec) -> None:
        """Add an engine while the pool is running."""
        self.run(self.fleet.add(spec))

    def remove(self, name: str) -> None:
        """Remove an engine once its running requests have finished."""
        self.run(self.fleet.remove(name))

    @override
    def take_metrics(self) -> dict[str, float]:
        async def taken() -> dict[str, float]:
            return self.fleet.take_metrics()

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

    async def _end(self) -> None:
        await self.fleet.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
