"""A pool in one event loop: requests are sampled and cancelled, slots are shared, weights are updated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.pool.pools import generate, publish
from tests.tiny import tiny_codec
from verl.rollout.group_sampling import sample_group
from verl.rollout.inference_server import EngineError, InferenceServer, RefusedError, ServerSpec, TokenChunk
from verl.rollout.pool.inference_pool import InferencePool
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.router import PrefixAffinity, Router
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import Completion, SamplingParams
from verl.weight_sync.types import TensorInfo, WeightChunk

TWO = SamplingParams(n=2, max_tokens=4)


class Gated(InferenceServer):
    """Samples a token, 50 plus its position, while its gate is open.

    A prompt that begins with 9 is refused, one that begins with 8 fails.
    """

    transports = ("shm",)
    position_seeded = True

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self.gate, self.load_gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.load_gate.set()
        self.began = self.left = 0

    async def open(self) -> None:
        return

    async def check(self) -> None:
        return

    async def close(self) -> None:
        return

    async def sample(self, prompt_ids: Any, params: SamplingParams) -> AsyncIterator[TokenChunk]:
        if prompt_ids[0] == 9:
            raise RefusedError("not with me")
        if prompt_ids[0] == 8:
            raise EngineError(f"{self.spec.name} is unwell")
        self.began += 1
        try:
            for i in range(params.max_tokens):
                await self.gate.wait()
                await asyncio.sleep(0)
                yield TokenChunk(
                    [50 + len(prompt_ids) + i], [-1.0], "length" if i + 1 == params.max_tokens else None
                )
        finally:
            self.left += 1

    async def pause(self) -> None:
        return

    async def resume(self) -> None:
        return

    async def begin_update(self) -> None:
        return

    async def load(self, part: WeightChunk) -> None:
        await self.load_gate.wait()

    async def sleep(self) -> None:
        return

    async def wake(self) -> None:
        return

    async def end_update(self, version: int) -> str:
        return f"print-{version}"


class Free(Gated):
    """The same engine, which keeps its own weights."""

    syncs_weights = False


def update(version: int) -> WeightSnapshot:
    """Weights without any tensors."""
    part = WeightChunk((TensorInfo("w", (1,), "float32"),), "shm", {"path": ""})
    return WeightSnapshot(version, (part,), None, f"print-{version}", 4, 0.0, Path("unused"))


class Weights:
    def write(self, version: int) -> WeightSnapshot:
        return update(version)

    def close(self) -> None:
        return


def with_pool(test: Any, count: int = 2, make: Any = Free, **options: Any) -> None:
    """Run a test with an open pool, and close the pool."""

    async def run() -> None:
        pool = InferencePool(
            make, tiny_codec(), **{"vocabulary": 100, "context": 100, "max_running": 4, **options}
        )
        await pool.open([ServerSpec(f"e{i}", "unused") for i in range(count)])
        try:
            await test(pool)
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def begun(work: Coroutine[Any, Any, list[Completion]]) -> asyncio.Task[list[Completion]]:
    return asyncio.ensure_future(work)


def tokens(answers: list[Completion]) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers]


def test_the_answers_to_a_prompt_stay_on_one_engine_and_the_next_prompt_goes_to_the_other():
    async def test(pool: InferencePool) -> None:
        both = [begun(sample_group(pool, [5], TWO)), begun(sample_group(pool, [5, 6], TWO))]
        await until(lambda: [replica.engine.began for replica in pool.replicas] == [2, 2])
        assert pool.num_running == pool.num_free == 4
        assert [tokens(await one) for one in both] == [[[51, 52, 53, 54]] * 2, [[52, 53, 54, 55]] * 2]
        assert pool.num_running == 0 and pool.num_free == 8

    with_pool(test)


def test_a_cancelled_request_is_aborted_in_the_engines_and_no_other():
    async def test(pool: InferencePool) -> None:
        (engine,) = (replica.engine for replica in pool.replicas)
        engine.gate.clear()
        first, second = begun(sample_group(pool, [5], TWO)), begun(sample_group(pool, [6], TWO))
        waits = begun(sample_group(pool, [7], TWO))
        await until(lambda: engine.began == 4)
        first.cancel()
        await until(lambda: engine.left == 2 and engine.began == 6)  # the waiting requests have the slots
        engine.gate.set()
        assert len(await second) == len(await waits) == 2 and first.cancelled()
        assert pool.num_free == 4 and pool.take_metrics()["engines/failures"] == 0

    with_pool(test, count=1)


def test_a_slot_of_a_cancelled_request_goes_to_the_next_waiting_one():
    async def test(pool: InferencePool) -> None:
        (engine,) = (replica.engine for replica in pool.replicas)
        engine.gate.clear()
        one = SamplingParams(max_tokens=1)
        has, woken, last = (begun(sample_group(pool, [5], one)) for _ in range(3))
        await until(lambda: engine.began == 1)
        has.cancel()
        await until(lambda: pool.num_free == 1)
        woken.cancel()  # it was already woken for the slot
        await until(lambda: engine.began == 2)
        engine.gate.set()
        assert len(await last) == 1 and woken.cancelled()

    with_pool(test, count=1, max_running=1)


def test_a_refusal_names_the_request():
    async def test(pool: InferencePool) -> None:
        with pytest.raises(
            RefusedError,
            match=r"the prompt has 2 tokens and may get 99 more; need at least one, and at most 100",
        ):
            await sample_group(pool, [5, 6], SamplingParams(max_tokens=99))
        with pytest.raises(
            RefusedError,
            match=r"engine e0 refuses answer \d to a prompt of 1 tokens, with up to 4 more.* not with me",
        ):
            await sample_group(pool, [9], TWO)
        assert [replica.state for replica in pool.replicas] == ["serving"] * 2 and pool.num_running == 0

    with_pool(test)


def test_a_request_that_fails_on_all_engines_raises_and_others_continue():
    async def test(pool: InferencePool) -> None:
        other = begun(sample_group(pool, [5], SamplingParams(max_tokens=40)))
        told = (
            r"answer 0 to a prompt of 2 tokens failed on 9 engines in turn, "
            r"with 0 of at most 4 tokens sampled; the last: e\d+ is unwell"
        )
        with pytest.raises(RuntimeError, match=told):
            await sample_group(pool, [8, 8], SamplingParams(max_tokens=4))
        assert len((await other)[0].token_ids) == 40

    with_pool(test, count=12)


def test_a_request_waits_for_the_weights_of_an_announced_version():
    async def test(pool: InferencePool) -> None:
        early = begun(sample_group(pool, [5], TWO))
        for version in (3, 4):
            await pool.begin_update(version)
            late = begun(sample_group(pool, [6], TWO))
            await asyncio.sleep(0.01)
            assert pool.num_running == pool.num_free == 0
            await pool.sync_weights(update(version))
            assert {v for answer in await late for v in answer.versions} == {version}
        assert {v for answer in await early for v in answer.versions} == {3}

    with_pool(test, make=Gated)


async def begin_on_both(pool: InferencePool, first: int = 5) -> list[asyncio.Task[list[Completion]]]:
    """Two prompts in generation with version 1, one on each engine, whose gates are closed."""
    await pool.begin_update(1)
    await pool.sync_weights(update(1))
    asked = [begun(sample_group(pool, [first, i], TWO)) for i in range(2)]
    await until(lambda: [replica.engine.began for replica in pool.replicas] == [2, 2])
    for replica in pool.replicas:
        replica.engine.gate.clear()
    return asked


def test_interrupted_requests_wait_for_their_own_engine():
    async def test(pool: InferencePool) -> None:
        early, late = (replica.engine for replica in pool.replicas)
        asked = await begin_on_both(pool)
        late.load_gate.clear()
        await pool.begin_update(2)
        spreading = asyncio.ensure_future(pool.sync_weights(update(2)))
        await until(lambda: late.left == 2 and early.began == 4)
        new = begun(sample_group(pool, [6], TWO))  # has no engine yet
        await until(lambda: early.began == 6)
        late.load_gate.set()
        await until(lambda: late.began == 4)
        for engine in (early, late):
            engine.gate.set()
        assert all(
            answer.finish_reason == "length"
            for group in await asyncio.gather(*asked, new)
            for answer in group
        )
        await spreading
        assert early.began == 6 and pool.take_metrics()["engines/moved_answers"] == 0

    with_pool(test, make=Gated, on_update="recompute", max_running=8)


def test_a_request_interrupted_after_its_last_token_is_complete():
    class Late(Gated):
        async def sample(self, prompt_ids: Any, params: SamplingParams) -> AsyncIterator[TokenChunk]:
            self.began += 1
            i = params.sample_index
            yield TokenChunk([50] * (params.max_tokens - i) + [1] * i, [-1.0] * params.max_tokens)
            await self.gate.wait()

    async def test(pool: InferencePool) -> None:
        asked = await begin_on_both(pool)
        await asyncio.sleep(0.01)
        await pool.begin_update(2)
        await pool.sync_weights(update(2))
        reasons = [[answer.finish_reason for answer in await one] for one in asked]
        assert reasons == [["length", "stop"]] * 2 and pool.take_metrics()["engines/recomputed_tokens"] == 0

    with_pool(test, make=Late, on_update="recompute")


@pytest.mark.parametrize("on_update", ["keep", "recompute", "abort"])
def test_requests_of_sleeping_engines_continue_when_they_wake(on_update):
    async def test(pool: InferencePool) -> None:
        asked = await begin_on_both(pool)
        await pool.sleep()
        assert (
            pool.num_running == pool.num_free == 0
            and [replica.state for replica in pool.replicas] == ["stale"] * 2
        )
        for replica in pool.replicas:
            replica.engine.gate.set()
        await pool.begin_update(2)
        await pool.sync_weights(update(2))
        for one in asked:
            for answer in await one:
                assert list(answer.token_ids) == [52, 53, 54, 55] and answer.versions[-1] == 2
                assert (1 in answer.versions) <= (on_update != "abort")
        assert pool.take_metrics()["engines/failures"] == 0

    with_pool(test, make=Gated, on_update=on_update)


def test_a_draining_engine_samples_nothing_with_old_weights_if_requests_are_interrupted():
    async def test(pool: InferencePool) -> None:
        leaving, stays = pool.replicas
        asked = await begin_on_both(pool)
        await pool.remove("e0")
        assert leaving.state == "draining"
        await pool.begin_update(2)
        await pool.sync_weights(update(2))
        await until(lambda: stays.engine.began == 6)
        stays.engine.gate.set()
        assert all(answer.versions[-1] == 2 for group in await asyncio.gather(*asked) for answer in group)
        while leaving.state != "gone":
            await asyncio.sleep(0.01)

    with_pool(test, make=Gated, on_update="recompute")


def test_closing_ends_running_and_waiting_requests():
    async def test(pool: InferencePool) -> None:
        for replica in pool.replicas:
            replica.engine.gate.clear()
        runs = [begun(sample_group(pool, [5], TWO)) for _ in range(6)]
        await until(lambda: pool.num_running == 8)
        await pool.close()
        for one in [*runs, begun(sample_group(pool, [5], TWO))]:
            with pytest.raises(RuntimeError, match="the engines were closed"):
                await one

    with_pool(test)


def test_an_evaluation_and_single_prompts_run_at_the_same_time():
    specs = [ServerSpec(f"e{i}", "unused") for i in range(2)]
    pool = ThreadedInferencePool(
        specs, Gated, tiny_codec(), Weights(), vocabulary=100, context=100, max_running=2
    )
    try:
        publish(pool, 1)
        asked = [asyncio.run_coroutine_threadsafe(sample_group(pool, [5], TWO), pool.loop) for _ in range(20)]
        groups = generate(pool, [[5, 6]] * 20, [TWO] * 20)
        publish(pool, 2)
        assert [tokens(group) for group in groups] == [[[52, 53, 54, 55]] * 2] * 20
        assert [tokens(one.result(20)) for one in asked] == [[[51, 52, 53, 54]] * 2] * 20
        assert pool.take_metrics()["engines/failures"] == 0
    finally:
        pool.close()


def test_a_closed_pool_ends_its_requests():
    pool = ThreadedInferencePool(
        [ServerSpec("e0", "unused")], Gated, tiny_codec(), Weights(), vocabulary=100, context=100
    )
    asked = asyncio.run_coroutine_threadsafe(
        sample_group(pool, [5], TWO), pool.loop
    )  # no weights are ever published
    pool.close()
    assert asked.cancelled() or isinstance(asked.exception(1), RuntimeError)
    assert "engines" not in {thread.name for thread in threading.enumerate()}


def test_a_free_slot_is_found_without_a_scan_of_all_engines():
    looks = []

    def free(replica: Replica) -> int:
        looks.append(replica)
        return replica.num_free

    async def run() -> list[Replica]:
        router = Router(4, free)
        sizes: dict[str, Any] = {
            "max_running": 4,
            "vocabulary": 100,
            "clock": lambda: 0.0,
            "note": lambda _: None,
        }
        replicas = [
            Replica(Free(ServerSpec(f"e{i}", "unused")), on_change=router.update, **sizes)
            for i in range(1000)
        ]
        for replica in replicas:
            await replica.open()
        assert router.num_free == 4000
        looks.clear()
        found = [await router.route(PrefixAffinity())]
        for _ in range(999):
            share = asyncio.ensure_future(found[-1].incarnation.run(asyncio.sleep(3600)))
            await asyncio.sleep(0)
            found.append(await router.route(PrefixAffinity()))
            share.cancel()
        return found

    found = asyncio.run(run())
    assert len(looks) < 4000 and len(set(found)) == 1000
