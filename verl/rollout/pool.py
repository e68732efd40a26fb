"""Engines that start, take the policy's weights, serve, fail and leave while a run goes on, behind the contract of one engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from verl.rollout.answers import Answer
from verl.rollout.engine import EngineError, EngineSpec, ServedEngine
from verl.rollout.members import Interrupted, Life, Member
from verl.rollout.weights import PolicyWeights, Update
from verl.utils.rollout import Completion, RolloutEngine, SamplingParams, check_requests
from verl.utils.tokens import TextCodec

T = TypeVar("T")
MakeEngine = Callable[[EngineSpec], ServedEngine]
# How often engines are asked whether they are well, and how often one answer may move to another engine.
_CHECK_S, _MAX_MOVES = 2.0, 8
# Failures without one good answer between them, after which an engine is given up, and the pauses before its restarts.
_MAX_FAILURES, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 6, 1.0, 30.0
# More than a prompt has answers.
_NUMBERS = 2**20


@dataclass
class _Session:
    """Requests that share a prefix, and the engine that has it in its cache."""

    member: Member | None = None


@dataclass
class _Counts:
    """What happened since it was last asked."""

    moved: int = 0
    kept_tokens: int = 0
    thrown_tokens: int = 0
    failures: int = 0
    sync_s: float = 0.0
    write_s: float = 0.0
    sync_bytes: int = 0


class EnginePool(RolloutEngine):
    """Lets several engines answer, each the prompts for which it has room; what one has not finished, another goes on with.

    The engines live in an event loop in a thread of their own. Weights of a version are written once, into shared memory, and stay
    there until the next, so that an engine that comes later, or again, gets the same.

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
        on_update: requests that run when weights come are kept and go on with them, or are aborted and begin anew.
        note: is told what happened, for people.

    Raises:
        ValueError: what was given cannot be used by an engine.
        EngineError: none of the engines starts.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        make: MakeEngine,
        codec: TextCodec,
        weights: PolicyWeights | None,
        *,
        vocabulary: int,
        context: int,
        max_running: int = 256,
        wait_s: float = 1200.0,
        sleeps: bool = False,
        on_update: Literal["keep", "abort"] = "keep",
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.members: list[Member] = []
        self._make, self._codec, self._weights, self._note = make, codec, weights, note
        self._options = {"max_running": max_running, "vocabulary": vocabulary}
        self._context, self._wait_s, self._sleeps = context, wait_s, sleeps
        self._aborts = on_update == "abort"
        self._publisher, self._is_at_hand = threading.get_ident(), False
        self._update: Update | None = None
        self._counts = _Counts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._served_s = time.monotonic()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        try:
            self.run(self._open(specs))
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs something in the loop of the engines, and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context; or an engine refuses a request.
            RuntimeError: no engine serves, or answers fail on one engine after the other.
        """
        check_requests(prompts, params, context=self._context)
        if self._weights is not None and self._update is None:
            self.publish(self.version)
        with self._policy_at_hand():
            if self._is_at_hand:
                self.run(self._spread())  # to those that came meanwhile
            return self.run(self._generate(prompts, params))

    def publish(self, version: int) -> None:
        """See `RolloutEngine.publish`; requests that run are paused, kept, and go on with the new weights, or begin anew."""
        super().publish(version)
        self._publisher = threading.get_ident()
        if self._weights is not None:
            self.run(self._forget(interrupts=self._aborts))
            update = self._weights.write(version)
            self._counts.write_s += update.seconds
            self._update = update
        with self._policy_at_hand():
            self.run(self._spread())

    @contextmanager
    def _policy_at_hand(self) -> Iterator[None]:
        """Inside, the policy can be asked for weights that are not here: the thread that publishes waits and asks nothing else of it."""
        is_outermost = not self._is_at_hand and threading.get_ident() == self._publisher
        self._is_at_hand |= is_outermost and self._update is not None and self._update.direct is not None
        try:
            yield
        finally:
            if is_outermost and self._is_at_hand:
                self._is_at_hand = False
                self.run(self._settled())

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; those that share no device go on."""
        if self._sleeps:
            self.run(self._sleep())

    def add(self, spec: EngineSpec) -> None:
        """One more engine, which serves as soon as it has started and has the weights."""
        self.run(self.add_engine(spec))

    def remove(self, name: str) -> None:
        """Gives an engine no further requests, and ends it when it has none.

        Raises:
            ValueError: there is no such engine.
        """
        self.run(self.remove_engine(name))

    def take_metrics(self) -> dict[str, float]:
        """See `RolloutEngine.take_metrics`."""
        counts, self._counts = self._counts, _Counts()
        repaired = sum(member.repaired for member in self.members)
        for member in self.members:
            member.repaired = 0
        return {
            "engines/serving": float(sum(member.state == "serving" for member in self.members)),
            "engines/failures": float(counts.failures),
            "engines/moved_answers": float(counts.moved),
            "engines/kept_tokens": float(counts.kept_tokens),
            "engines/thrown_tokens": float(counts.thrown_tokens),
            "engines/repaired_updates": float(repaired),
            "engines/sync_bytes": float(counts.sync_bytes),
            "time/sync_write_s": counts.write_s,
            "time/sync_load_s": counts.sync_s,
        }

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self.loop.is_closed():
            return
        try:
            self.run(self._close())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()
            if self._weights is not None:
                self._weights.close()

    # In the loop of the engines ---------------------------------------------------------------------------------------------

    async def add_engine(self, spec: EngineSpec) -> None:
        """See `add`; in the loop of the engines."""
        member = self._member(spec)
        self.members.append(member)
        self._do(self._join(member))

    async def remove_engine(self, name: str) -> None:
        """See `remove`; in the loop of the engines."""
        member = next((member for member in self.members if member.name == name and member.state != "gone"), None)
        if member is None:
            raise ValueError(f"need the name of an engine, got {name!r}; there are {', '.join(member.name for member in self.members)}")
        member.is_leaving = True
        self._do(self._drain(member))

    async def _open(self, specs: Sequence[EngineSpec]) -> None:
        """Starts all at once; those that fail are tried again, unless all do."""
        self.members = []
        for spec in specs:
            self.members.append(self._member(spec))
        opened = await asyncio.gather(*(member.open() for member in self.members), return_exceptions=True)
        for member, error in zip(self.members, opened, strict=True):
            if isinstance(error, BaseException) and not isinstance(error, EngineError):
                raise error
            if isinstance(error, EngineError):
                self._fail(member, member.life, error)
        failures = [error for error in opened if isinstance(error, EngineError)]
        if failures and len(failures) == len(opened):
            raise failures[0]
        self._do(self._watch())

    def _member(self, spec: EngineSpec) -> Member:
        if any(member.name == spec.name and member.state != "gone" for member in self.members):
            raise ValueError(f"need a name that no engine has, got {spec.name!r}")
        return Member(self._make(spec), note=self._note, **self._options)

    async def _join(self, member: Member) -> None:
        try:
            await member.open()
        except Exception as error:  # the border to a program that is not ours
            self._fail(member, member.life, error)
        else:
            await self._sync(member)

    async def _drain(self, member: Member) -> None:
        while member.life.running:
            await asyncio.sleep(0.05)
        await member.leave(f"engine {member.name} was removed")
        self._note(f"engine {member.name} has left")

    async def _forget(self, *, interrupts: bool = False) -> None:
        """No engine reads the last update from here on: its memory is about to be given back."""
        self._update = None
        await self._settled()
        if interrupts:
            await asyncio.gather(*(member.life.interrupt() for member in self.members if member.engine.follows))

    async def _settled(self) -> None:
        """Returns when no engine takes weights."""
        for member in self.members:
            async with member.taking:
                pass

    async def _sleep(self) -> None:
        await self._forget()
        await asyncio.gather(*(self._send_to_sleep(member) for member in self.members if member.state == "serving"))

    async def _send_to_sleep(self, member: Member) -> None:
        life = member.life
        try:
            await member.sleep()
        except Exception as error:  # the border to a program that is not ours
            self._fail(member, life, error)

    async def _spread(self) -> None:
        """Gives the newest weights to all that have others."""
        start_s = time.perf_counter()
        await asyncio.gather(*(self._sync(member) for member in self.members if member.state in ("stale", "serving")))
        self._counts.sync_s += time.perf_counter() - start_s

    async def _sync(self, member: Member) -> None:
        """Gives an engine the newest weights, if it follows the policy and has others, and they are here or the policy can be asked."""
        life = member.life
        try:
            async with member.taking:
                update = self._update
                if update is not None and update.direct is not None and not self._is_at_hand:
                    return  # it stays stale until then
                if member.engine.follows and update is not None and member.taken is not update:
                    await member.take(update)
                    self._counts.sync_bytes += member.taken_bytes
        except Exception as error:  # the border to a program that is not ours
            self._fail(member, life, error)
        self._wake()

    def _fail(self, member: Member, life: Life, error: BaseException) -> None:
        """Takes an engine out and begins to restart it; what comes late of an earlier life of it says nothing of this one."""
        if member.life is not life or life.cause is not None or member.state == "gone":
            return
        self._counts.failures += 1
        member.fail(str(error) or type(error).__name__)
        if member.is_leaving:
            return  # it has no requests any more, so it leaves
        self._do(self._restart(member))

    async def _restart(self, member: Member) -> None:
        """Ends it, starts it anew and gives it the newest weights; gives it up after several tries in vain."""
        pause_s = _FIRST_PAUSE_S
        while member.state == "failed":
            await member.engine.close()
            if member.failures >= _MAX_FAILURES:
                self._note(f"engine {member.name} is given up after {member.failures} failures; the last: {member.cause}")
                await member.leave(member.cause)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if member.state != "failed":
                return
            try:
                await member.open()
            except Exception as error:  # the border to a program that is not ours
                member.fail(str(error) or type(error).__name__)
        if member.state == "stale":
            await self._sync(member)
        if member.state == "serving":
            self._note(f"engine {member.name} is back with version {member.version}")
        self._wake()

    async def _watch(self) -> None:
        """Asks every engine whether it is well, again and again; tells those who wait when no engine will ever serve."""
        looks: dict[str, asyncio.Task[None]] = {}
        while True:
            await asyncio.sleep(_CHECK_S)
            for member in self.members:
                if member.state == "serving" and (member.name not in looks or looks[member.name].done()):
                    looks[member.name] = self._do(self._look(member, member.life))
            self._check_waiting()

    async def _look(self, member: Member, life: Life) -> None:
        try:
            await member.engine.check()
        except Exception as error:  # the border to a program that is not ours
            if member.state == "serving":
                self._fail(member, life, error)

    def _check_waiting(self) -> None:
        """Ends the waits for an engine if none has served for too long, or none ever will."""
        if any(member.state == "serving" for member in self.members):
            self._served_s = time.monotonic()
        is_over = all(member.state == "gone" for member in self.members)
        if not is_over and time.monotonic() - self._served_s < self._wait_s:
            self._wake()
            return
        states = "; ".join(f"{member.name} {member.state}: {member.cause or 'no cause'}" for member in self.members)
        told = f"no engine serves version {self.version} of the policy ({states}); see the logs of the engines"
        while self._waiting:
            if not (waiting := self._waiting.popleft()).done():
                waiting.set_exception(RuntimeError(told))

    async def _generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        tasks = []
        self._served_s = time.monotonic()
        for prompt, wanted in zip(prompts, params, strict=True):
            session = _Session()
            one = replace(wanted, n=1, stop_ids=tuple(dict.fromkeys((*self._codec.stop_ids, *wanted.stop_ids))))
            tasks += [asyncio.ensure_future(self._answer(list(prompt), one, i, session)) for i in range(wanted.n)]
        try:
            answers = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return [[next(answers) for _ in range(wanted.n)] for wanted in params]

    async def _answer(self, prompt: list[int], params: SamplingParams, number: int, session: _Session) -> Completion:
        """One answer, from as many engines as it takes."""
        answer = Answer(params, self._codec)
        while answer.finish_reason is None:
            member = await self._room(session)
            life = member.life
            try:
                await life.share(self._go_on(answer, member, prompt, number))
                member.finished()
            except Interrupted:
                self._counts.thrown_tokens += answer.begin_anew()
            except EngineError as error:
                self._fail(member, life, error)
                self._move(answer, session, error)
                answer.end_if_due(0)
            finally:
                self._wake(1)
        return answer.completion(self.version)

    def _move(self, answer: Answer, session: _Session, error: EngineError) -> None:
        """Takes an answer from an engine that failed."""
        session.member = None
        answer.moves += 1
        self._counts.moved += 1
        self._counts.kept_tokens += len(answer.token_ids)
        if answer.moves > _MAX_MOVES:
            raise RuntimeError(f"an answer failed on {answer.moves} engines in turn; the last: {error}") from error

    async def _go_on(self, answer: Answer, member: Member, prompt: list[int], number: int) -> None:
        """Samples the rest of an answer on one engine.

        Raises:
            EngineError: it did not come to its end.
        """
        have = len(answer.token_ids)
        # An engine that begins its random numbers anew may not repeat those that the first tokens were drawn with.
        own = number if not have or member.engine.seeds_by_place else number + _NUMBERS * have
        rest = replace(answer.params, max_tokens=answer.params.max_tokens - have)
        async with aclosing(member.sample([*prompt, *answer.token_ids], rest, number=own)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                seen = len(answer.token_ids)
                version = next(v for v in (chunk.version, member.version, self.version) if v is not None)
                answer.add(chunk, version)
                if chunk.finish_reason is not None and not answer.token_ids and answer.text is None:
                    break
                answer.finish_reason = chunk.finish_reason
                if have:
                    answer.end_if_due(seen)
                if answer.finish_reason is not None:
                    return
        raise EngineError(f"engine {member.name} ended an answer without a token or without saying why")

    async def _room(self, session: _Session) -> Member:
        """An engine with room: the one that the session is with, else that with most room, with which the session stays.

        Raises:
            RuntimeError: no engine has served for too long, or none ever will.
        """
        while True:
            own = session.member
            if own is not None and own.free and self._is_current(own):
                return own
            free = max((m for m in self.members if m.free and self._is_current(m)), key=lambda m: m.free, default=None)
            if free is not None:
                if own is None or own.state != "serving":
                    session.member = free
                return free
            waiting = self.loop.create_future()
            self._waiting.append(waiting)
            await waiting

    def _is_current(self, member: Member) -> bool:
        return not member.engine.follows or (member.taken is self._update and member.version == self.version)

    def _wake(self, count: int | None = None) -> None:
        """Lets those who have waited longest look for room: `count` of them, or as many as there is room for."""
        if count is None:
            count = sum(member.free for member in self.members)
        while self._waiting and count > 0:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                count -= 1

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.leave("the run has ended") for member in self.members), return_exceptions=True)

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins something that nobody waits for; what it raises is told."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(f"a task of the pool of engines failed: {type(error).__name__}: {error}")
