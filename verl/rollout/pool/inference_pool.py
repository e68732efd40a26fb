"""Engines that start, take the policy's weights, serve, fail and leave while answers are asked of them, all
in one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from verl.rollout.engine import EngineError, InferenceServer, RefusedError, ServerSpec
from verl.rollout.pool.replica import Incarnation, Replica, RequestInterrupted
from verl.rollout.pool.request import InflightRequest
from verl.rollout.pool.router import PrefixAffinity, Router
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Completion, SamplingParams, check_requests
from verl.utils.tokens import TextCodec

T = TypeVar("T")
MakeEngine = Callable[[ServerSpec], InferenceServer]
# What becomes of requests that run when weights come, see `rollout.on_update`.
OnUpdate = Literal["keep", "recompute", "abort"]
# How often engines are asked whether they are well, and how often one answer may move to another engine.
_CHECK_S, _MAX_MOVES = 2.0, 8
# Failures without one good answer between them, after which an engine is given up, and the pauses before its
# restarts.
_MAX_FAILURES, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 6, 1.0, 30.0
_DRAIN_POLL_S = 0.05
# More than a prompt has answers.
_NUMBERS = 2**20


@dataclass
class _Counts:
    """What happened since it was last asked."""

    moved: int = 0
    kept_tokens: int = 0
    thrown_tokens: int = 0
    recomputed_tokens: int = 0
    failures: int = 0
    sync_s: float = 0.0
    write_s: float = 0.0
    sync_bytes: int = 0


class InferencePool:
    """Lets several engines answer, each the prompts for which it has room; what one has not finished, another
    goes on with.

    Everything is asked in the event loop in which it was opened. The time of that loop is the only one that
    it knows.

    Args:
        make: makes an engine from what describes it.
        codec: of the policy.
        vocabulary: of the policy.
        context: of the policy, in tokens.
        max_running: requests that an engine gets at a time.
        wait_s: longest time without any engine that serves, while there are weights for them.
        on_update: requests that run when weights come are kept by their engines and go on with them (keep);
            are cut, and asked again with the tokens that they have, so that the new weights compute their
            cache (recompute, "interruptible rollout" of AReaL, https://arxiv.org/abs/2505.24298, section
            4.1); or begin anew (abort).
        note: is told what happened, for people.

    Attributes:
        replicas: the engines, also those that are gone.
        version: of the policy.
        update: its weights; None: they are not written yet, and no engine that follows the policy is asked
            anything.
        policy_is_at_hand: the policy can be asked for weights that only it has.
        loop: in which it was opened.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        make: MakeEngine,
        codec: TextCodec,
        *,
        vocabulary: int,
        context: int,
        max_running: int = 256,
        wait_s: float = 1200.0,
        on_update: OnUpdate = "keep",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.replicas: list[Replica] = []
        self.version = 0
        self.snapshot: WeightSnapshot | None = None
        self.policy_can_send = False
        self.on_update = on_update
        self._make, self._codec, self._note = make, codec, note
        self._vocabulary, self._context, self._max_running, self._wait_s = (
            vocabulary,
            context,
            max_running,
            wait_s,
        )
        self._counts = _Counts()
        self._router = Router(max_running, self._free)
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._running = 0
        self._served_s = 0.0

    @property
    def num_running(self) -> int:
        """Answers that engines have now."""
        return self._running

    @property
    def num_free(self) -> int:
        """Further requests that engines which serve this version could take now."""
        return self._router.num_free

    @property
    def needs_policy(self) -> bool:
        """Whether the weights of this version are with the policy alone."""
        return self.snapshot is not None and self.snapshot.p2p_sender is not None

    # Engines
    # ----------------------------------------------------------------------------------------------------------------

    async def open(self, specs: Sequence[ServerSpec]) -> None:
        """Starts all engines at once; those that fail are tried again, unless all do.

        Raises:
            ValueError: what was given cannot be used by an engine.
            EngineError: none of the engines starts.
        """
        self.loop = asyncio.get_running_loop()
        self._served_s = self.loop.time()
        for spec in specs:
            self.replicas.append(self._new_replica(spec))
        opened = await asyncio.gather(*(replica.open() for replica in self.replicas), return_exceptions=True)
        for replica, error in zip(self.replicas, opened, strict=True):
            if isinstance(error, BaseException) and not isinstance(error, EngineError):
                raise error
            if isinstance(error, EngineError):
                self._fail(replica, replica.incarnation, error)
        failures = [error for error in opened if isinstance(error, EngineError)]
        if failures and len(failures) == len(opened):
            raise failures[0]
        self._do(self._monitor())

    async def add(self, spec: ServerSpec) -> None:
        """One more engine, which serves as soon as it has started and has the weights.

        Raises:
            ValueError: there is one of this name, or it cannot be used.
        """
        replica = self._new_replica(spec)
        self.replicas.append(replica)
        self._do(self._join(replica))

    async def remove(self, name: str) -> None:
        """Gives an engine no further requests, and ends it when it has none.

        Raises:
            ValueError: there is no such engine.
        """
        replica = next(
            (replica for replica in self.replicas if replica.name == name and replica.state != "gone"), None
        )
        if replica is None:
            raise ValueError(
                f"need the name of an engine, got {name!r}; there are {', '.join(replica.name for replica in self.replicas)}"
            )
        replica.start_draining()
        self._do(self._drain(replica))

    async def close(self) -> None:
        """Ends all engines; answers that are still asked for fail. May be called again."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._router.close("the engines were closed")
        await asyncio.gather(
            *(replica.retire("the run has ended") for replica in self.replicas), return_exceptions=True
        )

    # Weights
    # ----------------------------------------------------------------------------------------------------------------

    async def begin_update(self, version: int) -> None:
        """A version of the policy is about to be written: from here on no engine reads the one before, whose
        memory is given back.

        Until an engine that follows the policy has the new ones, it begins no further request. Those that run
        go on meanwhile, or are ended at once if they are to begin anew.
        """
        self.version = version
        await self._drop_snapshot()
        if self.on_update == "abort":
            await asyncio.gather(
                *(
                    replica.incarnation.interrupt()
                    for replica in self.replicas
                    if replica.engine.syncs_weights
                )
            )

    async def sync_weights(self, update: WeightSnapshot | None = None) -> None:
        """Gives weights to all that have others, and returns when they serve them, or have failed.

        Args:
            update: the version that was announced; None: the present one, to engines that have come
                meanwhile.
        """
        if update is not None:
            self.snapshot = update
            self._counts.write_s += update.write_s
        start_s = self.loop.time()
        await asyncio.gather(
            *(
                self._sync(replica)
                for replica in self.replicas
                if replica.state in ("stale", "serving", "draining")
            )
        )
        self._counts.sync_s += self.loop.time() - start_s

    async def wait_synced(self) -> None:
        """Returns when no engine takes weights."""
        for replica in self.replicas:
            async with replica.sync_lock:
                pass

    async def sleep(self) -> None:
        """Engines that serve give their device memory back until the next weights; what they were asked goes
        on then.
        """
        await self._drop_snapshot()
        await asyncio.gather(
            *(self._send_to_sleep(replica) for replica in self.replicas if replica.state == "serving")
        )

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last call, for the metrics of a step."""
        counts, self._counts = self._counts, _Counts()
        repaired = sum(replica.num_repaired for replica in self.replicas)
        for replica in self.replicas:
            replica.num_repaired = 0
        return {
            "engines/serving": float(sum(replica.state == "serving" for replica in self.replicas)),
            "engines/failures": float(counts.failures),
            "engines/moved_answers": float(counts.moved),
            "engines/kept_tokens": float(counts.kept_tokens),
            "engines/thrown_tokens": float(counts.thrown_tokens),
            "engines/recomputed_tokens": float(counts.recomputed_tokens),
            "engines/repaired_updates": float(repaired),
            "engines/sync_bytes": float(counts.sync_bytes),
            "time/sync_write_s": counts.write_s,
            "time/sync_load_s": counts.sync_s,
        }

    # Answers
    # ----------------------------------------------------------------------------------------------------------------

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int, affinity: PrefixAffinity
    ) -> Completion:
        """Sample one completion of a prompt, on as many engines as it takes.

        Any number of calls may run at the same time after `open`. A call waits for the first weights, for a free
        slot, and for engines that load weights or restart. A cancelled call aborts its request in the engine.

        Args:
            prompt_ids: token ids of the prompt.
            params: how to sample; `params.n` is ignored.
            number: of the completion among those of the prompt; with `params.seed` it selects the random numbers.
            affinity: shared by the completions of one prompt, so that they are sampled on one engine.

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
        return await self._answer(list(prompt_ids), replace(params, n=1, stop_ids=stop_ids), number, affinity)

    async def answer(self, prompt: Sequence[int], params: SamplingParams) -> list[Completion]:
        """The `params.n` completions of one prompt, sampled on one engine if possible; raises as `sample`."""
        affinity = PrefixAffinity()
        if params.n == 1:
            return [await self.sample(prompt, params, number=0, affinity=affinity)]
        return await self._all(
            [self.sample(prompt, params, number=i, affinity=affinity) for i in range(params.n)]
        )

    async def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """The answers to several prompts, see `answer`."""
        return await self._all(
            [self.answer(prompt, wanted) for prompt, wanted in zip(prompts, params, strict=True)]
        )

    async def _all(self, works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """What comes of all of them; if one fails, or this is cancelled, all have ended before it returns."""
        tasks = [self.loop.create_task(work) for work in works]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _answer(
        self, prompt: list[int], params: SamplingParams, number: int, session: PrefixAffinity
    ) -> Completion:
        """One answer, from as many engines as it takes."""
        answer = InflightRequest(params, self._codec)
        while answer.finish_reason is None:
            replica = await self._router.find(session)
            incarnation = replica.incarnation
            if self.on_update == "abort" and answer.versions and answer.versions[-1] != replica.version:
                self._counts.thrown_tokens += (
                    answer.restart()
                )  # it lost its engine, and weights came before it had another one
            self._running += 1
            try:
                await incarnation.run(self._sample_rest(answer, replica, prompt, number))
                replica.record_success()
            except RequestInterrupted:
                self._cut(answer, len(prompt))
            except RefusedError as error:
                asked = f"answer {number} to a prompt of {len(prompt)} tokens, with up to {params.max_tokens} more"
                raise RefusedError(
                    f"engine {replica.name} refuses {asked}, and so would any other: {error}"
                ) from error
            except EngineError as error:
                self._fail(replica, incarnation, error)
                self._move(
                    answer, session, error, asked=f"answer {number} to a prompt of {len(prompt)} tokens"
                )
            finally:
                self._running -= 1
        return answer.completion(self.version)

    def _cut(self, answer: InflightRequest, prompt_tokens: int) -> None:
        """Takes an answer from an engine that gets weights, or gives its memory back."""
        if self.on_update == "abort":
            self._counts.thrown_tokens += answer.restart()
            return
        answer.finish_if_stopped()
        if answer.token_ids and answer.finish_reason is None:
            self._counts.recomputed_tokens += prompt_tokens + len(answer.token_ids)

    def _move(
        self, answer: InflightRequest, session: PrefixAffinity, error: EngineError, *, asked: str
    ) -> None:
        """Takes an answer from an engine that failed."""
        session.replica = None
        answer.num_migrations += 1
        self._counts.moved += 1
        self._counts.kept_tokens += len(answer.token_ids)
        if answer.num_migrations > _MAX_MOVES:
            sampled = f"{len(answer.token_ids)} of at most {answer.params.max_tokens} tokens"
            raise RuntimeError(
                f"{asked} failed on {answer.num_migrations} engines in turn, with {sampled} sampled; the last: {error}"
            ) from error
        answer.finish_if_stopped()

    async def _sample_rest(
        self, answer: InflightRequest, replica: Replica, prompt: list[int], number: int
    ) -> None:
        """Samples the rest of an answer on one engine.

        Raises:
            EngineError: it did not come to its end.
        """
        have = len(answer.token_ids)
        # An engine that begins its random numbers anew may not repeat those that the first tokens were drawn
        # with.
        own = number if not have or replica.engine.position_seeded else number + _NUMBERS * have
        rest = replace(answer.params, max_tokens=answer.params.max_tokens - have) if have else answer.params
        row = [*prompt, *answer.token_ids] if have else prompt
        async with aclosing(replica.sample(row, rest, number=own)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                version = next(v for v in (chunk.version, replica.version, self.version) if v is not None)
                answer.add(chunk, version)
                if chunk.finish_reason is not None and not answer.token_ids and answer.text is None:
                    break
                answer.finish_reason = chunk.finish_reason
                if have:
                    answer.finish_if_stopped()
                if answer.finish_reason is not None:
                    return
        raise EngineError(f"engine {replica.name} ended an answer without a token or without saying why")

    def _free(self, replica: Replica) -> int:
        """Requests that an engine could take now, with the weights of this version if it follows the policy."""
        is_current = not replica.engine.syncs_weights or (
            replica.snapshot is self.snapshot and replica.version == self.version
        )
        return replica.num_free if is_current else 0

    # The lives of engines
    # ---------------------------------------------------------------------------------------------------

    def _new_replica(self, spec: ServerSpec) -> Replica:
        if any(replica.name == spec.name and replica.state != "gone" for replica in self.replicas):
            raise ValueError(f"need a name that no engine has, got {spec.name!r}")
        sizes = {"max_running": self._max_running, "vocabulary": self._vocabulary}
        return Replica(
            self._make(spec), clock=self.loop.time, changed=self._router.changed, note=self._note, **sizes
        )

    async def _join(self, replica: Replica) -> None:
        try:
            await replica.open()
        except Exception as error:  # the border to a program that is not ours
            self._fail(replica, replica.incarnation, error)
        else:
            await self._sync(replica)

    async def _drain(self, replica: Replica) -> None:
        while replica.incarnation.num_running:
            await asyncio.sleep(_DRAIN_POLL_S)
        await replica.retire(f"engine {replica.name} was removed")
        self._note(f"engine {replica.name} has left")

    async def _drop_snapshot(self) -> None:
        """No engine reads the last update from here on."""
        self.snapshot = None
        for replica in self.replicas:
            self._router.changed(replica)
        await self.wait_synced()

    async def _send_to_sleep(self, replica: Replica) -> None:
        incarnation = replica.incarnation
        try:
            await incarnation.interrupt()
            await replica.sleep()
        except Exception as error:  # the border to a program that is not ours
            self._fail(replica, incarnation, error)

    async def _sync(self, replica: Replica) -> None:
        """Gives an engine the newest weights, if it follows the policy and has others, and they are here or
        the policy can be asked.
        """
        async with replica.sync_lock:
            update = self.snapshot
            is_here = update is not None and (update.p2p_sender is None or self.policy_can_send)
            # Else it stays stale until it is.
            if (
                update is not None
                and is_here
                and replica.engine.syncs_weights
                and replica.snapshot is not update
            ):
                await self._push(update, replica)
        self._router.changed(replica)  # it is not coming any more

    async def _push(self, update: WeightSnapshot, replica: Replica) -> None:
        incarnation = replica.incarnation
        if self.on_update == "recompute":
            await incarnation.interrupt()
        if replica.is_draining:
            return
        try:
            await replica.load_weights(update)
            self._counts.sync_bytes += replica.synced_bytes
        except Exception as error:  # the border to a program that is not ours
            self._fail(replica, incarnation, error)

    def _fail(self, replica: Replica, incarnation: Incarnation, error: BaseException) -> None:
        """Takes an engine out and begins to restart it; what comes late of an earlier incarnation of it says nothing
        of this one.
        """
        if replica.incarnation is not incarnation or incarnation.cause is not None or replica.state == "gone":
            return
        self._counts.failures += 1
        replica.fail(str(error) or type(error).__name__)
        if replica.is_draining:
            return  # it has no requests any more, so it leaves
        self._do(self._restart(replica))

    async def _restart(self, replica: Replica) -> None:
        """Ends it, starts it anew and gives it the newest weights; gives it up after several tries in vain."""
        pause_s = _FIRST_PAUSE_S
        while replica.state == "failed":
            await replica.shut_down()
            if replica.num_consecutive_failures >= _MAX_FAILURES:
                self._note(
                    f"engine {replica.name} is given up after {replica.num_consecutive_failures} failures; the last: {replica.cause}"
                )
                await replica.retire(replica.cause)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if replica.state != "failed":
                return
            try:
                await replica.open()
            except Exception as error:  # the border to a program that is not ours
                replica.fail(str(error) or type(error).__name__)
        if replica.state == "stale":
            await self._sync(replica)
        if replica.state == "serving":
            self._note(f"engine {replica.name} is back with version {replica.version}")

    async def _monitor(self) -> None:
        """Asks every engine whether it is well, again and again; tells those who wait when no engine will
        ever serve.
        """
        checks: dict[str, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(_CHECK_S)
            for replica in self.replicas:
                if replica.state == "serving" and (replica.name not in checks or checks[replica.name].done()):
                    checks[replica.name] = self._do(self._health_check(replica, replica.incarnation))
            self._check_waiting()

    async def _health_check(self, replica: Replica, incarnation: Incarnation) -> None:
        try:
            await replica.engine.check()
        except Exception as error:  # the border to a program that is not ours
            if replica.state == "serving":
                self._fail(replica, incarnation, error)

    def _check_waiting(self) -> None:
        """Ends the waits for an engine if none has served for too long, or none ever will."""
        now_s = self.loop.time()
        # While the policy has yet to give its weights, it is not the engines for which one waits.
        is_late = self.snapshot is not None and (not self.needs_policy or self.policy_can_send)
        is_late = is_late or not any(replica.engine.syncs_weights for replica in self.replicas)
        if (
            not self._router.has_waiters
            or not is_late
            or any(replica.state == "serving" for replica in self.replicas)
        ):
            self._served_s = now_s
        is_over = all(replica.state == "gone" for replica in self.replicas)
        if is_over or now_s - self._served_s >= self._wait_s:
            states = "; ".join(
                f"{replica.name} {replica.state}: {replica.cause or 'no cause'}" for replica in self.replicas
            )
            self._router.give_up(
                f"no engine serves version {self.version} of the policy ({states}); see the logs of the engines"
            )

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins something that nobody waits for; what it raises is told."""
        task = self.loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(f"a task of the fleet failed: {type(error).__name__}: {error}")
