"""A pool of real servers: its answers, and its requests when servers die, hang, join and leave."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from tests.rollout.pool.pools import (
    changed,
    generate,
    group_of,
    in_background,
    own_logprobs,
    pool_of,
    publish,
    saved,
    specs,
    started,
    waited,
)
from tests.tiny import random_prompts, tiny_policy
from verl.rollout.inference_server import EngineError, ServerSpec, TokenChunk
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.types import WeightChunk

pytestmark = pytest.mark.servers

PROMPTS = random_prompts([3, 11, 2, 6, 4, 5])
LONG = [SamplingParams(max_tokens=200, n=3, seed=i, temperature=1.5) for i in range(6)]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy("llama", initializer_range=0.02)


@pytest.fixture(scope="module")
def model(policy, tmp_path_factory) -> str:
    return saved(policy, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(policy, model, tmp_path_factory):
    made = pool_of(group_of(policy), model, tmp_path_factory.mktemp("pool"), 2)
    yield made
    made.close()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def doomed(policy, model, tmp_path, notes):
    """A pool of two servers, for tests that break them."""
    made = pool_of(group_of(policy), model, tmp_path, 2, notes=notes, timeout_s=3.0)
    yield made
    made.close()


def servers_of(pool) -> list[int]:
    return [replica.engine.pid for replica in pool.replicas]


def check_all_answered(policy, groups, params, version: int) -> None:
    """Assert that each prompt has all answers, complete, with the logprobs of the policy."""
    assert [len(group) for group in groups] == [wanted.n for wanted in params]
    for group, wanted in zip(groups, params, strict=True):
        for c in group:
            assert c.finish_reason in ("stop", "length") and (c.finish_reason == "stop") == (
                c.token_ids[-1] == 1
            )
            assert len(c.token_ids) == len(c.logprobs) == len(c.versions) <= wanted.max_tokens
            assert c.finish_reason == "stop" or len(c.token_ids) == wanted.max_tokens
            assert set(c.versions) == {version}
    prompt, first = PROMPTS[0], groups[0][0]
    assert first.logprobs == pytest.approx(
        own_logprobs(policy, prompt, list(first.token_ids), params[0].temperature), abs=1e-4
    )


def test_a_pool_answers_as_one_engine_and_uses_both_servers(pool, policy):
    params = [SamplingParams(max_tokens=12, n=2, seed=i) for i in range(6)]
    before = [replica.num_served for replica in pool.replicas]
    groups = generate(pool, PROMPTS, params)
    check_all_answered(policy, groups, params, pool.version)
    assert all(replica.num_served > count for replica, count in zip(pool.replicas, before, strict=True))
    again = generate(pool, PROMPTS[::-1], params[::-1])[::-1]
    assert [[c.token_ids for c in group] for group in again] == [
        [c.token_ids for c in group] for group in groups
    ]


def test_answers_after_an_update_are_of_the_new_weights(pool, policy):
    generate(pool, PROMPTS[:1], [SamplingParams(max_tokens=2)])
    changed(policy, seed=1)
    publish(pool, pool.version + 1)
    (group,) = generate(pool, PROMPTS[1:2], [SamplingParams(max_tokens=8, n=4)])
    for c in group:
        assert c.logprobs == pytest.approx(own_logprobs(policy, PROMPTS[1], list(c.token_ids)), abs=1e-4)
        assert set(c.versions) == {pool.version}
    metrics = pool.take_metrics()
    size = sum(p.nbytes for p in policy.transformer.parameters())
    assert (
        metrics["engines/serving"] == 2
        and metrics["engines/sync_bytes"] >= 2 * size
        and metrics["engines/failures"] == 0
    )


def test_running_requests_continue_with_the_new_weights(pool, policy):
    thread, out = in_background(
        pool, PROMPTS[:2], [SamplingParams(max_tokens=240, seed=i, temperature=2.0) for i in range(2)]
    )
    assert waited(lambda: sum(replica.incarnation.num_running for replica in pool.replicas) == 2)
    old = pool.version
    changed(policy, seed=2)
    publish(pool, old + 1)
    thread.join(60)
    for (c,) in out[0]:
        assert set(c.versions) <= {old, old + 1} and list(c.versions) == sorted(c.versions)
    assert any(old + 1 in c.versions for (c,) in out[0])


def test_running_requests_start_again_if_updates_abort_them(pool, policy):
    pool.inference_pool.on_update = "abort"
    try:
        params = [SamplingParams(max_tokens=230, seed=i, temperature=2.0) for i in range(2)]
        thread, out = in_background(pool, PROMPTS[:2], params)
        assert waited(lambda: sum(replica.incarnation.num_running for replica in pool.replicas) == 2)
        changed(policy, seed=4)
        publish(pool, pool.version + 1)
        thread.join(60)
    finally:
        pool.inference_pool.on_update = "keep"
    for prompt, (c,) in zip(PROMPTS, out[0], strict=False):
        # An answer that was complete before the update stays as it was.
        assert set(c.versions) in ({pool.version}, {pool.version - 1})
        if set(c.versions) == {pool.version}:
            assert c.logprobs == pytest.approx(own_logprobs(policy, prompt, list(c.token_ids), 2.0), abs=1e-4)
    assert pool.take_metrics()["engines/failures"] == 0 and all(
        replica.incarnation.num_running == 0 for replica in pool.replicas
    )


class Watched(EmbeddedServer):
    """Counts the tokens that arrive, and keeps old caches after an update."""

    tokens = 0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        async with aclosing(super().sample(prompt_ids, params)) as chunks:
            async for chunk in chunks:
                type(self).tokens += len(chunk.token_ids)
                yield chunk


@pytest.mark.parametrize("on_update", ["keep", "recompute"])
def test_each_token_of_an_answer_over_several_versions_is_of_the_policy_of_its_version(on_update, tmp_path):
    # Deep, so that an answer takes many times as long as an update.
    policy = tiny_policy("llama", initializer_range=0.05, num_hidden_layers=24)
    pool = pool_of(
        group_of(policy),
        saved(policy, tmp_path / "model"),
        tmp_path,
        2,
        make=Watched,
        options={"recompute": False},
    )
    pool.inference_pool.on_update = on_update
    policies: list[dict[str, torch.Tensor]] = []

    def publish_changed(version: int) -> None:
        changed(policy, seed=20 + version)
        policies.append({name: weight.clone() for name, weight in policy.transformer.state_dict().items()})
        publish(pool, version)

    try:
        publish_changed(0)
        thread, out = in_background(
            pool, PROMPTS, [SamplingParams(max_tokens=240, seed=i, temperature=2.0) for i in range(6)]
        )
        for version in range(1, 6):
            seen = Watched.tokens
            assert waited(partial(lambda seen: Watched.tokens > seen or not thread.is_alive(), seen))
            publish_changed(version)
        thread.join(60)
        metrics = pool.take_metrics()
    finally:
        pool.close()
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for prompt, (c,) in zip(PROMPTS, out[0], strict=True):
        assert list(c.versions) == sorted(c.versions) and len(c.versions) == len(c.token_ids)
        for version in set(c.versions):
            policy.transformer.load_state_dict(policies[version])
            own = own_logprobs(policy, prompt, list(c.token_ids), 2.0)
            for i, of in enumerate(c.versions):
                if of == version:
                    gaps[version == c.versions[0]].append(abs(own[i] - c.logprobs[i]))
    assert max(len(set(c.versions)) for (c,) in out[0]) >= 3
    assert max(gaps[True]) < 1e-4
    # With keys and values of older weights, a token is of no policy's distribution.
    assert max(gaps[False]) < 1e-4 if on_update == "recompute" else max(gaps[False]) > 1e-3
    assert (metrics["engines/recomputed_tokens"] > 0) == (on_update == "recompute")
    assert (
        metrics["engines/thrown_tokens"]
        == metrics["engines/moved_answers"]
        == metrics["engines/failures"]
        == 0
    )


def test_a_killed_server_and_a_hung_one_lose_nothing_while_a_third_joins(
    doomed, policy, model, tmp_path, notes
):
    publish(doomed, 5)
    thread, out = in_background(doomed, PROMPTS, LONG)
    assert started(doomed)
    killed, hung = servers_of(doomed)
    os.kill(killed, signal.SIGKILL)
    os.kill(hung, signal.SIGSTOP)
    (third,) = (ServerSpec("third", model, secret="other", log=tmp_path / "third.log", timeout_s=3.0),)
    doomed.add(third)
    thread.join(120)
    assert not isinstance(out[0], Exception), out[0]
    check_all_answered(policy, out[0], LONG, 5)
    assert len({tuple(c.token_ids) for group in out[0] for c in group}) == 18
    metrics = doomed.take_metrics()
    assert metrics["engines/failures"] >= 2 and metrics["engines/moved_answers"] > 0
    assert any("engine-0 failed" in note for note in notes) and any(
        "engine-1 failed" in note for note in notes
    )
    assert waited(lambda: [m.state for m in doomed.replicas] == ["serving"] * 3, 60), [
        (m.state, m.cause) for m in doomed.replicas
    ]
    assert [m.version for m in doomed.replicas] == [5] * 3
    assert not psutil.pid_exists(hung) and not psutil.pid_exists(killed)


def test_migrated_answers_equal_those_of_one_engine(doomed, policy):
    params = [SamplingParams(max_tokens=150, n=2, seed=i, temperature=1.5) for i in range(6)]
    expected = generate(doomed, PROMPTS, params)
    thread, out = in_background(doomed, PROMPTS, params)
    assert started(doomed)
    os.kill(servers_of(doomed)[0], signal.SIGKILL)
    thread.join(120)
    assert [[c.token_ids for c in group] for group in out[0]] == [
        [c.token_ids for c in group] for group in expected
    ]
    assert doomed.take_metrics()["engines/moved_answers"] > 0


class Torn(EmbeddedServer):
    """A server that loses the first part of its first updates on the way, which a real one does not do on
    command.
    """

    losses = 1

    async def load(self, part: WeightChunk) -> None:
        if self.losses and self.spec.name == "engine-1":
            self.losses -= 1
            return
        await super().load(part)


class AlwaysTorn(Torn):
    losses = 1000


def test_a_damaged_update_is_noticed_repaired_and_reported(policy, model, tmp_path, notes):
    pool = pool_of(group_of(policy), model, tmp_path, 2, make=Torn, notes=notes)
    try:
        changed(policy, seed=3)
        publish(pool, 1)
        assert [replica.version for replica in pool.replicas] == [1, 1]
        assert pool.take_metrics()["engines/repaired_updates"] == 1
        assert any("engine-1 did not get version 1 whole" in note for note in notes)
        for group in generate(pool, PROMPTS, [SamplingParams(max_tokens=6)] * 6):
            assert set(group[0].versions) == {1}
    finally:
        pool.close()


def test_an_engine_without_the_weights_never_serves(policy, model, tmp_path, notes):
    pool = pool_of(group_of(policy), model, tmp_path, 2, make=AlwaysTorn, notes=notes)
    try:
        publish(pool, 1)
        assert [replica.state == "serving" for replica in pool.replicas] == [True, False]
        generate(pool, PROMPTS, [SamplingParams(max_tokens=6, n=2)] * 6)
        assert pool.replicas[1].num_served == 0 and pool.replicas[1].version is None
    finally:
        pool.close()


def test_a_removed_engine_finishes_its_requests_first(policy, model, tmp_path):
    pool = pool_of(group_of(policy), model, tmp_path, 2)
    try:
        publish(pool, 0)
        thread, out = in_background(pool, PROMPTS, LONG)
        assert started(pool)
        leaving = servers_of(pool)[0]
        pool.remove("engine-0")
        thread.join(120)
        check_all_answered(policy, out[0], LONG, 0)
        assert waited(lambda: not psutil.pid_exists(leaving))
        assert pool.take_metrics()["engines/moved_answers"] == 0
        with pytest.raises(ValueError, match="need the name of an engine, got 'engine-0'"):
            pool.remove("engine-0")
    finally:
        pool.close()


@pytest.mark.parametrize("via", ["group", "disk", "direct"])
def test_weights_reach_engines_without_shared_memory(via, policy, model, tmp_path):
    pool = pool_of(group_of(policy), model, tmp_path, 1, transport=via)
    try:
        for version in (1, 2):
            changed(policy, seed=10 + version)
            publish(pool, version)
            ((c,),) = generate(pool, PROMPTS[:1], [SamplingParams(max_tokens=5)])
            assert c.logprobs == pytest.approx(own_logprobs(policy, PROMPTS[0], list(c.token_ids)), abs=1e-4)
            assert set(c.versions) == {version}
    finally:
        pool.close()


def test_a_lora_adapter_is_sent_alone(model, tmp_path):
    policy = tiny_policy("llama", initializer_range=0.02)
    group = group_of(policy, lora_rank=4)
    pool = pool_of(group, model, tmp_path, 1)
    try:
        for version in (1, 2):
            changed_additions(policy, version)
            publish(pool, version)
            ((c,),) = generate(pool, PROMPTS[:1], [SamplingParams(max_tokens=5)])
            assert c.logprobs == pytest.approx(own_logprobs(policy, PROMPTS[0], list(c.token_ids)), abs=1e-4)
        assert (
            0
            < pool.take_metrics()["engines/sync_bytes"]
            < sum(p.nbytes for p in policy.transformer.parameters())
        )
    finally:
        pool.close()


def changed_additions(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.transformer.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_servers_that_cannot_start_end_the_pool_with_their_log(policy, tmp_path):
    with pytest.raises((EngineError, ValueError), match="no-such-model"):
        pool_of(group_of(policy), str(tmp_path / "no-such-model"), tmp_path, 1)


def test_a_closed_pool_leaves_no_process_and_no_shared_memory(policy, model, tmp_path):
    pool = pool_of(group_of(policy), model, tmp_path, 1)
    publish(pool, 0)
    pids, memory = servers_of(pool), pool._weights._folder.path
    assert memory.parent == Path("/dev/shm") and list(memory.glob("part-*"))
    pool.close()
    assert not memory.exists() and not any(psutil.pid_exists(pid) for pid in pids)


def test_names_are_unique(pool, model):
    with pytest.raises(ValueError, match="need a name that no engine has, got 'engine-0'"):
        pool.add(specs(model, Path("unused"), 1)[0])
