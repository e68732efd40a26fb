"""Weights in the memory of a GPU, seen by another process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from verl.rollout.device_memory import handle_of
from verl.rollout.fingerprint import digest

pytestmark = pytest.mark.gpu

_READER = """
import json, sys
import torch
from verl.rollout.device_memory import opened
from verl.rollout.fingerprint import digest
for line in sys.stdin:
    content = opened(json.loads(line))
    print(digest(content), flush=True)
    content[:8] = 7
    torch.cuda.synchronize()
    print("written", flush=True)
    del content
"""


def test_another_process_reads_and_shares_the_bytes_of_a_part_of_a_tensor():
    whole = torch.arange(2**20, device="cuda", dtype=torch.int64).view(torch.uint8)
    reader = subprocess.Popen([sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for part in (whole, whole[4096:8192]):
            expected = digest(part)
            print(json.dumps(handle_of(part)), file=reader.stdin, flush=True)
            assert int(reader.stdout.readline()) == expected
            assert reader.stdout.readline() == "written\n"
            assert part[:8].tolist() == [7] * 8
    finally:
        reader.stdin.close()
        assert reader.wait(60) == 0


def test_a_gpu_that_is_not_there_is_named():
    handle = handle_of(torch.zeros(16, device="cuda", dtype=torch.uint8)) | {"device": "GPU-none"}
    code = "import json, sys; from verl.rollout.device_memory import opened; opened(json.loads(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(handle)], capture_output=True, text=True)
    assert done.returncode == 1 and "need the GPU GPU-none for weights in its memory" in done.stderr
