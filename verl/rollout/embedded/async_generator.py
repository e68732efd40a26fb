"""Generation in a thread for an event loop: requests start and end, and weights change, between two tokens.

The event loop posts commands to the thread, which executes them between two steps of the model; the thread
delivers new tokens to the loop. Neither touches the state of the other.
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
from verl.rollout.embedded.continuous_batch import ContinuousBatch, Row
from verl.rollout.embedded.prefix_cache import PrefixCache
from verl.utils.sampling_types import FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
# Slots of the cache at first: a server mostly has few requests.
_FIRST_SLOTS = 8
# Longest wait of the idle thread for a command, after which it shows that it is alive.
_HEARTBEAT_S = 0.5
_PACE_S = 0.02


class Token(NamedTuple):
    """A sampled token of an answer.

    Attributes:
        token_id: the sampled id.
        logprob: of the distribution that it was drawn from.
        version: of the weights that sampled it.
        top_logprobs: id and logprob of the most likely tokens at this position, if they were requested.
        finish_reason: None: more tokens will come.
        num_reused: prompt tokens of the answer whose keys and values were there already.
    """

    token_id: int
    logprob: float
    version: int
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    num_reused: int = 0

    @classmethod
    def last_of(cls, row: Row, version: int) -> Token:
        """The last token of a row."""
        top, reason = tuple(row.top_logprobs), row.finish_reason
        return cls(row.tokens[-1], row.logprobs[-1], version, top, reason, row.num_reused)


class GenerationRequest:
    """Prompts in generation, as seen by the event loop.

    The answers of all prompts are numbered from 0, prompt by prompt.

    Args:
        num_answers: to all prompts.
        pace_s: longest time between two deliveries of tokens; the last token of an answer comes at once.
        new_tokens: is set when there are new tokens; several requests may share one event.

    Attributes:
        pace_s: as above.
        failure: why there will be no more tokens; None: the generation has not failed.
    """

    def __init__(
        self, num_answers: int, *, pace_s: float = _PACE_S, new_tokens: asyncio.Event | None = None
    ) -> None:
        self.pace_s = pace_s
        self.failure: str | None = None
        self._num_unfinished = num_answers
        self._tokens: list[tuple[int, Token]] = []
        self._new_tokens = new_tokens or asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """True if all answers are complete, and their tokens were taken."""
        return self._num_unfinished == 0 and not self._tokens

    def put(self, answer: int, token: Token) -> None:
        """Add a new token."""
        self._tokens.append((answer, token))
        self._num_unfinished -= token.finish_reason is not None
        self._new_tokens.set()

    def fail(self, message: str) -> None:
        """Let `wait_tokens` raise."""
        self.failure = message
        self._new_tokens.set()

    async def wait_tokens(self, timeout_s: float) -> list[tuple[int, Token]]:
        """Wait for new tokens and take them; empty if none came in time.

        Returns:
            Number of the answer and token, of all tokens since the last call.

        Raises:
            RuntimeError: the generation failed.
        """
        if not self._tokens and self.failure is None:
            # asyncio.wait_for of Python before 3.12 loses a cancellation that comes together with a token:
            # https://github.com/python/cpython/issues/86296
            timer = asyncio.get_running_loop().call_later(timeout_s, self._new_tokens.set)
            try:
                await self._new_tokens.wait()
            finally:
                timer.cancel()
        if self.failure is not None:
            raise RuntimeError(self.failure)
        self._new_tokens.clear()
        return self.take_tokens()

    def take_tokens(self) -> list[tuple[int, Token]]:
        """Number of the answer and token, of all tokens since the last call."""
        tokens, self._tokens = self._tokens, []
        return tokens


@dataclass(frozen=True)
class _Command:
    """A function for the thread to call between two tokens.

    Attributes:
        run: the function.
        changes_weights: it is called while the model is not in use.
        result: of the call.
    """

    run: Callable[[], Any]
    changes_weights: bool
    result: Future[Any]

    def execute(self) -> None:
        """Call the function; its result or error goes to the caller."""
        if not self.result.set_running_or_notify_cancel():
            return  # the caller was cancelled
        try:
            result = self.run()
        except Exception as error:
            self.result.set_exception(error)
        else:
            self.result.set_result(result)


class AsyncGenerator:
    """A model that generates in a thread of its own; all methods are called in one event loop.

    Args:
        model: the policy.
        codec: its tokenizer.
        max_slots: answers at a time; further ones wait.
        prefix_tokens: limit on the tokens of finished answers whose keys and values are kept for prompts that
            begin with them; None: as many as the answers in generation take, 0: none.

    Attributes:
        version: of the weights.
        num_heartbeats: grows at least twice a second while the thread is alive, and at each step.
    """

    def __init__(
        self, model: PolicyModel, codec: TextCodec, *, max_slots: int, prefix_tokens: int | None = None
    ) -> None:
        self.version = 0
        self.num_heartbeats = 0
        self._model, self._codec, self._max_slots = model.eval(), codec, max_slots
        self._prefixes = PrefixCache(prefix_tokens)
        self._batch = self._new_batch()
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._prompt_ids = itertools.count()
        # For each prompt: its request, and what to add to a sample index to get the number of the answer
        # there.
        self._requests: dict[int, tuple[GenerationRequest, int]] = {}
        self._pause_reasons: set[str] = set()
        # Tokens that were not delivered yet, with the id of the prompt and the sample index.
        self._undelivered: list[tuple[int, int, Token]] = []
        self._delivered_s = 0.0
        self._pace_s = math.inf  # the shortest of all requests
        self._is_closed = self._cache_is_stale = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Answers that have a slot."""
        return len(self._batch.rows)

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        num_top_logprobs: int = 0,
        first_sample_index: int = 0,
        request: GenerationRequest | None = None,
    ) -> GenerationRequest:
        """Generate answers to prompts that fit the model.

        Args:
            prompts: token ids.
            params: one for each prompt.
            num_top_logprobs: most likely tokens to report with each token.
            first_sample_index: of the answers to each prompt; seed and sample index select the random
                numbers.
            request: that gets the tokens; None: a new one.
        """
        request = request or GenerationRequest(sum(wanted.n for wanted in params))
        prompt_ids = [next(self._prompt_ids) for _ in prompts]
        num_before = 0
        for prompt_id, wanted in zip(prompt_ids, params, strict=True):
            self._requests[prompt_id] = (request, num_before - first_sample_index)
            num_before += wanted.n
        self._pace_s = min(self._pace_s, request.pace_s)

        def add() -> None:
            for prompt_id, prompt, wanted in zip(prompt_ids, prompts, params, strict=True):
                self._batch.add(
                    prompt_id,
                    prompt,
                    wanted,
                    num_top_logprobs=num_top_logprobs,
                    first_sample_index=first_sample_index,
                )

        self._post(add)
        return request

    def abort(self, request: GenerationRequest, answers: Collection[int] | None = None) -> None:
        """Abort a request, or some of its answers; a finished one only gives its memory back."""
        shifts = {key: shift for key, (other, shift) in self._requests.items() if other is request}
        if answers is None:
            for prompt_id in shifts:
                del self._requests[prompt_id]
            self._pace_s = min((other.pace_s for other, _ in self._requests.values()), default=math.inf)

        def abort() -> None:
            for prompt_id, shift in shifts.items():
                indices = None if answers is None else {answer - shift for answer in answers}
                self._batch.abort(prompt_id, indices)

        if not request.is_finished:
            self._post(abort)

    async def pause(self, reason: str) -> None:
        """Stop between two tokens, when all earlier ones are delivered; requests wait for `resume`.

        Args:
            reason: for this pause; generation continues when each reason has been resumed.
        """

        def stop() -> None:
            self._deliver()
            self._pause_reasons.add(reason)

        await asyncio.wrap_future(self._post(stop))

    async def resume(self, reason: str, *, recompute: bool) -> None:
        """Continue after a pause.

        Args:
            reason: of the pause.
            recompute: after a change of the weights, compute the caches of running answers again; otherwise
                they stay those of the earlier weights.
        """

        def go_on() -> None:
            if self._cache_is_stale and not recompute:
                self._batch.mark_stale()
            self._cache_is_stale = self._cache_is_stale and recompute
            self._pause_reasons.discard(reason)

        await asyncio.wrap_future(self._post(go_on))

    async def update_weights(self, change: Callable[[], T]) -> T:
        """Call a function that changes the weights, between two tokens while the model is not in use."""

        def update() -> T:
            self._cache_is_stale = True
            self._prefixes.clear()
            return change()

        result: T = await asyncio.wrap_future(self._post(update, changes_weights=True))
        return result

    def close(self) -> None:
        """End the thread."""
        self._is_closed = True
        self._post(lambda: None)
        self._thread.join(timeout=10)

    def _post(self, run: Callable[[], Any], *, changes_weights: bool = False) -> Future[Any]:
        command = _Command(run, changes_weights, Future())
        self._commands.put(command)
        return command.result

    def _new_batch(self) -> ContinuousBatch:
        slots = {"slots": self._max_slots, "first_slots": _FIRST_SLOTS}
        return ContinuousBatch(self._model, self._codec, **slots, prefixes=self._prefixes)

    # In the thread:

    @property
    def _can_step(self) -> bool:
        return not (self._pause_reasons or self._is_closed or self._batch.is_idle)

    def _run(self) -> None:
        while not self._is_closed:
            self.num_heartbeats += 1
            try:
                command = self._generate() if self._can_step else self._next_command(wait=True)
            except Exception as error:  # the border of the thread: all requests fail, later ones may succeed
                _LOG.exception("the generation failed")
                self._batch, self._undelivered = self._new_batch(), []
                self._loop.call_soon_threadsafe(self._fail_requests, str(error))
                continue
            if command is not None:
                command.execute()
            else:
                self._batch.free_cache()

    def _generate(self) -> _Command | None:
        """Generate until all answers are complete, or a command changes the weights; return that command."""
        with torch.inference_mode(), self._model.forward_mode():
            if self._cache_is_stale:
                self._batch.recompute_cache()
                self._cache_is_stale = False
            command = None
            while command is None and self._can_step:
                self._step()
                while (command := self._next_command(wait=False)) is not None and not command.changes_weights:
                    command.execute()
        self._deliver()
        return command

    def _step(self) -> None:
        self.num_heartbeats += 1
        rows = self._batch.step()
        self._undelivered += [
            (row.prompt_id, row.sample_index, Token.last_of(row, self.version)) for row in rows
        ]
        # Waking the event loop costs both threads more than a token of a small model.
        is_due = time.monotonic() - self._delivered_s >= self._pace_s
        if is_due or any(row.finish_reason is not None for row in rows):
            self._deliver()

    def _deliver(self) -> None:
        """Hand new tokens to the event loop."""
        self._delivered_s = time.monotonic()
        if self._undelivered:
            self._loop.call_soon_threadsafe(self._put_tokens, self._undelivered)
            self._undelivered = []

    def _next_command(self, *, wait: bool) -> _Command | None:
        try:
            return self._commands.get(timeout=_HEARTBEAT_S) if wait else self._commands.get_nowait()
        except queue.Empty:
            return None

    # In the event loop:

    def _put_tokens(self, tokens: list[tuple[int, int, Token]]) -> None:
        for prompt_id, sample_index, token in tokens:
            if prompt_id in self._requests:  # otherwise it was aborted meanwhile
                request, shift = self._requests[prompt_id]
                request.put(shift + sample_index, token)

    def _fail_requests(self, message: str) -> None:
        for request, _ in self._requests.values():
            request.fail(message)
