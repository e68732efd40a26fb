"""A model in a thread of its own that generates for an event loop: requests come and go between two tokens,
and so do weights.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from verl.engines.hf.models import PolicyModel
from verl.rollout.embedded.generator import Generation, Row
from verl.utils.sampling_types import FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
# The cache begins with as many rows: a server mostly has few.
_FIRST_SLOTS = 8
_BEAT_S = 0.5
_PACE_S = 0.02


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        token_id: as it was drawn.
        logprob: of the distribution that it was drawn from.
        version: of the weights that drew it.
        likeliest: id and logprob of the most likely tokens in its place, where they are asked for.
        finish_reason: none: more will come.
    """

    token_id: int
    logprob: float
    version: int
    likeliest: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, row: Row, version: int) -> Token:
        """The last one of a row."""
        return cls(row.tokens[-1], row.logprobs[-1], version, tuple(row.likeliest), row.finish_reason)


class Request:
    """Prompts that are being answered, as the event loop sees them; answers are numbered through, prompt by
    prompt.

    Attributes:
        pace_s: see below.
        failure: why there will be no more tokens; None: there will, or all have come.

    Args:
        num_answers: to all prompts.
        pace_s: it is told of tokens of answers that go on at least so often, and of the last ones of an
            answer at once.
        arrived: is set when there is something new; several requests may have the same.
    """

    def __init__(
        self, num_answers: int, *, pace_s: float = _PACE_S, arrived: asyncio.Event | None = None
    ) -> None:
        self.pace_s = pace_s
        self.failure: str | None = None
        self._num_open = num_answers
        self._tokens: list[tuple[int, Token]] = []
        self._arrived = arrived or asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether all answers are complete and read."""
        return self._num_open == 0 and not self._tokens

    def take(self, answer: int, token: Token) -> None:
        """Keeps a new token for `more`."""
        self._tokens.append((answer, token))
        self._num_open -= token.finish_reason is not None
        self._arrived.set()

    def fail(self, message: str) -> None:
        """Lets `more` raise."""
        self.failure = message
        self._arrived.set()

    async def more(self, timeout_s: float) -> list[tuple[int, Token]]:
        """Number of the answer and token, of all since the last call; none if none came in time.

        Raises:
            RuntimeError: the generation failed.
        """
        if not self._tokens and self.failure is None:
            # Not by asyncio.wait_for: before Python 3.12 it loses a cancellation that comes together with a
            # token.
            timer = asyncio.get_running_loop().call_later(timeout_s, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                timer.cancel()
        if self.failure is not None:
            raise RuntimeError(self.failure)
        self._arrived.clear()
        return self.taken()

    def taken(self) -> list[tuple[int, Token]]:
        """Number of the answer and token, of all since the last call."""
        tokens, self._tokens = self._tokens, []
        return tokens


@dataclass(frozen=True)
class _Command:
    """Something to be done between two tokens; `outside` where the model is not in use, so that its weights
    may change.
    """

    run: Callable[[], Any]
    outside: bool
    result: Future[Any]


class AsyncGenerator:
    """Runs a model; everything about it is asked from one event loop.

    Attributes:
        version: of the weights.
        num_beats: grows at least twice a second while the thread is alive and no single step takes longer.

    Args:
        model: the policy.
        codec: its tokenizer.
        max_slots: most answers at a time; further ones wait.
    """

    def __init__(self, model: PolicyModel, codec: TextCodec, *, max_slots: int) -> None:
        self.version = 0
        self.num_beats = 0
        self._model, self._codec, self._max_slots = model.eval(), codec, max_slots
        self._generation = self._fresh_generation()
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._numbers = itertools.count()
        # By the number of each prompt: what asked for it, and the number of its first answer there.
        self._requests: dict[int, tuple[Request, int]] = {}
        self._holds: set[str] = set()
        # Tokens that the loop has not yet been given, with the number of the prompt and of the answer, and
        # when it was last given some.
        self._fresh: list[tuple[int, int, Token]] = []
        self._delivered_s = 0.0
        self._pace_s = math.inf  # of the request that wants it most often
        self._is_closed = self._is_stale = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it can generate."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Answers that have a slot."""
        return len(self._generation.rows)

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        num_likeliest: int = 0,
        first_answer: int = 0,
        request: Request | None = None,
    ) -> Request:
        """Asks for the answers to prompts that fit the model, to each from number `first_answer` on;
        `request` takes their tokens.
        """
        request = request or Request(sum(wanted.n for wanted in params))
        numbers = [next(self._numbers) for _ in prompts]
        first = 0
        for number, wanted in zip(numbers, params, strict=True):
            self._requests[number] = (request, first - first_answer)
            first += wanted.n
        self._pace_s = min(self._pace_s, request.pace_s)

        def add() -> None:
            for number, prompt, wanted in zip(numbers, prompts, params, strict=True):
                self._generation.add(
                    number, prompt, wanted, num_likeliest=num_likeliest, first_answer=first_answer
                )

        self._send(add)
        return request

    def drop(self, request: Request, answers: Collection[int] | None = None) -> None:
        """Takes a request back, or some of its answers; one that is over may be dropped, too."""
        numbers = {number: first for number, (other, first) in self._requests.items() if other is request}
        if answers is None:
            for number in numbers:
                del self._requests[number]
            self._pace_s = min((other.pace_s for other, _ in self._requests.values()), default=math.inf)

        def abort() -> None:
            for number, first in numbers.items():
                self._generation.abort(
                    number, None if answers is None else {answer - first for answer in answers}
                )

        if not request.is_over:
            self._send(abort)

    async def hold(self, reason: str) -> None:
        """Stops between two tokens, all of which have been delivered then; requests are kept, and new ones
        wait until each reason is released."""

        def stop() -> None:
            self._deliver()
            self._holds.add(reason)

        await asyncio.wrap_future(self._send(stop))

    async def release(self, reason: str, *, recompute: bool) -> None:
        """Goes on. After a change of the weights, caches are computed anew, or stay those of the weights
        before.
        """

        def go_on() -> None:
            self._is_stale = self._is_stale and recompute
            self._holds.discard(reason)

        await asyncio.wrap_future(self._send(go_on))

    async def with_weights(self, change: Callable[[], T]) -> T:
        """What `change` returns, run between two tokens while the model is not in use; caches count as stale
        from then on.
        """

        def changing() -> T:
            self._is_stale = True
            return change()

        result: T = await asyncio.wrap_future(self._send(changing, outside=True))
        return result

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed = True
        self._send(lambda: None)
        self._thread.join(timeout=10)

    def _send(self, run: Callable[[], Any], *, outside: bool = False) -> Future[Any]:
        command = _Command(run, outside, Future())
        self._commands.put(command)
        return command.result

    def _fresh_generation(self) -> Generation:
        return Generation(self._model, self._codec, slots=self._max_slots, first_slots=_FIRST_SLOTS)

    @property
    def _may_step(self) -> bool:
        return not (self._holds or self._is_closed or self._generation.is_idle)

    def _run(self) -> None:
        while not self._is_closed:
            self.num_beats += 1
            try:
                command = self._generate() if self._may_step else self._next(wait=True)
            except Exception as error:  # the border of the thread: all that is asked for fails, later requests are tried anew
                _LOG.exception("the generation failed")
                self._generation, self._fresh = self._fresh_generation(), []
                self._loop.call_soon_threadsafe(self._fail_all, str(error))
                continue
            if command is not None:
                _obey(command)
            else:
                self._generation.free()

    def _generate(self) -> _Command | None:
        """Generates until there is nothing more, or a command for which the model must be left; returns that
        one.
        """
        with torch.inference_mode(), self._model.forward_mode():
            if self._is_stale:
                self._generation.recompute()
                self._is_stale = False
            command = None
            while command is None and self._may_step:
                self._step()
                command = self._obey_inside()
        self._deliver()
        return command

    def _step(self) -> None:
        self.num_beats += 1
        rows = self._generation.step()
        self._fresh += [(row.request, row.sample, Token.of(row, self.version)) for row in rows]
        # To wake the loop costs both threads more than a token of a small model.
        if (
            any(row.finish_reason is not None for row in rows)
            or time.monotonic() - self._delivered_s >= self._pace_s
        ):
            self._deliver()

    def _deliver(self) -> None:
        """Gives new tokens to the loop."""
        self._delivered_s = time.monotonic()
        if self._fresh:
            self._loop.call_soon_threadsafe(self._take, self._fresh)
            self._fresh = []

    def _obey_inside(self) -> _Command | None:
        """Does what may be done while the model is in use; returns the first command that is not of these."""
        while (command := self._next(wait=False)) is not None and not command.outside:
            _obey(command)
        return command

    def _next(self, *, wait: bool) -> _Command | None:
        try:
            return self._commands.get(timeout=_BEAT_S) if wait else self._commands.get_nowait()
        except queue.Empty:
            return None

    def _take(self, tokens: list[tuple[int, int, Token]]) -> None:
        for number, sample, token in tokens:
            if number in self._requests:  # else it was dropped meanwhile
                request, first = self._requests[number]
                request.take(first + sample, token)

    def _fail_all(self, message: str) -> None:
        for request, _ in self._requests.values():
            request.fail(message)


def _obey(command: _Command) -> None:
    if not command.result.set_running_or_notify_cancel():
        return  # who asked has left
    try:
        result = command.run()
    except Exception as error:  # belongs to the one who asked
        command.result.set_exception(error)
    else:
        command.result.set_result(result)
