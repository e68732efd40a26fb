"""Waits, their duration and stalls: on a clock of the test, in threads and in coroutines."""

from __future__ import annotations

import asyncio
import threading

import pytest

from verl.monitoring.wait_tracker import Snapshot, StageWaits, Wait, WaitTracker, stall_reason


class FakeClock:
    """A clock that advances only when the test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def waits(clock):
    return WaitTracker(clock=clock)


def test_a_snapshot_has_a_wait_in_progress_with_its_description_and_time(clock, waits):
    with waits.track("training", "a batch", limit_s=60.0):
        clock.pass_s(5)
        assert waits.snapshot() == Snapshot(
            5.0, 60.0, (StageWaits("training", 5.0, 1, (Wait("a batch", 5.0, 60.0),)),)
        )
    assert waits.snapshot() == Snapshot(0.0, 0.0, (StageWaits("training", 0.0),))


def test_seconds_are_taken_once_also_of_a_wait_in_progress(clock, waits):
    with waits.track("training", "a batch"):
        clock.pass_s(5)
        assert waits.take_seconds() == {"training": 5.0}
        clock.pass_s(2)
    clock.pass_s(100)
    assert waits.take_seconds() == {"training": 2.0}
    assert waits.take_seconds() == {"training": 0.0}


def test_several_waits_of_a_stage_count_once_and_the_oldest_is_named(clock, waits):
    first, second = waits.track("rewards", "group 1"), waits.track("rewards", "group 2")
    first.__enter__()
    clock.pass_s(3)
    second.__enter__()
    clock.pass_s(1)
    assert (
        str(waits.snapshot().stages[0])
        == "rewards has waited 4.0 s for group 1, the first of 2 waits, moved 4.0 s ago"
    )
    first.__exit__(None, None, None)
    clock.pass_s(1)
    assert str(waits.snapshot().stages[0]) == "rewards has waited 2.0 s for group 2, moved 1.0 s ago"
    second.__exit__(None, None, None)
    assert waits.take_seconds() == {"rewards": 5.0}


def test_waits_of_stages_nest(clock, waits):
    with waits.track("training", "a batch"):
        clock.pass_s(1)
        with waits.track("publishing", "engine b"):
            clock.pass_s(2)
    assert waits.take_seconds() == {"training": 3.0, "publishing": 2.0}


def test_a_description_is_evaluated_for_each_snapshot(waits):
    have = 0

    def description():
        return f"{have} of 8 groups"

    with waits.track("training", description):
        have = 5
        assert waits.snapshot().stages[0].waits[0].what == "5 of 8 groups"


def test_a_description_that_fails_is_replaced_by_its_error(waits):
    with waits.track("training", lambda: str(1 / 0)):
        assert (
            waits.snapshot().stages[0].waits[0].what
            == "something that cannot be described (ZeroDivisionError: division by zero)"
        )


def test_a_description_is_tried_again_if_its_data_changed_meanwhile(waits):
    answers = [RuntimeError("dictionary changed size during iteration"), RuntimeError("again"), None]

    def description():
        if error := answers.pop(0):
            raise error
        return "3 groups"

    with waits.track("training", description):
        assert waits.snapshot().stages[0].waits[0].what == "3 groups"


def test_a_wait_that_succeeds_is_progress_and_one_that_fails_is_not(clock, waits):
    clock.pass_s(10)
    with pytest.raises(TimeoutError), waits.track("training", "a batch"):
        clock.pass_s(1)
        raise TimeoutError
    assert waits.snapshot().still_s == 11.0 and waits.take_seconds() == {"training": 1.0}
    with waits.track("training", "a batch"):
        clock.pass_s(1)
    assert waits.snapshot().still_s == 0.0


def test_progress_of_any_stage_is_progress_of_the_run(clock, waits):
    with waits.track("training", "a batch"):
        for _ in range(10):
            clock.pass_s(9)
            assert stall_reason(waits.snapshot(), 10) is None
            waits.mark_progress("generation")
        clock.pass_s(9.5)
        assert stall_reason(waits.snapshot(), 10) is None
        clock.pass_s(0.5)
        assert stall_reason(waits.snapshot(), 10) == (
            "nothing has moved for 10 s, and may stand still for 10 s; "
            "training has waited 100 s for a batch, moved 100 s ago; "
            "generation waits for nothing, moved 10 s ago"
        )


def test_a_run_that_never_named_a_stage_can_stall_too(clock, waits):
    clock.pass_s(10)
    assert (
        stall_reason(waits.snapshot(), 10)
        == "nothing has moved for 10 s, and may stand still for 10 s; no stage has begun"
    )


def test_a_wait_over_its_own_limit_is_a_stall_though_others_move_and_though_it_is_not_the_oldest(
    clock, waits
):
    with waits.track("rewards", "group 1"), waits.track("rewards", "group 2", limit_s=5):
        clock.pass_s(5)
        waits.mark_progress("generation")
        assert stall_reason(waits.snapshot(), 100) is None
        clock.pass_s(0.1)
        waits.mark_progress("generation")
        assert stall_reason(waits.snapshot(), 100).startswith(
            "rewards has waited 5.1 s for group 2, and may for 5.0 s; rewards has waited"
        )


def test_a_wait_that_may_take_longer_than_the_limit_may(clock, waits):
    with waits.track("publishing", "engine b to start", limit_s=50):
        clock.pass_s(49)
        assert stall_reason(waits.snapshot(), 10) is None
    clock.pass_s(10)
    assert stall_reason(waits.snapshot(), 10) is not None


def test_a_snapshot_lists_few_of_many_waits_among_them_one_over_its_limit(clock, waits):
    contexts = [waits.track("generation", f"group {i}", limit_s=5 if i == 400 else None) for i in range(500)]
    for context in contexts:
        context.__enter__()
    clock.pass_s(6)
    (stage,) = waits.snapshot().stages
    assert stage.num_waits == 500 and [wait.what for wait in stage.waits] == [
        "group 400",
        "group 0",
        "group 1",
    ]


def test_time_without_possible_progress_is_excluded(clock, waits):
    with waits.track("training", "a batch", limit_s=20):
        clock.pass_s(1000)
        waits.exclude(995)
        assert waits.snapshot() == Snapshot(
            5.0, 20.0, (StageWaits("training", 5.0, 1, (Wait("a batch", 5.0, 20.0),)),)
        )
        waits.exclude(995)
        assert waits.snapshot().still_s == 0.0


def test_coroutines_of_one_stage_wait_at_once():
    async def main():
        waits = WaitTracker(clock=asyncio.get_running_loop().time)
        gate = asyncio.Event()

        async def ask(number):
            with waits.track("generation", f"group {number}"):
                await gate.wait()

        tasks = [asyncio.ensure_future(ask(number)) for number in range(4)]
        await asyncio.sleep(0)
        seen = waits.snapshot().stages[0]
        tasks[0].cancel()
        await asyncio.sleep(0)
        left = waits.snapshot().stages[0]
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return seen, left, waits.snapshot().stages[0]

    seen, left, after = asyncio.run(main())
    assert (seen.num_waits, left.num_waits, after.num_waits) == (4, 3, 0) and left.waits[0].what == "group 1"


def test_threads_wait_while_snapshots_are_taken():
    waits, num = WaitTracker(), 8

    def work():
        for number in range(300):
            with waits.track("rewards", lambda number=number: f"group {number}"):
                waits.mark_progress("generation")

    threads = [threading.Thread(target=work) for _ in range(num)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert all(stage.num_waits <= num for stage in waits.snapshot().stages)
        assert all(seconds >= 0 for seconds in waits.take_seconds().values())
    assert [stage.num_waits for stage in waits.snapshot().stages] == [0, 0]
