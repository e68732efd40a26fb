"""Weights from policy ranks directly to servers: what arrives, and failures of a server during a transfer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rollout.pool.pools import generate, own_logprobs, publish, saved, specs, waited
from tests.rollout.ranks import move, moved, policy_ranks
from tests.tiny import random_prompts, tiny_codec, tiny_policy
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.types import WeightChunk

pytestmark = pytest.mark.servers
PROMPTS = random_prompts([3, 11, 2, 6])
SILENCE_S = 4.0


class Doomed(EmbeddedServer):
    """A server that gets a signal during an update."""

    fate: signal.Signals | None = None

    async def load(self, part: WeightChunk) -> None:
        if self.fate is not None and self.spec.name == "engine-1":
            os.kill(self.pid, self.fate)
            type(self).fate = None
        await super().load(part)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Any]:
    """A pool of two servers, two tensor-parallel policy ranks, and the same policy in this process."""
    folder, policy = tmp_path_factory.mktemp("direct"), tiny_policy("llama", initializer_range=0.02)
    model = saved(policy, folder / "model")
    with policy_ranks(model, 2, tensor=2) as group:
        weights = WeightPublisher(group, "float32", folder / "weights", chunk_bytes=20_000, uses_p2p=True)
        sizes: dict[str, Any] = {"vocabulary": 100, "context": 256, "max_running": 8, "wait_s": 60.0}
        given = specs(model, folder, 2, transport="direct", timeout_s=SILENCE_S)
        pool = ThreadedInferencePool(given, Doomed, tiny_codec(), weights, **sizes)
        try:
            yield pool, group, policy
        finally:
            pool.close()


def published(running: Any, version: int) -> float:
    """Change and sync the policy; seconds that the sync took."""
    pool, group, policy = running
    group.call(moved, version)
    move(policy.transformer, version)
    start_s = time.monotonic()
    publish(pool, version)
    return time.monotonic() - start_s


def assert_serves(running: Any, version: int) -> None:
    pool, _, policy = running
    for prompt, (c,) in zip(
        PROMPTS, generate(pool, PROMPTS, [SamplingParams(max_tokens=5)] * 4), strict=True
    ):
        assert set(c.versions) == {version}
        assert list(c.logprobs) == pytest.approx(own_logprobs(policy, prompt, list(c.token_ids)), abs=1e-4)


def test_servers_load_the_weights_that_policy_ranks_send(running):
    pool, _, policy = running
    for version in (1, 2):
        published(running, version)
        assert [replica.state for replica in pool.replicas] == ["serving"] * 2
        assert_serves(running, version)
        num_bytes = sum(parameter.nbytes for parameter in policy.transformer.parameters())
        metrics = pool.take_metrics()
        assert metrics["engines/sync_bytes"] == 2 * num_bytes and metrics["engines/repaired_updates"] == 0


@pytest.mark.parametrize("fate, version", [(signal.SIGKILL, 3), (signal.SIGSTOP, 4)], ids=["dies", "hangs"])
def test_a_server_that_fails_during_a_transfer_ends_neither_policy_nor_other_servers(running, fate, version):
    pool, _, _ = running
    Doomed.fate = fate
    assert published(running, version) < 60
    assert [replica.version for replica in pool.replicas] == [version, None]
    # A restarted server has no weights until the policy can send, which is before the next requests.
    assert waited(lambda: pool.replicas[1].state == "stale", 90), (
        pool.replicas[1].state,
        pool.replicas[1].cause,
    )
    time.sleep(0.3)
    assert pool.replicas[1].state == "stale" and pool.replicas[0].state == "serving"
    assert_serves(running, version)
    assert [replica.version for replica in pool.replicas] == [version] * 2


def test_the_only_server_gets_the_weights_again_when_it_fails_during_a_request(running):
    pool, _, policy = running
    pool.remove("engine-1")
    pid = pool.replicas[0].engine.pid
    os.kill(pid, signal.SIGSTOP)
    assert_serves(running, 4)
    assert pool.replicas[0].engine.pid != pid
