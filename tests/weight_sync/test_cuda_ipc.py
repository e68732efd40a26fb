"""Weights in the memory of a GPU, seen by another process."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

from tests.rollout.pool.pools import changed, generate, group_of, own_logprobs, pool_of, publish, saved
from tests.tiny import random_prompts, tiny_policy
from verl.rollout.actor_worker import ActorWorker
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.cuda_ipc import export_handle
from verl.weight_sync.fingerprint import digest

PROMPTS = random_prompts([3, 7, 1, 5])

_READER = """
import json, sys
import torch
from verl.weight_sync.cuda_ipc import open_handle
from verl.weight_sync.fingerprint import digest
for line in sys.stdin:
    content = open_handle(json.loads(line))
    print(digest(content), flush=True)
    content[:8] = 7
    torch.cuda.synchronize()
    print("written", flush=True)
    del content
"""


@pytest.mark.gpu
def test_another_process_reads_and_shares_the_bytes_of_a_part_of_a_tensor():
    whole = torch.arange(2**20, device="cuda", dtype=torch.int64).view(torch.uint8)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        for part in (whole, whole[4096:8192]):
            expected = digest(part)
            print(json.dumps(export_handle(part)), file=reader.stdin, flush=True)
            assert int(reader.stdout.readline()) == expected
            assert reader.stdout.readline() == "written\n"
            assert part[:8].tolist() == [7] * 8
    finally:
        reader.stdin.close()
        assert reader.wait(60) == 0


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_named():
    handle = export_handle(torch.zeros(16, device="cuda", dtype=torch.uint8)) | {"device": "GPU-none"}
    code = (
        "import json, sys; from verl.weight_sync.cuda_ipc import open_handle; "
        "open_handle(json.loads(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(handle)], capture_output=True, text=True)
    assert done.returncode == 1 and "need the GPU GPU-none for weights in its memory" in done.stderr


@pytest.mark.gpu
def test_servers_on_the_gpu_of_the_policy_read_its_weights_there(tmp_path):
    policy = tiny_policy("llama", initializer_range=0.02)
    model = saved(policy, tmp_path / "model")
    pool = pool_of(
        group_of(policy, device=torch.device("cuda")), model, tmp_path, 2, transport="ipc", policy=policy
    )
    try:
        for version in (1, 2):
            changed(policy, version)
            publish(pool, version)
            here = copy.deepcopy(policy).cpu()
            for prompt, (c,) in zip(
                PROMPTS, generate(pool, PROMPTS, [SamplingParams(max_tokens=5)] * len(PROMPTS)), strict=True
            ):
                assert set(c.versions) == {version}
                assert list(c.logprobs) == pytest.approx(
                    own_logprobs(here, prompt, list(c.token_ids)), abs=1e-3
                )
    finally:
        pool.close()


def test_a_policy_that_is_on_no_gpu_has_none_to_share():
    group = group_of(tiny_policy())
    with pytest.raises(
        ValueError, match="need the policy on a GPU for rollout.weights_via=ipc, it is on cpu; take auto"
    ):
        group.call(ActorWorker.share_weights, [], {}).result()
