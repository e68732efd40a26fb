"""Scripted engines that fail on command, as real servers do by chance."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.pool.pools import generate, publish, waited
from tests.tiny import tiny_codec
from verl.rollout.inference_server import EngineError, InferenceServer, RefusedError, ServerSpec, TokenChunk
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightSnapshot
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.types import TensorInfo, WeightChunk

Sampler = Callable[["Scripted", list[int], SamplingParams], AsyncIterator[TokenChunk]]


async def plain(engine: Scripted, prompt: list[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
    """Tokens 50, 51, ..., which depend on their position alone."""
    for i in range(params.max_tokens):
        await asyncio.sleep(0)
        last = i + 1 == params.max_tokens
        yield TokenChunk([50 + (len(prompt) + i) % 40], [-1.0], "length" if last else None)


class Scripted(InferenceServer):
    """An engine that samples by the `scripts` of its name, one per start; then as `plain`."""

    transports = ("shm",)
    position_seeded = True
    scripts: dict[str, list[Sampler]] = {}
    loads = 0

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self.num_starts = 0
        self.is_open = False

    async def open(self) -> None:
        self.num_starts += 1
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def check(self) -> None:
        if not self.is_open:
            raise EngineError("closed")

    async def sample(self, prompt_ids: Any, params: SamplingParams) -> AsyncIterator[TokenChunk]:
        scripts = self.scripts.get(self.spec.name, [])
        script = scripts[self.num_starts - 1] if self.num_starts <= len(scripts) else plain
        async for chunk in script(self, list(prompt_ids), params):
            yield chunk

    async def pause(self) -> None:
        return

    async def resume(self) -> None:
        return

    async def begin_update(self) -> None:
        return

    async def load(self, part: WeightChunk) -> None:
        type(self).loads += 1

    async def end_update(self, version: int) -> str:
        return f"print-{version}"


class Weights:
    """Publisher of versions without tensors."""

    def write(self, version: int) -> WeightSnapshot:
        part = WeightChunk((TensorInfo("w", (1,), "float32"),), "shm", {"path": ""})
        return WeightSnapshot(version, (part,), None, f"print-{version}", 4, 0.0, Path("unused"))

    def close(self) -> None:
        return


def pool_of(
    count: int = 2, make: Any = Scripted, notes: list[str] | None = None, **options: Any
) -> ThreadedInferencePool:
    specs = [ServerSpec(f"e{i}", "unused") for i in range(count)]
    note = (notes if notes is not None else []).append
    sizes = {"vocabulary": 100, "context": 1000, "max_running": 4, "note": note, **options}
    return ThreadedInferencePool(specs, make, tiny_codec(), Weights(), **sizes)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    Scripted.scripts, Scripted.loads = {}, 0
    monkeypatch.setattr("verl.rollout.pool.supervisor._FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("verl.rollout.pool.inference_pool._CHECK_S", 0.1)


def answers(pool: ThreadedInferencePool, n: int = 4, **params: Any) -> list[Any]:
    return generate(pool, [[5, 6]], [SamplingParams(n=n, **{"max_tokens": 6, **params})])[0]


def ending(error: BaseException, after: int) -> Sampler:
    async def script(
        engine: Scripted, prompt: list[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        async for chunk in plain(engine, prompt, params):
            if after <= 0:
                raise error
            yield chunk
            break
        raise error

    return script


def giving(*chunks: TokenChunk) -> Sampler:
    async def script(
        engine: Scripted, prompt: list[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        for chunk in chunks:
            yield chunk
        raise EngineError("broken off")

    return script


@pytest.mark.parametrize(
    "script",
    [
        ending(EngineError("died"), 1),
        ending(KeyError("a bug of a client"), 1),
        ending(OSError("no route"), 0),
        giving(TokenChunk([52], [-1.0]), TokenChunk([], [], "abort")),
        giving(TokenChunk([52, 53], [-1.0])),
        giving(TokenChunk([52], [float("nan")])),
        giving(TokenChunk([52], [None])),
        giving(TokenChunk([100], [-1.0])),
        giving(TokenChunk(["52"], [-1.0])),
        giving(TokenChunk([52], [0.5])),
        giving(TokenChunk([52] * 7, [-1.0] * 7)),
        giving(TokenChunk([], [], "stop")),
        giving(TokenChunk([52], [-1.0], None, 99)),
    ],
)
def test_an_engine_that_fails_or_gives_garbage_is_restarted_and_its_answers_are_whole(script):
    Scripted.scripts = {"e0": [script]}
    pool = pool_of()
    try:
        for answer in answers(pool):
            assert list(answer.token_ids) == [52, 53, 54, 55, 56, 57] and list(answer.logprobs) == [-1.0] * 6
            assert answer.finish_reason == "length" and set(answer.versions) == {0}
        assert waited(lambda: pool.replicas[0].state == "serving") and pool.replicas[0].engine.num_starts == 2
        assert pool.take_metrics()["engines/failures"] == 1
    finally:
        pool.close()


def test_a_stop_text_that_begins_on_one_engine_ends_the_answer_on_the_next():
    codec = tiny_codec()
    first, second, *rest = codec.encode("xyzw")
    Scripted.scripts = {"e0": [giving(TokenChunk([40, first], [-1.0, -1.0]))]}

    class Other(Scripted):
        async def sample(self, prompt_ids: Any, params: SamplingParams) -> AsyncIterator[TokenChunk]:
            if self.spec.name == "e0" and self.num_starts == 1:
                async for chunk in super().sample(prompt_ids, params):
                    yield chunk
            # One chunk of an engine that does not know of the "x" before.
            yield TokenChunk(
                [second, *rest, *[40] * (params.max_tokens - 3)], [-2.0] * params.max_tokens, "length"
            )

    pool = pool_of(1, Other)
    try:
        (answer,) = answers(pool, 1, max_tokens=40, stop=("xy",))
        assert list(answer.token_ids) == [40, first, second] and answer.finish_reason == "stop"
        assert list(answer.logprobs) == [-1.0, -1.0, -2.0] and len(answer.versions) == 3
    finally:
        pool.close()


def test_streams_that_never_end_are_ended_when_their_engine_fails():
    async def silent(
        engine: Scripted, prompt: list[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        yield TokenChunk([52], [-1.0])
        await asyncio.Event().wait()

    Scripted.scripts = {"e0": [silent]}
    pool = pool_of(1)
    try:
        out: list[Any] = []
        thread = threading.Thread(target=lambda: out.extend(answers(pool)), daemon=True)
        thread.start()
        assert waited(lambda: pool.replicas[0].incarnation.num_running == 4)
        pool.replicas[0].engine.is_open = False  # the next check fails
        thread.join(20)
        assert [list(answer.token_ids) for answer in out] == [[52, 53, 54, 55, 56, 57]] * 4
        assert pool.replicas[0].engine.num_starts == 2 and waited(lambda: pool.replicas[0].num_free == 4)
    finally:
        pool.close()


def test_a_late_error_of_an_earlier_incarnation_is_ignored():
    pool = pool_of(1)
    try:
        answers(pool)
        replica = pool.replicas[0]
        before = replica.incarnation
        pool.loop.call_soon_threadsafe(
            pool.inference_pool._supervisor.fail, replica, before, EngineError("first")
        )
        assert waited(lambda: replica.state == "serving" and replica.engine.num_starts == 2)
        pool.loop.call_soon_threadsafe(
            pool.inference_pool._supervisor.fail, replica, before, EngineError("late")
        )
        time.sleep(0.3)
        assert replica.state == "serving" and replica.engine.num_starts == 2
    finally:
        pool.close()


def test_an_engine_removed_during_its_restart_does_not_come_back(monkeypatch):
    monkeypatch.setattr("verl.rollout.pool.supervisor._FIRST_PAUSE_S", 0.5)
    pool = pool_of()
    try:
        answers(pool)
        replica = pool.replicas[0]
        pool.loop.call_soon_threadsafe(
            pool.inference_pool._supervisor.fail, replica, replica.incarnation, EngineError("died")
        )
        assert waited(lambda: replica.state == "failed")
        pool.remove("e0")
        assert waited(lambda: replica.state == "gone")
        time.sleep(1)
        assert replica.state == "gone" and replica.engine.num_starts == 1 and not replica.engine.is_open
        assert len(answers(pool)) == 4 and replica.num_served <= 4
    finally:
        pool.close()


def test_an_engine_whose_close_fails_is_restarted():
    class Stubborn(Scripted):
        async def close(self) -> None:
            await super().close()
            if self.num_starts == 1:
                raise OSError("no such process")

    Scripted.scripts = {"e0": [ending(EngineError("died"), 1)]}
    notes: list[str] = []
    pool = pool_of(1, Stubborn, notes=notes)
    try:
        assert [list(answer.token_ids) for answer in answers(pool)] == [[52, 53, 54, 55, 56, 57]] * 4
        assert any("engine e0 could not be ended: OSError: no such process" in note for note in notes)
    finally:
        pool.close()


def test_an_engine_that_keeps_failing_is_given_up_and_the_last_one_ends_the_run(monkeypatch):
    monkeypatch.setattr("verl.rollout.pool.supervisor._LONGEST_PAUSE_S", 0.05)
    Scripted.scripts = {"e0": [ending(EngineError("never well"), 0)] * 20}
    notes: list[str] = []
    pool = pool_of(1, notes=notes)
    try:
        with pytest.raises(RuntimeError, match=r"no engine serves version 0 .* \(e0 gone: never well\)"):
            answers(pool, 1)
        assert any("given up after 6 failures" in note for note in notes)
    finally:
        pool.close()


def test_an_update_waits_for_an_engine_that_loads_the_version_before():
    gate = threading.Event()

    class Slow(Scripted):
        async def load(self, part: WeightChunk) -> None:
            await super().load(part)
            if self.spec.name == "late":
                await asyncio.to_thread(gate.wait, 10)

    pool = pool_of(1, Slow)
    try:
        publish(pool, 1)
        pool.add(ServerSpec("late", "unused"))
        assert waited(lambda: pool.replicas[-1].sync_lock.locked())
        thread = threading.Thread(target=publish, args=(pool, 2), daemon=True)
        thread.start()
        time.sleep(0.2)
        assert pool.inference_pool.snapshot is None and thread.is_alive()
        gate.set()
        thread.join(20)
        assert [replica.version for replica in pool.replicas] == [2, 2] and pool.take_metrics()[
            "engines/failures"
        ] == 0
    finally:
        pool.close()


def test_the_same_version_with_other_weights_is_sent_again():
    pool = pool_of(1)
    try:
        publish(pool, 1)
        publish(pool, 1)
        assert Scripted.loads == 2
    finally:
        pool.close()


class Counted(deque):
    """A queue that counts how often a request began to wait."""

    waits = 0

    def append(self, waiting: Any) -> None:
        self.waits += 1
        super().append(waiting)


def test_a_waiting_request_is_woken_for_a_free_slot_and_not_for_every_change():
    pool = pool_of(2, max_running=8)
    pool.inference_pool._router._waiting = Counted()
    try:
        groups = generate(pool, [[5, 6]] * 500, [SamplingParams(n=4, max_tokens=2)] * 500)
        assert [len(group) for group in groups] == [4] * 500
        assert 2000 - 16 <= pool.inference_pool._router._waiting.waits < 2 * 2000
    finally:
        pool.close()


@pytest.mark.parametrize("on_update", ["keep", "recompute", "abort"])
def test_running_requests_are_kept_recomputed_or_aborted_at_an_update(on_update):
    aborted = []

    async def slow(engine: Scripted, prompt: list[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        try:
            async for chunk in plain(engine, prompt, params):
                yield chunk
                if len(prompt) == 2 and chunk.token_ids[0] == 54 and engine.loads == 1:
                    stops.append(prompt)
                    while engine.loads == 1:
                        await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            aborted.append(prompt)
            raise

    stops: list[list[int]] = []
    Scripted.scripts = {"e0": [slow]}
    pool = pool_of(1, on_update=on_update)
    try:
        publish(pool, 0)
        out: list[Any] = []
        thread = threading.Thread(target=lambda: out.extend(answers(pool)), daemon=True)
        thread.start()
        assert waited(lambda: len(stops) == 4)
        publish(pool, 1)
        thread.join(20)
        metrics = pool.take_metrics()
        assert [list(answer.token_ids) for answer in out] == [[52, 53, 54, 55, 56, 57]] * 4
        counts = (len(aborted), metrics["engines/thrown_tokens"], metrics["engines/recomputed_tokens"])
        versions, expected = {
            "keep": ([0, 0, 0, 1, 1, 1], (0, 0, 0)),
            "recompute": ([0, 0, 0, 1, 1, 1], (4, 0, 4 * (2 + 3))),
            "abort": ([1] * 6, (4, 12, 0)),
        }[on_update]
        assert [list(answer.versions) for answer in out] == [versions] * 4 and counts == expected
        assert metrics["engines/moved_answers"] == metrics["engines/failures"] == 0
    finally:
        pool.close()


def test_a_refused_request_raises_and_no_engine_is_restarted():
    Scripted.scripts = {
        "e0": [ending(RefusedError("too long for me"), 0)],
        "e1": [ending(RefusedError("too long for me"), 0)],
    }
    pool = pool_of()
    try:
        with pytest.raises(ValueError, match="too long for me"):
            answers(pool)
        assert [replica.state for replica in pool.replicas] == ["serving"] * 2
    finally:
        pool.close()


@pytest.mark.parametrize("sleeps", [False, True])
def test_servers_that_share_devices_sleep_during_training_and_wake_for_the_next_weights(sleeps):
    calls: list[str] = []

    class Sleepy(Scripted):
        async def sleep(self) -> None:
            calls.append("sleep")

        async def wake(self) -> None:
            calls.append("wake")

        async def begin_update(self) -> None:
            calls.append("update")

    pool = pool_of(1, Sleepy, sleeps=sleeps)
    try:
        answers(pool)
        pool.sleep()
        assert pool.replicas[0].state == ("stale" if sleeps else "serving")
        publish(pool, 1)
        assert calls == (["update", "sleep", "wake", "update"] if sleeps else ["update", "update"])
        assert {version for answer in answers(pool) for version in answer.versions} == {1}
    finally:
        pool.close()
