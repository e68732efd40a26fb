"""A pool of inference engines in one event loop: answers requests, and syncs weights to its replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from verl.rollout.inference_server import EngineError, RefusedError, ServerSpec
from verl.rollout.pool.background_tasks import BackgroundTasks
from verl.rollout.pool.replica import Replica, RequestInterrupted
from verl.rollout.pool.request import InflightRequest
from verl.rollout.pool.router import Router
from verl.rollout.pool.supervisor import MakeEngine, Supervisor
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Completion, PrefixAffinity, SamplingParams, check_requests
from verl.utils.tokens import TextCodec

# Running requests at a weight update, the setting `rollout.on_update`.
OnUpdate = Literal["keep", "recompute", "abort"]
# Time between two health checks.
_CHECK_S = 2.0


@dataclass
class _Counts:
    """Events since the last `take_metrics`."""

    moved: int = 0
    kept_tokens: int = 0
    thrown_tokens: int = 0
    recomputed_tokens: int = 0
    sync_s: float = 0.0
    write_s: float = 0.0
    sync_bytes: int = 0


class InferencePool:
    """Samples on several engines; a request that one engine does not finish continues on another.

    All methods are called in the event loop in which the pool was opened. Time is the time of that loop.

    An update of the weights: `begin_update`, then the policy is written, then `sync_weights`. In between, no
    engine that syncs weights gets a request.

    Args:
        make_engine: creates the client of an engine.
        codec: of the policy.
        vocabulary: size of the policy's vocabulary.
        context: of the policy, in tokens.
        max_running: requests that an engine gets at a time.
        wait_s: longest time without any serving engine, while there are weights to serve.
        on_update: running requests at an update of the weights. keep: they are paused, and continue with the
            new weights and their old cache. recompute: they are interrupted, and continue with a cache that
            the new weights compute ("interruptible rollout" of AReaL, https://arxiv.org/abs/2505.24298,
            section 4.1). abort: they start again without their tokens.
        note: is called with human-readable messages.

    Attributes:
        replicas: the engines; removed ones stay, in state "gone".
        version: of the policy.
        snapshot: weights of this version; None: they are not written yet.
        policy_can_send: the policy's ranks are free to send weights that only they have.
        num_running: requests that run on engines.
        loop: in which the pool was opened.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        make_engine: MakeEngine,
        codec: TextCodec,
        *,
        vocabulary: int,
        context: int,
        max_running: int = 256,
        wait_s: float = 1200.0,
        on_update: OnUpdate = "keep",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.version = 0
        self.snapshot: WeightSnapshot | None = None
        self.policy_can_send = False
        self.num_running = 0
        self.on_update = on_update
        self._codec, self._context, self._wait_s = codec, context, wait_s
        self._router = Router(max_running, self._num_free_of)
        self._supervisor = Supervisor(
            make_engine,
            max_running=max_running,
            vocabulary=vocabulary,
            on_change=self._router.update,
            on_started=self._sync,
            note=note,
        )
        self.replicas = self._supervisor.replicas
        self._tasks = BackgroundTasks(note)
        self._counts = _Counts()
        self._last_served_s = 0.0

    @property
    def num_free(self) -> int:
        """Free slots of the engines that serve this version."""
        return self._router.num_free

    @property
    def needs_policy(self) -> bool:
        """True if only the policy's ranks have the weights of this version."""
        return self.snapshot is not None and self.snapshot.p2p_sender is not None

    async def open(self, specs: Sequence[ServerSpec]) -> None:
        """Start all engines; raises as `Supervisor.open`."""
        self.loop = asyncio.get_running_loop()
        self._last_served_s = self.loop.time()
        await self._supervisor.open(specs)
        self._tasks.start(self._monitor())

    async def add(self, spec: ServerSpec) -> None:
        """Add an engine; raises as `Supervisor.add`."""
        self._supervisor.add(spec)

    async def remove(self, name: str) -> None:
        """Remove an engine when its running requests have finished; raises as `Supervisor.remove`."""
        self._supervisor.remove(name)

    async def close(self) -> None:
        """End all engines; unfinished requests fail. May be called again."""
        await self._tasks.cancel()
        # First the waiting requests: none of them may go to an engine that is about to end.
        self._router.close("the engines were closed")
        await self._supervisor.close()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        """Sample one completion of a prompt, on as many engines as it takes.

        Any number of calls may run at the same time after `open`. A call waits for the first weights, for a
        free slot, and for engines that load weights or restart. A cancelled call aborts its request in the
        engine.

        Args:
            prompt_ids: token ids of the prompt.
            params: how to sample; `params.n` is ignored.
            affinity: shared by requests with a common prefix, so that they are sampled on one engine.

        Raises:
            RefusedError: no engine would ever answer: an empty prompt, prompt and completion longer than the
                context, or an engine refused the request.
            RuntimeError: no engine has served for too long or ever will, the request failed on one engine
                after the other, or the pool was closed.
        """
        try:
            check_requests([prompt_ids], [params], context=self._context)
        except ValueError as error:
            raise RefusedError(str(error).replace("prompt 0", "the prompt", 1)) from None
        stop_ids = tuple(dict.fromkeys((*self._codec.stop_ids, *params.stop_ids)))
        request = InflightRequest(list(prompt_ids), replace(params, n=1, stop_ids=stop_ids), self._codec)
        affinity = affinity or PrefixAffinity()
        while request.finish_reason is None:
            await self._run_on_one(request, affinity)
        return request.completion(self.version)

    async def _run_on_one(self, request: InflightRequest, affinity: PrefixAffinity) -> None:
        """Run a request on one engine until it finishes, is interrupted, or the engine fails."""
        replica = await self._router.route(affinity)
        incarnation = replica.incarnation
        if self.on_update == "abort" and request.versions and request.versions[-1] != replica.version:
            # Its engine failed, and new weights came before another engine had a free slot.
            self._counts.thrown_tokens += request.restart()
        self.num_running += 1
        try:
            await incarnation.run(request.sample_on(replica, lambda: self.version))
            replica.record_success()
        except RequestInterrupted:
            if self.on_update == "abort":
                self._counts.thrown_tokens += request.restart()
            else:
                self._counts.recomputed_tokens += request.interrupt()
        except RefusedError as error:
            raise RefusedError(
                f"engine {replica.name} refuses {request}, with up to {request.params.max_tokens} more, "
                f"and so would any other: {error}"
            ) from error
        except EngineError as error:
            self._supervisor.fail(replica, incarnation, error)
            affinity.leave(replica)
            self._counts.moved += 1
            self._counts.kept_tokens += len(request.token_ids)
            request.migrate(error)
        finally:
            self.num_running -= 1

    async def begin_update(self, version: int) -> None:
        """Announce a new version of the policy; from here on no engine reads the weights of the one before.

        Args:
            version: of the weights that the next `sync_weights` brings.
        """
        self.version = version
        await self._drop_snapshot()
        if self.on_update == "abort":
            syncing = (replica for replica in self.replicas if replica.engine.syncs_weights)
            await asyncio.gather(*(replica.incarnation.interrupt() for replica in syncing))

    async def sync_weights(self, snapshot: WeightSnapshot | None = None) -> None:
        """Push weights to all engines that have others; return when each serves them or has failed.

        Args:
            snapshot: of the version that was announced; None: the present one, to engines that were added or
                restarted meanwhile.
        """
        if snapshot is not None:
            self.snapshot = snapshot
            self._counts.write_s += snapshot.write_s
        start_s = self.loop.time()
        started = (replica for replica in self.replicas if replica.state in ("stale", "serving", "draining"))
        await asyncio.gather(*(self._sync(replica) for replica in started))
        self._counts.sync_s += self.loop.time() - start_s

    async def wait_synced(self) -> None:
        """Return when no engine loads weights."""
        for replica in self.replicas:
            async with replica.sync_lock:
                pass

    async def sleep(self) -> None:
        """Free the device memory of serving engines until the next weights, when their requests continue."""
        await self._drop_snapshot()

        async def put_to_sleep(replica: Replica) -> None:
            incarnation = replica.incarnation
            try:
                await incarnation.interrupt()
                await replica.sleep()
            except Exception as error:  # foreign code: an engine may raise anything
                self._supervisor.fail(replica, incarnation, error)

        await asyncio.gather(
            *(put_to_sleep(replica) for replica in self.replicas if replica.state == "serving")
        )

    def take_metrics(self) -> dict[str, float]:
        """Events since the last call, as metrics of a training step."""
        counts, self._counts = self._counts, _Counts()
        num_failures, self._supervisor.num_failures = self._supervisor.num_failures, 0
        num_repaired = sum(replica.transfer.num_repaired for replica in self.replicas)
        for replica in self.replicas:
            replica.transfer.num_repaired = 0
        return {
            "engines/serving": float(sum(replica.state == "serving" for replica in self.replicas)),
            "engines/failures": float(num_failures),
            "engines/moved_answers": float(counts.moved),
            "engines/kept_tokens": float(counts.kept_tokens),
            "engines/thrown_tokens": float(counts.thrown_tokens),
            "engines/recomputed_tokens": float(counts.recomputed_tokens),
            "engines/repaired_updates": float(num_repaired),
            "engines/sync_bytes": float(counts.sync_bytes),
            "time/sync_write_s": counts.write_s,
            "time/sync_load_s": counts.sync_s,
        }

    def _num_free_of(self, replica: Replica) -> int:
        """Free slots of a replica, 0 while it lacks the weights of this version."""
        is_current = not replica.engine.syncs_weights or (
            replica.snapshot is self.snapshot and replica.version == self.version
        )
        return replica.num_free if is_current else 0

    async def _drop_snapshot(self) -> None:
        """Let no engine read the present snapshot; return when those that read it have ended."""
        self.snapshot = None
        for replica in self.replicas:
            self._router.update(replica)
        await self.wait_synced()

    async def _sync(self, replica: Replica) -> None:
        """Push the newest weights to a replica that lacks them, if they are available."""
        async with replica.sync_lock:
            snapshot = self.snapshot
            # While only the policy has the weights, and cannot send them, the replica stays stale.
            is_available = snapshot is not None and (snapshot.p2p_sender is None or self.policy_can_send)
            is_missing = replica.engine.syncs_weights and replica.snapshot is not snapshot
            if snapshot is not None and is_available and is_missing:
                await self._push(snapshot, replica)
        # It is no longer syncing: requests that wait for it are woken even if it failed.
        self._router.update(replica)

    async def _push(self, snapshot: WeightSnapshot, replica: Replica) -> None:
        incarnation = replica.incarnation
        if self.on_update == "recompute":
            await incarnation.interrupt()
        if replica.is_draining:
            return
        try:
            await replica.load_weights(snapshot)
            self._counts.sync_bytes += replica.transfer.num_bytes
        except Exception as error:  # foreign code: an engine may raise anything
            self._supervisor.fail(replica, incarnation, error)

    async def _monitor(self) -> None:
        """Check the engines periodically, and fail the waiting requests when no engine will serve them."""
        while True:
            await asyncio.sleep(_CHECK_S)
            self._supervisor.check_health()
            self._fail_hopeless_waits()

    def _fail_hopeless_waits(self) -> None:
        """Fail the waiting requests if no engine has served for too long, or all are gone."""
        now_s = self.loop.time()
        # Before the policy has provided its weights, requests do not wait for engines.
        has_weights = self.snapshot is not None and (not self.needs_policy or self.policy_can_send)
        has_weights = has_weights or not any(replica.engine.syncs_weights for replica in self.replicas)
        is_serving = any(replica.state == "serving" for replica in self.replicas)
        if not self._router.has_waiters or not has_weights or is_serving:
            self._last_served_s = now_s
        all_gone = all(replica.state == "gone" for replica in self.replicas)
        if all_gone or now_s - self._last_served_s >= self._wait_s:
            states = (f"{each.name} {each.state}: {each.cause or 'no cause'}" for each in self.replicas)
            self._router.fail_waiters(
                f"no engine serves version {self.version} of the policy ({'; '.join(states)}); "
                f"see the logs of the engines"
            )
