"""Engines that start, take the policy's weights, serve, fail and leave while a run goes on, behind the contract of one engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from verl.rollout.engine import EngineError, EngineSpec, RefusedError, ServedEngine
from verl.rollout.members import Member
from verl.rollout.weights import PolicyWeights, Update
from verl.utils.rollout import Completion, FinishReason, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")
MakeEngine = Callable[[EngineSpec], ServedEngine]
# How often engines are asked whether they are well, and how often one answer may move to another engine.
_CHECK_S, _MAX_MOVES = 2.0, 8
# More than a prompt has answers.
_NUMBERS = 2**20


@dataclass
class _Session:
    """Requests that share a prefix, and the engine that has it in its cache."""

    member: Member | None = None


@dataclass
class _Answer:
    """What has been sampled of an answer, by whichever engines."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: str | None = None
    moves: int = 0


@dataclass
class _Counts:
    """What happened since it was last asked."""

    moved: int = 0
    kept_tokens: int = 0
    failures: int = 0
    syncs: int = 0
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
        wait_s: float = 600.0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.members: list[Member] = []
        self._make, self._codec, self._weights, self._note = make, codec, weights, note
        self._options = {"max_running": max_running, "vocabulary": vocabulary}
        self._context, self._wait_s = context, wait_s
        self._update: Update | None = None
        self._counts = _Counts()
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        self._changed = asyncio.Condition()
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
        if len(prompts) != len(params):
            raise ValueError(f"need sampling parameters for each prompt, got {len(prompts)} prompts and {len(params)} parameters")
        for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            if not prompt or len(prompt) + wanted.max_tokens > self._context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and may get {wanted.max_tokens} more; need at least one, and at most "
                    f"{self._context} in all, the model's context; lower sampling.max_tokens or data.max_prompt_tokens"
                )
        if self._weights is not None and self._update is None:
            self.publish(self.version)
        return self.run(self._generate(prompts, params))

    def publish(self, version: int) -> None:
        """See `RolloutEngine.publish`; requests that run are paused, kept, and go on with the new weights."""
        super().publish(version)
        if self._weights is not None:
            self._update = self._weights.write(version)
            self._counts.write_s += self._update.seconds
        self.run(self._spread())

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
            "engines/repaired_updates": float(repaired),
            "engines/sync_bytes": float(counts.sync_bytes),
            "time/sync_write_s": counts.write_s,
            "time/sync_load_s": counts.sync_s,
        }

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self.loop.is_closed():
            return
        self.run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        if self._weights is not None:
            self._weights.close()

    # In the loop of the engines ---------------------------------------------------------------------------------------------

    async def _open(self, specs: Sequence[EngineSpec]) -> None:
        """Starts all at once; those that fail are tried again, unless all do."""
        self.members = [self._member(spec) for spec in specs]
        opened = await asyncio.gather(*(member.open() for member in self.members), return_exceptions=True)
        for member, error in zip(self.members, opened, strict=True):
            if isinstance(error, BaseException) and not isinstance(error, EngineError):
                raise error
            if isinstance(error, EngineError):
                self._fail(member, error)
        failures = [error for error in opened if isinstance(error, EngineError)]
        if failures and len(failures) == len(opened):
            raise failures[0]
        self._do(self._watch())

    def _member(self, spec: EngineSpec) -> Member:
        if any(member.name == spec.name and member.state != "gone" for member in self.members):
            raise ValueError(f"need a name that no engine has, got {spec.name!r}")
        return Member(self._make(spec), note=self._note, **self._options)

    async def add_engine(self, spec: EngineSpec) -> None:
        """See `add`; in the loop of the engines."""
        member = self._member(spec)
        self.members.append(member)
        self._do(self._join(member))

    async def _join(self, member: Member) -> None:
        try:
            await member.open()
            await self._sync(member)
        except (EngineError, ValueError) as error:
            self._fail(member, error)
        await self._tell()

    async def remove_engine(self, name: str) -> None:
        """See `remove`; in the loop of the engines."""
        member = next((member for member in self.members if member.name == name and member.state != "gone"), None)
        if member is None:
            raise ValueError(f"need the name of an engine, got {name!r}; there are {', '.join(member.name for member in self.members)}")
        member.become("draining")
        self._do(self._drain(member))

    async def _drain(self, member: Member) -> None:
        while member.running:
            await asyncio.sleep(0.05)
        await member.leave()
        self._note(f"engine {member.name} has left")

    async def _spread(self) -> None:
        """Gives the newest weights to all that have others."""
        start_s = time.perf_counter()
        behind = [member for member in self.members if member.state in ("stale", "serving")]
        await asyncio.gather(*(self._sync_or_fail(member) for member in behind))
        self._counts.sync_s += time.perf_counter() - start_s

    async def _sync_or_fail(self, member: Member) -> None:
        try:
            await self._sync(member)
        except (EngineError, RefusedError) as error:
            self._fail(member, error)
        await self._tell()

    async def _sync(self, member: Member) -> None:
        """Until it has the newest, which may change while it takes it."""
        if not member.engine.follows:
            member.version = self.version
        while member.engine.follows and self._update is not None and member.version != self._update.version:
            await member.take(self._update)
            self._counts.syncs += 1
            self._counts.sync_bytes += self._update.num_bytes

    def _fail(self, member: Member, error: BaseException) -> None:
        """Takes an engine out and begins to restart it."""
        if member.state in ("failed", "gone"):
            return
        if member.state == "draining":
            self._do(member.leave())
            return
        self._counts.failures += 1
        member.fail(str(error))
        self._do(self._restart(member))

    async def _restart(self, member: Member) -> None:
        await member.restart(lambda: self._update)
        if member.state == "serving":
            await self._sync_or_fail(member)
            self._note(f"engine {member.name} is back with version {member.version}")
        await self._tell()

    async def _watch(self) -> None:
        """Asks every engine whether it is well, again and again."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await asyncio.gather(*(self._look(member) for member in self.members if member.state == "serving"))

    async def _look(self, member: Member) -> None:
        try:
            await member.engine.check()
        except EngineError as error:
            if member.state == "serving":
                self._fail(member, error)

    async def _generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        tasks = []
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
        answer = _Answer()
        while answer.finish_reason is None:
            member = await self._room(session)
            try:
                await self._go_on(answer, member, prompt, params, number)
            except EngineError as error:
                self._fail(member, error)
                session.member = None
                answer.moves += 1
                self._counts.moved += 1
                self._counts.kept_tokens += len(answer.token_ids)
                if answer.moves > _MAX_MOVES:
                    raise RuntimeError(f"an answer failed on {answer.moves} engines in turn; the last: {error}") from error
                self._finish_if_ended(answer, params)
            finally:
                await self._tell()
        if answer.text is not None and not answer.token_ids:
            return self._of_text(answer, params)
        return Completion(answer.token_ids, answer.logprobs, answer.finish_reason, answer.versions[0], versions=answer.versions)

    async def _go_on(self, answer: _Answer, member: Member, prompt: list[int], params: SamplingParams, number: int) -> None:
        """Samples the rest of an answer on one engine."""
        have = len(answer.token_ids)
        # An engine that begins its random numbers anew may not repeat those that the first tokens were drawn with.
        own = number if not have or member.engine.seeds_by_place else number + _NUMBERS * have
        rest = replace(params, max_tokens=params.max_tokens - have)
        async with aclosing(member.sample([*prompt, *answer.token_ids], rest, number=own)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                version = member.version if chunk.version is None else chunk.version
                answer.token_ids += chunk.token_ids
                answer.logprobs += chunk.logprobs
                answer.versions += [self.version if version is None else version] * len(chunk.token_ids)
                answer.text = chunk.text if chunk.text is not None else answer.text
                answer.finish_reason = chunk.finish_reason
                if have and answer.finish_reason is None:
                    self._finish_if_ended(answer, params)
                if answer.finish_reason is not None:
                    return

    def _finish_if_ended(self, answer: _Answer, params: SamplingParams) -> None:
        """Ends an answer that an engine had no time to end, or whose stop text began on another engine."""
        ids = answer.token_ids
        if not ids:
            return
        if params.stop:
            tail = self._codec.decode(ids[-(max(len(stop.encode()) for stop in params.stop) + 8) :])
            if any(stop in tail for stop in params.stop):
                answer.finish_reason = "stop"
        if ids[-1] in params.stop_ids:
            answer.finish_reason = "stop"
        elif answer.finish_reason is None and len(ids) >= params.max_tokens:
            answer.finish_reason = "length"

    def _of_text(self, answer: _Answer, params: SamplingParams) -> Completion:
        """An answer that came as text: tokenized once, without logprobs."""
        assert answer.text is not None and answer.finish_reason is not None
        ids = self._codec.encode_answer(answer.text) if answer.finish_reason == "stop" else self._codec.encode(answer.text)
        cut = len(ids) > params.max_tokens
        return Completion(ids[: params.max_tokens], None, "length" if cut else answer.finish_reason, self.version, answer.text)

    async def _room(self, session: _Session) -> Member:
        """An engine with room: the one that the session is with, else that with most room, for which the session stays with it.

        Raises:
            RuntimeError: no engine has served for too long, or none ever will.
        """
        deadline = time.monotonic() + self._wait_s
        async with self._changed:
            while True:
                serving = [m for m in self.members if m.state == "serving" and (not m.engine.follows or m.version == self.version)]
                free = max(serving, key=lambda m: m.free, default=None)
                if session.member is not None and session.member in serving and session.member.free:
                    return session.member
                if free is not None and free.free:
                    session.member = session.member if session.member in serving else free
                    return free
                if serving:
                    deadline = time.monotonic() + self._wait_s
                await self._wait(deadline)

    async def _wait(self, deadline: float) -> None:
        if all(member.state == "gone" for member in self.members) or time.monotonic() > deadline:
            states = "; ".join(f"{m.name} {m.state}: {m.cause or 'no cause'}" for m in self.members)
            raise RuntimeError(f"no engine serves version {self.version} of the policy ({states}); see the logs of the engines")
        try:
            await asyncio.wait_for(self._changed.wait(), 1.0)
        except asyncio.TimeoutError:
            return

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.leave() for member in self.members))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Begins something that nobody waits for."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
