"""Calls on threads of the trainer: limits, and what they leave behind."""

import asyncio
import threading
import time

import pytest

from tests.rewards.answers import (
    length,
    rewards_of,
    rows,
    scored,
    slow_length,
)
from verl.rewards.reward_function import RewardFunction

release = threading.Event()


def hang(prompt, response):
    return release.wait() if response == "hang" else 1.0


async def hang_async(prompt, response):
    return await asyncio.sleep(1000 if response == "hang" else 0, result=1.0)


async def hang_without_awaiting(prompt, response):
    return release.wait() if response == "hang" else 1.0


def hang_in_batch(completions):
    return [hang("", c) for c in completions]


@pytest.fixture
def _released():
    release.clear()
    yield
    release.set()


@pytest.mark.usefixtures("_released")
@pytest.mark.parametrize(
    ("function", "num_hanging"),
    [(hang, 1), (hang, 12), (hang_async, 1), (hang_async, 70), (hang_without_awaiting, 2)],
)
def test_hanging_calls_fail_alone_and_block_neither_the_others_nor_the_next_call(function, num_hanging):
    functions = rewards_of(function, timeout_s=0.25)
    trajectories = rows(*["hang"] * num_hanging, *["good"] * 100)
    start = time.monotonic()
    functions.score(trajectories)
    assert time.monotonic() - start < 10.0
    assert {t.outcome for t in trajectories[:num_hanging]} == {"reward_timeout"}
    assert trajectories[0].detail.startswith(f"{function.__name__}: no answer within 0.25 s")
    assert [t.reward for t in trajectories[num_hanging:]] == [1.0] * 100
    again = rows("good", "good")
    functions.score(again)
    assert [t.reward for t in again] == [1.0, 1.0]


@pytest.mark.usefixtures("_released")
def test_a_hanging_batched_call_fails_its_rows_and_not_another_function():
    trajectories = scored(rows("hang", "good"), hang_in_batch, length, timeout_s=0.25)
    assert [(t.outcome, t.scores) for t in trajectories] == [("reward_timeout", {"length": 4.0})] * 2


@pytest.mark.usefixtures("_released")
def test_a_coroutine_that_holds_the_event_loop_is_told_to_await():
    trajectories = scored(rows("hang", *["good"] * 100), hang_without_awaiting, timeout_s=0.25)
    assert "held the event loop" in trajectories[0].detail
    assert [t.outcome for t in trajectories[1:]] == ["ok"] * 100


def test_the_clock_of_a_call_starts_with_the_call_and_not_in_the_queue():
    def work(prompt, response):
        time.sleep(0.15)
        return 1.0

    async def work_async(prompt, response):
        await asyncio.sleep(0.15)
        return 1.0

    assert {t.outcome for t in scored(rows(*["x"] * 48), work, timeout_s=0.8)} == {"ok"}
    assert {t.outcome for t in scored(rows(*["x"] * 384), work_async, timeout_s=0.8)} == {"ok"}


@pytest.mark.usefixtures("_released")
def test_calls_that_never_return_are_limited_in_number():
    functions = rewards_of(hang, timeout_s=0.02)
    with pytest.raises(
        RuntimeError, match=r"at most 16 reward calls that never return, got \d\d, the last one of 'hang'"
    ):
        functions.score(rows(*["hang"] * 40))
    with pytest.raises(RuntimeError, match="never return"):
        functions.score(rows("good"))
    release.set()
    time.sleep(0.1)
    after = rows("good")
    functions.score(after)
    assert after[0].reward == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("place", [None, "thread"])
def test_a_function_that_exits_fails_its_answer_and_does_not_end_the_program(error, is_async, place):
    def f(prompt, response):
        raise error("stop")

    async def f_async(prompt, response):
        raise error("stop")

    (row,) = scored(rows("x"), RewardFunction(f_async if is_async else f, place=place))
    assert (row.outcome, row.detail.split(" (")[0][-len(error.__name__) - 6 :]) == (
        "reward_error",
        f"{error.__name__}: stop",
    )


def test_a_timeout_error_of_the_function_itself_is_its_error():
    async def f(prompt, response):
        raise asyncio.TimeoutError("judge is down")

    (row,) = scored(rows("x"), f)
    assert row.outcome == "reward_error" and "TimeoutError: judge is down" in row.detail


def test_two_scorings_at_the_same_time_keep_apart():
    functions = rewards_of(length, slow_length)
    batches = [rows(*["x" * i] * 50) for i in range(4)]
    threads = [threading.Thread(target=functions.score, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{t.reward for t in batch} for batch in batches] == [{0.0}, {2.0}, {4.0}, {6.0}]
