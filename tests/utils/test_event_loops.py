"""Gathered requests, and interrupts of calls in threads."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.group_sampling import sample_groups
from verl.utils.event_loops import BackgroundLoop, Gatherer, OwnLoop, gather_all, wait_for_thread
from verl.utils.sampling_types import BatchGenerator, Completion, SamplingParams


def slowly(ends: list[str]) -> None:
    """Interrupts the main thread, then takes its time; notes how it ends."""
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    try:
        for _ in range(1000):
            time.sleep(0.01)
    except KeyboardInterrupt:
        ends.append("interrupted")
        raise


def test_an_interrupted_wait_for_a_thread_interrupts_the_call_in_it():
    ends: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        wait_for_thread(lambda: slowly(ends), name="slow")
    assert ends == ["interrupted"]


def test_an_interrupt_in_a_notebook_ends_the_work_and_the_loop_can_be_used_again():
    own, ends = OwnLoop(), []

    async def work() -> None:
        slowly(ends)

    async def cell() -> str:
        with pytest.raises(KeyboardInterrupt):
            own.run(work())
        assert ends == ["interrupted"]
        return own.run(asyncio.sleep(0, "again"))

    # `asyncio.run` has a handler of its own for the signal, a notebook has not.
    notebook = asyncio.new_event_loop()
    assert notebook.run_until_complete(cell()) == "again"
    notebook.close()
    own.close_loop()


def test_an_interrupt_calls_nothing_that_was_asked_before_it():
    own, calls = OwnLoop(), []
    gatherer = Gatherer[int, int](lambda requests: calls.append(requests) or requests)

    async def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.run(gather_all([gatherer.ask(1), interrupted()]))
    assert calls == [] and own.run(gatherer.ask(2)) == 2
    own.close_loop()


def cancelled(requests: list[int]) -> list[int]:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda requests: requests[1:], ValueError, "need an answer to each of 2 requests, got 1"),
        (cancelled, RuntimeError, "the call was cancelled"),
    ],
)
def test_a_call_that_answers_too_little_is_an_error_of_all_requests(
    call: Callable[[list[int]], list[int]], error: type[Exception], message: str
):
    gatherer = Gatherer[int, int](call)

    async def asked() -> list[Any]:
        return await asyncio.gather(gatherer.ask(1), gatherer.ask(2), return_exceptions=True)

    for result in asyncio.run(asked()):
        assert isinstance(result, error) and str(result) == message


class Uneven(BatchGenerator):
    """Gives the first prompt an answer of the second."""

    def generate(self, prompts: Any, params: Any) -> list[list[Completion]]:
        answer = Completion([1], [0.0], "stop")
        return [[answer] * 3, [answer]]


def test_a_batch_generator_must_give_each_prompt_its_number_of_completions():
    engine = BatchingEngine(Uneven())
    message = r"Uneven.generate must return \[2, 2\] completions for 2 prompts, got \[3, 1\]"
    with pytest.raises(ValueError, match=message):
        engine.run(sample_groups(engine, [[1], [2]], [SamplingParams(n=2)] * 2))
    engine.close()


def test_threads_share_a_background_loop_and_its_end_cancels_what_runs():
    loop = BackgroundLoop("test")
    ended = []

    async def forever():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def begin():
        return asyncio.ensure_future(forever())

    task = loop.run(begin())
    assert loop.run(asyncio.sleep(0, "value")) == "value"
    loop.close()
    loop.close()
    assert task.cancelled() and ended == [True] and loop.is_closed
