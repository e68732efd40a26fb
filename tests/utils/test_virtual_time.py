"""Virtual time: hours of waiting pass at once, in a fixed order; an endless wait is an error."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from verl.utils.virtual_time import VirtualTimeLoop, run


def test_a_day_of_waiting_passes_at_once():
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        await asyncio.sleep(86_400.5)
        return start_s, loop.time()

    assert run(main()) == (0.0, 86_400.5)


def test_time_stands_still_while_something_is_to_be_done():
    async def main() -> float:
        for _ in range(100):
            await asyncio.sleep(0)
        time.sleep(0.01)
        return asyncio.get_running_loop().time()

    assert run(main()) == 0.0


def test_timers_run_in_the_order_of_their_times_each_at_its_own():
    async def main() -> list[tuple[str, float]]:
        loop, seen = asyncio.get_running_loop(), []
        for name, delay in (("c", 2.0), ("a", 1.0), ("d", 2.0 + 2**-51), ("b", 1.5)):
            loop.call_later(delay, lambda name=name: seen.append((name, loop.time())))
        await asyncio.sleep(3)
        return seen

    assert run(main()) == [("a", 1.0), ("b", 1.5), ("c", 2.0), ("d", 2.0 + 2**-51)]


def test_a_wait_for_the_rest_of_a_time_comes_to_its_end_whatever_is_rounded():
    async def main() -> int:
        loop, rounds = asyncio.get_running_loop(), 0
        for i in range(1000):
            until_s = loop.time() + (0.1 + i) / 3
            while (left_s := until_s - loop.time()) > 0:
                await asyncio.sleep(left_s * random.Random(i).choice([1.0, 0.3]) if left_s > 1e-6 else left_s)
                rounds += 1
            assert loop.time() >= until_s
        return rounds

    assert run(main()) < 100_000


def test_a_limit_in_time_is_kept():
    async def main() -> float:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 60)
        return asyncio.get_running_loop().time()

    assert run(main()) == 60.0


async def waits_forever() -> None:
    await asyncio.Event().wait()


def test_who_waits_for_what_never_comes_is_named_with_the_line():
    async def main() -> None:
        task = asyncio.ensure_future(waits_forever())
        task.set_name("the one in the corner")
        await asyncio.sleep(5)
        await task

    with pytest.raises(
        RuntimeError,
        match=r"at 5 s nothing will ever happen again.*Task-\d+ in main.*the one in the corner in wait",
    ):
        run(main())


def test_a_lock_that_two_take_in_opposite_order_is_no_hang():
    async def both(first: asyncio.Lock, second: asyncio.Lock) -> None:
        async with first:
            await asyncio.sleep(1)
            async with second:
                pass

    async def main() -> None:
        one, other = asyncio.Lock(), asyncio.Lock()
        await asyncio.gather(both(one, other), both(other, one))

    with pytest.raises(RuntimeError, match=r"at 1 s nothing will ever happen again.*in acquire.*in acquire"):
        run(main())


def test_a_program_that_polls_forever_ends_at_the_limit():
    async def main() -> None:
        while True:
            await asyncio.sleep(7)

    with pytest.raises(RuntimeError, match="at 994 s the limit of 1000 s comes first"):
        run(main(), limit_s=1000)


def test_a_program_that_goes_round_without_time_is_ended(monkeypatch):
    monkeypatch.setattr("verl.utils.virtual_time._MAX_ROUNDS", 1000)

    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="at 0 s it runs without letting time pass"):
        run(main())


def test_work_for_a_thread_is_done_at_once_and_its_error_is_raised_where_it_is_awaited():
    async def main() -> Any:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return await asyncio.to_thread(sum, [1, 2, 3]), asyncio.get_running_loop().time()

    assert run(main()) == (6, 0.0)


def test_tasks_that_are_left_are_ended_the_oldest_first_and_may_take_time_to():
    ended = []

    async def left(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ended.append(name)

    async def main() -> None:
        for name in "abc":
            asyncio.get_running_loop().create_task(left(name))
        await asyncio.sleep(0)

    run(main())
    assert ended == ["a", "b", "c"]


def test_an_error_of_the_program_is_raised_when_the_rest_has_ended():
    ended = []

    async def left() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(True)

    async def main() -> None:
        asyncio.get_running_loop().create_task(left())
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main())
    assert ended == [True]


def crowd(seed: int) -> list[tuple[float, int]]:
    """Times and values that many tasks receive which meet at random times."""

    async def main() -> list[tuple[float, int]]:
        loop, queue, seen = asyncio.get_running_loop(), asyncio.Queue[int](2), []
        rng = random.Random(seed)

        async def gives(i: int) -> None:
            await asyncio.sleep(rng.random())
            await queue.put(i)

        async def takes() -> None:
            for _ in range(25):
                await asyncio.sleep(rng.choice([0.0, rng.random()]))
                seen.append((loop.time(), await queue.get()))

        await asyncio.gather(*(gives(i) for i in range(50)), takes(), takes())
        return seen

    return run(main())


def test_equal_programs_do_the_same_in_the_same_order():
    assert crowd(1) == crowd(1) != crowd(2)


def test_the_list_of_tasks_does_not_grow_with_those_that_are_done():
    async def main() -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        for _ in range(5000):
            await loop.create_task(asyncio.sleep(1))
        return len(loop._tasks)

    assert run(main()) <= 1001
