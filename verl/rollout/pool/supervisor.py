"""Life cycle of the replicas of a pool: start, health checks, restart with backoff, removal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from verl.rollout.inference_server import EngineError, InferenceServer, ServerSpec
from verl.rollout.pool.background_tasks import BackgroundTasks
from verl.rollout.pool.replica import Incarnation, Replica

MakeEngine = Callable[[ServerSpec], InferenceServer]
# A replica is given up after so many failures without a finished request between them.
_MAX_FAILURES = 6
# Pauses before the restarts of a replica: doubled each time, up to the longest.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_DRAIN_POLL_S = 0.05


class Supervisor:
    """Starts, checks, restarts and removes replicas.

    Args:
        make_engine: creates the client of an engine.
        max_running: requests that a replica gets at a time.
        vocabulary: size of the policy's vocabulary.
        on_change: is called when a replica may have more or fewer free slots than before.
        on_started: is awaited when a replica has started or restarted; it loads the weights.
        note: is called with human-readable messages.

    Attributes:
        replicas: all replicas, in the order in which they were added; removed ones stay, in state "gone".
        num_failures: of all replicas, since it was last reset.
    """

    def __init__(
        self,
        make_engine: MakeEngine,
        *,
        max_running: int,
        vocabulary: int,
        on_change: Callable[[Replica], None],
        on_started: Callable[[Replica], Awaitable[None]],
        note: Callable[[str], None],
    ) -> None:
        self.replicas: list[Replica] = []
        self.num_failures = 0
        self._make_engine, self._max_running, self._vocabulary = make_engine, max_running, vocabulary
        self._on_change, self._on_started, self._note = on_change, on_started, note
        self._tasks = BackgroundTasks(note)
        self._checks: dict[str, asyncio.Task[None]] = {}

    async def open(self, specs: Sequence[ServerSpec]) -> None:
        """Start all replicas at the same time; those that fail are restarted, unless all fail.

        Raises:
            ValueError: an engine cannot use its spec.
            EngineError: no engine starts.
        """
        for spec in specs:
            self._new_replica(spec)
        opened = await asyncio.gather(*(replica.open() for replica in self.replicas), return_exceptions=True)
        for replica, error in zip(self.replicas, opened, strict=True):
            if isinstance(error, BaseException) and not isinstance(error, EngineError):
                raise error
            if isinstance(error, EngineError):
                self.fail(replica, replica.incarnation, error)
        errors = [error for error in opened if isinstance(error, EngineError)]
        if errors and len(errors) == len(opened):
            raise errors[0]

    def add(self, spec: ServerSpec) -> None:
        """Add a replica, which serves as soon as it has started and loaded the weights.

        Raises:
            ValueError: another replica has this name, or the engine cannot use the spec.
        """
        self._tasks.start(self._start(self._new_replica(spec)))

    def remove(self, name: str) -> None:
        """Give a replica no further requests, and end it when the running ones have finished.

        Raises:
            ValueError: no replica has this name.
        """
        found = [replica for replica in self.replicas if replica.name == name and replica.state != "gone"]
        if not found:
            names = ", ".join(replica.name for replica in self.replicas)
            raise ValueError(f"need the name of an engine, got {name!r}; there are {names}")
        found[0].start_draining()
        self._tasks.start(self._drain(found[0]))

    def fail(self, replica: Replica, incarnation: Incarnation, error: BaseException) -> None:
        """Take a replica out of service and start its restart.

        Errors of an earlier incarnation may arrive late; they say nothing about the present one.
        """
        if replica.incarnation is not incarnation or incarnation.cause is not None or replica.state == "gone":
            return
        self.num_failures += 1
        replica.fail(str(error) or type(error).__name__)
        # One that drains has no requests left now, and is about to be removed.
        if not replica.is_draining:
            self._tasks.start(self._restart(replica))

    def check_health(self) -> None:
        """Start a health check of each serving replica whose last check has ended."""
        for replica in self.replicas:
            last = self._checks.get(replica.name)
            if replica.state == "serving" and (last is None or last.done()):
                self._checks[replica.name] = self._tasks.start(
                    self._health_check(replica, replica.incarnation)
                )

    async def close(self) -> None:
        """End all replicas. May be called again."""
        await self._tasks.cancel()
        ends = (replica.retire("the run has ended") for replica in self.replicas)
        await asyncio.gather(*ends, return_exceptions=True)

    def _new_replica(self, spec: ServerSpec) -> Replica:
        if any(replica.name == spec.name and replica.state != "gone" for replica in self.replicas):
            raise ValueError(f"need a name that no engine has, got {spec.name!r}")
        replica = Replica(
            self._make_engine(spec),
            max_running=self._max_running,
            vocabulary=self._vocabulary,
            clock=asyncio.get_running_loop().time,
            on_change=self._on_change,
            note=self._note,
        )
        self.replicas.append(replica)
        return replica

    async def _start(self, replica: Replica) -> None:
        try:
            await replica.open()
        except Exception as error:  # foreign code: an engine may raise anything
            self.fail(replica, replica.incarnation, error)
        else:
            await self._on_started(replica)

    async def _drain(self, replica: Replica) -> None:
        while replica.incarnation.num_running:
            await asyncio.sleep(_DRAIN_POLL_S)
        await replica.retire(f"engine {replica.name} was removed")
        self._note(f"engine {replica.name} was removed")

    async def _restart(self, replica: Replica) -> None:
        """Restart a failed replica until it starts, or has failed too often."""
        pause_s = _FIRST_PAUSE_S
        while replica.state == "failed":
            await replica.shut_down()
            if replica.num_consecutive_failures >= _MAX_FAILURES:
                self._note(
                    f"engine {replica.name} is given up after {replica.num_consecutive_failures} failures; "
                    f"the last: {replica.cause}"
                )
                await replica.retire(replica.cause)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if replica.state != "failed":
                return  # it was removed meanwhile
            try:
                await replica.open()
            except Exception as error:  # foreign code: an engine may raise anything
                replica.fail(str(error) or type(error).__name__)
        if replica.state == "stale":
            await self._on_started(replica)
        if replica.state == "serving":
            self._note(f"engine {replica.name} is back with version {replica.version}")

    async def _health_check(self, replica: Replica, incarnation: Incarnation) -> None:
        try:
            await replica.engine.check()
        except Exception as error:  # foreign code: an engine may raise anything
            if replica.state == "serving":
                self.fail(replica, incarnation, error)
