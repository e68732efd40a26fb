"""Calls of users' functions: each has a time limit, and one that hangs or dies costs its own answer alone."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from verl.monitoring import interpreter_watchdog
from verl.rewards.execution.isolation import Callee, Place
from verl.rewards.execution.worker_handles import (
    CallWorker,
    Event,
    ProcessWorker,
    ThreadWorker,
    WorkerLostError,
)
from verl.rewards.failures import FatalRewardError, RewardFailure
from verl.rewards.reward_log import logging_call

# Time for a worker to start, to import the function and to read the arguments, before that of the call.
LOAD_LIMIT_S = 120.0
# Time between looks for new calls, while a worker runs some and has room for more.
_LOOK_S = 0.01
# Times that a call is handed over, if workers die before it begins.
_MAX_STARTS = 2
# Beyond twice the limit of a call: time for a busy machine to come back to the thread that waits.
_GUARD_MARGIN_S = 5.0


class _Pending:
    """The result of a call that has none yet."""


PENDING: Final = _Pending()
_numbers = itertools.count(1)


class RewardCall:
    """One call of a user's function.

    Attributes:
        name: of the function, for messages.
        callee: the function, and where it runs.
        args, kwargs: what the function is called with.
        result: the value or a `RewardFailure`; `PENDING` until the call has settled.
        number: of the call among all; never 0.
        num_starts: times that a worker was given the call.
        deadline_s: clock by which the worker must have begun it or settled it.
        has_begun: the function has been entered.
    """

    def __init__(self, name: str, callee: Callee, *args: Any, **kwargs: Any) -> None:
        self.name, self.callee, self.args, self.kwargs = name, callee, args, kwargs
        self.number = next(_numbers)
        self.result: Any = PENDING
        self.round: _Round | None = None
        self.num_starts, self.deadline_s, self.has_begun = 0, 0.0, False

    @property
    def is_wanted(self) -> bool:
        """True while somebody waits for the result."""
        return self.round is not None and not self.round.over.is_set() and self.result is PENDING

    def run_inline(self) -> None:
        """Settles it in the calling thread, before anybody waits for it.

        Raises:
            FatalRewardError: no later call of the function could succeed.
        """
        try:
            self.result = logging_call(self.callee.function, self.args, self.kwargs)()
        except FatalRewardError:
            raise
        except Exception as error:  # kept on the trajectory, as its outcome
            self.result = RewardFailure.from_exception(error)

    def settle(self, result: Any) -> None:
        """Stores the first result; drops later ones."""
        assert self.round is not None
        self.round.settle(self, result)


class _Round:
    """The calls of one `CallPool.run`; `over` when all have settled or nobody waits any more."""

    def __init__(self, pool: CallPool, calls: Sequence[RewardCall]) -> None:
        self.pool = pool
        self.over = threading.Event()
        self.error: RuntimeError | None = None
        self._lock = threading.Lock()
        self._num_unsettled = len(calls)
        for call in calls:
            call.round = self

    def settle(self, call: RewardCall, result: Any) -> None:
        with self._lock:
            if call.result is PENDING:
                call.result = result
                self._num_unsettled -= 1
            if self._num_unsettled == 0:
                self.over.set()

    def fail(self, error: RuntimeError) -> None:
        self.error = error
        self.over.set()


@dataclass
class _Station:
    """Workers of one kind, each with its lane, and the calls that wait for them.

    Attributes:
        start_worker: makes a new worker.
        num_lanes: most workers.
        num_slots: most calls that a worker has at once.
        timeout_s: limit of a call.
        patience_s: time after which the worker is killed; longer where the worker itself ends late calls.
        timeout_hint: said of a call for which the worker was killed.
        max_stuck: threads left behind in calls that never return, beyond which a run fails.
        stuck: those that are left behind.
    """

    start_worker: Callable[[], CallWorker]
    num_lanes: int
    num_slots: int
    timeout_s: float
    patience_s: float
    timeout_hint: str
    max_stuck: int
    inbox: queue.SimpleQueue[RewardCall | None] = field(default_factory=queue.SimpleQueue)
    lanes: list[_Lane] = field(default_factory=list)
    stuck: list[ThreadWorker] = field(default_factory=list)

    def put(self, calls: Sequence[RewardCall]) -> None:
        """Queues calls, for no more lanes than there are calls."""
        while len(self.lanes) < min(self.num_lanes, len(calls)):
            self.lanes.append(_Lane(self))
        for call in calls:
            self.inbox.put(call)

    def close(self) -> None:
        """Ends every lane and its worker; the next call starts new ones."""
        for _ in self.lanes:
            self.inbox.put(None)
        self.lanes, self.inbox = [], queue.SimpleQueue()

    def check_stuck(self, name: str) -> None:
        """Raises RuntimeError if too many threads are stuck in calls of a function."""
        self.stuck = [worker for worker in self.stuck if worker.is_alive]
        if len(self.stuck) > self.max_stuck:
            raise RuntimeError(
                f"need at most {self.max_stuck} reward calls that never return, got {len(self.stuck)}, the "
                f"last one of {name!r}; give the function a time limit of its own, below {self.timeout_s:g} s"
            )


class _Lane:
    """A thread that hands calls to a worker of its own, and replaces a worker that dies or had to be killed.

    It holds no reference to the pool while it waits, so that a pool that nobody holds ends with its lanes.
    """

    def __init__(self, station: _Station) -> None:
        self._station, self._inbox = station, station.inbox
        self._worker: CallWorker | None = None
        self._calls: dict[int, RewardCall] = {}  # those that the worker has, by number
        threading.Thread(target=self._serve, name="verl-reward-lane", daemon=True).start()

    def _serve(self) -> None:
        while self._take_calls():
            if self._worker is None or not self._calls:
                continue
            try:
                self._handle(self._worker.receive(self._wait_s()))
            except WorkerLostError as loss:
                self._recover(loss)
        if self._worker is not None:
            self._worker.kill()

    def _take_calls(self) -> bool:
        """Fills the slots of the worker; waits for a call if it has none. False if the pool has closed."""
        while len(self._calls) < self._station.num_slots:
            try:
                call = self._inbox.get(block=not self._calls)
            except queue.Empty:
                break
            if call is None:
                return False
            if call.is_wanted:
                self._submit(call)
        return True

    def _submit(self, call: RewardCall) -> None:
        call.num_starts += 1
        call.has_begun = False
        call.deadline_s = time.monotonic() + LOAD_LIMIT_S
        self._calls[call.number] = call
        try:
            self._worker = self._worker or self._station.start_worker()
            self._worker.submit(call.number, call.callee, call.args, call.kwargs)
        except (ValueError, OSError) as error:
            self._settle(call.number, RewardFailure("reward_error", str(error)))
        except WorkerLostError as loss:
            self._recover(loss)

    def _wait_s(self) -> float:
        """Seconds until a call can be over its limit, or until new calls may have come for free slots."""
        left_s = max(0.0, min(call.deadline_s for call in self._calls.values()) - time.monotonic())
        return left_s if len(self._calls) == self._station.num_slots else min(left_s, _LOOK_S)

    def _handle(self, event: Event | None) -> None:
        kind, number, value = event or (None, 0, None)
        if kind == "started":
            self._calls[number].has_begun = True
            self._calls[number].deadline_s = time.monotonic() + self._station.patience_s
        elif kind == "done":
            self._settle(number, value)
        elif kind == "unloadable":
            call = self._calls.pop(number)
            assert call.round is not None
            call.round.pool.run_in_trainer(call, str(value))
        late = [call for call in self._calls.values() if call.deadline_s <= time.monotonic()]
        if late:
            limit_s, hint = self._station.timeout_s, self._station.timeout_hint
            self._replace_worker(late, RewardFailure.timeout(limit_s, hint))

    def _settle(self, number: int, result: Any) -> None:
        self._calls.pop(number).settle(result)

    def _recover(self, loss: WorkerLostError) -> None:
        """Deals with the death of the worker."""
        suspects = [c for c in self._calls.values() if c.has_begun or c.num_starts >= _MAX_STARTS]
        self._replace_worker(suspects, RewardFailure("reward_crash", str(loss), loss.exit_code))

    def _replace_worker(self, suspects: Sequence[RewardCall], failure: RewardFailure) -> None:
        """Kills the worker, fails the call that held it, and queues its other calls again.

        Of coroutines that share a worker, the one whose code ran is to blame. Where no code of a call ran, as
        in a task that a coroutine has started, all suspects are.
        """
        assert self._worker is not None
        running = self._calls.get(self._worker.running())
        guilty = suspects if running is None else [running]
        self._worker.kill()
        if isinstance(self._worker, ThreadWorker):
            self._station.stuck.append(self._worker)
        self._worker = None
        for call in guilty:
            self._settle(call.number, failure)
            try:
                self._station.check_stuck(call.name)
            except RuntimeError as error:
                assert call.round is not None
                call.round.fail(error)
        for call in self._calls.values():
            self._inbox.put(call)
        self._calls = {}


class CallPool:
    """Workers that outlive the calls; they start with the first call, and one that hangs or dies is replaced.

    Args:
        timeout_s: limit of each call, from when its function is entered.
        num_workers: plain calls at the same time; None for one per CPU, from 2 to 8.
        max_concurrent: coroutines at the same time.
        max_stuck: threads of the trainer still stuck in a call over its limit, beyond which `run` raises.
        note: called with a sentence about a function that cannot run in a worker process.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        num_workers: int | None = None,
        max_concurrent: int = 64,
        max_stuck: int = 16,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._timeout_s, self._note = timeout_s, note
        self._lock = threading.Lock()
        num_workers = num_workers or min(max(os.cpu_count() or 1, 2), 8)

        blocked = ", and an async function held the event loop; await inside it, or make it a plain function"

        def station(worker: type[ProcessWorker] | type[ThreadWorker], *, is_async: bool) -> _Station:
            return _Station(
                partial(worker, is_async=is_async, timeout_s=timeout_s),
                num_lanes=1 if is_async else num_workers,
                num_slots=max_concurrent if is_async else 1,
                timeout_s=timeout_s,
                # The event loop ends late coroutines itself. If it has not by twice the limit, then for at
                # least the limit some coroutine has not let it.
                patience_s=2 * timeout_s if is_async else timeout_s,
                timeout_hint=blocked if is_async else "",
                max_stuck=max_stuck,
            )

        self._stations: dict[tuple[Place, bool], _Station] = {
            ("process", False): station(ProcessWorker, is_async=False),
            ("process", True): station(ProcessWorker, is_async=True),
            ("thread", False): station(ThreadWorker, is_async=False),
            ("thread", True): station(ThreadWorker, is_async=True),
        }
        self._finalizer = weakref.finalize(self, _close, list(self._stations.values()))

    def run(self, calls: Sequence[RewardCall]) -> None:
        """Settles every call: its `result` is then the value or a `RewardFailure`.

        Several threads may call it at once. A function on a thread of the trainer that holds the GIL for more
        than twice the limit ends the trainer, with exit code 1 and its stack on standard error: nothing else
        can stop it.

        Raises:
            RuntimeError: too many threads of the trainer are stuck in calls that never return.
            FatalRewardError: a function can never succeed again.
        """
        for call in calls:
            if call.callee.place == "inline" and call.result is PENDING:
                call.run_inline()
        waiting = [call for call in calls if call.result is PENDING]
        if not waiting:
            return
        current = _Round(self, waiting)
        try:
            self._guard(current, waiting)
            self._submit(waiting)
            while not current.over.wait(self._timeout_s):
                self._guard(current, waiting)
        finally:
            current.over.set()
            interpreter_watchdog.disarm(current)
        if current.error is not None:
            raise current.error

    def run_in_trainer(self, call: RewardCall, reason: str) -> None:
        """Runs a call on a thread of the trainer, and from now on all calls of its function."""
        if call.callee.place == "process":
            call.callee.keep_in_trainer(f"it cannot be loaded in another process ({reason})")
            self._note(f"reward function {call.name}: {call.callee.note}")
        self._submit([call])

    def close(self) -> None:
        """Ends all workers; threads in a call, when it returns."""
        with self._lock:
            _close(list(self._stations.values()))

    def _submit(self, calls: Sequence[RewardCall]) -> None:
        with self._lock:
            for (place, is_async), station in self._stations.items():
                own = [c for c in calls if c.callee.place == place and c.callee.is_async == is_async]
                if own:
                    station.check_stuck(own[0].name)
                    station.put(own)

    def _guard(self, current: _Round, calls: Sequence[RewardCall]) -> None:
        # A regular expression without end, or C code, may never give the GIL back: then no Python runs in the
        # trainer that could count the time. Only ending the process helps, with the stack of the function.
        if any(call.callee.place == "thread" for call in calls):
            interpreter_watchdog.arm(current, 2 * self._timeout_s + _GUARD_MARGIN_S)


def _close(stations: Sequence[_Station]) -> None:
    for station in stations:
        station.close()
