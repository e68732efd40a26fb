"""Groups through the pipeline by hand: what is admitted, tried again, dropped and batched, and that the
ledger knows each of them.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
import torch

from verl.agents.group_source import Source
from verl.agents.group_state import saved_groups
from verl.agents.groups import Group, GroupError
from verl.agents.pipeline import Pipeline, staleness_metrics
from verl.config import load_config
from verl.data.batch import Batch
from verl.data.trajectory import Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.utils.sampling_types import Prompt


class ByHand(Source):
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.in_turn = False
        self.asked: dict[int, tuple[Group, asyncio.Future[None]]] = {}
        self.order: list[int] = []

    def start(self, group: Group) -> asyncio.Future[None]:
        self.asked[group.number] = group, asyncio.get_running_loop().create_future()
        self.order.append(group.number)
        return self.asked[group.number][1]

    def finish(self, group: Group) -> bool:
        return len({t.reward for t in group.answers}) > 1

    async def answer(self, number: int, *rewards: float | str, version: int = 0) -> None:
        """Ends a group with answers of these rewards, or outcomes without one."""
        group, future = self.asked.pop(number)
        group.answers = group.answers or [
            Trajectory(group.prompt, [1], [2, 3], [True] * 2, [-1.0] * 2, [version] * 2, 0) for _ in rewards
        ]
        for t, reward in zip(group.answers, rewards, strict=True):
            t.reward, t.outcome = (reward, "ok") if isinstance(reward, float) else (None, reward)
        future.set_result(None)
        await settled()

    async def fail(self, number: int, error: Exception) -> None:
        self.asked.pop(number)[1].set_exception(error)
        await settled()


async def settled() -> None:
    """Lets everything happen that can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Bench:
    """A pipeline of two prompts a step."""

    def __init__(self, *overrides: str, max_resamples: int = 0, kept_share: float = 1.0) -> None:
        given = [f"pipeline.{override}" for override in overrides]
        config = load_config("grpo", ["rollout.engine=served", "rollout.servers=1", *given])
        self.source, self.ledger, self.drawn, self.notes = ByHand(), Ledger(), 0, []
        self.pipeline = Pipeline(
            self.draw,
            self.source,
            self.ledger,
            config.pipeline,
            prompts_per_step=2,
            waits=WaitTracker(),
            max_resamples=max_resamples,
            kept_share=kept_share,
        )

    def draw(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [Prompt(f"p{i}", index=i) for i in range(self.drawn - count, self.drawn)]

    async def begin(self) -> asyncio.Task[Any]:
        """A step that waits for its batch."""
        task = asyncio.ensure_future(self.pipeline.next_batch())
        await settled()
        return task

    async def learn(self, task: asyncio.Task[Any]) -> list[int]:
        """The numbers of a batch that is complete, which the policy then has learned from."""
        batch = await asyncio.wait_for(task, 5)
        await self.pipeline.drain_in_flight()
        self.pipeline.advance(self.pipeline.version + 1)
        await settled()
        return [group.number for group in batch.groups]


def in_loop(scenario):
    """A test that is a coroutine."""

    def test() -> None:
        asyncio.run(scenario())

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@in_loop
async def test_a_step_asks_for_its_prompts_and_none_before_the_next_version():
    bench = Bench()
    step = await bench.begin()
    assert bench.source.order == [0, 1]
    await bench.source.answer(1, 1.0, 0.0)
    await bench.source.answer(0, 1.0, 0.0)
    assert bench.source.order == [0, 1]
    assert await bench.learn(step) == [0, 1]
    assert bench.source.order == [0, 1, 2, 3]
    assert (bench.ledger.counts().trained, bench.ledger.counts().answering) == (2, 2)


@in_loop
async def test_one_step_of_staleness_is_one_batch_ahead_and_what_is_first_complete_is_first_learned_from():
    bench = Bench("max_staleness=1")
    step = await bench.begin()
    assert bench.source.order == [0, 1, 2, 3]
    await bench.source.answer(3, 1.0, 0.0)
    await bench.source.answer(2, 1.0, 0.0)
    assert await bench.learn(step) == [2, 3]
    assert bench.source.order == [0, 1, 2, 3, 4, 5]
    step = await bench.begin()
    await bench.source.answer(4, 1.0, 0.0, version=1)
    await bench.source.answer(0, 1.0, 0.0)
    assert not step.done()  # group 1 would be too stale after this batch
    await bench.source.answer(1, 1.0, 0.0)
    assert await bench.learn(step) == [0, 1]


@in_loop
async def test_groups_that_teach_nothing_give_way_to_other_prompts_so_many_times():
    bench = Bench(max_resamples=1)
    step = await bench.begin()
    for number in (0, 1):
        await bench.source.answer(number, 1.0, 1.0)
    assert bench.source.order == [0, 1, 2, 3]
    await bench.source.answer(2, 0.0, 0.0)
    await bench.source.answer(3, 1.0, 0.0)
    batch = await step
    assert [group.number for group in batch.groups if not group.has_no_signal] == [
        3
    ] and batch.num_refills == 2
    assert [group.number for group in batch.all_groups] == [0, 1, 2, 3]
    bench.pipeline.advance(1)
    counts = bench.ledger.counts()
    assert (counts.trained, counts.dropped) == (1, {"dead": 3})


@in_loop
async def test_the_groups_whose_rewards_deviate_least_are_dropped_when_the_batch_is_complete():
    bench = Bench(kept_share=0.5)
    step = await bench.begin()
    await bench.source.answer(0, 1.0, 0.5)
    await bench.source.answer(1, 1.0, 0.0)
    batch = await step
    assert [group.drop_reason for group in batch.groups] == ["low_deviation", ""]
    assert bench.ledger.counts().trained == 0
    bench.pipeline.advance(1)
    counts = bench.ledger.counts()
    assert (counts.trained, counts.dropped) == (1, {"low_deviation": 1})


@in_loop
async def test_a_group_is_asked_again_as_often_as_its_class_of_failure_allows():
    bench = Bench("retries.infrastructure=1")
    step = await bench.begin()
    await bench.source.fail(0, GroupError("infrastructure", "the engine died"))
    assert bench.source.order == [0, 1, 0]
    await bench.source.fail(0, GroupError("infrastructure", "the engine died"))
    assert bench.source.order == [0, 1, 0, 2]
    await bench.source.fail(1, GroupError("data", "too long"))
    assert bench.source.order == [0, 1, 0, 2, 3]
    for number in (2, 3):
        await bench.source.answer(number, 1.0, 0.0)
    assert await bench.learn(step) == [2, 3]
    counts = bench.ledger.counts()
    assert (counts.failed, counts.retries) == ({"infrastructure": 1, "data": 1}, {"infrastructure": 1})


@in_loop
async def test_a_reward_that_fails_is_asked_for_again_with_the_same_answers():
    bench = Bench()
    step = await bench.begin()
    answers = bench.source.asked[0][0].answers
    await bench.source.answer(0, 1.0, "reward_timeout")
    answers = bench.source.asked[0][0].answers
    assert len(answers) == 2 and answers[1].outcome == "ok"
    await bench.source.answer(0, 1.0, 0.5)
    await bench.source.answer(
        1, 1.0, "reward_not_finite"
    )  # another try would not mend it, and one answer is left
    batch = await step
    assert [len([t for t in group.answers if t.outcome == "ok"]) for group in batch.groups] == [2, 1]


@pytest.mark.parametrize(
    ("rule", "order", "dropped"), [("drop", [0, 1, 2], {"too_few": 1}), ("refill", [0, 1, 0], {})]
)
def test_a_group_with_too_few_survivors_is_dropped_or_refilled(rule, order, dropped):
    async def scenario() -> None:
        bench = Bench(f"survivors={rule}", "survivors.least=2")
        await bench.begin()
        await bench.source.answer(0, 1.0, "reward_not_finite")
        assert bench.source.order == order
        assert bench.ledger.counts().dropped == dropped
        again = bench.source.asked[order[-1]][0]
        assert again.attempt == (rule == "refill") and again.answers == []

    asyncio.run(scenario())


@in_loop
async def test_too_many_failures_in_a_row_stop_the_run_with_the_cause():
    bench = Bench("max_failures_in_a_row=3", "retries.infrastructure=0")
    step = await bench.begin()
    for number in range(3):
        await bench.source.fail(number, GroupError("infrastructure", "no engine serves"))
    with pytest.raises(
        RuntimeError,
        match="3 groups failed one after the other, the last with infrastructure: no engine serves",
    ):
        await asyncio.wait_for(step, 5)


@in_loop
async def test_what_is_no_failure_of_a_group_ends_the_run():
    bench = Bench()
    step = await bench.begin()
    await bench.source.fail(0, KeyError("a fault of ours"))
    with pytest.raises(KeyError, match="a fault of ours"):
        await asyncio.wait_for(step, 5)


@in_loop
async def test_the_slowest_of_an_oversampled_step_are_aborted_and_counted():
    bench = Bench("oversample=1")
    step = await bench.begin()
    assert bench.source.order == [0, 1, 2]
    straggler = bench.source.asked[1][1]
    await bench.source.answer(2, 1.0, 0.0)
    await bench.source.answer(0, 1.0, 0.0)
    assert await bench.learn(step) == [0, 2]
    assert straggler.cancelled() and bench.ledger.counts().dropped == {"straggler": 1}
    assert bench.source.order == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # none of them while version 0 was current: no batch could have had it


@in_loop
async def test_in_order_each_group_is_of_one_version_and_the_oldest_come_first():
    bench = Bench("max_staleness=1", "batches=deterministic")
    step = await bench.begin()
    for number in (3, 1, 2):
        await bench.source.answer(number, 1.0, 0.0)
    assert not step.done()  # what becomes of the others is decided when all are there
    await bench.source.answer(0, 1.0, 0.0)
    assert await bench.learn(step) == [0, 1]
    batch = await asyncio.wait_for(bench.pipeline.next_batch(), 5)
    assert [group.number for group in batch.groups] == [2, 3]
    publishing = asyncio.ensure_future(bench.pipeline.drain_in_flight())
    for number in (5, 4):
        assert not publishing.done()
        await bench.source.answer(number, 1.0, 0.0, version=1)
    await asyncio.wait_for(publishing, 5)


@in_loop
async def test_a_restart_keeps_answered_groups_and_asks_for_the_others_again_under_their_numbers():
    first = Bench("max_staleness=1")
    step = await first.begin()
    for number in (0, 1, 3):
        await first.source.answer(number, 1.0, 0.0)
    assert await first.learn(step) == [0, 1]
    file = io.BytesIO()
    ledger, groups = first.pipeline.snapshot()
    torch.save({"ledger": ledger, "groups": saved_groups(groups)}, file)
    file.seek(0)

    second = Bench("max_staleness=1")
    prompts = {i: Prompt(f"p{i}", index=i) for i in range(6)}
    second.drawn = first.drawn
    second.pipeline.load_state(torch.load(file, weights_only=True), 1, prompts)
    step = await second.begin()
    assert second.source.order == [2, 4, 5]
    assert second.source.asked[2][0].prompt is prompts[2] and second.source.asked[2][0].oldest == 1
    await second.source.answer(5, 1.0, 0.0, version=1)
    assert await second.learn(step) == [3, 5]
    counts = second.ledger.counts()
    assert (counts.dispatched, counts.trained, counts.answering, counts.accounted) == (8, 4, 4, 8)


@in_loop
async def test_what_the_trainer_and_the_generator_wait_for_has_names():
    bench = Bench()
    step = await bench.begin()
    told = {
        stage.stage: stage.waits[0].what for stage in bench.pipeline._waits.snapshot().stages if stage.waits
    }
    assert told["training"] == (
        "groups for the batch of version 0: it has 0, 2 are in flight, "
        "the oldest is group 0, answered since version 0"
    )
    for number in (0, 1):
        await bench.source.answer(number, 1.0, 0.0)
    await step
    told = {
        stage.stage: stage.waits[0].what for stage in bench.pipeline._waits.snapshot().stages if stage.waits
    }
    assert told == {"admission": "room for more groups: those within 0 steps of version 0 are answered"}


def test_staleness_is_of_sampled_tokens():
    rows = [Trajectory(Prompt("p"), [1], [2, 3, 4], [True, False, True], [-1.0] * 3, [5, 0, 7], 0)]
    metrics = staleness_metrics(Batch.from_trajectories(rows), 7)
    assert metrics == {
        "staleness/mean": 1.0,
        "staleness/max": 2.0,
        "staleness/share_0": 0.5,
        "staleness/share_2": 0.5,
    }
