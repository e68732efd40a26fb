"""Two real servers of vLLM that follow a policy: one is killed, one hangs, a third joins, and nothing is
lost.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.rollout.pool.pools import (
    changed,
    group_of,
    in_background,
    own_logprobs,
    pool_of,
    publish,
    saved,
    started,
    waited,
)
from tests.rollout.vllm.bench import counted
from tests.tiny import random_prompts, tiny_policy
from verl.rollout.inference_server import ServerSpec
from verl.rollout.vllm.server import VLLMServer
from verl.utils.sampling_types import SamplingParams

pytestmark = pytest.mark.vllm
PROMPTS = random_prompts([3, 11, 2, 6])


def test_a_killed_server_and_a_hung_one_lose_nothing_while_a_third_joins(tmp_path, monkeypatch):
    # Plugins of other packages beside vLLM are none of ours.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    policy = tiny_policy(
        "llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.02
    )
    model, options = saved(policy, tmp_path / "model"), {"max_model_len": 256}
    pool = pool_of(group_of(policy), model, tmp_path, 2, make=VLLMServer, options=options, timeout_s=15.0)
    try:
        for version in (1, 2):
            changed(policy, seed=version)
            publish(pool, version)
        params = [SamplingParams(max_tokens=240, n=8, seed=i, temperature=1.5) for i in range(4)]
        thread, out = in_background(pool, PROMPTS, params)
        assert started(pool)
        assert waited(
            lambda: all(
                pool.run(counted(replica.engine, "vllm:generation_tokens_total")) > 20
                for replica in pool.replicas
            )
        )
        killed, hung = (replica.engine._process.pid for replica in pool.replicas)
        os.killpg(killed, signal.SIGKILL)
        os.killpg(hung, signal.SIGSTOP)
        pool.add(
            ServerSpec("third", model, options, secret="other", log=tmp_path / "third.log", timeout_s=15.0)
        )
        thread.join(400)
        assert out and not isinstance(out[0], Exception), out or [
            (m.name, m.state, m.cause) for m in pool.replicas
        ]
        groups = out[0]
        assert [len(group) for group in groups] == [8] * 4
        assert len({tuple(c.token_ids) for group in groups for c in group}) == 32
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for c in group:
                assert len(c.token_ids) == len(c.logprobs) == len(c.versions) and set(c.versions) == {2}
                assert (c.finish_reason == "stop") == (c.token_ids[-1] == 1) and (
                    c.finish_reason == "stop" or len(c.token_ids) == 240
                )
                # Also of an answer that one server began and another one ended: all of it is of the policy.
                assert list(c.logprobs) == pytest.approx(
                    own_logprobs(policy, prompt, list(c.token_ids), 1.5), abs=1e-3
                )
        metrics = pool.take_metrics()
        assert (
            metrics["engines/failures"] >= 2
            and metrics["engines/moved_answers"] > 0
            and metrics["engines/kept_tokens"] > 0
        )
    finally:
        pool.close()
